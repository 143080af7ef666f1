"""Square blocks of weights, the zero blocks left out: block compressed sparse rows, multiplied by a Triton kernel.

Gray, Radford, Kingma, "GPU Kernels for Block-Sparse Weights", 2017, section 3. A block of 16 and more inputs and outputs
fills the tensor cores whatever the others are, so that time goes with the number of blocks. float32 is multiplied as such
(no TF32), and all sums are float32.

With TRITON_INTERPRET=1 the kernel runs in Triton's interpreter on the CPU, for tests.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional

from openwork.errors import ModelError
from openwork.runtime.cuda._checks import check_input, refuse, weight_obstacle

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
BLOCKS = (64, 32, 16)
FULL = 0.9
"""The largest block is taken of which this share of what is stored is not zero (XNNPACK's rule)."""


@dataclass(frozen=True, eq=False)
class Packed:
    """The non-zero blocks of a weight, block row by block row. It never changes and may be shared.

    Attributes:
        values: (blocks, block, block), each as (in, out): transposed, as the kernel reads it.
        columns: int32 (blocks), ascending within a block row.
        starts: int32 (block rows + 1): where each block row's blocks begin.
        bias: (out), or None.
        shape: (out, in) of the weight; sizes that are no multiples of the block are filled up with zeros.
        block: 16, 32 or 64.
    """

    values: Tensor
    columns: Tensor
    starts: Tensor
    bias: Tensor | None
    shape: tuple[int, int]
    block: int

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        """Return itself: a packed weight never changes."""
        return self


def obstacle(weight: Tensor, bias: Tensor | None = None) -> str | None:
    """Return why weight (out, in) and bias (out) cannot be packed and multiplied, None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "needs triton, which is not installed: pip install triton"
    return weight_obstacle(weight, bias, DTYPES, "cpu" if interpreted() else "cuda")


def interpreted() -> bool:
    """Return whether Triton's kernels run in its interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def pack(weight: Tensor, bias: Tensor | None = None, block: int | None = None) -> Packed:
    """Return weight (out, in) and bias (out) packed, on their device.

    Args:
        weight: float16, bfloat16 or float32.
        bias: of weight's dtype, or None.
        block: 16, 32 or 64; None takes the largest whose stored blocks are at least 90 % non-zero, else 16.

    Raises:
        ModelError: with the reason, if there is an `obstacle`, or no such block.
    """
    refuse(obstacle(weight, bias))
    if block is not None and (isinstance(block, bool) or block not in BLOCKS):
        raise ModelError(f"there is no block of {block!r}: choose from {', '.join(map(str, BLOCKS))}, or None")
    weight = weight.detach()
    size = block or next((each for each in BLOCKS if _fullness(weight, each) >= FULL), BLOCKS[-1])
    tiled = _tiled(weight, size)
    kept = (tiled != 0).flatten(2).any(dim=2)
    row, column = kept.nonzero(as_tuple=True)
    starts = functional.pad(kept.sum(dim=1).cumsum(0), (1, 0))
    values = tiled[row, column].transpose(1, 2).contiguous()
    held = None if bias is None else bias.detach().clone(memory_format=torch.contiguous_format)
    return Packed(values, column.int(), starts.int(), held, (weight.shape[0], weight.shape[1]), size)


def unpack(packed: Packed) -> tuple[Tensor, Tensor | None]:
    """Return weight (out, in) and bias (out) as they went in; a negative zero may come back as zero."""
    (out, columns), size = packed.shape, packed.block
    high, wide = -(-out // size), -(-columns // size)
    tiled = packed.values.new_zeros(high, wide, size, size)
    row = torch.repeat_interleave(torch.arange(high, device=tiled.device), packed.starts.diff().long())
    tiled[row, packed.columns.long()] = packed.values.transpose(1, 2)
    weight = tiled.transpose(1, 2).reshape(high * size, wide * size)[:out, :columns]
    return weight.contiguous(), packed.bias


@torch.no_grad()
def matmul(packed: Packed, x: Tensor) -> Tensor:
    """Return `x @ weight.T + bias` for x (..., in) of any strides. Zero blocks are skipped, whatever x has there.

    Raises:
        ModelError: if x does not fit.
    """
    out, columns = packed.shape
    check_input(x, columns, packed.values.dtype, packed.values.device)
    flat = x.detach().reshape(-1, columns)
    y = flat.new_empty(flat.shape[0], out)
    if flat.shape[0]:
        tile = min(64, max(16, 1 << (flat.shape[0] - 1).bit_length()))
        grid = (-(-flat.shape[0] // tile), len(packed.starts) - 1)
        has_bias = packed.bias is not None
        widen = interpreted() and x.dtype == torch.bfloat16  # the interpreter's dot reads bfloat16 as whole numbers
        with torch.cuda.device(flat.device if flat.is_cuda else -1):  # the kernel goes to the current device
            _kernel()[grid](
                flat, flat.stride(0), flat.stride(1), packed.values, packed.columns, packed.starts,
                packed.bias if has_bias else y, y, flat.shape[0], columns, out, has_bias, packed.block, tile, widen,
            )  # fmt: skip
    return y.reshape(*x.shape[:-1], out)


def nbytes(packed: Packed) -> int:
    """Return the bytes of blocks, indices and bias."""
    parts = (packed.values, packed.columns, packed.starts, packed.bias)
    return sum(part.numel() * part.element_size() for part in parts if part is not None)


def _tiled(weight: Tensor, size: int) -> Tensor:
    """Return the blocks (block rows, block columns, size, size) of a weight, filled up with zeros."""
    out, columns = weight.shape
    filled = functional.pad(weight, (0, -columns % size, 0, -out % size))
    return filled.reshape(-(-out // size), size, -(-columns // size), size).transpose(1, 2)


def _fullness(weight: Tensor, size: int) -> float:
    """Return the share of non-zeros in the blocks that have any; 1 where all is zero."""
    count = (_tiled(weight, size) != 0).flatten(2).sum(dim=2)
    stored = int((count > 0).sum()) * size * size
    return int(count.sum()) / stored if stored else 1.0


def _kernel() -> Any:
    from openwork.runtime.cuda import _blocks

    return _blocks.multiply
