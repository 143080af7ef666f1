"""Giving a peer the form that it likes best."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from openwork.runtime.timing import timed

FIRST_SIGHT = 5
"""Calls of which the fastest says how fast a form is."""


def fastest(calls: Mapping[str, Callable[[], Tensor]]) -> Callable[[], Tensor]:
    """Return the call that is the fastest at first sight."""
    for call in calls.values():
        call()
    return min(calls.values(), key=lambda call: min(timed(call) for _ in range(FIRST_SIGHT)))
