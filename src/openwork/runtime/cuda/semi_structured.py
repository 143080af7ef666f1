"""Two of four: at most two non-zeros in every four neighbouring inputs, on the sparse tensor cores, by torch.

Mishra et al., "Accelerating Sparse Deep Neural Networks", 2021 (arXiv 2104.08378), section 3. torch holds the kept half
and two bits for each kept weight, and multiplies by cuSPARSELt or CUTLASS.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional

from openwork.runtime.cuda._checks import check_input, refuse, weight_obstacle

DTYPES = (torch.float16, torch.bfloat16)
MULTIPLES = (32, 64)
"""What (out, in) must be whole multiples of, so that either of torch's libraries takes the weight."""
CAPABILITY = (8, 0)
"""The first generation with sparse tensor cores (Ampere)."""


@dataclass(frozen=True, eq=False)
class Packed:
    """torch's semi-structured tensor (out, in), and the bias."""

    weight: Tensor
    bias: Tensor | None

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        """Return itself: a packed weight never changes."""
        return self


def obstacle(weight: Tensor, bias: Tensor | None = None) -> str | None:
    """Return why weight (out, in) and bias (out) cannot be packed, None if they can."""
    reason = weight_obstacle(weight, bias, DTYPES, "cuda")
    if reason is not None:
        return reason
    if torch.cuda.get_device_capability(weight.device) < CAPABILITY:
        return f"is on {torch.cuda.get_device_name(weight.device)}, which has no sparse tensor cores"
    return shape_obstacle(weight) or pattern_obstacle(weight)


def shape_obstacle(weight: Tensor) -> str | None:
    """Return why the shape (out, in) does not fit, None if it does."""
    if weight.shape[0] % MULTIPLES[0] or weight.shape[1] % MULTIPLES[1]:
        sizes = " and ".join(map(str, MULTIPLES))
        return f"has shape {tuple(weight.shape)}: out and in must be multiples of {sizes}"
    return None


def pattern_obstacle(weight: Tensor) -> str | None:
    """Return how many groups of four inputs hold more than two non-zeros, None if none does; `in` is a multiple of 4."""
    over = int(((weight != 0).reshape(-1, 4).sum(dim=1) > 2).sum())
    return f"has {over} of {weight.numel() // 4} groups of four inputs with more than two non-zeros" if over else None


def pack(weight: Tensor, bias: Tensor | None = None) -> Packed:
    """Return weight (out, in) and bias (out) packed, on their device.

    Raises:
        ModelError: with the reason, if there is an `obstacle`.
    """
    refuse(obstacle(weight, bias))
    held = torch.sparse.to_sparse_semi_structured(weight.detach().contiguous())
    return Packed(held, None if bias is None else bias.detach().clone(memory_format=torch.contiguous_format))


def unpack(packed: Packed) -> tuple[Tensor, Tensor | None]:
    """Return weight (out, in), for finite weights exactly, and bias (out)."""
    return packed.weight.to_dense(), packed.bias


@torch.no_grad()
def matmul(packed: Packed, x: Tensor) -> Tensor:
    """Return `x @ weight.T + bias` for x (..., in) of any strides.

    Raises:
        ModelError: if x does not fit.
    """
    out, columns = packed.weight.shape
    check_input(x, columns, packed.weight.dtype, packed.weight.device)
    flat = x.detach().reshape(-1, columns).contiguous()
    if flat.shape[0] == 0:
        return flat.new_empty(*x.shape[:-1], out)
    return functional.linear(flat, packed.weight, packed.bias).reshape(*x.shape[:-1], out)


def nbytes(packed: Packed) -> int:
    """Return the bytes of the kept weights, their places and the bias."""
    weight = packed.weight
    held = [getattr(weight, name, None) for name in ("packed", "meta")]
    return sum(part.numel() * part.element_size() for part in (*held, packed.bias) if part is not None)
