"""Allocations: how much of each layer stays, for one density over all.

Every rule returns densities that are exactly count / size, with the counts summing to round(density * total). Ideal
counts are rounded by largest remainder; equal remainders go by the order of the layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from openwork.core.select import count_of, top
from openwork.errors import AllocationError

Shapes = Mapping[str, torch.Size]
Allocation = Callable[[Shapes, float], dict[str, float]]


def uniform(shapes: Shapes, density: float) -> dict[str, float]:
    """Give every layer the same density, the first and the last included."""
    return _exact(shapes, dict.fromkeys(shapes, density), density)


def uniform_plus(shapes: Shapes, density: float, *, last: float = 0.2) -> dict[str, float]:
    """Keep the first layer dense and at least `last` of the last one; the rest share what remains.

    Gale, Elsen, Hooker 2019, section 4.2; Liu et al. 2022, section 3. Unlike the released code of the latter, the
    remainder is divided by the size of the rest, so that the total is exact.
    """
    names = list(shapes)
    fixed = {names[0]: 1.0} if names else {}
    if len(names) > 1 and density < last:
        fixed[names[-1]] = last
    return _remainder(shapes, density, fixed, _flat)


def er(shapes: Shapes, density: float) -> dict[str, float]:
    """Erdos-Renyi: density of a layer proportional to (in + out) / (in * out), kernels left out (Mocanu et al. 2018)."""
    return _proportional(shapes, density, lambda shape: sum(shape[:2]) / math.prod(shape[:2]))


def erk(shapes: Shapes, density: float, *, power: float = 1.0) -> dict[str, float]:
    """Erdos-Renyi-kernel: density proportional to sum(dims) / prod(dims) (Evci et al. 2020, section 3).

    Layers whose share would exceed one become dense, the largest first, and the rest is solved again.

    Args:
        shapes: weight shapes (out, in, *kernel).
        density: kept share over all layers.
        power: exponent on the share; 0 is uniform.
    """
    return _proportional(shapes, density, lambda shape: (sum(shape) / math.prod(shape)) ** power)


def erk_plus(shapes: Shapes, density: float, *, last: float = 1.0) -> dict[str, float]:
    """ERK with the last layer at density `last`; the rest share what remains (Liu et al. 2022, section 3)."""
    fixed = {list(shapes)[-1]: last} if shapes else {}
    return _remainder(shapes, density, fixed, erk)


def explicit(densities: Mapping[str, float]) -> Allocation:
    """Return the allocation of given layer densities; the total that is asked for must agree with them to a weight a layer.

    Raises:
        AllocationError: (when called) if a layer is missing or unknown, or the total disagrees.
    """

    def allocate(shapes: Shapes, density: float) -> dict[str, float]:
        if set(densities) != set(shapes):
            odd = sorted(set(densities) ^ set(shapes))
            raise AllocationError(f"explicit densities and layers disagree on {', '.join(odd)}")
        counts = {name: count_of(densities[name], math.prod(shape)) for name, shape in shapes.items()}
        asked, given = count_of(density, _total(shapes)), sum(counts.values())
        if abs(asked - given) > len(counts):
            raise AllocationError(
                f"the layers' densities keep {given} weights, but density {density} of {_total(shapes)} is {asked}; "
                f"ask for density {given / _total(shapes):.6g}"
            )
        return {name: counts[name] / max(1, math.prod(shape)) for name, shape in shapes.items()}

    return allocate


def from_scores(scores: Mapping[str, Tensor], density: float) -> dict[str, float]:
    """Return the layer shares of a global top-k over all scores: SNIP or GraSP ratios, or global magnitude.

    Args:
        scores: name -> finite scores of the weight's shape; higher stays.
        density: kept share over all layers.
    """
    masks = top_globally(scores, density)
    return {name: int(mask.sum()) / max(1, mask.numel()) for name, mask in masks.items()}


def top_globally(scores: Mapping[str, Tensor], density: float) -> dict[str, Tensor]:
    """Return the masks of the highest scores over all layers together; ties go by layer order, then by index."""
    if not scores:
        return {}
    flat = torch.cat([score.detach().reshape(-1).double() for score in scores.values()])
    kept = top(flat, count_of(density, flat.numel()))
    parts = torch.split(kept, [score.numel() for score in scores.values()])
    return {name: part.reshape(scores[name].shape) for name, part in zip(scores, parts, strict=True)}


def named(name: str) -> Allocation:
    """Return the allocation called `name`: uniform, uniform+, er, erk, erk+.

    Raises:
        AllocationError: for any other name.
    """
    rules: dict[str, Allocation] = {
        "uniform": uniform, "uniform+": uniform_plus, "er": er, "erk": erk, "erk+": erk_plus,
    }  # fmt: skip
    if name not in rules:
        raise AllocationError(f"unknown allocation {name!r}: use one of {', '.join(rules)}")
    return rules[name]


def _flat(shapes: Shapes, density: float) -> dict[str, float]:
    return dict.fromkeys(shapes, density)


def _total(shapes: Shapes) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def _remainder(shapes: Shapes, density: float, fixed: Mapping[str, float], rule: Allocation) -> dict[str, float]:
    """Give `fixed` layers their densities and let `rule` share what remains of the budget among the others."""
    rest = {name: shape for name, shape in shapes.items() if name not in fixed}
    spent = sum(share * math.prod(shapes[name]) for name, share in fixed.items())
    size = _total(rest)
    left = (density * _total(shapes) - spent) / size if size else 0.0
    if not 0.0 <= left <= 1.0:
        # the fixed layers alone exceed the budget (or cannot use it up): no rule can keep them as asked
        raise AllocationError(
            f"density {density} of {_total(shapes)} weights cannot hold {', '.join(fixed)} at "
            f"{', '.join(map(str, fixed.values()))}; raise the density or use erk or uniform"
        )
    return _exact(shapes, {**rule(rest, left), **fixed}, density)


def _proportional(shapes: Shapes, density: float, share: Callable[[torch.Size], float]) -> dict[str, float]:
    """Solve sum(min(1, eps * raw_l) * size_l) = density * total, making the layers of largest raw dense first."""
    sizes = {name: math.prod(shape) for name, shape in shapes.items() if math.prod(shape)}
    raw = {name: share(shapes[name]) for name in sizes}
    dense: set[str] = set()
    epsilon = 0.0
    while len(dense) < len(sizes):
        free = [name for name in sizes if name not in dense]
        budget = density * sum(sizes.values()) - sum(sizes[name] for name in dense)
        epsilon = budget / sum(raw[name] * sizes[name] for name in free)
        largest = max(raw[name] for name in free)
        if epsilon * largest <= 1.0:
            break
        dense |= {name for name in free if raw[name] == largest}
    ideal = {name: 1.0 if name in dense else max(0.0, epsilon * raw[name]) for name in sizes}
    return _exact(shapes, {name: ideal.get(name, 0.0) for name in shapes}, density)


def _exact(shapes: Shapes, ideal: Mapping[str, float], density: float) -> dict[str, float]:
    """Round ideal densities to counts that sum to round(density * total): largest remainder, then layer order."""
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    goal = count_of(density, sum(sizes.values()))
    wanted = {name: min(1.0, ideal[name]) * size for name, size in sizes.items()}
    counts = {name: min(sizes[name], math.floor(value + 1e-9)) for name, value in wanted.items()}
    short = goal - sum(counts.values())
    order = sorted(sizes, key=partial(_need, wanted, counts), reverse=True)
    while short:
        for name in order if short > 0 else reversed(order):
            step = (short > 0) - (short < 0)
            if short and 0 <= counts[name] + step <= sizes[name]:
                counts[name] += step
                short -= step
    return {name: counts[name] / size if size else 0.0 for name, size in sizes.items()}


def _need(wanted: Mapping[str, float], counts: Mapping[str, int], name: str) -> float:
    return round(wanted[name] - counts[name], 9)
