"""Draws without replacement whose memory is that of what is drawn, not of what it is drawn from."""

from __future__ import annotations

import torch
from torch import Tensor

from openwork.errors import MaskError


def subset(total: int, count: int, generator: torch.Generator) -> Tensor:
    """Return `count` distinct numbers below `total`, ascending; every subset of that size is equally likely.

    Numbers are drawn with replacement and repetitions are drawn again until there are enough, which treats all numbers
    alike. Of a subset that is more than half, the rest is drawn. Time and memory are O(count).

    Args:
        total: how many numbers there are.
        count: how many to draw, 0 to `total`.
        generator: on the CPU.

    Returns:
        int64 (count).

    Raises:
        MaskError: if `count` is out of range.
    """
    if not 0 <= count <= total:
        raise MaskError(f"cannot draw {count} of {total} positions without repetition: give 0 to {total}")
    if 2 * count > total:
        return complement(subset(total, total - count, generator), total)
    found = torch.empty(0, dtype=torch.int64)
    while found.numel() < count:
        found = torch.unique(torch.cat((found, torch.randint(total, (count - found.numel(),), generator=generator))))
    return found


def absent(present: Tensor, ranks: Tensor) -> Tensor:
    """Return the numbers that stand at `ranks` among those that are not in `present`.

    Args:
        present: int64 (n), ascending and distinct.
        ranks: int64, any shape; 0 is the smallest number that is not present.

    Returns:
        int64 of the shape of `ranks`, in O(n + m log n) time and O(n + m) memory.
    """
    # before present[k] there are present[k] - k absent numbers, so that many ranks lie below it
    before = present - torch.arange(present.numel())
    return ranks + torch.searchsorted(before, ranks, right=True)


def complement(present: Tensor, total: int) -> Tensor:
    """Return the numbers below `total` that are not in `present` (int64, ascending and distinct), ascending."""
    return absent(present, torch.arange(total - present.numel()))


def subset_without(present: Tensor, total: int, count: int, generator: torch.Generator) -> Tensor:
    """Return `count` distinct numbers below `total` that are not in `present`, ascending, all subsets equally likely.

    Args:
        present: int64 (n), ascending and distinct.
        total: how many numbers there are.
        count: how many to draw, 0 to `total - n`.
        generator: on the CPU.

    Raises:
        MaskError: if `count` is out of range.
    """
    return absent(present, subset(total - present.numel(), count, generator))
