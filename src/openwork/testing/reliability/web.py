"""R19, R20: the local page refuses foreign hosts and paths, escapes everything, and listens on loopback only."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from openwork.lab import sweep
from openwork.lab.store import write_result
from openwork.testing import faults
from openwork.testing.reliability import _children, _trials
from openwork.testing.reliability._rows import Measured, Part, Parts, Scale, complaints, total

HOSTS = (
    "evil.example",
    "127.0.0.1.evil.example",
    "localhost.evil.example",
    "0.0.0.0",
    "10.0.0.1:8642",
    "",
    "[::2]",
    "a@localhost",
)
CONTROLS = ("\x1b[31m", "\0", "\N{RIGHT-TO-LEFT OVERRIDE}")
MARKS = ("<script>alert(1)", "<img src=x", "</script><!--", *CONTROLS)
"""What must not stand in a page as it is; in a table of text, markup is text and controls are not."""
_UPS = ("../", "..\\", "%2e%2e/", "..%2f", "%2e%2e%2f", "..%5c", "....//", "%252e%252e%252f", ".%2e/", "%c0%ae%c0%ae/")
TRAVERSALS = [
    *(f"/runs/{up * depth}{target}" for up in _UPS for depth in (1, 8) for target in ("etc/passwd", "results.json")),
    *(f"/{up * 6}etc/passwd" for up in _UPS),
    "/runs//etc/passwd", "/runs/%2fetc%2fpasswd", "/runs/file:%2f%2f%2fetc%2fpasswd", "/runs/C:%5cwindows%5cwin.ini",
    "/runs/results.json%00.html", "/style.css/../../../../etc/passwd", "/runs/~root/.ssh/id_rsa", "//etc/passwd",
]  # fmt: skip


def ask(app: Any, address: str, host: str | None = "localhost", method: str = "GET") -> tuple[int, str, str]:
    """Send a request to an application exactly as it is written; return status, body, and its kind as the header says."""
    path, _, query = address.partition("?")
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http",
        "path": unquote(path, errors="replace"), "raw_path": path.encode("ascii", "replace"),
        "query_string": query.encode("ascii", "replace"), "root_path": "", "server": ("127.0.0.1", 80),
        "client": ("127.0.0.1", 5), "state": {}, "headers": [] if host is None else [(b"host", host.encode("latin-1"))],
    }  # fmt: skip
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(app(scope, receive, send))
    start = next(one for one in sent if one["type"] == "http.response.start")
    kinds = [value.decode("latin-1") for name, value in start["headers"] if name.lower() == b"content-type"]
    body = b"".join(one.get("body", b"") for one in sent).decode("utf-8", "replace")
    return int(start["status"]), body, kinds[0] if kinds else ""


def hostile_run(folder: Path) -> Path:
    """Write a run folder whose arms, errors and details bear the hostile names, and return it."""
    from openwork.report import html

    names = [name for kind, name in faults.hostile_names().items() if kind != "lone surrogate"]
    made = sweep.plan(_trials.STUDY, _trials.STUDY.preset("smoke", ways=tuple(names)), folder)
    for k, trial in enumerate(made.trials):
        good = {"status": "ok", "error": None, "metrics": {"accuracy": 0.5 + k / 100}}
        bad = {"status": "failed", "error": trial.arm.name, "metrics": {}}
        layers = {trial.arm.name: {"kept": 1, "total": 2, "shape": [2]}}
        name = trial.arm.name
        shown = {"curves": {name: [[0, 1.0]]}, "layers": layers, "details": {"data": name}}
        made.results[trial.key] = {"key": trial.key, "arm": name, "seed": 0, **shown, **(good if k % 3 else bad)}
        place = made.store.begin(trial)
        write_result(place, made.results[trial.key])
        (place / "log.txt").write_bytes(trial.arm.name.encode("utf-8", "replace"))
    found = sweep.results(made)
    sweep.write(made, found)
    html.write_report(found, folder / "report.html", None)
    return folder


def pages(most: int) -> Part:
    """Read every page that can be reached from the first one, and the report; nothing hostile may stand there as it is."""
    from openwork.web.app import create

    with _children.folder() as outer:
        folder = hostile_run(outer / "runs" / "hostile")
        app = create([outer / "runs"])
        texts = {"report.html": (folder / "report.html").read_text(encoding="utf-8")}
        tables = set[str]()
        waiting, wrong = ["/"], list[str]()
        while waiting and len(texts) < most:
            address = waiting.pop(0)
            if address in texts:
                continue
            status, texts[address], kind = ask(app, address)
            tables |= {address} if kind.startswith("text/csv") else set()
            wrong += [f"{address} answers {status}"] if status not in (200, 404) else []
            found = re.findall(r'(?:href|src)="(/[^"]*)"', texts[address])
            waiting += [one.replace("&amp;", "&") for one in found if "style" not in one]
        for address, text in texts.items():
            wrong += [f"{address} holds {mark!r}" for mark in (CONTROLS if address in tables else MARKS) if mark in text]
            if address in tables:
                wrong += [f"{address} holds a formula" for line in text.splitlines() if re.match(r'"?[=+@\t]', line)]
    return {"cases": len(texts), "wrong": wrong}


def strangers() -> Part:
    """Ask under foreign host names, for paths outside, and by methods that write."""
    from openwork.web.app import create

    with _children.folder() as folder:
        app = create([folder])
        wrong = [f"Host {host!r} is answered {ask(app, '/', host)[0]}" for host in HOSTS if ask(app, "/", host)[0] != 400]
        wrong += ["a request without Host is answered"] if ask(app, "/", None)[0] != 400 else []
        for address in TRAVERSALS:
            status, text, _ = ask(app, address)
            wrong += [f"{address} is answered {status}"] if status != 404 or "root:" in text else []
        for kind, name in faults.hostile_names().items():
            status, text, _ = ask(
                app, f"/runs/{quote(name[:500], safe='', errors='replace')}?text={quote(name[:500], errors='replace')}"
            )
            wrong += [f"a run called {kind} is answered {status}"] if status != 404 else []
            wrong += [f"the answer to {kind} holds {mark!r}" for mark in MARKS if mark in text]
        wrong += [f"{method} is answered" for method in ("POST", "PUT", "DELETE") if ask(app, "/", method=method)[0] != 405]
    return {"cases": len(HOSTS) + 1 + len(TRAVERSALS) + len(faults.HOSTILE) + 3, "wrong": wrong}


def _pages(scale: Scale) -> Parts:
    return {"pages": partial(pages, 400 if scale == "long" else 16), "strangers": strangers}


def _judge_pages(found: Mapping[str, Part]) -> Measured:
    bad = sum(len(part["wrong"]) for part in found.values())
    value = (
        f"{bad} of {total(found, 'cases')}: {len(HOSTS) + 1} foreign hosts, {len(TRAVERSALS)} traversals, "
        f"{len(faults.HOSTILE)} hostile names, {found['pages']['cases']} pages"
    )
    return Measured(value, bad == 0, complaints(found))


def listening(*words: str) -> Part:
    """Start `openwork serve` and read from the system at which addresses the process listens."""
    with _children.folder() as folder:
        command = [sys.executable, "-m", "openwork", "serve", str(folder), "--port", "0", *words]
        child = subprocess.Popen(
            command, env=_children.environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert child.stdout is not None
        with child.stdout:
            told = ""
            for line in child.stdout:
                told += line
                if "http://" in line:
                    break
            found = sorted(_addresses(child.pid)) if "http://" in told else []
            child.send_signal(signal.SIGINT)
            try:
                ended = child.wait(30) == 0
            except subprocess.TimeoutExpired:
                ended = False
                child.kill()
                child.wait()
    return {"cases": 1, "addresses": found, "token": "token=" in told, "told": told[-300:], "ended": ended}


def _addresses(pid: int) -> set[str]:
    """Return the addresses at which a process accepts connections, as Linux tells them."""
    own = set()
    for one in Path(f"/proc/{pid}/fd").iterdir():
        match = re.fullmatch(r"socket:\[(\d+)\]", os.readlink(one)) if one.is_symlink() else None
        own |= {match[1]} if match else set()
    found = set()
    for table in ("tcp", "tcp6"):
        place = Path(f"/proc/{pid}/net/{table}")
        for line in place.read_text(encoding="ascii").splitlines()[1:] if place.exists() else ():
            fields = line.split()
            if fields[3] == "0A" and fields[9] in own:
                raw = bytes.fromhex(fields[1].partition(":")[0])
                words = [raw[k : k + 4][::-1] for k in range(0, len(raw), 4)]
                found.add(str(ipaddress.ip_address(b"".join(words))))
    return found


def _listens(scale: Scale) -> Parts:
    parts: Parts = {"by default": partial(listening)}
    return {**parts, "everywhere": partial(listening, "--host", "0.0.0.0")} if scale == "long" else parts


def _judge_listens(found: Mapping[str, Part]) -> Measured:
    part = found["by default"]
    addresses = part["addresses"]
    local = bool(addresses) and all(ipaddress.ip_address(one).is_loopback for one in addresses)
    other = found.get("everywhere")
    guarded = other is None or (other["token"] and not part["token"])
    value = f"listens at {', '.join(addresses) or 'no address'} by default"
    value += "" if other is None else f"; at other addresses {'with' if other['token'] else 'without'} a token"
    value += "" if all(one["ended"] for one in found.values()) else "; Ctrl-C does not end it"
    return Measured(value, local and guarded and all(one["ended"] for one in found.values()), "" if local else part["told"])


PAGES = _pages, _judge_pages
BIND = _listens, _judge_listens
