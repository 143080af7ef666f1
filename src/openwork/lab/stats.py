"""Means, paired differences and tests over seeds: Student's t, two one-sided tests, Holm's correction.

Everything is exact where there is nothing to estimate: one value has no interval, values that are all alike have a
point interval and a p of 0 or 1. Differences below float rounding count as none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from openwork.errors import RecipeError

Arm = TypeVar("Arm")
Seed = TypeVar("Seed")
Alternative = Literal["greater", "less", "two-sided"]

ROUNDING = 1e-12
"""Relative size below which a difference is taken for float rounding."""


@dataclass(frozen=True)
class Interval:
    """A mean over `n` values and its interval; `low` and `high` are nan where there is none (n < 2, non-finite)."""

    mean: float
    low: float
    high: float
    n: int

    def as_dict(self) -> dict[str, float | None]:
        """Return `mean`, `low` and `high` for JSON: None where a number is not finite."""
        return {key: value if math.isfinite(value) else None for key, value in self._numbers().items()}

    def _numbers(self) -> dict[str, float]:
        return {"mean": self.mean, "low": self.low, "high": self.high}


@dataclass(frozen=True)
class Equivalence:
    """The result of two one-sided tests: the p of "not equivalent" (nan for n < 2) and the 90 % interval."""

    p: float
    interval: Interval


def mean_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Return the mean of independent `values` and its interval by Student's t with n - 1 degrees of freedom.

    No value gives a nan mean; one value, or a non-finite one, gives a mean without interval; values that are all
    alike give a point.

    Raises:
        RecipeError: if `level` is not between 0 and 1.
    """
    if not 0.0 < level < 1.0:
        raise RecipeError(f"interval level {level!r} is not between 0 and 1: write 0.95 for 95 %")
    mean, error, n = _moments(values)
    if math.isnan(error):
        return Interval(mean, math.nan, math.nan, n)
    from scipy.special import stdtrit

    reach = 0.0 if error == 0.0 else float(stdtrit(n - 1, 0.5 + level / 2.0)) * error
    return Interval(mean, mean - reach, mean + reach, n)


def paired_interval(a: Mapping[Seed, float], b: Mapping[Seed, float], level: float = 0.95) -> Interval:
    """Return the mean of `a - b` over the seeds that both have, with its interval."""
    return mean_interval(list(contrast({"a": a, "b": b}, {"a": 1.0, "b": -1.0}).values()), level)


def contrast(values: Mapping[Arm, Mapping[Seed, float]], weights: Mapping[Arm, float]) -> dict[Seed, float]:
    """Return the weighted sum over arms for each seed that all weighted arms have, in the order of the first arm.

    A sum below float rounding of its terms is returned as 0.

    Raises:
        RecipeError: if `weights` is empty or names an arm that `values` lacks.
    """
    if not weights:
        raise RecipeError("a contrast without arms compares nothing: write weights such as {'rigl': 1, 'set': -1}")
    for arm in weights:
        if arm not in values:
            raise RecipeError(f"the contrast names arm {arm!r}, which was not run; known: {', '.join(map(str, values))}")
    first, *others = [values[arm] for arm in weights]
    seeds = [seed for seed in first if all(seed in other for other in others)]
    return {seed: _settled([weight * values[arm][seed] for arm, weight in weights.items()]) for seed in seeds}


def t_test(values: Sequence[float], null: float = 0.0, alternative: Alternative = "two-sided") -> float:
    """Return the p of "the mean is `null`" (or lies beyond it, away from `alternative`) by Student's t; nan for n < 2.

    Values that are all alike give 0 if they contradict the null hypothesis and 1 if they do not.

    Raises:
        RecipeError: if `alternative` is none of "greater", "less", "two-sided".
    """
    if alternative not in ("greater", "less", "two-sided"):
        raise RecipeError(f"alternative {alternative!r} is none of 'greater', 'less', 'two-sided'")
    mean, error, n = _moments(values)
    if math.isnan(error):
        return math.nan
    distance = _settled([mean, -null])
    above, below = _tails(distance, error, n)
    if alternative == "two-sided":
        return min(1.0, 2.0 * min(above, below))
    return above if alternative == "greater" else below


def equivalence_test(differences: Sequence[float], margin: float) -> Equivalence:
    """Test by two one-sided t-tests (TOST) that the mean of paired `differences` lies within ± `margin`.

    The p is the larger of the two one-sided ones; p < 0.05 exactly when the 90 % interval lies inside the margin.
    Source: Schuirmann, "A comparison of the two one-sided tests procedure and the power approach for assessing the
    equivalence of average bioavailability", 1987.

    Raises:
        RecipeError: if `margin` is not a positive number.
    """
    if not (math.isfinite(margin) and margin > 0.0):
        raise RecipeError(f"equivalence margin {margin!r} is not a positive number: say which difference is small")
    lower, upper = t_test(differences, -margin, "greater"), t_test(differences, margin, "less")
    return Equivalence(max(lower, upper), mean_interval(differences, 0.90))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's step-down adjusted p values in the given order.

    A nan (no test was made) stays nan and is not counted.

    Source: Holm, "A simple sequentially rejective multiple test procedure", 1979.

    Raises:
        RecipeError: if a p lies outside 0 to 1.
    """
    for p in p_values:
        if not (math.isnan(p) or 0.0 <= p <= 1.0):
            raise RecipeError(f"p value {p!r} lies outside 0 to 1")
    order = sorted((index for index, p in enumerate(p_values) if not math.isnan(p)), key=lambda index: p_values[index])
    adjusted = [math.nan] * len(p_values)
    highest = 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def _moments(values: Sequence[float]) -> tuple[float, float, int]:
    """Return mean, standard error and n; the error is 0 for values alike up to rounding, nan where there is none."""
    n = len(values)
    if n == 0:
        return math.nan, math.nan, 0
    if not all(map(math.isfinite, values)):
        return sum(values) / n, math.nan, n
    if n == 1 or max(values) == min(values):
        return float(values[0]), math.nan if n == 1 else 0.0, n
    _, exponent = math.frexp(max(map(abs, values)))
    scaled = [math.ldexp(value, -exponent) for value in values]  # exact, and no square can overflow
    mean = math.fsum(scaled) / n
    if max(scaled) - min(scaled) <= ROUNDING * max(map(abs, scaled)):
        return math.ldexp(mean, exponent), 0.0, n
    variance = math.fsum((value - mean) ** 2 for value in scaled) / (n - 1)
    return math.ldexp(mean, exponent), math.ldexp(math.sqrt(variance / n), exponent), n


def _tails(distance: float, error: float, n: int) -> tuple[float, float]:
    """Return the p of a mean that far above the null, for "greater" and for "less"."""
    if error == 0.0:
        return float(distance <= 0.0), float(distance >= 0.0)
    from scipy.special import stdtr

    return float(stdtr(n - 1, -distance / error)), float(stdtr(n - 1, distance / error))


def _settled(terms: Sequence[float]) -> float:
    """Return the sum of `terms`, or 0 where it is no more than their rounding."""
    try:
        total, size = math.fsum(terms), math.fsum(map(abs, terms))
    except (OverflowError, ValueError):  # beyond float64, or both infinities
        return math.nan
    return 0.0 if abs(total) <= ROUNDING * size < math.inf else total
