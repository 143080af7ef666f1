"""Two explanations of a falling curve, a broken line and a smooth power, each by least squares, and how they compare."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

LEAST = 5
"""Points below which a broken line of four parameters is fitted to noise."""
MARGIN = 4.0
"""How much lower the broken line's AIC must be: less, and the smooth curve has support too (Burnham, Anderson 2002, 2.6).

At 0 a straight line of ten points with a little noise gets a break one time in four, at 4 about one time in thirty.
"""
POWERS = (0.05, 64.0)
"""Exponents among which the smooth curve is sought."""
_EXACT = 1e-8
"""Errors below this share of the curve's range count as none, so that two exact fits are judged by their parameters."""


@dataclass(frozen=True)
class Hinge:
    """The broken line a + b1 s + b2 max(s - c, 0).

    Attributes:
        at: c, where it breaks.
        start: a, its value at s = 0.
        before: slope up to c, b1.
        after: slope from c on, b1 + b2.
        error: sum of squared errors.
        points: how many points it was fitted to.
    """

    at: float
    start: float
    before: float
    after: float
    error: float
    points: int

    @property
    def sharpness(self) -> float:
        """(b1 + b2) / b1: how many times steeper the curve falls behind the break; infinite after a level stretch."""
        return self.after / self.before if self.before else math.inf

    def __call__(self, s: float) -> float:
        """Return the line's height at `s`."""
        return self.start + self.before * s + (self.after - self.before) * max(s - self.at, 0.0)


@dataclass(frozen=True)
class Power:
    """The smooth curve a + b s^p.

    Attributes:
        start: a.
        rise: b, negative where the curve falls.
        power: p.
        error: sum of squared errors.
        points: how many points it was fitted to.
    """

    start: float
    rise: float
    power: float
    error: float
    points: int

    def __call__(self, s: float) -> float:
        """Return the curve's height at `s`."""
        return self.start + self.rise * float(s**self.power)


def used(y: Sequence[float] | Floats, floor: float) -> int:
    """Return how many points, from the first on, lie down to half of (y_0 - floor), with the first one below.

    What comes later is the flat floor of a network that is broken; it would drag a break towards itself.
    """
    values = np.asarray(y, np.float64)
    below = np.nonzero(values < floor + (values[0] - floor) / 2.0)[0]
    return int(below[0]) + 1 if len(below) else len(values)


def fit_hinge(s: Sequence[float] | Floats, y: Sequence[float] | Floats) -> Hinge | None:
    """Return the broken line of least squared error, its break between the second point and the last but one.

    Exact, without a grid for c (Hudson 1966): for every way to part the points, two free lines whose crossing lies in
    the gap are the best for that gap; elsewhere the best break of a gap is one of its ends.

    Args:
        s: ascending places.
        y: heights there.

    Returns:
        the line, or None for fewer than four points.
    """
    x, v = np.asarray(s, np.float64), np.asarray(y, np.float64)
    n = len(x)
    if n < 4:
        return None
    best: tuple[float, float, float, float, float] | None = None
    for place in range(1, n - 1):
        design = np.stack([np.ones(n), x, np.maximum(x - x[place], 0.0)], axis=1)
        (a, b, c), error = _solve(design, v)
        if best is None or error < best[0]:
            best = error, float(x[place]), a, b, b + c
    for left in range(2, n - 1):
        (a, b), before = _line(x[:left], v[:left])
        (c, d), after = _line(x[left:], v[left:])
        crossing = (c - a) / (b - d) if b != d else math.nan
        if x[left - 1] < crossing < x[left] and best is not None and before + after < best[0]:
            best = before + after, float(crossing), a, b, d
    if best is None:
        return None
    error, at, start, slope, steep = best
    return Hinge(at, start, slope, steep, error, n)


def fit_power(s: Sequence[float] | Floats, y: Sequence[float] | Floats) -> Power | None:
    """Return the curve a + b s^p of least squared error with p between .05 and 64, or None for fewer than three points."""
    x, v = np.asarray(s, np.float64), np.asarray(y, np.float64)
    if len(x) < 3:
        return None
    scale = float(x.max())
    t = x / scale
    powers = np.exp(np.linspace(math.log(POWERS[0]), math.log(POWERS[1]), 120))
    errors = _power_errors(t, v, powers)
    place = int(errors.argmin())
    power = _refined(t, v, powers[max(0, place - 1)], powers[min(len(powers) - 1, place + 1)])
    (a, b), error = _line(t**power, v)
    return Power(a, b / scale**power, power, error, len(x))


def akaike(error: float, points: int, parameters: int, scale: float) -> float:
    """Return n ln(error / n) + 2 k, Akaike's criterion of a least squares fit; lower is better.

    Args:
        error: sum of squared errors.
        points: n.
        parameters: k.
        scale: the curve's range: errors of less than 1e-8 of it count as rounding.
    """
    least = max(points * (_EXACT * scale) ** 2, 1e-300)
    return points * math.log(max(error, least) / points) + 2.0 * parameters


def advantage(s: Sequence[float] | Floats, y: Sequence[float] | Floats) -> float:
    """Return by how much a broken line that turns down beats the power curve: its lower AIC, -inf where there is none.

    The broken line has four parameters (a, b1, b2, c), the power curve three (a, b, p).
    """
    v = np.asarray(y, np.float64)
    hinge, power = fit_hinge(s, v), fit_power(s, v)
    if len(v) < LEAST or hinge is None or power is None:
        return -math.inf
    scale = float(v.max() - v.min())
    turn = (hinge.after - hinge.before) * float(np.ptp(np.asarray(s)))
    if hinge.after >= 0.0 or turn >= -_EXACT * max(scale, 1e-300):
        return -math.inf
    return akaike(power.error, len(v), 3, scale) - akaike(hinge.error, len(v), 4, scale)


def _line(x: Floats, y: Floats) -> tuple[tuple[float, float], float]:
    """Return intercept, slope and squared error of the least squares line."""
    mx, my = x.mean(), y.mean()
    dx, dy = x - mx, y - my
    spread = float(dx @ dx)
    slope = float(dx @ dy) / spread if spread else 0.0
    rest = dy - slope * dx
    return (float(my - slope * mx), slope), float(rest @ rest)


def _solve(design: Floats, y: Floats) -> tuple[tuple[float, ...], float]:
    found: Any = np.linalg.lstsq(design, y, rcond=None)[0]
    rest = design @ found - y
    return tuple(map(float, found)), float(rest @ rest)


def _power_errors(t: Floats, y: Floats, powers: Floats) -> Floats:
    """Return the squared error of the best line in t^p for every p at once."""
    x = t[None, :] ** powers[:, None]
    dx, dy = x - x.mean(1, keepdims=True), y - y.mean()
    spread = np.maximum((dx * dx).sum(1), 1e-300)
    return np.asarray(np.maximum(float(dy @ dy) - (dx @ dy) ** 2 / spread, 0.0))


def _refined(t: Floats, y: Floats, low: float, high: float) -> float:
    """Return the exponent of least error between two, by golden section."""
    golden = (math.sqrt(5.0) - 1.0) / 2.0

    def error(power: float) -> float:
        return _line(t**power, y)[1]

    one, two = high - golden * (high - low), low + golden * (high - low)
    first, second = error(one), error(two)
    for _ in range(60):
        if first <= second:
            high, two, second = two, one, first
            one = high - golden * (high - low)
            first = error(one)
        else:
            low, one, first = one, two, second
            two = low + golden * (high - low)
            second = error(two)
    return (low + high) / 2.0
