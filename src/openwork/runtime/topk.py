"""The k greatest numbers of each row and where they are: what selects the active units of a k-sparse layer.

float32, float16 and bfloat16 on the CPU run on a kernel that reads each row once; other dtypes and devices are sorted by
torch. Either way ties go to the lowest index, which `torch.topk` does not promise.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from openwork.errors import ModelError
from openwork.runtime.kernels import topk as kernel
from openwork.runtime.kernels.launch import Program
from openwork.runtime.kernels.target import host, targets
from openwork.runtime.launching import Pool, Ready

SMALL = 1 << 18
"""Numbers below which a second thread costs more than it brings."""
LINE = 64
"""Bytes of a cache line."""


class _Key(NamedTuple):
    """What a program is made for; the stride in bytes."""

    target: str
    rows: int
    columns: int
    kept: int
    x_row: int
    ordered: bool


def topk(x: Tensor, k: int, *, ordered: bool = True, threads: int | None = None) -> tuple[Tensor, Tensor]:
    """Return the `k` greatest numbers along the last dimension, and their indices.

    Among equal numbers the lowest index comes first, and is kept first. NaN counts as greater than every number, and
    -0.0 as equal to 0.0, as in `torch.topk`. The result is the same for every number of threads.

    Args:
        x: (..., n), any real dtype.
        k: how many, 0 to n.
        ordered: in descending order; else by index, which spares the sorting.
        threads: at most; None is torch's number, one where there is little to read.

    Returns:
        values (..., k) of x's dtype, through which gradients flow to x, and indices (..., k), int64.

    Raises:
        ModelError: if x has no dimension, or `k` is out of range.
    """
    if x.ndim < 1 or x.is_complex() or isinstance(k, bool) or not isinstance(k, int) or not 0 <= k <= x.shape[-1]:
        raise ModelError(f"cannot keep {k!r} of the last dimension of {tuple(x.shape)}, {x.dtype}: give real x, 0 <= k <= n")
    flat = x.detach().reshape(math.prod(x.shape[:-1]), x.shape[-1])
    small = flat.dtype in (torch.float32, torch.float16, torch.bfloat16) and flat.device.type == "cpu"
    if not small or host() is None or 0 in (*flat.shape, k):
        values, indices = _plain(flat, k, ordered)
    else:
        values, indices = _kept(flat.float(), k, ordered, threads)
    shape = (*x.shape[:-1], k)
    indices = indices.reshape(shape)
    if x.requires_grad and torch.is_grad_enabled():
        return x.gather(-1, indices), indices
    return values.to(x.dtype).reshape(shape), indices


def _plain(x: Tensor, k: int, ordered: bool) -> tuple[Tensor, Tensor]:
    """Return values and indices (rows, k) by sorting all of x (rows, n)."""
    indices = x.argsort(dim=1, descending=True, stable=True)[:, :k]
    if not ordered:
        indices = indices.sort(dim=1).values
    return x.gather(1, indices), indices


def _kept(x: Tensor, k: int, ordered: bool, threads: int | None) -> tuple[Tensor, Tensor]:
    """Return values and indices (rows, k) of float32 x (rows, n) by the kernel."""
    target = host()
    assert target is not None  # asked by the caller
    rows, columns = x.shape
    if x.stride(1) != 1 and columns > 1:
        x = x.contiguous()
    by_kernel = ordered and k <= kernel.SORTED
    if threads is None:
        threads = torch.get_num_threads() if rows * columns > SMALL else 1
    values, indices = torch.empty(rows, k), torch.empty(rows, k, dtype=torch.int64)
    key = _Key(target.name, rows, columns, k, 4 * x.stride(0), by_kernel)
    _pool().run(key, (x.data_ptr(), values.data_ptr(), indices.data_ptr()), threads)
    if ordered and not by_kernel:
        values, place = values.sort(dim=1, descending=True, stable=True)
        indices = indices.gather(1, place)
    return values, indices


def _ready(key: _Key) -> Ready:
    """Return the program, with the buffers of its units."""
    target = targets()[key.target]
    size = kernel.units(key.rows, key.columns, key.kept) * kernel.need(key.columns, key.kept)
    room = np.empty(size + LINE, np.uint8)
    start = room.ctypes.data + -room.ctypes.data % LINE
    calls = kernel.calls(target, 0, key.x_row, key.rows, key.columns, key.kept, 0, 0, start, ordered=key.ordered)
    places = [kernel.WORDS.index(word) for word in ("x", "values", "indices")]
    patches = [(call.slots, place, i) for call in calls for i, place in enumerate(places)]
    return Ready(Program([calls], target), tuple(patches), room)


@functools.cache
def _pool() -> Pool[_Key]:
    return Pool(_ready)
