"""Engines by name. An engine is a function that runs trials and puts their results into a store; no more is asked of it.

A trial's key, its child process and its result are the same under every engine, so a sweep that was begun under one can
be finished under another.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Protocol

from openwork.errors import RecipeError
from openwork.lab.spec import Trial
from openwork.lab.store import Store

LOCAL = "local"
_HOMES = {LOCAL: "openwork.lab.engines.local", "ray": "openwork.lab.engines.ray"}
_ADDRESS = re.compile(r"(?:ray://)?(?:[\w.-]+|\[[0-9a-fA-F:.]+\]):(\d{1,5})")

Done = Callable[[Trial, dict[str, Any]], None]


class Engine(Protocol):
    """What runs trials: each in a child process of its own, its result written to the store, then `done` called."""

    def __call__(self, trials: Iterable[Trial], store: Store, *, workers: int, timeout: float | None, done: Done) -> None:
        """Run trials until all have ended.

        Args:
            trials: what to run, no key twice.
            store: where results go; held by the caller.
            workers: trials at a time; 0 is as many as fit.
            timeout: seconds that a trial may take; None is without end.
            done: called in the calling thread with each trial and its result.

        Raises:
            StoreError: if results cannot be written any more; finished trials are kept.
            KeyboardInterrupt: after what still ran has been stopped.
        """


def names() -> list[str]:
    """Return the names of the engines."""
    return list(_HOMES)


def find(name: str = LOCAL, address: str | None = None) -> Engine:
    """Return the engine called `name`; its libraries are imported when it runs.

    Args:
        name: one of `names()`.
        address: for engines that span machines: "auto" for the cluster that runs here, HOST:PORT of its head, "local"
            for one that is started for the sweep and ends with it; None for the first of these that there is.

    Raises:
        RecipeError: if there is no such engine, or it takes no address, or the address has another form.
    """
    if name not in _HOMES:
        raise RecipeError(f"there is no engine {name!r}; known are {', '.join(names())}")
    run = importlib.import_module(_HOMES[name]).run
    if name == LOCAL:
        if address is not None:
            raise RecipeError(f"the engine 'local' runs on this machine and takes no address {address!r}: add --engine ray")
        return run  # type: ignore[no-any-return]
    return partial(run, address=None if address is None else checked(address))


def checked(address: str) -> str:
    """Return the address of a cluster if it has the form of one.

    Raises:
        RecipeError: saying which forms there are.
    """
    found = _ADDRESS.fullmatch(address)
    if address in ("auto", LOCAL) or (found and 0 < int(found[1]) < 65536):
        return address
    raise RecipeError(
        f"the address {address!r} is none: write auto (the cluster that runs on this machine), HOST:PORT of its head, for "
        "example 10.0.0.5:6379, or local"
    )
