"""How much, when: plain functions of the step, and the steps at which to act."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

Schedule = Callable[[float], float]


class Every(NamedTuple):
    """The steps `start, start + period, ...` below `stop` (None: without end); `step in Every(...)` asks for one.

    Attributes:
        period: steps between two actions.
        start: the first step at which to act.
        stop: the first step at which not to act any more.
    """

    period: int
    start: int = 0
    stop: float | None = None

    def __contains__(self, step: object) -> bool:
        return (
            isinstance(step, int)
            and step >= self.start
            and (self.stop is None or step < self.stop)
            and (step - self.start) % self.period == 0
        )


def constant(value: float) -> Schedule:
    """Return the schedule that is `value` at every step."""
    return lambda _step: value


def linear(start: float, end: float, *, steps: float, begin: float = 0.0) -> Schedule:
    """Return the schedule that goes from `start` at step `begin` to `end` at step `begin + steps` in a line."""
    return lambda step: start + (end - start) * _progress(step, begin, steps)


def cosine(start: float, end: float, *, steps: float) -> Schedule:
    """Return end + (start - end) / 2 (1 + cos(pi t / steps)): RigL's drop share (Evci et al. 2020, Alg. 1)."""
    return lambda step: end + 0.5 * (start - end) * (1.0 + math.cos(math.pi * _progress(step, 0.0, steps)))


def cubic(start: float, end: float, *, steps: float, begin: float = 0.0) -> Schedule:
    """Return end + (start - end) (1 - t)^3, t from 0 at `begin` to 1 after `steps` (Zhu & Gupta 2017, Eq. 1)."""
    return lambda step: end + (start - end) * (1.0 - _progress(step, begin, steps)) ** 3


def _progress(step: float, begin: float, steps: float) -> float:
    return min(1.0, max(0.0, (step - begin) / steps)) if steps > 0 else 1.0
