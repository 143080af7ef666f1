"""The whole bench in one call: what belongs to it, in full and in short, and the file that a stopped run goes on with."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from openwork.bench import networks, operators, page, peers, runner, tasks
from openwork.bench.results import Row
from openwork.errors import ModelError

PARTS = ("operators", "networks", "tasks")
FILE = "performance.json"


@dataclass(frozen=True)
class Suite:
    """What to measure.

    Attributes:
        parts: of `PARTS`.
        peers: names.
        threads: numbers of threads, each a table of its own.
        quick: fewer shapes, sparsities and rounds.
        seconds: for the rounds of one product; a network gets ten times as much. None is 1, or 0.3 where it is quick.
    """

    parts: tuple[str, ...] = PARTS
    peers: tuple[str, ...] = ()
    threads: tuple[int, ...] = ()
    quick: bool = False
    seconds: float | None = None

    def jobs(self) -> list[runner.Job]:
        """Return the work, products first.

        Raises:
            ModelError: for a part, peer or number of threads that does not exist.
        """
        unknown = [part for part in self.parts if part not in PARTS]
        if unknown:
            raise ModelError(f"there is no part {unknown[0]!r} of the bench: choose from {', '.join(PARTS)}")
        if any(count < 1 for count in self.threads):
            raise ModelError(f"threads are {self.threads}: give whole numbers of at least 1")
        names, threads = chosen(self.peers), list(self.threads) or default_threads()
        seconds = self.seconds if self.seconds is not None else 0.3 if self.quick else 1.0
        made = []
        if "operators" in self.parts:
            quick = (operators.QUICK_SHAPES, operators.QUICK_SPARSITIES)
            made += runner.jobs("operator", operators.cells(*(quick if self.quick else ())), names, threads, seconds)
        if "networks" in self.parts:
            cells = networks.QUICK_NETWORKS if self.quick else networks.NETWORKS
            made += runner.jobs("network", cells, names, threads, 10.0 * seconds)
        if "tasks" in self.parts:
            words = tasks.QUICK_NAMES if self.quick else tasks.NAMES
            made += [runner.Job("task", words, (peers.OURS,), count, 10.0 * seconds) for count in threads]
        return made


def chosen(names: Sequence[str]) -> list[str]:
    """Return the peers asked for, all where none is.

    Raises:
        ModelError: if there is no such peer.
    """
    for name in names:
        peers.load(name)
    return list(names) or peers.names()


def default_threads() -> list[int]:
    """Return one thread, and as many as this process may use."""
    usable = getattr(os, "sched_getaffinity", None)
    every = len(usable(0)) if usable is not None else os.cpu_count() or 1
    return sorted({1, every})


def opened(path: Path) -> tuple[runner.Bench, str]:
    """Return the results file to go on with, and what is to be said about it.

    Rows of another machine, other packages or other code are left behind; reasons written by hand are kept.

    Raises:
        FormatError: if the file is none of the bench's.
    """
    found, now = runner.read(path), runner.identity()
    if not found.rows:
        return runner.Bench(now, reasons=found.reasons), ""
    if found.identity != now:
        differs = ", ".join(name for name in now if found.identity.get(name) != now[name])
        return runner.Bench(now, reasons=found.reasons), f"{path} is of another {differs}: measured anew"
    return found, ""


def measure(
    suite: Suite,
    bench: runner.Bench,
    path: Path | None,
    done: Callable[[Row], None] = lambda _row: None,
    at: Callable[[str], None] = lambda _words: None,
) -> list[str]:
    """Measure what is missing, keeping each row in the file at once; return what failed, in words.

    Raises:
        StoreError: if the file cannot be written.
    """

    def keep(row: Row) -> None:
        if path is not None:
            runner.write(path, bench)
        done(row)

    return runner.run(bench, runner.missing(bench, suite.jobs()), keep, at)


def write(folder: Path) -> Path:
    """Write the page again from the results file of `folder`; return its path.

    Raises:
        FormatError: if there is no such file, or it is none of the bench's.
    """
    bench = runner.read(folder / FILE)
    if not bench.rows:
        raise ModelError(f"there are no results in {str(folder / FILE)!r}: measure first, openwork bench page")
    return page.write(bench, folder)
