"""How much of each layer stays: OWL's outlier shares, densities given by name, and a global magnitude ranking.

Counts are whole and sum to round(density * total).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase

import numpy as np
import torch
from torch import Tensor

from openwork.core.select import count_of
from openwork.errors import AllocationError

Counts = dict[str, int]


def uniform(sizes: Mapping[str, int], density: float) -> Counts:
    """Give every layer the same density."""
    return rounded(sizes, dict.fromkeys(sizes, density), density)


def outlier_share(score: Tensor, multiple: float) -> float:
    """Return the share of entries above `multiple` times their mean (OWL, section 3.2: D of a layer, M = multiple).

    Args:
        score: |W_oi| ||X_i||_2 of a layer, any shape.
    """
    return float((score > multiple * score.mean()).double().mean())


def owl(sizes: Mapping[str, int], shares: Mapping[str, float], density: float, spread: float) -> Counts:
    """Return counts that keep more where there are more outliers (Yin et al. 2024, section 3.3).

    Densities are density + c (D - mean D), with the mean weighed by size and c so large that the farthest departs by
    `spread`. (The paper scales D to an interval of 2 spread and then subtracts its mean, which may depart further.)

    Args:
        sizes: weights of each layer.
        shares: D of each layer; layers of one block usually have the block's.
        density: kept share over all layers.
        spread: lambda, lowered to min(density, 1 - density) where it is larger.
    """
    total = sum(sizes.values())
    mean = sum(shares[name] * size for name, size in sizes.items()) / max(1, total)
    apart = max((abs(shares[name] - mean) for name in sizes), default=0.0)
    spread = min(spread, density, 1.0 - density)
    slope = spread / apart if apart > 0 else 0.0
    return rounded(sizes, {name: density + slope * (shares[name] - mean) for name in sizes}, density)


def explicit(sizes: Mapping[str, int], given: Mapping[str, float], density: float | None) -> Counts:
    """Return the counts of densities by parameter name, layer name or glob; a later key overrides an earlier one.

    Raises:
        AllocationError: if a key matches nothing, a layer has no density, a density is no share, or the total is not
            `density` to a weight a layer.
    """
    found: dict[str, float] = {}
    for key, value in given.items():
        names = [name for name in sizes if _named(name, key)]
        if not names:
            raise AllocationError(f"allocation names {key!r}, which is no layer that is pruned; they are {_some(sizes)}")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value <= 1.0:
            raise AllocationError(f"allocation gives {key!r} the density {value!r}: use a share in [0, 1]")
        found |= dict.fromkeys(names, float(value))
    missing = [name for name in sizes if name not in found]
    if missing:
        raise AllocationError(f"allocation gives no density for {_some(missing)}: add them, or exclude them from pruning")
    counts = {name: count_of(found[name], size) for name, size in sizes.items()}
    total, kept = sum(sizes.values()), sum(counts.values())
    if density is not None and abs(count_of(density, total) - kept) > len(sizes):
        raise AllocationError(
            f"the layers' densities keep {kept} of {total} weights, but density={density:g} is {count_of(density, total)}; "
            f"leave density out, or ask for {kept / total:.6g}"
        )
    return counts


def by_global_magnitude(weights: Callable[[], Iterable[tuple[str, Tensor]]], density: float) -> Counts:
    """Return how many weights of each layer are among the largest |w| of all; ties go by layer order.

    The threshold is found by the digits of the magnitudes, most significant first, so that one weight is held at a time.

    Args:
        weights: called several times, it goes through (name, weight) in the same order.
        density: kept share over all layers.
    """
    total = sum(weight.numel() for _, weight in weights())
    goal = count_of(density, total)
    prefix, above = 0, 0
    for digit in (3, 2, 1, 0):
        counts = np.zeros(65536, dtype=np.int64)
        for _, weight in weights():
            bits = _bits(weight)
            if digit < 3:
                bits = bits[bits >> (16 * (digit + 1)) == prefix]
            counts += np.bincount((bits >> (16 * digit)) & 65535, minlength=65536)
        higher = above + np.concatenate([np.cumsum(counts[::-1])[::-1][1:], [0]])  # with a higher digit
        place = int(np.argmax(higher < goal)) if goal > 0 else 65535
        prefix, above = prefix << 16 | place, int(higher[place])
    kept: Counts = {}
    spare = goal - above
    for name, weight in weights():
        bits = _bits(weight)
        ties = min(max(spare, 0), int((bits == prefix).sum()))
        spare -= ties
        kept[name] = (int((bits > prefix).sum()) if goal > 0 else 0) + ties
    return kept


def rounded(sizes: Mapping[str, int], ideal: Mapping[str, float], density: float) -> Counts:
    """Round ideal densities to counts that sum to round(density * total): largest remainder, then layer order."""
    goal = count_of(density, sum(sizes.values()))
    counts = {name: min(size, max(0, math.floor(ideal[name] * size + 1e-9))) for name, size in sizes.items()}
    order = sorted(sizes, key=lambda name: round(counts[name] - ideal[name] * sizes[name], 9))
    while (short := goal - sum(counts.values())) != 0:
        step = 1 if short > 0 else -1
        free = [name for name in order[::step] if 0 <= counts[name] + step <= sizes[name]]
        for name in free[: abs(short)]:
            counts[name] += step
    return counts


def _bits(weight: Tensor) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Return |w| as integers of the same order: the bits of a positive float64."""
    return weight.detach().reshape(-1).double().abs().cpu().contiguous().view(torch.int64).numpy()


def _named(name: str, key: str) -> bool:
    layer = name.removesuffix(".weight")
    return fnmatchcase(name, key) or fnmatchcase(layer, key) or layer.startswith(f"{key}.")


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:5]) + (f" and {len(listed) - 5} more" if len(listed) > 5 else "")
