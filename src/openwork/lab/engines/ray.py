"""The Ray engine: trials over the machines of a cluster, each still one child process, its result written here.

A task of Ray carries one trial to a worker and brings a parcel home; workers need no disk in common. A trial whose
worker or machine is lost is run again, a bounded number of times; a trial that ends by itself, well or not, is labelled
as the local engine would. Nothing is in flight twice.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import socket
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

from openwork import atomic
from openwork.errors import FormatError, StoreError, TrialError
from openwork.lab import elsewhere
from openwork.lab.engines import cluster, parcel, remote
from openwork.lab.engines import needs as resources
from openwork.lab.engines.catalog import Done
from openwork.lab.engines.needs import Needs
from openwork.lab.execute import lost
from openwork.lab.spec import Trial
from openwork.lab.store import Store, write_result

_log = logging.getLogger(__name__)

ATTEMPTS = 4  # a trial may cost its worker so often before it counts as the cause
_AHEAD = 2  # trials in flight a place, so that a cluster that can grow sees what is wanted
_PATIENCE = 60  # looks, a second each, at machines of which none could hold what waits


@dataclass(frozen=True)
class _Flight:
    """A trial on its way, its needs, and which attempt it is."""

    trial: Trial
    needs: Needs
    attempt: int = 1


def run(
    trials: Iterable[Trial], store: Store, *, workers: int, timeout: float | None, done: Done, address: str | None = None
) -> None:
    """Run trials over a Ray cluster; see `catalog.Engine`.

    Args:
        trials: what to run.
        store: where results go, on this machine.
        workers: trials in flight at most; 0 is as many as the cluster holds.
        timeout: seconds that a trial may take on its worker; None is without end.
        done: called with each trial and its result.
        address: as for `catalog.find`.

    Raises:
        TrialError: if there is no cluster, a machine of it has other code, versions or data, or none can hold a trial.
        StoreError: if results cannot be written here, or a worker's disk is full.
        MissingExtra: if Ray is not installed.
    """
    waiting = deque(trials)
    if not waiting:
        return
    threads = int(waiting[0].identity.get("threads", 1))
    with cluster.joined(address, max(os.cpu_count() or 1, workers * threads, threads)) as ray:
        _Sweep(ray, store, workers, timeout, done).run(waiting)


class _Sweep:
    """One run: what waits, what flies, and what comes home."""

    def __init__(self, ray: ModuleType, store: Store, workers: int, timeout: float | None, done: Done) -> None:
        self.ray, self.store, self.workers, self.timeout, self.done = ray, store, workers, timeout, done
        self.name = hashlib.sha256(f"{socket.gethostname()}\0{store.folder.resolve()}".encode()).hexdigest()[:16]
        self.baggage = elsewhere.baggage()
        self.needs = resources.reader()
        self.task = ray.remote(max_retries=0)(remote.run)
        self.flying: dict[Any, _Flight] = {}
        self.nodes = cluster.nodes(ray)
        self.started, self.barren = False, 0

    def run(self, trials: deque[Trial]) -> None:
        """Keep the cluster busy until every trial is home."""
        waiting = deque(_Flight(trial, self.needs(trial)) for trial in trials)
        try:
            while waiting or self.flying:
                while waiting and len(self.flying) < self._width(waiting[0].needs):
                    self._send(waiting.popleft())
                landed = self._landed()
                for reference in landed:
                    again = self._receive(self.flying.pop(reference), reference)
                    if again is not None:
                        waiting.appendleft(again)
                if not landed:
                    self._look([*self.flying.values(), *waiting][0].needs)
        finally:
            self._cancel()

    def _width(self, needs: Needs) -> int:
        """Return how many trials of these needs may be in flight: none while the machines for them are gone."""
        if self.started and not cluster.able(needs, self.nodes):
            return 0
        fitted = cluster.fitting(needs, self.nodes)
        return self.workers or _AHEAD * sum(node.holds(fitted) for node in self.nodes) + 1

    def _send(self, flight: _Flight) -> None:
        needs = cluster.fitting(flight.needs, self.nodes)
        name = f"openwork {flight.trial.arm.name} seed {flight.trial.seed}"
        options: dict[str, Any] = {"num_cpus": needs.cpus, "memory": needs.memory, "name": name}
        if needs.gpus:
            options["num_gpus"] = needs.gpus
        order = remote.order(flight.trial, self.name, self.timeout, self.baggage)
        self.flying[self.task.options(**options).remote(order)] = replace(flight, needs=needs)
        self.started = True

    def _landed(self) -> list[Any]:
        """Return the tasks that have ended, after a second at most."""
        if not self.flying:
            time.sleep(1.0)
            return []
        ready, _ = self.ray.wait(list(self.flying), num_returns=1, timeout=1.0)
        return list(ready)

    def _receive(self, flight: _Flight, reference: Any) -> _Flight | None:
        """Keep what a task brought; return the flight for another attempt if its worker was lost."""
        errors = self.ray.exceptions
        try:
            note, files = parcel.unpack(self.ray.get(reference))
        except errors.RayTaskError as error:
            raise TrialError(_unable(error)) from error
        except errors.RuntimeEnvSetupError as error:
            raise TrialError(f"a worker could not set up its environment: {_first_line(error)}") from error
        except (errors.RayError, FormatError) as error:
            return self._lost(flight, error)
        if "trouble" in note:
            raise (StoreError if note.get("store") else TrialError)(f"{note['trouble']} (on {note['node']})")
        self._keep(flight.trial, dict(note["result"]), files)
        return None

    def _lost(self, flight: _Flight, error: Exception) -> _Flight | None:
        """Return the next attempt of a trial whose worker is gone, None once its result says that it was the last."""
        self.nodes = cluster.nodes(self.ray)
        if flight.attempt >= ATTEMPTS:
            why = f"its worker was lost {flight.attempt} times, at last by {type(error).__name__}: {_first_line(error)}"
            self._keep(flight.trial, lost(flight.trial, "killed", why), {})
            return None
        short = isinstance(error, self.ray.exceptions.OutOfMemoryError)
        kind, trial = type(error).__name__, flight.trial
        _log.warning("%s, seed %d: its worker was lost (%s); it is run again", trial.arm.name, trial.seed, kind)
        needs = replace(flight.needs, memory=flight.needs.memory * (2 if short else 1))
        return replace(flight, needs=needs, attempt=flight.attempt + 1)

    def _keep(self, trial: Trial, result: dict[str, Any], files: dict[str, memoryview]) -> None:
        """Write what a trial left into the store, its result last: where that stands, everything does."""
        place = self.store.begin(trial)
        for name, content in files.items():
            atomic.write_bytes(place / name, content)
        write_result(place, result)
        self.done(trial, result)

    def _look(self, needs: Needs) -> None:
        """Learn which machines came and went, and give up if for a while none could hold what waits."""
        self.nodes = cluster.nodes(self.ray)
        self.barren = 0 if cluster.able(needs, self.nodes) else self.barren + 1
        if self.barren > _PATIENCE:
            cluster.fitting(needs, self.nodes)

    def _cancel(self) -> None:
        """Stop what still flies; with its worker a trial's child ends too."""
        for reference in self.flying:
            with contextlib.suppress(Exception):
                self.ray.cancel(reference, force=True)
        with contextlib.suppress(Exception):
            self.ray.wait(list(self.flying), num_returns=len(self.flying), timeout=10.0)


def _unable(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if "Error" in line]
    said = lines[-1].strip() if lines else _first_line(error)
    return f"a worker could not begin a trial: {said[:500]}; install the same version of openwork on every machine"


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]
