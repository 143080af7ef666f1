"""Compressed sparse rows, multiplied by torch (MKL on x86), with torch's threads."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from openwork.runtime.formats._common import Rows, check_input, check_weight, matrix_of, rows_of


@dataclass(frozen=True)
class Packed:
    """The rows, the same memory as torch's sparse matrix (out, in), and the bias (zeros where there is none)."""

    rows: Rows
    matrix: Tensor
    bias: Tensor
    has_bias: bool

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        """Return itself: a packed weight never changes."""
        return self


def pack(weight: Tensor, bias: Tensor | None = None) -> Packed:
    """Return the non-zero entries of weight (out, in), and bias (out). Indices have 32 bits, as MKL wants them.

    Raises:
        ModelError: if they are not float32 or float64 on the CPU, or do not fit one another.
    """
    check_weight(weight, bias)
    rows = rows_of(weight)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        matrix = torch.sparse_csr_tensor(rows.starts, rows.columns, rows.values, weight.shape, check_invariants=True)
    added = weight.new_zeros(weight.shape[0]) if bias is None else bias.detach().clone()
    return Packed(rows, matrix, added.detach(), bias is not None)


def unpack(packed: Packed) -> tuple[Tensor, Tensor | None]:
    """Return weight (out, in) and bias (out)."""
    return matrix_of(packed.rows, packed.matrix.shape), packed.bias if packed.has_bias else None


@torch.no_grad()
def matmul(packed: Packed, x: Tensor) -> Tensor:
    """Return `x @ weight.T + bias` for x (..., in); one row takes the matrix-vector product.

    Raises:
        ModelError: if x does not fit.
    """
    out, columns = packed.matrix.shape
    check_input(x, columns, packed.bias.dtype)
    flat = x.detach().reshape(-1, columns)
    if flat.shape[0] == 0 or out == 0 or packed.rows.values.numel() == 0:
        return packed.bias.expand(flat.shape[0], out).reshape(*x.shape[:-1], out).clone()
    if flat.shape[0] == 1:
        y = torch.addmv(packed.bias, packed.matrix, flat[0])
    else:
        y = torch.addmm(packed.bias[:, None], packed.matrix, flat.t()).t()
    return y.reshape(*x.shape[:-1], out)


def nbytes(packed: Packed) -> int:
    """Return the bytes of values, indices and bias."""
    return packed.rows.nbytes + packed.has_bias * packed.bias.numel() * packed.bias.element_size()
