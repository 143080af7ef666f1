"""The executor: trials as child processes, launched through joblib's interface, so that another back-end is one word away."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from openwork.errors import StoreError
from openwork.lab.child import STORE_FAILED
from openwork.lab.spec import Trial
from openwork.lab.store import Store, read_result, write_result

Done = Callable[[Trial, dict[str, Any]], None]


def execute(
    trials: Iterable[Trial], store: Store, *, workers: int, timeout: float | None, done: Done
) -> None:
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

    stop = threading.Event()
    pool = Parallel(n_jobs=workers, backend="threading", return_as="generator_unordered", pre_dispatch=workers)
    try:
        for trial, result in pool(delayed(_run)(trial, store, timeout, stop) for trial in trials):
            if result is None:
                continue
            if result["status"] == "store":
                raise StoreError(result["error"])
            done(trial, result)
    finally:
        stop.set()  # children of an interrupted sweep end now; their checkpoints are kept


def _run(trial: Trial, store: Store, timeout: float | None, stop: threading.Event) -> tuple[Trial, dict[str, Any] | None]:
    if stop.is_set():
        return trial, None
    try:
        place = store.begin(trial)
        status, code = _child(place, timeout, stop)
    except (OSError, StoreError) as error:
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


def _child(place: Path, timeout: float | None, stop: threading.Event) -> tuple[str, int]:
    """Run the child in `place` to its end, the timeout or the stop; return how it ended and its exit status."""
    (place / "result.json").unlink(missing_ok=True)
    command = [sys.executable, "-m", "openwork.lab.child", str(place)]
    deadline = None if timeout is None else time.monotonic() + timeout
    with (place / "log.txt").open("wb") as log:
        # a session of its own: Ctrl-C reaches the parent alone, which then stops its children
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True, env=_environment()
        )
        status = "ended"
        try:
            while process.poll() is None:
                if stop.is_set():
                    status = "stopped"
                elif deadline is not None and time.monotonic() > deadline:
                    status = "timeout"
                if status != "ended":
                    process.kill()
                try:
                    process.wait(timeout=0.1)
                except subprocess.TimeoutExpired:
                    continue
        finally:
            process.kill()
            process.wait()
            if process.stdin is not None:
                process.stdin.close()
    return status, process.returncode


def _environment() -> dict[str, str]:
    """Return the environment of a child: the parent's import path, and one thread for libraries that openwork does not set."""
    paths = [path for path in sys.path if path]
    quiet = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    return {**os.environ, **quiet}


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
