"""How examples go into batches: the order of an epoch, and the plain order."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from openwork.core.rng import generator
from openwork.errors import DataError


def steps(size: int, batch_size: int) -> int:
    """Return the number of full batches in `size` examples, at least 1.

    Raises:
        DataError: if `batch_size` is not a whole number of at least 1.
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise DataError(f"batch_size is {batch_size!r}; it must be a whole number of at least 1")
    return max(1, size // batch_size)


def shuffled(size: int, seed: int, epoch: int, batch_size: int) -> Iterator[Tensor]:
    """Yield the positions (int64) of each batch of an epoch: a permutation without its incomplete last batch."""
    count = steps(size, batch_size)
    order = torch.randperm(size, generator=generator(seed, "order", epoch))
    for index in range(count):
        yield order[index * batch_size : (index + 1) * batch_size]


def plain(size: int, batch_size: int) -> Iterator[slice]:
    """Yield the positions of each batch in the order of the examples; the last batch may be shorter."""
    steps(size, batch_size)
    for start in range(0, size, batch_size):
        yield slice(start, min(start + batch_size, size))
