"""Run folders as commands leave them, and a client that sends to the application exactly what it is told."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from starlette.applications import Starlette

from openwork.web.app import create
from openwork.web.places import run_id
from tests.report.conftest import HOSTILE, hostile, make

Results = dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """What came back."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode("utf-8")


def ask(
    app: Starlette,
    address: str,
    *,
    method: str = "GET",
    host: str | None = "localhost",
    headers: Sequence[tuple[bytes, bytes]] = (),
) -> Answer:
    """Send a request as a server would that does not tidy the address: dots and slashes arrive as they are."""
    path, _, query = address.partition("?")
    given = [*([(b"host", host.encode("latin-1"))] if host is not None else []), *headers]
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http",
        "path": unquote(path, errors="replace"), "raw_path": path.encode("utf-8", "replace"),
        "query_string": query.encode("utf-8", "replace"),
        "root_path": "", "headers": given, "server": ("127.0.0.1", 8642), "client": ("127.0.0.1", 50000), "state": {},
    }  # fmt: skip
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(app(scope, receive, send))
    start = next(message for message in sent if message["type"] == "http.response.start")
    found = {name.decode().lower(): value.decode("latin-1") for name, value in start["headers"]}
    return Answer(start["status"], found, b"".join(message.get("body", b"") for message in sent[1:]))


def key_of(arm: str, seed: int) -> str:
    """Return a trial key as the lab makes them: 24 hexadecimal digits."""
    return hashlib.sha256(f"{arm}\0{seed}".encode("utf-8", "surrogatepass")).hexdigest()[:24]


def keyed(results: Results) -> Results:
    """Return results whose trials have keys such as the lab's."""
    return {**results, "trials": [{**t, "key": key_of(t["arm"], t["seed"])} for t in results["trials"]]}


def write_run(folder: Path, results: Results | None, *, trials: int = 0, log: str = "") -> Path:
    """Write a run folder with the results and, of its first `trials` trials, their own folders; return it resolved."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "trials").mkdir(exist_ok=True)
    if results is not None:
        (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
        for trial in results["trials"][:trials]:
            place = folder / "trials" / trial["key"]
            place.mkdir(exist_ok=True)
            arm = {
                "name": trial["arm"],
                "settings": {"method": trial["arm"]},
                "method": trial["arm"],
                "density": 0.1,
                "note": "",
            }
            spec = {"study": "compare", "config": results["recipe"], "content": {}, "arm": arm, "seed": trial["seed"],
                    "identity": {"torch": "2.13.0", "threads": 1}, "key": trial["key"]}  # fmt: skip
            (place / "spec.json").write_text(json.dumps(spec), encoding="utf-8")
            (place / "result.json").write_text(json.dumps(trial), encoding="utf-8")
            (place / "log.txt").write_bytes(log.encode("utf-8", "surrogatepass"))
    return folder.resolve()


def small(name: str = "resnet20 on cifar10", **options: Any) -> Results:
    """Return results of two methods at two densities with three seeds."""
    return keyed(make(**{"methods": ("random", "rigl"), "densities": (0.1, 0.05), "seeds": 3, "name": name, **options}))


def hostile_run(kind: str = "study") -> Results:
    """Return results in which every name is hostile, with keys as the lab's; arms stay apart by their seeds."""
    made = keyed(hostile(kind))
    for trial in made["trials"]:
        trial["curves"] = {HOSTILE["script"]: [[0, 1.0], [1, 0.5]], HOSTILE["template"]: [[0, 1.0], [1, 0.5]]}
        trial["metrics"] = {**trial["metrics"], HOSTILE["quotes"]: 1.0}
        trial["details"] = {HOSTILE["nul"]: HOSTILE["script"]}
    return made


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A folder with a comparison, a study that lost a seed, and an older comparison of other settings."""
    folder = tmp_path / "runs"
    first = small()
    first["recipe"].update(model="resnet20", data="cifar10")
    write_run(folder / "compare", first, trials=20, log="step 1\nstep 2\n")
    study = small("rigl", kind="study", lost=[("rigl@0.05", 1, "diverged")])
    write_run(folder / "deep" / "study", study, trials=3)
    other = small(seeds=4)
    other["recipe"].update(model="mlp", data="digits", seeds=4)
    other["environment"]["date"] = "2025-01-02 03:04 UTC"
    write_run(folder / "other", other)
    return folder


@pytest.fixture
def app(runs: Path) -> Starlette:
    """The application over `runs`, looking at the folders at every page."""
    return over(runs)


def over(*folders: Path, **options: Any) -> Starlette:
    """Return the application over some folders, looking at them at every page."""
    made = create(folders, **options)
    made.state.index.fresh = 0.0
    return made


def ids(app: Starlette) -> list[str]:
    """Return the ids in the order of the first page."""
    return re.findall(r'name="run" value="([0-9a-f]{16})"', ask(app, "/").text)


def id_of(folder: Path) -> str:
    """Return the id of a run folder."""
    return run_id(folder.resolve())


@pytest.fixture(autouse=True)
def own_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep index and list of runs in a folder of the test's own."""
    monkeypatch.setenv("OPENWORK_CACHE", str(tmp_path / "cache"))
