"""A trial on a worker of a cluster: unpacked from text, run in a child process of its own, sent back as bytes.

Nothing here needs Ray or imports torch; the worker process holds a nursery whose children do.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import socket
import tempfile
import time
from pathlib import Path
from typing import Any

from openwork import atomic
from openwork.errors import OpenworkError, StoreError
from openwork.lab import elsewhere
from openwork.lab.engines import parcel
from openwork.lab.execute import attempt
from openwork.lab.nursery import Nursery
from openwork.lab.spec import Trial
from openwork.lab.store import DONE, PROGRESS, SCRATCH

_OWN = frozenset({"spec.json", "result.json", PROGRESS})  # the store at home writes these
_KEPT_SECONDS = 7 * 86_400.0


def order(trial: Trial, sweep: str, timeout: float | None, baggage: dict[str, Any]) -> bytes:
    """Return what `run` is to do, as JSON text.

    Args:
        trial: the trial.
        sweep: a short name of the run folder: trials of different ones do not meet on a worker.
        timeout: seconds that the trial may take; None is without end.
        baggage: of `elsewhere`.
    """
    return json.dumps({"trial": trial.to_json(), "sweep": sweep, "timeout": timeout, "baggage": baggage}).encode()


def run(asked: bytes) -> bytes:
    """Run the trial of an `order` and return a parcel.

    Its note holds the `result` and the `node`, or as `trouble` why this machine cannot run trials of the sweep; its files
    are what the trial left. The folder stays while the trial may be run again here, to go on from its checkpoint.
    """
    given = json.loads(asked)
    trial, node = Trial.from_json(given["trial"]), socket.gethostname()
    try:
        place = _place(given["sweep"], trial.key)
        spec = {**given["trial"], "elsewhere": elsewhere.unpacked(given["baggage"])}
        atomic.write_json(place / "spec.json", spec)
        result = attempt(trial, place, _living(), timeout=given["timeout"])
        files = {str(path.relative_to(place).as_posix()): path.read_bytes() for path in _left(place)}
    except (OSError, OpenworkError) as error:
        return parcel.pack({"trouble": str(error), "store": isinstance(error, OSError | StoreError), "node": node}, {})
    if result is not None and (result["status"] in DONE or not (place / SCRATCH).exists()):
        shutil.rmtree(place, ignore_errors=True)
    return parcel.pack({"result": result, "node": node}, files)


def _place(sweep: str, key: str) -> Path:
    """Return the trial's folder on this machine, which nobody else may read.

    Raises:
        StoreError: if somebody else made the folder above it.
    """
    base = _base()
    base.mkdir(mode=0o700, exist_ok=True)
    if base.is_symlink() or (hasattr(os, "getuid") and base.stat().st_uid != os.getuid()):
        raise StoreError(f"{str(base)!r} belongs to another user: remove it, or set TMPDIR to another folder")
    place = base / sweep / key
    place.mkdir(parents=True, exist_ok=True)
    atomic.sweep(place)
    return place


def _base() -> Path:
    return Path(tempfile.gettempdir()) / f"openwork-{os.getuid() if hasattr(os, 'getuid') else 'user'}"


def _left(place: Path) -> list[Path]:
    """Return the files that the trial left to be kept."""
    files = (path for path in sorted(place.rglob("*")) if path.is_file() and not path.is_symlink())
    inner = ((path, path.relative_to(place).parts) for path in files)
    return [path for path, parts in inner if parts[0] not in {*_OWN, SCRATCH} and not parts[-1].startswith(atomic.PREFIX)]


def _living() -> Nursery:
    """Return this process's nursery, a new one if it has died."""
    if not _nursery().alive:
        _nursery.cache_clear()
    return _nursery()


@functools.cache
def _nursery() -> Nursery:
    _forget_old(_base())
    return Nursery()


def _forget_old(base: Path) -> None:
    """Remove the folders of trials that nobody came back for."""
    for sweep in base.glob("*"):
        with contextlib.suppress(OSError):
            if time.time() - max(path.stat().st_mtime for path in (sweep, *sweep.glob("*/*"))) > _KEPT_SECONDS:
                shutil.rmtree(sweep, ignore_errors=True)
