"""openwork itself: the weight packed for its own kernels, or the network accelerated."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from openwork.bench.peers._pick import fastest
from openwork.errors import ModelError
from openwork.runtime import matvec, spmm
from openwork.runtime.timing import run

ABOUT = "openwork"
DENSE, APART = False, False


def operator(weight: Tensor, bias: Tensor | None, x: Tensor) -> Callable[[], Tensor]:
    """Return the product by the kernels; those for a single column are tried too where there is only one.

    Rows that share their pattern are found by the packing.
    """
    threads, out = torch.get_num_threads(), weight.new_empty(weight.shape[0], x.shape[1])
    packed = spmm.pack_spmm(weight, bias, block="auto")
    calls: dict[str, Callable[[], Tensor]] = {"spmm": lambda: spmm.spmm_chw(packed, x, out=out, threads=threads)}
    if x.shape[1] == 1:
        row = x.t().contiguous()
        for pack in (matvec.pack_rows, matvec.pack_blocks, matvec.pack_nm):
            try:
                single = pack(weight, bias)
            except ModelError:  # its zeros are not of that form
                continue
            calls[pack.__name__] = functools.partial(_single, single, row)
    return fastest(calls)


def _single(packed: matvec.PackedMatVec, row: Tensor) -> Tensor:
    return matvec.multiply(packed, row).t()


def network(model: nn.Module, example: Any) -> Callable[[], Tensor]:
    """Return the model after `openwork.accelerate`."""
    from openwork.runtime.plan import accelerate

    fast = accelerate(model, example, verbose=False)
    return lambda: run(fast, example)
