"""One trial in a process of its own: runs the spec.json that lies in a folder and leaves result.json beside it.

A crash, an out-of-memory kill or a hang costs this trial only.
"""

from __future__ import annotations

import contextlib
import json
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from openwork.errors import DivergedError, OpenworkError, StoreError
from openwork.lab.store import PROGRESS, SCRATCH

STORE_FAILED = 74  # sysexits.h: EX_IOERR; the parent stops the sweep, since the next trial would fail too
ELSEWHERE = 78  # sysexits.h: EX_CONFIG; what this machine would measure is not what was asked for


def main(folder: str) -> int:
    """Run the trial in `folder`, write its result.json, and return the exit status."""
    from openwork.lab.elsewhere import settle
    from openwork.lab.spec import Trial
    from openwork.lab.store import write_result

    place = Path(folder)
    spec = json.loads((place / "spec.json").read_text(encoding="utf-8"))
    elsewhere = spec.pop("elsewhere", None)
    started = time.monotonic()
    if elsewhere is not None:
        try:
            settle(Trial.from_json(spec), elsewhere)
        except OpenworkError as error:
            print(f"the machine {socket.gethostname()!r} cannot run trials of this sweep: {error}", file=sys.stderr)
            return ELSEWHERE
    try:
        result = run(spec, place)
        result["timings"] = {"seconds": round(time.monotonic() - started, 3)}
        write_result(place, result)
    except StoreError as error:
        print(error, file=sys.stderr)
        return STORE_FAILED
    return 0


def run(spec: dict[str, Any], place: Path) -> dict[str, Any]:
    """Run one trial and return its result; errors become its status, except those of the store."""
    import torch

    from openwork.lab.spec import Trial
    from openwork.lab.study import Work, find

    trial = Trial.from_json(spec)
    torch.set_num_threads(int(trial.identity.get("threads", 1)))
    scratch = place / SCRATCH
    scratch.mkdir(exist_ok=True)
    result: dict[str, Any] = {"key": trial.key, "arm": trial.arm.name, "seed": trial.seed, "error": None}
    try:
        study = find(trial.study)
        config = study.config.read(trial.config)
        outcome = study.run(config, trial.arm, trial.seed, Work(place, scratch, _Progress(place)))
    except StoreError:
        raise
    except DivergedError as error:
        return {**result, "status": "diverged", "error": str(error), "metrics": {}}
    except OpenworkError as error:
        return {**result, "status": "failed", "error": str(error), "metrics": {}}
    except Exception as error:
        traceback.print_exc()
        return {**result, "status": "failed", "error": f"{type(error).__name__}: {error}"[:2000], "metrics": {}}
    metrics = {name: float(value) for name, value in outcome.metrics.items()}
    return {
        **result,
        "status": "ok",
        "metrics": metrics,
        "curves": outcome.curves,
        "layers": outcome.layers,
        "details": outcome.details,
    }


class _Progress:
    """Writes the share that is done a few times a second; a torn or missing file harms nobody."""

    def __init__(self, place: Path) -> None:
        self._path, self._next = place / PROGRESS, 0.0

    def __call__(self, share: float) -> None:
        now = time.monotonic()
        if now >= self._next:
            self._next = now + 0.25
            with contextlib.suppress(OSError):
                self._path.write_text(f"{share:.4f}")
