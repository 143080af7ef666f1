"""Choosing examples: exact counts, the classes in proportion, the same choice for the same seed."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from openwork.errors import DataError


def tensor(array: NDArray[Any]) -> Tensor:
    """Return the tensor over `array`, copied only where torch cannot share it (read-only or unusual strides)."""
    array = np.ascontiguousarray(array)
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def complement(chosen: Tensor, size: int) -> Tensor:
    """Return the positions below `size` that are not in `chosen`, ascending, int64."""
    left = torch.ones(size, dtype=torch.bool)
    left[chosen] = False
    return left.nonzero().flatten()


def stratified(labels: Tensor, count: int, generator: torch.Generator, reserve: int = 0) -> Tensor:
    """Return `count` positions, ascending, drawn so that every class has its share to within one example.

    Args:
        labels: (n,) class numbers. Labels with more axes have no classes to keep in proportion: the draw is plain.
        count: how many positions.
        generator: where the draw comes from.
        reserve: how many examples of each class must be left over.

    Returns:
        (count,) int64.

    Raises:
        DataError: if there are fewer examples than that.
    """
    if labels.dim() != 1:
        labels = torch.zeros(labels.shape[0], dtype=torch.int64)
    kinds, sizes = torch.unique(labels, return_counts=True)
    most = (sizes - reserve).clamp_min(0)
    if not 0 <= count <= int(most.sum()):
        left = f", leaving {reserve} of each class," if reserve else ""
        raise DataError(f"cannot choose {count:,} of {labels.numel():,} examples{left}: at most {int(most.sum()):,}")
    quotas = shares(sizes, count, most)
    chosen = []
    for kind, quota in zip(kinds, quotas.tolist(), strict=True):
        places = (labels == kind).nonzero().flatten()
        chosen.append(places[torch.randperm(places.numel(), generator=generator)[:quota]])
    return torch.cat(chosen).sort().values if chosen else torch.empty(0, dtype=torch.int64)


def shares(sizes: Tensor, count: int, most: Tensor) -> Tensor:
    """Divide `count` in proportion to `sizes`, none above `most`, by largest remainder; ties go to the first.

    Args:
        sizes: (k,) int64.
        count: at most the sum of `most`.
        most: (k,) int64.

    Returns:
        (k,) int64 that sum to `count`.
    """
    exact = [count * size / max(1, int(sizes.sum())) for size in sizes.tolist()]
    given = [min(int(share), top) for share, top in zip(exact, most.tolist(), strict=True)]
    while (missing := count - sum(given)) > 0:
        open_ = [i for i, top in enumerate(most.tolist()) if given[i] < top]
        for i in sorted(open_, key=lambda i: given[i] - exact[i])[:missing]:
            given[i] += 1
    return torch.tensor(given, dtype=torch.int64)


def count_of(validation: float, size: int) -> int:
    """Return how many of `size` examples a validation set takes: a share in [0, 1) or a number of examples.

    Raises:
        DataError: if `validation` is neither.
    """
    whole = isinstance(validation, int) and not isinstance(validation, bool)
    share = isinstance(validation, float) and 0 <= validation < 1
    if not (share or (whole and 0 <= validation < size)):
        raise DataError(
            f"validation is {validation!r}; it must be a share in [0, 1) or a whole number below {size:,}, the number "
            "of training examples"
        )
    return int(validation) if whole else round(validation * size)
