"""The local engine: trials as child processes of this machine, launched through joblib's interface."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from typing import Any

from openwork.errors import OpenworkError, StoreError
from openwork.lab.engines.catalog import Done
from openwork.lab.execute import attempt
from openwork.lab.nursery import Nursery
from openwork.lab.spec import Trial
from openwork.lab.store import Store


def run(trials: Iterable[Trial], store: Store, *, workers: int, timeout: float | None, done: Done) -> None:
    """Run trials on this machine, `workers` at a time (0: one a core); see `catalog.Engine`.

    A trial that fails, diverges, hangs or is killed costs that trial only: its result says so.
    """
    from joblib import Parallel, delayed

    stop, nursery, workers = threading.Event(), Nursery(), workers or os.cpu_count() or 1
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
        return trial, attempt(trial, store.begin(trial), nursery, timeout=timeout, stopped=stop.is_set)
    except (OSError, OpenworkError) as error:
        stop.set()
        return trial, {"status": "store", "error": str(error)}
