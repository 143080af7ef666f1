"""Dense torch: `nn.functional.linear` on tokens, the activations column by column (N, K)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional

ABOUT = "dense torch, linear on (columns, in)"
DENSE, APART = True, False


def operator(weight: Tensor, bias: Tensor | None, x: Tensor) -> Callable[[], Tensor]:
    """Return the product as a linear layer on (columns, in); its result is read transposed."""
    tokens = x.t().contiguous()
    return lambda: functional.linear(tokens, weight, bias).t()
