"""What methods of pruning and retraining share: densities of the phases, retraining schedules, a pruning, a leg."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from openwork.core.masks import Masks
from openwork.core.schedules import Schedule
from openwork.errors import MaskError, MethodError
from openwork.sparsifier.parameters import unwrap
from openwork.sparsifier.procedure import Leg, Train
from openwork.sparsifier.sparsifier import Params, Sparsifier

SCHEDULES = ("ft", "lrw", "slr", "clr", "llr", "allr")
WARMUP = 0.1  # share of a retraining; fine-tuning and rewinding have none


def phase_densities(density: float, phases: int) -> list[float]:
    """Return density^(k / phases) for k = 1..phases: every phase prunes the same share of what is left.

    In sparsities, S_k = 1 - (1 - S)^(k / P); the last one is `density` itself.
    """
    if phases < 1:
        raise MethodError(f"phases={phases!r}: pruning takes at least one phase")
    return [density ** (k / phases) for k in range(1, phases)] + [density]


def share_steps(total_steps: int, pretrain: float, phases: int) -> tuple[int, list[int]]:
    """Return the steps of pretraining and of each phase; they sum to `total_steps`, earlier phases take the rest.

    Raises:
        MethodError: if a phase would have no step.
    """
    if not 0.0 <= pretrain < 1.0:
        raise MethodError(f"pretrain={pretrain!r} is not in [0, 1); it is the share of total_steps before pruning")
    dense = round(pretrain * total_steps)
    each, left = divmod(total_steps - dense, phases)
    if each < 1:
        raise MethodError(
            f"total_steps={total_steps!r} leaves {total_steps - dense} steps after pretraining for {phases} phases; "
            "every phase needs at least one"
        )
    return dense, [each + (phase < left) for phase in range(phases)]


def base_rate(base: Schedule | Sequence[float] | None) -> Schedule:
    """Return the rate of pretraining by progress: as given, a list of rates read from end to end, or 1 - t for None."""
    if base is None:
        return lambda t: 1.0 - t
    if callable(base):
        return base
    return _read_along(_checked(list(base)))


def history_of(base: Schedule | Sequence[float] | None, steps: int) -> list[float]:
    """Return the rates of pretraining step by step, as multiples of the run's base rate; given ones as they are."""
    if base is not None and not callable(base):
        return _checked(list(base))
    rate = base_rate(base)
    return _checked([rate(step / steps) for step in range(steps)]) if steps else []


def retrain_schedule(
    name: str, history: Sequence[float], steps: int, *, lost: float = 1.0, pruned: float = 1.0, scale: float = 1.0
) -> Schedule:
    """Return the learning rate of a retraining, as a multiple of the run's base rate, by progress in [0, 1).

    With h and l the highest rate of pretraining and the lowest after it: `ft` is l; `lrw` the last `steps` rates
    (Renda et al. 2020; all of them, stretched, where there are fewer); `slr` all rates, compressed, and `clr` a cosine
    from h to l (Le & Hua 2021); `llr` a line from h to 0, and `allr` the same from `adaptive_peak` (Zimmer et al. 2023).
    All but `ft` and `lrw` first rise from 0 in half a cosine over a tenth of the steps.

    Args:
        name: one of the six.
        history: rates of pretraining, step by step; empty counts as a single rate of 1.
        steps: optimizer steps of the retraining.
        lost: for `allr`, the relative norm lost in pruning.
        pruned: for `allr`, the share of the weights that were left that was pruned.
        scale: factor on all rates.

    Raises:
        MethodError: if the name is unknown.
    """
    if name not in SCHEDULES:
        raise MethodError(f"schedule={name!r} is unknown; use one of {', '.join(SCHEDULES)}")
    rates = [scale * rate for rate in history or (1.0,)]
    peak = max(range(len(rates)), key=rates.__getitem__)
    high, low = rates[peak], min(rates[peak:])
    if name == "ft":
        return lambda _t: low
    if name == "lrw":
        return _read_along(rates[-steps:])
    if name == "slr":
        return _warmed(_read_along([high] * peak + rates[peak:]), high)
    if name == "clr":
        return _warmed(lambda t: low + 0.5 * (high - low) * (1.0 + math.cos(math.pi * t)), high)
    start = high if name == "llr" else adaptive_peak(high, steps / len(rates), lost, pruned)
    return _warmed(lambda t: start * (1.0 - t), start)


def adaptive_peak(high: float, length: float, lost: float, pruned: float) -> float:
    """Return clip(high d / sqrt(p), high min(length, 1), high), the first rate of ALLR (Zimmer et al. 2023).

    Args:
        high: highest rate of pretraining.
        length: steps of the retraining over steps of pretraining.
        lost: d = |w - m w| / |w|, at most sqrt(p) when the smallest weights are pruned.
        pruned: p, the share of the weights that were left that was pruned.
    """
    wanted = lost / math.sqrt(pruned) if pruned > 0 else 0.0
    return high * max(min(length, 1.0), min(1.0, wanted))


def prune(model: nn.Module, masks: Masks | None, target: float, **settings: Any) -> tuple[Masks, float]:
    """Prune in place the smallest magnitudes of what `masks` keeps, down to `target`.

    Args:
        model: any module.
        masks: what is kept now; None is everything.
        target: kept share of all masked weights afterwards.
        settings: `density`, `layerwise` and the options of a Sparsifier.

    Returns:
        the new masks, and the share of the norm of the masked weights that was lost.
    """
    pruning = Pruning(masks=masks, target=target, **settings)
    found = pruning.attach(model).finalize()
    return found, pruning.lost


class Pruning(Sparsifier):
    """One pruning by magnitude, of what given masks keep, down to a density on the way to the final one."""

    def __init__(self, density: float, *, masks: Masks | None, target: float, layerwise: bool, **options: Any) -> None:
        super().__init__(density, **options)
        self._start, self._target, self._layerwise = masks, target, layerwise
        self.lost = 0.0

    def initial(self, params: Params) -> Masks:
        """Shrink, and note the relative norm that is lost."""
        start = self._start or Masks.ones(params)
        start = Masks({name: start[name].to(param.device) for name, param in params.items()})
        masks = self.shrink(params, start, self._target, layerwise=self._layerwise)
        squares = {name: param.detach().double().square() for name, param in params.items()}
        whole = sum(float(square.sum()) for square in squares.values())
        gone = sum(float(square[~masks[name]].sum()) for name, square in squares.items())
        self.lost = math.sqrt(gone / whole) if whole > 0 else 0.0
        return masks


def run_leg(train: Train, model: nn.Module, sparsifier: Sparsifier | None, leg: Leg) -> nn.Module:
    """Return `train(model, sparsifier, leg)`, checked: it is a model, and zero where the sparsifier masks it.

    Raises:
        MethodError: if `train` returns no model, or did not hold the masks.
    """
    trained: object = train(model, sparsifier, leg)
    if not isinstance(trained, nn.Module):
        raise MethodError(f"train returned {type(trained).__name__} for leg {leg.name!r}; it must return the model")
    if sparsifier is not None:
        try:
            if not sparsifier.masks:
                raise MaskError("it was never attached")
            sparsifier.masks.check(unwrap(trained))
        except MaskError as error:
            raise MethodError(
                f"train did not hold the masks in leg {leg.name!r}; it must call sparsifier.attach(model, optimizer) "
                f"before its first step ({error})"
            ) from error
    return trained


@torch.no_grad()
def count_nonzero(model: nn.Module, masks: Masks) -> int:
    """Return how many of the weights under the masks are not zero; fewer than are kept where kept ones vanished."""
    params = dict(unwrap(model).named_parameters())
    return sum(int(torch.count_nonzero(params[name])) for name in masks)


def _read_along(rates: Sequence[float]) -> Schedule:
    """Read `rates` from end to end; as many steps as rates meet each of them once."""
    return lambda t: rates[min(int(t * len(rates) + 1e-9), len(rates) - 1)]


def _warmed(rate: Schedule, high: float) -> Schedule:
    """Rise to `high` in half a cosine over the first tenth, then run through `rate`."""

    def warmed(t: float) -> float:
        if t < WARMUP:
            return 0.5 * high * (1.0 - math.cos(math.pi * t / WARMUP))
        return rate((t - WARMUP) / (1.0 - WARMUP))

    return warmed


def _checked(rates: list[float]) -> list[float]:
    if not rates or not all(math.isfinite(rate) and rate >= 0 for rate in rates) or max(rates) <= 0:
        raise MethodError(
            "base_schedule must give finite rates of at least 0, some above 0, as multiples of the run's base rate"
        )
    return rates
