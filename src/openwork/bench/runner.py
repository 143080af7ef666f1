"""Driving the measurement: children that may crash, rows that are kept as soon as they are measured, runs that go on.

A results file is JSON with a row a cell, thread count and group of peers. It is written after every row, and a run with
the same file, machine, code and packages measures only what is missing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

import openwork
from openwork import atomic
from openwork.bench import peers
from openwork.bench.networks import Network
from openwork.bench.operators import Cell
from openwork.bench.results import Arm, Row, plain
from openwork.bench.roofline import Limits
from openwork.errors import FormatError
from openwork.lab import environment

FORMAT = 1
PATIENCE = 600.0
"""Seconds that one peer may take on one cell before its process is ended."""
_ROOMS = ("runtime", "bench/peers", "bench/operators.py", "bench/networks.py", "bench/tasks.py", "bench/folding.py")
Kind = Literal["operator", "network", "task"]


@dataclass(frozen=True)
class Job:
    """Cells to measure with some peers in one process.

    Attributes:
        kind: what the cells are.
        cells: Cell or Network, or the names of tasks.
        peers: names.
        threads: of torch and of every peer.
        seconds: for the interleaved rounds of one cell.
        group: empty, or the peer that has this process for itself.
    """

    kind: Kind
    cells: tuple[Cell | Network | str, ...]
    peers: tuple[str, ...]
    threads: int
    seconds: float
    group: str = ""


@dataclass
class Bench:
    """A results file in memory: the identity of the run, the machine's limits by thread count, and the rows by key."""

    identity: dict[str, Any]
    limits: dict[int, Limits | None] = field(default_factory=dict)
    rows: dict[str, Row] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)

    def merged(self, kind: Kind | None = None) -> list[Row]:
        """Return one row a cell and thread count, the arms of peers with a process for themselves among the others.

        Such an arm keeps the ratio of its own process, where dense torch was measured too.
        """
        whole: dict[str, Row] = {}
        for key, row in sorted(self.rows.items(), key=lambda item: bool(_group(item[0]))):
            if kind is not None and row.kind != kind:
                continue
            group, before = _group(key), whole.get(row.key)
            if before is None:
                whole[row.key] = row
            elif group:
                arms = {**before.arms, **{name: arm for name, arm in row.arms.items() if name == group}}
                whole[row.key] = Row(row.key, row.kind, row.cell, row.threads, before.least_ms, arms)
        return list(whole.values())


def identity() -> dict[str, Any]:
    """Return what the numbers depend on: processor, cores, packages and openwork's own code."""
    return {
        "processor": environment.processor(),
        "cores": os.cpu_count() or 1,
        "code": _digest(),
        "packages": dict(peers.versions()),
    }


def read(path: Path) -> Bench:
    """Return the content of a results file; an empty one of this machine if there is none.

    Raises:
        FormatError: if it is not what `write` wrote.
    """
    if not path.exists():
        return Bench(identity())
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["format"] != FORMAT or found["kind"] != "performance":
            raise ValueError("of another format or kind")
        limits = {int(threads): None if one is None else _limits(one) for threads, one in found["limits"].items()}
        rows = {key: Row.from_json(one) for key, one in found["measured"].items()}
        return Bench(found["identity"], limits, rows, dict(found.get("reasons") or {}), dict(found["environment"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(
            f"cannot read {str(path)!r} as results of the bench ({error}): delete it to measure anew"
        ) from error


def write(path: Path, bench: Bench, claims: Sequence[Mapping[str, Any]] = ()) -> None:
    """Write a results file. It is one of `openwork.report` too: claims and environment stand where a study's do.

    Raises:
        StoreError: if it cannot be written.
    """
    atomic.write_json(path, plain({
        "format": FORMAT, "kind": "performance", "name": "performance", "rows": [], "claims": list(claims),
        "environment": bench.environment, "identity": bench.identity, "reasons": bench.reasons,
        "limits": {str(threads): None if one is None else one.to_json() for threads, one in bench.limits.items()},
        "measured": {key: row.to_json() for key, row in bench.rows.items()},
    }))  # fmt: skip


def jobs(
    kind: Kind, cells: Sequence[Cell | Network | str], names: Sequence[str], threads: Sequence[int], seconds: float
) -> list[Job]:
    """Return the work: with one thread all peers in one process; with more, those that are `APART` in one each.

    A process of its own has the dense arms too, so that each ratio is taken within one process.
    """
    found = []
    for count in threads:
        apart = [name for name in names if count > 1 and peers.is_apart(name)]
        dense = [name for name in names if peers.load(name).DENSE]
        together = tuple(name for name in names if name not in apart)
        found.append(Job(kind, tuple(cells), together, count, seconds))
        found += [Job(kind, tuple(cells), (*dense, name), count, seconds, name) for name in apart]
    return found


def missing(bench: Bench, work: Sequence[Job]) -> list[Job]:
    """Return the jobs without the cells whose rows are there with every peer that was asked for."""
    left = []
    for job in work:
        cells = tuple(cell for cell in job.cells if not _is_there(bench, job, cell))
        if cells:
            left.append(Job(job.kind, cells, job.peers, job.threads, job.seconds, job.group))
    return left


def run(
    bench: Bench,
    work: Sequence[Job],
    done: Callable[[Row], None] = lambda _row: None,
    at: Callable[[str], None] = lambda _words: None,
) -> list[str]:
    """Measure the jobs into `bench`; `done` hears of each row, `at` of each peer that starts. Return what failed, in words.

    Raises:
        KeyboardInterrupt: the child is ended and the rows measured so far are in `bench`.
    """
    trouble: list[str] = []
    if work:
        bench.environment = environment.describe(max(job.threads for job in work), 1) | _load()
    for job in work:
        trouble += _run_job(bench, job, done, at)
    return trouble


def _run_job(bench: Bench, job: Job, done: Callable[[Row], None], at: Callable[[str], None]) -> list[str]:
    """Feed the cells to a child; when it dies, lay it at the door of the peer that was running, and go on."""
    trouble: list[str] = []
    place = 0
    skip: list[dict[str, str]] = [{} for _ in job.cells]
    while place < len(job.cells):
        running = ""
        for event in _child(_task(job, place, skip)):
            if "at" in event:
                running = event["at"]
                at(f"{_key(job.cells[place])}, {_threads(job.threads)}: {running or 'timing'}")
            elif "limits" in event:
                found = event["limits"]
                bench.limits[job.threads] = _higher(bench.limits.get(job.threads), None if found is None else _limits(found))
            elif "row" in event:
                row = _with_crashed(Row.from_json(event["row"]), skip[place])
                bench.rows[_row_key(row.key, job.group)] = row
                done(row)
                place, running = place + 1, ""
            elif "error" in event:
                trouble.append(f"{_key(job.cells[place])}: {event['error']}")
                place, running = place + 1, ""
            elif place < len(job.cells):  # {"ended": how}
                if running in job.peers:
                    for later in skip[place:]:
                        later[running] = f"its process {event['ended']}"
                else:
                    trouble.append(f"{_key(job.cells[place])}: the measuring process {event['ended']}")
                    place += 1
    return trouble


def _child(task: Mapping[str, Any]) -> Generator[dict[str, Any], None, None]:
    """Yield the events of a child; the last one says how it ended if it did not finish."""
    paths = os.pathsep.join(path for path in sys.path if path)
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "openwork.bench.child"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
            env={**os.environ, "PYTHONPATH": paths, "TF_CPP_MIN_LOG_LEVEL": "3"}, text=True,
        )  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(json.dumps(task))
                process.stdin.close()
            hung = yield from _events(process.stdout)
            if hung:
                process.kill()
            status = process.wait()
            if hung or status:
                yield {"ended": _how(status, hung, log)}
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
            process.stdout.close()


def _events(stream: IO[str]) -> Generator[dict[str, Any], None, bool]:
    """Yield the lines of a child; return whether it went silent for longer than any peer may take."""
    lines: queue.Queue[str | None] = queue.Queue()

    def read_lines() -> None:
        for line in stream:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read_lines, daemon=True).start()
    while True:
        try:
            line = lines.get(timeout=PATIENCE)
        except queue.Empty:
            return True
        if line is None:
            return False
        with contextlib.suppress(ValueError):
            yield json.loads(line)


def _how(status: int, hung: bool, log: IO[bytes]) -> str:
    if hung:
        return f"was silent for {PATIENCE:g} s and was ended"
    log.seek(0)
    last = [line for line in log.read()[-4000:].decode("utf-8", "replace").splitlines() if line.strip()][-1:]
    words = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
    return words + (f" ({last[0].strip()[:200]})" if last else "")


def _task(job: Job, place: int, skip: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    cells = [{"name": cell} if isinstance(cell, str) else asdict(cell) for cell in job.cells[place:]]
    return {
        "kind": job.kind, "cells": cells, "peers": list(job.peers), "skip": [list(one) for one in skip[place:]],
        "threads": job.threads, "seconds": job.seconds,
    }  # fmt: skip


def _with_crashed(row: Row, skipped: Mapping[str, str]) -> Row:
    arms = {name: Arm("crashed", dense=peers.load(name).DENSE, reason=reason) for name, reason in skipped.items()}
    return Row(row.key, row.kind, row.cell, row.threads, row.least_ms, {**row.arms, **arms})


def _is_there(bench: Bench, job: Job, cell: Cell | Network | str) -> bool:
    row = bench.rows.get(_row_key(f"{_key(cell)} {job.threads}", job.group))
    half = {"operator": "operator", "network": "network"}.get(job.kind)
    wanted = {name for name in job.peers if half is None or hasattr(peers.load(name), half)}
    return row is not None and (half is None or wanted <= row.arms.keys())


def _key(cell: Cell | Network | str) -> str:
    return cell if isinstance(cell, str) else cell.key


def _row_key(key: str, group: str) -> str:
    return f"{key} [{group}]" if group else key


def _group(key: str) -> str:
    return key.rpartition(" [")[2].removesuffix("]") if key.endswith("]") else ""


def _limits(found: Mapping[str, Any]) -> Limits:
    return Limits(**{**found, "reads": tuple((int(size), float(rate)) for size, rate in found["reads"])})


def _higher(one: Limits | None, two: Limits | None) -> Limits | None:
    """Return the limits of the process that reached the higher peak: a disturbed one saw less."""
    if one is None or two is None:
        return one or two
    return max(one, two, key=lambda limits: limits.flops)


def _threads(count: int) -> str:
    return f"{count} thread{'s' if count != 1 else ''}"


def _load() -> dict[str, str]:
    """Return how many processes wanted a core in the minute before: numbers from a busy machine are worth less."""
    load = getattr(os, "getloadavg", None)
    return {} if load is None else {"load before": f"{load()[0]:.2f}"}


def _digest() -> str:
    """Return a digest of the source that the numbers depend on."""
    total, root = hashlib.sha256(), Path(openwork.__file__).parent
    for room in _ROOMS:
        place = root / room
        for path in [place] if place.is_file() else sorted(place.rglob("*.py")):
            total.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return total.hexdigest()[:16]
