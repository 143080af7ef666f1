"""The one prune-and-grow core of dynamic sparse training: shrink over all layers, drop and grow within one.

Positions that are off never compete with positions that are on, even where a kept weight happens to be zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from openwork.core.patterns import Pattern, Unstructured, pick
from openwork.core.select import check_finite, count_of, top
from openwork.errors import MaskError


def keep(active: Tensor, score: Tensor, count: int) -> Tensor:
    """Return the `count` highest-scored positions of those that are on; ties to the lowest index.

    Args:
        active: bool, any shape.
        score: finite numbers of that shape.
        count: 0 to the number of active positions.
    """
    on = active.reshape(-1).nonzero().squeeze(1)
    if count > on.numel():
        raise MaskError(f"cannot keep {count} of {on.numel()} active weights")
    kept = torch.zeros(active.numel(), dtype=torch.bool, device=active.device)
    kept[on[top(score.reshape(-1)[on], count)]] = True
    return kept.reshape(active.shape)


def shrink(masks: Mapping[str, Tensor], scores: Mapping[str, Tensor], density: float, pattern: Pattern) -> dict[str, Tensor]:
    """Keep the highest scores over all layers together, among what is on (GraNet's and GMP's global shrink).

    Every layer keeps its best unit, so that no layer is cut off. With patterns whose units have several weights the
    mean score of a unit competes, and units are taken while they fit the count.

    Args:
        masks: name -> bool mask.
        scores: name -> score of the mask's shape.
        density: kept share of all weights, at most the masks' own.
        pattern: unstructured, block, kernel group, channel or layer.

    Returns:
        name -> bool mask; for unstructured masks exactly round(density * total) are kept, at least one a layer.
    """
    goal = count_of(density, sum(mask.numel() for mask in masks.values()))
    tiles = {name: pattern.tiles(scores[name]) for name in masks}
    active = {name: pattern.tiles(mask.to(scores[name].dtype)) > 0 for name, mask in masks.items()}
    sizes = {name: pattern.sizes(masks[name].shape) for name in tiles}
    # smaller units, of leftover channels, come scaled up to the largest
    flat = torch.cat([(tiles[name].double() / int(size.max())).reshape(-1) for name, size in sizes.items()])
    on = torch.cat([active[name].reshape(-1) for name in tiles])
    weights = torch.cat([size.reshape(-1) for size in sizes.values()]).to(flat.device)
    chosen = _within(flat, on, weights, _best_of_each(list(active.values()), flat), goal)
    parts = torch.split(chosen, [tile.numel() for tile in tiles.values()])
    return {
        name: pattern.untile(part.reshape(tiles[name].shape), masks[name].shape)
        for name, part in zip(masks, parts, strict=True)
    }


def tighten(mask: Tensor, score: Tensor, density: float, pattern: Pattern) -> Tensor:
    """Keep the highest scores of one layer among what is on, down to `density` of the layer.

    Args:
        mask: bool mask of the layer.
        score: score of the mask's shape.
        density: kept share of the layer's units; a layer that keeps fewer already is left alone.
        pattern: any.
    """
    active, tiles = pattern.tiles(mask.to(score.dtype)) > 0, pattern.tiles(score).double()
    check_finite(tiles)
    below = torch.nextafter(tiles.min(), tiles.new_tensor(-math.inf))  # lower than any, however large the scores are
    ranked = torch.where(active, tiles, below)
    return pattern.untile(pick(ranked, pattern.quota(density, tiles.shape[1])) & active, mask.shape)


def prune_and_grow(
    mask: Tensor, drop: Tensor, grow: Tensor, share: float, *, pattern: Pattern | None = None, round_up: bool = False
) -> Tensor:
    """Drop a share of a layer's kept units and grow as many where it is off, those just dropped included.

    Args:
        mask: bool mask of the layer.
        drop: score of the mask's shape; the lowest of the kept ones leave.
        grow: score of the mask's shape; the highest of those then off come on.
        share: share of the kept units that leaves, in [0, 1].
        pattern: the units; with N:M every group is filled up to the number it had.
        round_up: take ceil(share * kept) as GraNet does, else floor as RigL does.

    Returns:
        bool mask with as many kept units as before. A unit dropped and grown again is simply kept.
    """
    pattern = pattern or Unstructured()
    active = pattern.tiles(mask.to(drop.dtype)) > 0
    kept = int(active.sum())
    count = math.ceil(share * kept - 1e-9) if round_up else math.floor(share * kept + 1e-9)
    if count == 0:
        return mask
    survivors = keep(active, pattern.tiles(drop), kept - count)
    score = pattern.tiles(grow)
    one = active.shape[0] == 1
    grown = keep(~survivors, score, count) if one else _fill_rows(survivors, score, active.sum(dim=1))
    return pattern.untile(survivors | grown, mask.shape)


def _fill_rows(survivors: Tensor, score: Tensor, quota: Tensor) -> Tensor:
    """Return, for every row, its survivors and the highest-scored others up to the row's quota."""
    check_finite(score)
    order = score.argsort(dim=1, descending=True, stable=True)
    place = torch.empty_like(order)
    place.scatter_(1, order, torch.arange(score.shape[1], device=score.device).expand_as(order))
    place = torch.where(survivors, -1, place)
    first = place.argsort(dim=1, stable=True)
    seat = torch.empty_like(first)
    seat.scatter_(1, first, torch.arange(score.shape[1], device=score.device).expand_as(first))
    return seat < quota.unsqueeze(1)


def _best_of_each(active: list[Tensor], flat: Tensor) -> Tensor:
    """Return the flat positions of every layer's highest-scored active unit."""
    best, start = [], 0
    for on in active:
        part = torch.where(on.reshape(-1), flat[start : start + on.numel()], -math.inf)
        if bool(on.any()):
            best.append(start + int(part.argmax()))
        start += on.numel()
    return torch.tensor(best, dtype=torch.int64, device=flat.device)


def _within(score: Tensor, on: Tensor, weights: Tensor, reserved: Tensor, goal: int) -> Tensor:
    """Choose the reserved units and the best of the others that fit into `goal` weights."""
    chosen = torch.zeros_like(on)
    chosen[reserved] = True
    left = goal - int(weights[chosen].sum())
    rest = on & ~chosen
    if left <= 0:
        return chosen
    if bool((weights == 1).all()):
        return chosen | keep(rest, score, min(left, int(rest.sum())))
    check_finite(score)
    order = score.argsort(descending=True, stable=True)
    order = order[rest[order]]
    fits = weights[order].cumsum(0) <= left
    chosen[order[fits]] = True
    return chosen
