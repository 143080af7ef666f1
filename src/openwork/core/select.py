"""Exact selection: the one place where scores become masks.

Ties are the normal case (1,000 random half-precision scores hold a handful of values), so nothing here thresholds:
the count is exact, and among equal scores the lowest flat index wins.
"""

from __future__ import annotations

import torch
from torch import Tensor

from openwork.errors import MaskError


def count_of(density: float, total: int) -> int:
    """Return round(density * total), halves up: the number kept of `total`.

    Raises:
        MaskError: if `density` is not a number in [0, 1].
    """
    if not 0.0 <= density <= 1.0:
        raise MaskError(f"density {density!r} is not in [0, 1]; it is the share of weights that is kept")
    return min(total, int(density * total + 0.5))


def check_finite(score: Tensor) -> None:
    """Raise a MaskError if a score cannot be ranked: topk and argsort would give NaN the first place."""
    if score.is_floating_point() and not bool(torch.isfinite(score).all()):
        bad = ~torch.isfinite(score.reshape(-1))
        raise MaskError(
            f"{int(bad.sum())} of {score.numel()} scores are not finite (the first at flat index "
            f"{int(bad.int().argmax())}); check the weights and gradients for NaN or overflow"
        )


def top(score: Tensor, count: int) -> Tensor:
    """Return the mask of the `count` highest scores.

    Args:
        score: finite numbers, any shape, any real dtype.
        count: how many to keep, 0 to `score.numel()`.

    Returns:
        bool tensor of the score's shape with exactly `count` True; ties go to the lowest flat index.

    Raises:
        MaskError: if `count` is out of range or a score is not finite.
    """
    total = score.numel()
    if not 0 <= count <= total:
        raise MaskError(f"cannot keep {count} of {total} scores")
    if count in (0, total):
        return torch.full_like(score, count > 0, dtype=torch.bool)
    check_finite(score)
    flat = score.detach().reshape(-1)
    if flat.dtype in (torch.float16, torch.bfloat16):
        flat = flat.float()
    threshold = flat.kthvalue(total - count + 1).values
    mask = flat > threshold
    ties = (flat == threshold).nonzero().squeeze(1)
    mask[ties[: count - int(mask.sum())]] = True
    return mask.reshape(score.shape)


def top_rows(score: Tensor, count: int) -> Tensor:
    """Return the mask of the `count` highest scores of every row.

    Args:
        score: (rows, width) finite numbers.
        count: how many to keep of each row.

    Returns:
        bool tensor (rows, width) with exactly `count` True in every row; ties go to the lowest index.
    """
    check_finite(score)
    order = score.detach().argsort(dim=1, descending=True, stable=True)
    mask = torch.zeros_like(score, dtype=torch.bool)
    return mask.scatter_(1, order[:, :count], True)


def ranks(score: Tensor) -> Tensor:
    """Return each score's place, int64: 0 for the lowest, `numel - 1` for the highest, in the order that `top` uses."""
    check_finite(score)
    order = score.detach().reshape(-1).argsort(descending=True, stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(order.numel() - 1, -1, -1, device=order.device)
    return place.reshape(score.shape)
