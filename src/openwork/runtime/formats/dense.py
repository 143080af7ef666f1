"""Dense: the weight as it is. What every other format has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional

from openwork.runtime.formats._common import check_input, check_weight


@dataclass(frozen=True)
class Packed:
    """The weight (out, in), row by row, and its bias."""

    weight: Tensor
    bias: Tensor | None

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        """Return itself: a packed weight never changes."""
        return self


def pack(weight: Tensor, bias: Tensor | None = None) -> Packed:
    """Return a copy of weight (out, in) and bias (out).

    Raises:
        ModelError: if they are not float32 or float64 on the CPU, or do not fit one another.
    """
    check_weight(weight, bias)
    kept = weight.detach().clone(memory_format=torch.contiguous_format)
    return Packed(kept, None if bias is None else bias.detach().clone())


def unpack(packed: Packed) -> tuple[Tensor, Tensor | None]:
    """Return weight (out, in) and bias (out)."""
    return packed.weight, packed.bias


@torch.no_grad()
def matmul(packed: Packed, x: Tensor) -> Tensor:
    """Return `x @ weight.T + bias` for x (..., in).

    Raises:
        ModelError: if x does not fit.
    """
    check_input(x, packed.weight.shape[1], packed.weight.dtype)
    return functional.linear(x, packed.weight, packed.bias)


def nbytes(packed: Packed) -> int:
    """Return the bytes of weight and bias."""
    return sum(part.numel() * part.element_size() for part in (packed.weight, packed.bias) if part is not None)
