"""One trial from its folder to its result: a child process, watched until it ends, is stopped, or takes too long."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from openwork.errors import StoreError, TrialError
from openwork.lab.child import ELSEWHERE, STORE_FAILED
from openwork.lab.nursery import Nursery
from openwork.lab.spec import Trial
from openwork.lab.store import read_result, tidy, write_result


def attempt(
    trial: Trial, place: Path, nursery: Nursery, *, timeout: float | None, stopped: Callable[[], bool] = lambda: False
) -> dict[str, Any] | None:
    """Run the trial whose specification lies in `place`, and return its result, which then lies there too.

    Args:
        trial: the trial.
        place: its folder; what the trial leaves there is kept, its scratch only if it was cut short.
        nursery: what starts the child.
        timeout: seconds that the trial may take; None is without end.
        stopped: asked a few times a second; True ends the child.

    Returns:
        The result; one that says how the child was lost if it left none; None if it was stopped.

    Raises:
        StoreError: if the folder cannot be written to any more.
        TrialError: if the child could not be started, or refused to run here.
    """
    status, code = _child(place, nursery, timeout, stopped)
    if status == "stopped":
        return None
    if code == STORE_FAILED:
        raise StoreError(_last_line(place) or "the run folder cannot be written to")
    if code == ELSEWHERE:
        raise TrialError(_last_line(place) or "the trial cannot be run on this machine")
    result = read_result(place, trial.key)
    if result is None or code != 0:
        result = lost(trial, *_why(place, status, code, timeout))
        write_result(place, result)
    else:
        tidy(place)
    return result


def lost(trial: Trial, status: str, error: str) -> dict[str, Any]:
    """Return the result of a trial that left none: `status` is "killed", "timeout" or "failed"."""
    return {"key": trial.key, "arm": trial.arm.name, "seed": trial.seed, "status": status, "error": error, "metrics": {}}


def _child(place: Path, nursery: Nursery, timeout: float | None, stopped: Callable[[], bool]) -> tuple[str, int]:
    """Run the child in `place` to its end, the timeout or the stop; return how it ended and its exit status."""
    (place / "result.json").unlink(missing_ok=True)
    pid, status = nursery.start(place), "ended"
    deadline = None if timeout is None else time.monotonic() + timeout
    while (code := nursery.wait(pid, 0.1)) is None:
        if stopped():
            status = "stopped"
        elif deadline is not None and time.monotonic() > deadline:
            status = "timeout"
        if status != "ended":
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    return status, code


def _why(place: Path, status: str, code: int, timeout: float | None) -> tuple[str, str]:
    """Return status and error of a trial whose child left no result."""
    if status == "timeout":
        return "timeout", f"took longer than {timeout:g} s; raise --timeout or shorten the run"
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        hint = " (out of memory?)" if name == "SIGKILL" else ""
        return "killed", f"the process was ended by {name}{hint}"
    return "failed", f"the process ended with status {code}: {_last_line(place) or 'no message'}"


def _last_line(place: Path) -> str:
    try:
        lines = (place / "log.txt").read_text(errors="replace").strip().splitlines()
    except OSError:
        return ""
    return lines[-1][:1000] if lines else ""
