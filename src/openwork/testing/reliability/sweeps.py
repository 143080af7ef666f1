"""R21, R22, R23, R36: sweeps and downloads that go wrong cost what went wrong, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from openwork.errors import StoreError
from openwork.lab import sweep
from openwork.lab.store import read_result
from openwork.testing import faults
from openwork.testing.reliability import _children, _trials
from openwork.testing.reliability._rows import Measured, Part, Parts, Scale, complaints, none_wrong

ENDS = {"ok": "ok", "killed": "killed", "hangs": "timeout", "raises": "failed", "memory": "failed"}


def survived(numbers: Mapping[str, int], workers: int, timeout: float) -> Part:
    """Run so many trials of each kind, then the same sweep again: what failed ends well, what was good is not run."""
    ways = tuple(f"{way} {k}" for way, count in numbers.items() for k in range(count))
    with _children.folder() as folder:
        first, _ = _swept(folder, ways, workers, timeout)
        got = {r["arm"]: (r["status"], str(r["error"])) for r in first.results.values()}
        second, ended = _swept(folder, ways, workers, None)
    wrong = [
        f"{way} ended as {got.get(way)}" for way in ways if got.get(way, ("",))[0] != ENDS[way.partition(" ")[0]]
    ]  # fmt: skip
    wrong += [f"{way} does not say why: {error}" for way, (_, error) in got.items() if not _explained(way, error)]
    missing = sorted(way for way in ways if not way.startswith("ok "))
    if sorted(ended) != missing:
        wrong.append(f"the second call ran {len(ended)} trials, not the {len(missing)} that were missing")
    wrong += [f"{r['arm']} did not end well the second time: {r['error']}" for r in second.results.values() if r["error"]]
    return {"cases": len(ways), "wrong": wrong, "ended": dict(Counter(status for status, _ in got.values()))}


def _swept(folder: Path, ways: tuple[str, ...], workers: int, timeout: float | None, **more: Any) -> Any:
    made = sweep.plan(_trials.STUDY, _trials.STUDY.preset("smoke", ways=ways, **more), folder)
    ended: list[str] = []
    sweep.run(made, workers=workers, timeout=timeout, done=lambda trial, _result: ended.append(trial.arm.name))
    return made, ended


def _explained(way: str, error: str) -> bool:
    words = {"killed": "SIGKILL", "hangs": "--timeout", "raises": "a plain bug", "memory": "memory"}
    return words.get(way.partition(" ")[0], "") in error


def _survivals(scale: Scale) -> Parts:
    if scale == "long":
        numbers = {"ok": 78, "killed": 10, "hangs": 5, "raises": 5, "memory": 2}
        return {"sweep": partial(survived, numbers, 4, 20.0)}
    return {"sweep": partial(survived, {"ok": 3, "killed": 1, "hangs": 1, "raises": 1, "memory": 1}, 4, 6.0)}


def _judge_survivals(found: Mapping[str, Part]) -> Measured:
    part = found["sweep"]
    ended = ", ".join(f"{count} {status}" for status, count in sorted(part.get("ended", {}).items()))
    bad = none_wrong(found, "trials are lost or labelled wrongly")
    return Measured(f"{bad.value}: {ended}; then all well", bad.passed, bad.detail)


def sweep_slowly(folder: str) -> None:
    """Run a sweep of slow trials; to be killed."""
    _swept(Path(folder), tuple(f"ok {k}" for k in range(6)), 2, None, seconds=0.6)


def orphaned(kills: int) -> Part:
    """Kill the process that runs a sweep, and run it again: nothing is left running, and no manual step is needed."""
    wrong = []
    for seed in range(kills):
        with _children.folder() as folder:
            child = _children.start(sweep_slowly, str(folder))
            while child.is_alive() and not list(folder.glob("trials/*/progress.json")):
                time.sleep(0.02)
            faults.kill_at_random(child, within=(0.0, 1.0), seed=seed)
            if not _all_gone(str(folder), seconds=30.0):
                wrong.append(f"kill {seed}: trials run on without their sweep")
            kept = sum(read_result(one, one.name) is not None for one in folder.glob("trials/*"))
            made, ended = _swept(folder, tuple(f"ok {k}" for k in range(6)), 2, None, seconds=0.6)
            if len(ended) + kept != 6 or {r["status"] for r in made.results.values()} != {"ok"}:
                wrong.append(f"kill {seed}: {kept} results were kept, {len(ended)} trials run, of 6")
    return {"cases": kills, "wrong": wrong}


def _all_gone(folder: str, seconds: float) -> bool:
    """Tell whether every process that holds a file of the folder open, or names it, is gone within `seconds`."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if not any(_uses(place, folder) for place in Path("/proc").glob("[0-9]*")):
            return True
        time.sleep(0.1)
    return False


def _uses(place: Path, folder: str) -> bool:
    if place.name == str(os.getpid()):
        return False
    try:
        return any(os.readlink(one).startswith(folder) for one in (place / "fd").iterdir())
    except OSError:
        return False


def _orphans(scale: Scale) -> Parts:
    return {"kills": partial(orphaned, 6 if scale == "long" else 1)}


def _judge_orphans(found: Mapping[str, Part]) -> Measured:
    return none_wrong(found, "killed sweeps need a hand or leave something running")


def filled(again: bool) -> Part:
    """Let the disk fill up in the middle of a sweep; then, with `again`, make room and call once more."""
    wrong: list[str] = []
    with _children.folder() as outer, faults.full_disk(outer / "disk", room=100 * 2**20) as disk:
        real = faults.is_disk(disk)
        (disk / "ballast").write_bytes(bytes((100 - 80) * 2**20) if real else b"")
        ways = tuple(f"write {k}" for k in range(14))  # 8 MB each: the disk is full after nine or so
        room = faults.full_disk(outer / "cap", room=4 * 2**20) if not real else None
        said = _refused(disk, ways, room)
        wrong += [] if "disk is full" in said or (not real and said) else [f"the sweep says: {said or 'nothing'}"]
        wrong += [] if "finished and kept" in said else [f"it does not say what is kept: {said}"]
        kept = [one for one in disk.glob("trials/*") if read_result(one, one.name) is not None]
        wrong += [f"{one.name} is unreadable" for one in disk.glob("trials/*/result.json") if one.parent not in kept]
        if real:
            wrong += [] if kept else ["no earlier result is readable"]
            wrong += _goes_on(disk, kept) if again else []
    return {"cases": 1, "wrong": wrong, "kept": len(kept), "disk": real}


def _refused(disk: Path, ways: tuple[str, ...], cap: Any) -> str:
    try:
        if cap is None:
            _swept(disk, ways, 1, None)
        else:
            with cap:
                _swept(disk, ways, 1, None)
    except StoreError as error:
        return str(error)
    return ""


def _goes_on(disk: Path, kept: list[Path]) -> list[str]:
    """Make room, call again with trials that need none, and say what was lost."""
    for one in disk.glob("trials/*/large.bin"):
        one.unlink()
    (disk / "ballast").unlink()
    made, _ = _swept(disk, tuple(f"ok {k}" for k in range(2)), 1, None)
    lost = [one.name for one in kept if read_result(one, one.name) is None]
    wrong = [f"{name} was lost" for name in lost]
    return wrong + (
        [] if {r["status"] for r in made.results.values()} == {"ok"} else ["it does not go on after making room"]
    )


def exit_code() -> Part:
    """Run `openwork compare` onto a disk that is too small, and read the exit status and what is said."""
    with _children.folder() as outer, faults.full_disk(outer / "disk", room=2 * 2**20) as disk:
        if not faults.is_disk(disk):
            return {"cases": 0, "wrong": []}
        words = [
            "compare",
            "--model",
            "mlp-8",
            "--methods",
            "dense",
            "--seeds",
            "1",
            "--steps",
            "5",
            "--out",
            str(disk / "run"),
        ]
        done = subprocess.run(
            [sys.executable, "-m", "openwork", *words],
            env=_children.environment(),
            capture_output=True,
            text=True,
            check=False,
        )
    told = done.stderr.strip().splitlines()
    sound = done.returncode == 2 and len(told) == 1 and "MB are free" in told[0]
    return {"cases": 1, "wrong": [] if sound else [f"status {done.returncode}: {done.stderr[-300:]}"]}


def _disks(scale: Scale) -> Parts:
    sweep_: Parts = {"sweep": partial(filled, scale == "long")}
    return {**sweep_, "exit status": exit_code} if scale == "long" else sweep_


def _judge_disks(found: Mapping[str, Part]) -> Measured:
    part = found["sweep"]
    kind = "a real full disk" if part.get("disk") else "a limit on file sizes (no right to mount)"
    good = all(not one["wrong"] for one in found.values())
    kept = f"{part.get('kept', 0)} earlier results readable"
    value = f"{kind}: {kept}, {'one sentence, exit status 2' if good else 'not as promised'}"
    return Measured(value, good, complaints(found))


SURVIVALS = _survivals, _judge_survivals
ORPHANS = _orphans, _judge_orphans
DISKS = _disks, _judge_disks
