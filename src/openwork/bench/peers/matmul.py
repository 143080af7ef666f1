"""Dense torch: `weight @ x`, the weight row by row and the activations channel by channel (CHW)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

ABOUT = "dense torch, addmm on (in, columns)"
DENSE, APART = True, False


def operator(weight: Tensor, bias: Tensor | None, x: Tensor) -> Callable[[], Tensor]:
    """Return the product as one matrix multiplication; one column takes the matrix-vector product."""
    if x.shape[1] == 1:
        vector, out = x[:, 0].contiguous(), weight.new_empty(weight.shape[0])
        if bias is None:
            return lambda: torch.mv(weight, vector, out=out)[:, None]
        return lambda: torch.addmv(bias, weight, vector, out=out)[:, None]
    out = weight.new_empty(weight.shape[0], x.shape[1])
    if bias is None:
        return lambda: torch.mm(weight, x, out=out)
    column = bias[:, None]
    return lambda: torch.addmm(column, weight, x, out=out)
