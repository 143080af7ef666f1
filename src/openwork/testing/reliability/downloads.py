"""R36: a download from a server that cuts, alters, drips, hangs up, refuses or leads away leaves no part of a file."""

from __future__ import annotations

import contextlib
import hashlib
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from openwork.data import download
from openwork.data.entry import File
from openwork.testing import faults
from openwork.testing.reliability import _children
from openwork.testing.reliability._rows import Measured, Part, Parts, Scale, complaints, total

BODY = bytes(range(256)) * 1000


@dataclass(frozen=True)
class Answer:
    """One answer of a bad server: status, body, announced length (None: the true one), pause a kilobyte, redirect."""

    status: int = 200
    body: bytes = BODY
    length: int | None = None
    drip: float = 0.0
    location: str = ""


GOOD = Answer()
CUT = Answer(body=BODY[:-1000], length=len(BODY))
CASES: dict[str, tuple[tuple[Answer, ...], bool]] = {
    "whole": ((GOOD,), True),
    "truncated": ((CUT,), False),
    "truncated, then whole": ((CUT, CUT, GOOD), True),
    "altered": ((Answer(body=BODY[:-1] + b"!"),), False),
    "altered in one bit": ((Answer(body=bytes([BODY[0] ^ 1]) + BODY[1:]),), False),
    "longer": ((Answer(body=BODY * 3),), False),
    "slow": ((Answer(drip=0.001),), True),
    "not found": ((Answer(404, b"no such file"),), False),
    "an error page in place of the file": ((Answer(body=b"<html>busy</html>"),), False),
    "busy, then whole": ((Answer(503, b""), GOOD), True),
    "a redirect to http": ((Answer(302, b"", location="http://example.org/set.gz"),), False),
    "a redirect on the same host": ((Answer(302, b"", location="/elsewhere"), GOOD), True),
}
"""What the server answers in turn, the last again and again, and whether the file is had in the end."""


@contextlib.contextmanager
def serving(*answers: Answer) -> Iterator[str]:
    """Yield the address of a server on this machine that gives these answers in turn."""
    asked = 0

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            nonlocal asked
            answer = answers[min(asked, len(answers) - 1)]
            asked += 1
            self.send_response(answer.status)
            if answer.location:
                self.send_header("Location", answer.location)
            self.send_header("Content-Length", str(len(answer.body) if answer.length is None else answer.length))
            self.end_headers()
            with contextlib.suppress(OSError):
                size = 1024 if answer.drip else max(1, len(answer.body))
                for start in range(0, len(answer.body), size):
                    self.wfile.write(answer.body[start : start + size])
                    time.sleep(answer.drip)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def known(address: str) -> File:
    """Return what is registered of the file: its checksum and size."""
    return File("set.gz", (address,), hashlib.sha256(BODY).hexdigest(), "", len(BODY))


def fetched(name: str) -> Part:
    """Download from a server that answers as the case says, and look at what stands under the final name."""
    answers, good = CASES[name]
    wrong = []
    with _children.folder() as folder, serving(*answers) as address:
        try:
            download.fetch(known(address), folder / "set", attempts=3, pause=0)
            had = True
        except download.Failure:
            had = False
        path = folder / "set" / "set.gz"
        if had != good:
            wrong.append("the file is had although it is wrong" if had else "the file is not had in the end")
        if path.exists() and path.read_bytes() != BODY:
            wrong.append("a part of a file stands under its final name")
        left = [one.name for one in (folder / "set").iterdir() if one != path] if (folder / "set").exists() else []
        wrong += [f"{one} is left over" for one in left]
    return {"cases": 1, "wrong": wrong}


_PROGRAM = """
import sys
from openwork.data import download
from openwork.data.entry import File
print("ready", flush=True)
download.fetch(File("set.gz", (sys.argv[1],), sys.argv[2], "", int(sys.argv[3])), Path(sys.argv[4]), pause=0)
"""


def interrupted(kills: int) -> Part:
    """Kill the process that downloads at random moments; the next call gets the file."""
    wrong = []
    for seed in range(kills):
        with _children.folder() as folder, serving(Answer(drip=0.002), GOOD) as address:
            file = known(address)
            words = [sys.executable, "-c", _PROGRAM, address, file.sha256, str(file.size), str(folder)]
            child = subprocess.Popen(words, env=_children.environment(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            assert child.stdout is not None
            with child.stdout:
                child.stdout.readline()
                faults.kill_at_random(child, within=(0.0, 0.9), seed=seed)
            path = folder / "set.gz"
            if path.exists() and path.read_bytes() != BODY:
                wrong.append(f"kill {seed}: a part of a file stands under its final name")
            if download.fetch(file, folder, pause=0).read_bytes() != BODY:
                wrong.append(f"kill {seed}: the next call does not get the file")
    return {"cases": kills, "wrong": wrong}


def _downloads(scale: Scale) -> Parts:
    cases: Parts = {name: partial(fetched, name) for name in CASES}
    return {**cases, "killed": partial(interrupted, 20)} if scale == "long" else cases


def _judge_downloads(found: Mapping[str, Part]) -> Measured:
    bad = sum(len(part["wrong"]) for part in found.values())
    value = f"{total(found, 'cases') - bad} of {total(found, 'cases')} bad downloads refused or resumed, no part left"
    return Measured(value, bad == 0, complaints(found))


DOWNLOADS = _downloads, _judge_downloads
