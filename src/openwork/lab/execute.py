"""The executor: trials as child processes, launched through joblib's interface: another back-end is one word away."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from openwork.errors import OpenworkError, StoreError
from openwork.lab.child import STORE_FAILED
from openwork.lab.nursery import Nursery
from openwork.lab.spec import Trial
from openwork.lab.store import Store, read_result, write_result

Done = Callable[[Trial, dict[str, Any]], None]


def execute(trials: Iterable[Trial], store: Store, *, workers: int, timeout: float | None, done: Done) -> None:
    """Run trials, `workers` at a time, each in a child process; call `done` as each one ends.

    A trial that fails, diverges, hangs or is killed costs that trial only: its result says so.

    Args:
        trials: what to run.
        store: where results go.
        workers: child processes at a time.
        timeout: seconds that a trial may take; None is without end.
        done: called in the main thread with each trial and its result.

    Raises:
        StoreError: if the store cannot be written to any more; finished trials are kept.
        KeyboardInterrupt: after the children have been stopped.
    """
    from joblib import Parallel, delayed

    stop, nursery = threading.Event(), Nursery()
    pool = Parallel(n_jobs=workers, backend="threading", return_as="generator_unordered", pre_dispatch=workers)
    try:
        for trial, result in pool(delayed(_run)(trial, store, nursery, timeout, stop) for trial in trials):
            if result is None:
                continue
            if result["status"] == "store":
                raise StoreError(result["error"])
            done(trial, result)
    finally:
        stop.set()  # children of an interrupted sweep end now; their checkpoints are kept
        nursery.close()


def _run(
    trial: Trial, store: Store, nursery: Nursery, timeout: float | None, stop: threading.Event
) -> tuple[Trial, dict[str, Any] | None]:
    if stop.is_set():
        return trial, None
    try:
        place = store.begin(trial)
        status, code = _child(place, nursery, timeout, stop)
    except (OSError, OpenworkError) as error:
        stop.set()
        return trial, {"status": "store", "error": str(error)}
    if status == "stopped":
        return trial, None
    result = read_result(place, trial.key)
    if code == STORE_FAILED:
        stop.set()
        return trial, {"status": "store", "error": _last_line(place) or "the run folder cannot be written to"}
    if result is None or code != 0:
        result = _lost(trial, place, status, code, timeout)
        write_result(place, result)
    else:
        store.clean(trial)
    return trial, result


def _child(place: Path, nursery: Nursery, timeout: float | None, stop: threading.Event) -> tuple[str, int]:
    """Run the child in `place` to its end, the timeout or the stop; return how it ended and its exit status."""
    (place / "result.json").unlink(missing_ok=True)
    pid, status = nursery.start(place), "ended"
    deadline = None if timeout is None else time.monotonic() + timeout
    while (code := nursery.wait(pid, 0.1)) is None:
        if stop.is_set():
            status = "stopped"
        elif deadline is not None and time.monotonic() > deadline:
            status = "timeout"
        if status != "ended":
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    return status, code


def _lost(trial: Trial, place: Path, status: str, code: int, timeout: float | None) -> dict[str, Any]:
    """Return the result of a trial that left none."""
    if status == "timeout":
        kind, error = "timeout", f"took longer than {timeout:g} s; raise --timeout or shorten the run"
    elif code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        hint = " (out of memory?)" if name == "SIGKILL" else ""
        kind, error = "killed", f"the process was ended by {name}{hint}"
    else:
        kind, error = "failed", f"the process ended with status {code}: {_last_line(place) or 'no message'}"
    return {"key": trial.key, "arm": trial.arm.name, "seed": trial.seed, "status": kind, "error": error, "metrics": {}}


def _last_line(place: Path) -> str:
    try:
        lines = (place / "log.txt").read_text(errors="replace").strip().splitlines()
    except OSError:
        return ""
    return lines[-1][:1000] if lines else ""
