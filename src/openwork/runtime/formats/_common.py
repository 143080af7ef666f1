"""What every format checks before it packs or multiplies, and the compressed rows that two of them hold."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from openwork.errors import ModelError


@dataclass(frozen=True)
class Rows:
    """Compressed sparse rows (CSR): row i holds `values[starts[i]:starts[i + 1]]` in the columns of the same range."""

    starts: Tensor
    columns: Tensor
    values: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of the three arrays."""
        return sum(part.numel() * part.element_size() for part in (self.starts, self.columns, self.values))


def check_weight(weight: Tensor, bias: Tensor | None) -> None:
    """Refuse a weight that is not a float32 or float64 matrix on the CPU, or a bias that does not fit it.

    Raises:
        ModelError: with what was given and what is expected.
    """
    if weight.ndim != 2 or weight.dtype not in (torch.float32, torch.float64) or weight.device.type != "cpu":
        raise ModelError(
            f"cannot pack a weight of shape {tuple(weight.shape)}, {weight.dtype} on {weight.device}: give a float32 "
            "or float64 matrix (out, in) on the CPU"
        )
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != weight.dtype):
        raise ModelError(
            f"a bias of shape {tuple(bias.shape)} and {bias.dtype} does not fit a weight of shape "
            f"{tuple(weight.shape)} and {weight.dtype}"
        )


def check_input(x: Tensor, columns: int, dtype: torch.dtype) -> None:
    """Refuse an input that is not (..., columns) of the weight's dtype on the CPU.

    Raises:
        ModelError: with what was given and what is expected.
    """
    if x.ndim < 1 or x.shape[-1] != columns or x.dtype != dtype or x.device.type != "cpu":
        raise ModelError(
            f"cannot multiply an input of shape {tuple(x.shape)}, {x.dtype} on {x.device} with this weight: give "
            f"(..., {columns}) of {dtype} on the CPU"
        )


def rows_of(weight: Tensor) -> Rows:
    """Return the non-zero entries of a matrix row by row, with 32-bit indices."""
    kept = weight != 0
    starts = torch.zeros(weight.shape[0] + 1, dtype=torch.int64)
    torch.cumsum(kept.sum(dim=1), 0, out=starts[1:])
    if int(starts[-1]) >= 2**31:
        raise ModelError(f"{int(starts[-1])} non-zero entries are too many for 32-bit indices: keep this layer dense")
    return Rows(starts.int(), kept.nonzero()[:, 1].int(), weight.detach()[kept])


def matrix_of(rows: Rows, shape: torch.Size) -> Tensor:
    """Return the dense matrix (out, in) of compressed rows."""
    row = torch.repeat_interleave(torch.arange(shape[0]), rows.starts.diff().long())
    weight = torch.zeros(shape, dtype=rows.values.dtype)
    weight[row, rows.columns.long()] = rows.values
    return weight
