"""The curve of quality against one-shot sparsity: its tolerance point, its break, and whether the break is one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import numpy as np

from openwork.core.rng import derive
from openwork.errors import MethodError
from openwork.methods.sparsify import _curve_fits as fits
from openwork.methods.sparsify._curve_fits import Floats, Hinge, Power

Mark = Literal["hinge", "tolerance"]


@dataclass(frozen=True)
class Interval:
    """A bootstrap interval.

    Attributes:
        low: lower end; None if it lies beyond the grid.
        high: upper end; None if it lies beyond the grid.
        sharp: share of the draws in which the broken line beats the smooth curve.
        draws: how many draws.
    """

    low: float | None
    high: float | None
    sharp: float
    draws: int


@dataclass(frozen=True)
class Curve:
    """Quality against the share of weights pruned in one shot, averaged over seeds.

    Attributes:
        sparsity: the grid, ascending from 0, the dense model.
        quality: what `evaluate` gave at each point, higher is better.
        floor: quality of a guess.
        scope: how weights were chosen.
        protocol: "prune, evaluate" or "prune, fine-tune, evaluate".
        samples: one array (points, examples) a seed: the quality of every example, of one column where only their mean
            is known.

    Raises:
        MethodError: if the grid does not ascend from 0, or lengths disagree, or a number is not finite.
    """

    sparsity: tuple[float, ...]
    quality: tuple[float, ...]
    floor: float = 0.0
    scope: str = "global"
    protocol: str = "prune, evaluate"
    samples: tuple[Floats, ...] = field(default=(), compare=False, repr=False)

    def __post_init__(self) -> None:
        check_grid(self.sparsity)
        if len(self.quality) != len(self.sparsity):
            raise MethodError(f"{len(self.sparsity)} sparsities and {len(self.quality)} qualities make no curve")
        for s, y in zip(self.sparsity, self.quality, strict=True):
            if not math.isfinite(y):
                raise MethodError(f"the quality at sparsity {s:g} is {y!r}; give a finite number, 0 for a broken model")
        if not math.isfinite(self.floor):
            raise MethodError(f"floor={self.floor!r}; give the finite quality of a guess")
        for values in self.samples:
            if values.ndim != 2 or values.shape[0] != len(self.sparsity) or not values.shape[1]:
                raise MethodError(f"samples of shape {values.shape} do not fit {len(self.sparsity)} points")

    def tolerance(self, delta: float | None = None) -> float | None:
        """Return where the curve first falls to y_0 - delta, interpolated on a straight line; None if it never does.

        Args:
            delta: the drop that is tolerated, in units of the quality; None is 1 % of y_0.
        """
        return _tolerance(np.asarray(self.sparsity), np.asarray(self.quality), delta)

    def hinge(self, *, whole: bool = False) -> Hinge | None:
        """Return the best broken line; None for fewer than four points or a dense model no better than a guess.

        Args:
            whole: fit all points instead of those down to half of (y_0 - floor) with the first one below.
        """
        if self.quality[0] <= self.floor:
            return None
        n = len(self.sparsity) if whole else fits.used(self.quality, self.floor)
        return fits.fit_hinge(self.sparsity[:n], self.quality[:n])

    def smooth(self) -> Power | None:
        """Return the best curve a + b s^p on the points that the broken line is fitted to."""
        if self.quality[0] <= self.floor:
            return None
        n = fits.used(self.quality, self.floor)
        return fits.fit_power(self.sparsity[:n], self.quality[:n])

    def advantage(self) -> float:
        """Return how much lower the broken line's AIC is than the smooth curve's; -inf without a downward break.

        A broken line can be laid through any bent curve, so that a break alone proves nothing.
        """
        if self.quality[0] <= self.floor:
            return -math.inf
        n = fits.used(self.quality, self.floor)
        return fits.advantage(self.sparsity[:n], self.quality[:n])

    def knee(self) -> float | None:
        """Return the essential sparsity: the break, if the broken line beats the smooth curve by `MARGIN` of AIC.

        None where the quality never falls by 1 %: a curve that bends without a loss has nothing to lose there.
        """
        found = self.hinge()
        sharp = found is not None and self.tolerance() is not None and self.advantage() > fits.MARGIN
        return found.at if found is not None and sharp else None

    def interval(
        self, mark: Mark = "hinge", *, level: float = 0.95, delta: float | None = None, draws: int = 1000, seed: int = 0
    ) -> Interval:
        """Return the percentile interval of a mark, from resampled seeds and, within each, resampled examples.

        The same examples are drawn at every point of a seed's curve, as they were evaluated.

        Args:
            mark: "hinge", the break, or "tolerance".
            level: coverage, in (0, 1).
            delta: as in `tolerance`.
            draws: how many bootstrap draws, at least 20.
            seed: of the draws.

        Raises:
            MethodError: if there is nothing to resample, or an argument is out of range.
        """
        if mark not in ("hinge", "tolerance") or not 0.0 < level < 1.0 or draws < 20:
            raise MethodError(
                f"mark={mark!r}, level={level!r}, draws={draws!r}: use 'hinge' or 'tolerance', a level between 0 and 1 and "
                "at least 20 draws"
            )
        curves = self._resampled(draws, seed)
        found, sharp = [], 0
        for y in curves:
            again = Curve(self.sparsity, tuple(map(float, y)), self.floor)
            broken = again.hinge()
            sharp += again.knee() is not None
            place = again.tolerance(delta) if mark == "tolerance" else None if broken is None else broken.at
            found.append(math.inf if place is None else place)
        edge = (1.0 - level) / 2.0
        low, high = (float(np.quantile(found, q, method="nearest")) for q in (edge, 1.0 - edge))
        return Interval(_inside(low), _inside(high), sharp / draws, draws)

    def summary(self, *, draws: int = 1000, seed: int = 0) -> dict[str, Any]:
        """Return every number that a reader of the curve needs, in plain JSON values."""
        broken, smooth, advantage = self.hinge(), self.smooth(), self.advantage()
        found: dict[str, Any] = {
            "scope": self.scope,
            "protocol": self.protocol,
            "floor": self.floor,
            "sparsity": list(self.sparsity),
            "quality": list(self.quality),
            "tolerance": self.tolerance(),
            "knee": self.knee(),
            "hinge": None if broken is None else {"at": broken.at, "before": broken.before, "after": broken.after},
            "smooth": None if smooth is None else {"start": smooth.start, "rise": smooth.rise, "power": smooth.power},
            "advantage": advantage if math.isfinite(advantage) else None,
            "reason": self.reason(),
        }
        if self._can_resample():
            for mark in ("hinge", "tolerance"):
                span = self.interval(mark, draws=draws, seed=seed)
                found[f"{mark}_interval"] = [span.low, span.high]
                found["sharp"] = span.sharp
        return found

    def reason(self) -> str:
        """Say in one sentence whether there is a knee, and why."""
        broken, advantage = self.hinge(), self.advantage()
        n = fits.used(self.quality, self.floor)
        if self.quality[0] <= self.floor:
            return f"no knee: the dense model ({self.quality[0]:.4g}) is no better than a guess ({self.floor:.4g})"
        if self.tolerance() is None:
            return f"no knee: the quality never falls by 1 % (up to sparsity {self.sparsity[-1]:g})"
        if n < fits.LEAST or broken is None:
            return f"no knee: only {n} points lie above half of the quality, {fits.LEAST} are needed; take a finer grid"
        if broken.after >= broken.before or math.isinf(advantage):
            return "no knee: the curve does not turn down"
        if advantage <= fits.MARGIN:
            side = "lower by" if advantage < 0.0 else "higher by only"
            return f"no knee: a smooth curve explains the points as well (its AIC is {side} {abs(advantage):.1f})"
        return f"knee at {broken.at:.3f}: the broken line beats a smooth curve (its AIC is {advantage:.1f} lower)"

    @classmethod
    def join(cls, curves: Iterable[Curve]) -> Self:
        """Return one curve of several seeds: the mean at every point, and all their samples.

        Raises:
            MethodError: if there is none, or grid, floor, scope or protocol differ.
        """
        every = list(curves)
        kinds = {(one.sparsity, one.floor, one.scope, one.protocol) for one in every}
        if len(kinds) != 1:
            raise MethodError(f"{len(every)} curves of {len(kinds)} kinds cannot be joined; they need one grid and one way")
        grid, floor, scope, protocol = kinds.pop()
        mean = np.mean([one.quality for one in every], axis=0)
        samples = tuple(values for one in every for values in (one.samples or (np.array(one.quality)[:, None],)))
        return cls(grid, tuple(map(float, mean)), floor, scope, protocol, samples)

    def _can_resample(self) -> bool:
        return len(self.samples) > 1 or any(values.shape[1] > 1 for values in self.samples)

    def _resampled(self, draws: int, seed: int) -> Floats:
        """Return bootstrap curves (draws, points)."""
        if not self._can_resample():
            raise MethodError("the curve holds one number a point; let evaluate return one a example, or join several seeds")
        rng = np.random.default_rng(derive(seed, "essential sparsity", "bootstrap"))
        total = np.zeros((draws, len(self.sparsity)))
        chosen = rng.integers(0, len(self.samples), (draws, len(self.samples)))
        for place in range(len(self.samples)):
            for index, values in enumerate(self.samples):
                rows = np.nonzero(chosen[:, place] == index)[0]
                n = values.shape[1]
                weights = rng.multinomial(n, np.full(n, 1.0 / n), size=len(rows)) / n
                total[rows] += weights @ values.T
        return np.asarray(total / len(self.samples))


def check_grid(grid: Sequence[float]) -> tuple[float, ...]:
    """Return the grid; raise a MethodError unless it ascends from 0 and stays in [0, 1]."""
    values = list(grid)
    if not values or values[0] != 0.0 or not all(math.isfinite(s) and 0.0 <= s <= 1.0 for s in values):
        raise MethodError(f"grid {values} must start at 0, the dense model, and stay within [0, 1]")
    if any(two <= one for one, two in itertools.pairwise(values)):
        raise MethodError(f"grid {values} must ascend, every sparsity once")
    return tuple(values)


def from_points(points: Mapping[float, Any], floor: float, scope: str, protocol: str) -> Curve:
    """Return the curve of what `evaluate` gave at each sparsity: a number, or one a example.

    Raises:
        MethodError: if the points have different numbers of examples, or a value is no finite number.
    """
    grid = tuple(sorted(points))
    values = [as_examples(points[s], s) for s in grid]
    counts = {len(one) for one in values}
    if len(counts) > 1:
        raise MethodError(f"evaluate gave {sorted(counts)} numbers at different sparsities; it must score the same examples")
    samples = np.stack(values)
    return Curve(grid, tuple(map(float, samples.mean(1))), floor, scope, protocol, (samples,))


def as_examples(value: Any, sparsity: float) -> Floats:
    """Return what `evaluate` gave as a vector of floats, one a example.

    Raises:
        MethodError: if it is no number, empty, or not finite.
    """
    try:
        found = np.asarray(value.detach().cpu() if hasattr(value, "detach") else value, np.float64).reshape(-1)
    except (TypeError, ValueError) as error:
        raise MethodError(f"evaluate gave a {type(value).__name__} at sparsity {sparsity:g}: {error}") from error
    if not len(found):
        raise MethodError(f"evaluate gave no number at sparsity {sparsity:g}")
    if not np.isfinite(found).all():
        raise MethodError(
            f"evaluate gave {found[~np.isfinite(found)][0]} at sparsity {sparsity:g}; give finite numbers, higher is "
            "better: accuracy, or exp(-loss) instead of a loss that can overflow"
        )
    return found


def _tolerance(s: Floats, y: Floats, delta: float | None) -> float | None:
    drop = 0.01 * abs(float(y[0])) if delta is None else float(delta)
    if not (math.isfinite(drop) and drop >= 0.0):
        raise MethodError(f"delta={delta!r}; give the tolerated drop, a number of at least 0")
    bar = float(y[0]) - drop
    below = np.nonzero(y[1:] <= bar)[0]
    if drop == 0.0:
        below = np.nonzero(y[1:] < bar)[0]
    if not len(below):
        return None
    i = int(below[0])
    fall = float(y[i] - y[i + 1])
    share = (float(y[i]) - bar) / fall if fall > 0.0 else 1.0
    return float(s[i] + (s[i + 1] - s[i]) * min(1.0, max(0.0, share)))


def _inside(value: float) -> float | None:
    return value if math.isfinite(value) else None
