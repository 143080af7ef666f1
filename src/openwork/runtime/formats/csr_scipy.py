"""Compressed sparse rows, multiplied by scipy: always one thread, so it keeps its pace on a busy machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from openwork.runtime.formats._common import Rows, check_input, check_weight, matrix_of, rows_of


@dataclass(frozen=True)
class Packed:
    """The rows, the same memory as a scipy array (out, in), and the bias."""

    rows: Rows
    matrix: Any
    bias: Tensor | None

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        """Return itself: a packed weight never changes."""
        return self


def pack(weight: Tensor, bias: Tensor | None = None) -> Packed:
    """Return the non-zero entries of weight (out, in), and bias (out).

    Raises:
        ModelError: if they are not float32 or float64 on the CPU, or do not fit one another.
    """
    from scipy import sparse

    check_weight(weight, bias)
    rows = rows_of(weight)
    parts = (rows.values.numpy(), rows.columns.numpy(), rows.starts.numpy())
    return Packed(rows, sparse.csr_array(parts, shape=tuple(weight.shape)), None if bias is None else bias.detach().clone())


def unpack(packed: Packed) -> tuple[Tensor, Tensor | None]:
    """Return weight (out, in) and bias (out)."""
    return matrix_of(packed.rows, torch.Size(packed.matrix.shape)), packed.bias


@torch.no_grad()
def matmul(packed: Packed, x: Tensor) -> Tensor:
    """Return `x @ weight.T + bias` for x (..., in); one row takes the matrix-vector product.

    Raises:
        ModelError: if x does not fit.
    """
    out, columns = packed.matrix.shape
    check_input(x, columns, packed.rows.values.dtype)
    flat = x.detach().reshape(-1, columns)
    if flat.shape[0] == 1:
        y = torch.from_numpy(packed.matrix @ flat[0].numpy())
    else:
        y = torch.from_numpy(packed.matrix @ flat.t().numpy()).t()
    if packed.bias is not None:
        y += packed.bias
    return y.reshape(*x.shape[:-1], out)


def nbytes(packed: Packed) -> int:
    """Return the bytes of values, indices and bias."""
    bias = packed.bias
    return packed.rows.nbytes + (0 if bias is None else bias.numel() * bias.element_size())
