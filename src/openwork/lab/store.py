"""The run folder: trials under their content keys, written atomically, found again by the next call."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from openwork import atomic
from openwork.errors import StoreError
from openwork.lab.spec import Trial

DONE = frozenset({"ok", "diverged"})  # a trial that diverged would diverge again
SCRATCH = "scratch"  # checkpoints, in the trial's folder until it has ended
PROGRESS = "progress.json"  # the share that is done


class Store:
    """A run folder.

    Args:
        folder: made if it is not there.

    Raises:
        StoreError: if the folder cannot be written to.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.trials = folder / "trials"
        try:
            self.trials.mkdir(parents=True, exist_ok=True)
            probe = self.trials / ".probe"
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise StoreError(
                f"cannot write to the run folder {str(folder)!r}: {error.strerror}; choose another with --out"
            ) from error

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder for this process; a killed process lets go by itself.

        Raises:
            StoreError: if another process holds it.
        """
        with atomic.alone(self.folder):
            atomic.sweep(self.folder)
            yield

    def place(self, trial: Trial) -> Path:
        """Return the trial's own folder."""
        return self.trials / trial.key

    def begin(self, trial: Trial) -> Path:
        """Write the trial's specification and return its folder."""
        place = self.place(trial)
        place.mkdir(parents=True, exist_ok=True)
        atomic.sweep(place)
        atomic.write_json(place / "spec.json", trial.to_json())
        return place

    def finished(self, trial: Trial) -> dict[str, Any] | None:
        """Return the trial's result if it is there, whole, and need not be run again."""
        result = read_result(self.place(trial), trial.key)
        return result if result is not None and result["status"] in DONE else None

    def others(self, trials: Iterable[Trial]) -> dict[str, list[Mapping[str, Any]]]:
        """Return for each trial's key under which other identities its question was answered before, if it was."""
        keys = {trial.question: trial.key for trial in trials}
        found: dict[str, list[Mapping[str, Any]]] = {}
        for path in self.trials.glob("*/spec.json") if keys else ():
            spec = read_json(path) or {}
            key = keys.get(str(spec.get("question")))
            if key is not None and spec.get("key") != key:
                found.setdefault(key, []).append(spec["identity"])
        return found


def write_result(place: Path, result: Mapping[str, Any]) -> None:
    """Write a trial's result with a digest of itself, atomically."""
    atomic.write_json(place / "result.json", {**result, "digest": _digest(result)})


def read_result(place: Path, key: str) -> dict[str, Any] | None:
    """Return the result in a trial's folder, or None if there is none, or it is damaged or another trial's."""
    result = read_json(place / "result.json")
    if not result or result.get("key") != key:
        return None
    digest = result.pop("digest", None)
    return result if digest == _digest(result) else None


def tidy(place: Path) -> None:
    """Remove from a trial's folder what a finished trial does not need any more."""
    shutil.rmtree(place / SCRATCH, ignore_errors=True)
    (place / PROGRESS).unlink(missing_ok=True)


def free_megabytes(folder: Path) -> float:
    """Return the free space of the disk that holds `folder`, in megabytes."""
    return shutil.disk_usage(folder).free / 1e6


def _digest(result: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(result, sort_keys=True).encode()).hexdigest()[:16]


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the JSON object in a file, or None if it cannot be read or holds something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
