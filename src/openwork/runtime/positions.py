"""Where a sparse weight has entries: compressed rows of blocks, without values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from openwork.errors import PatternError

BLOCKS = (1, 2, 4)
"""Output rows that a block may have."""
_MOST = 2**31 - 1


@dataclass(frozen=True, eq=False)
class Positions:
    """The entries of a weight (out, in): blocks of `block` output rows and one input column, row by row.

    A group is `block` consecutive output rows, which have the same input columns. Entry p of group g stands for the weights
    [g * block + r, columns[p]], whose values are number p * block + r of the weight's values.

    Attributes:
        shape: (out, in).
        block: output rows of a block, 1, 2 or 4; divides out.
        starts: int32 (out / block + 1), where each group's entries begin, and the end.
        columns: int32 (entries), ascending within a group.

    Raises:
        PatternError: if these are no positions of such a weight; everything is checked, at the cost of O(entries).
    """

    shape: tuple[int, int]
    block: int
    starts: Tensor
    columns: Tensor

    def __post_init__(self) -> None:
        fault = self._fault()
        if fault:
            raise PatternError(f"these are no positions of a weight {self.shape} in blocks of {self.block}: {fault}")

    @property
    def groups(self) -> int:
        """Runs of `block` output rows."""
        return self.shape[0] // self.block

    @property
    def entries(self) -> int:
        """Blocks that the weight has."""
        return self.columns.numel()

    @property
    def nnz(self) -> int:
        """Values that the weight has."""
        return self.entries * self.block

    @property
    def total(self) -> int:
        """Blocks that the weight would have were it dense."""
        return self.groups * self.shape[1]

    @property
    def group(self) -> Tensor:
        """The group of each entry, int64 (entries)."""
        return torch.repeat_interleave(
            torch.arange(self.groups, device=self.starts.device), self.starts.diff().long(), output_size=self.entries
        )

    def flat(self) -> Tensor:
        """Return group * in + column of each entry, int64 (entries), ascending."""
        return self.group * self.shape[1] + self.columns

    def pairs(self) -> tuple[Tensor, Tensor]:
        """Return the output row and the input column of each value, int64 (nnz) both."""
        if self.block == 1:
            return self.group, self.columns.long()
        rows = self.group[:, None] * self.block + torch.arange(self.block, device=self.group.device)
        return rows.reshape(-1), self.columns.long().repeat_interleave(self.block)

    def mask(self) -> Tensor:
        """Return the bool mask (out, in), which is dense."""
        mask = torch.zeros(self.shape, dtype=torch.bool, device=self.columns.device)
        mask[self.pairs()] = True
        return mask

    def _fault(self) -> str | None:
        out, width = self.shape
        if out < 1 or width < 1 or self.block not in BLOCKS or out % self.block:
            return f"give at least one row and column, and a block of {', '.join(map(str, BLOCKS))} that divides the rows"
        starts, columns = self.starts, self.columns
        if any(one.dtype != torch.int32 or one.ndim != 1 or not one.is_contiguous() for one in (starts, columns)):
            return "starts and columns must be contiguous int32 vectors"
        if starts.numel() != self.groups + 1 or self.nnz > _MOST:
            return f"{starts.numel()} starts and {columns.numel()} columns were given"
        if starts.is_meta or columns.is_meta:
            return None
        steps = starts.diff()
        if int(starts[0]) or int(starts[-1]) != columns.numel() or bool((steps < 0).any()):
            return "starts must ascend from 0 to the number of columns"
        flat = self.flat()
        inside = bool(((columns >= 0) & (columns < width)).all())
        return None if inside and bool((flat.diff() > 0).all()) else "columns must ascend within a row and lie inside it"


def from_flat(flat: Tensor, shape: tuple[int, int], block: int = 1) -> Positions:
    """Return the positions of entries numbered group * in + column, int64 (entries), ascending and distinct."""
    group = torch.div(flat, shape[1], rounding_mode="floor")
    counts = torch.bincount(group, minlength=shape[0] // block)
    starts = torch.zeros(counts.numel() + 1, dtype=torch.int32, device=flat.device)
    starts[1:] = counts.cumsum(0)
    return Positions(shape, block, starts, (flat - group * shape[1]).int())


def from_mask(mask: Tensor, block: int = 1) -> Positions:
    """Return the positions that a bool mask (out, in) keeps.

    Raises:
        PatternError: if the mask keeps a part of a block only, or cannot be cut into blocks.
    """
    if mask.ndim != 2 or mask.dtype != torch.bool or block not in BLOCKS or mask.shape[0] % block:
        raise PatternError(
            f"cannot cut a mask of shape {tuple(mask.shape)}, {mask.dtype} into blocks of {block} rows: give a bool mask "
            f"(out, in), and a block of {', '.join(map(str, BLOCKS))} that divides out"
        )
    blocks = mask.reshape(-1, block, mask.shape[1])
    kept = blocks.any(dim=1)
    if bool((kept != blocks.all(dim=1)).any()):
        raise PatternError(f"the mask keeps parts of blocks of {block} rows: keep whole blocks, or use block=1")
    return from_flat(kept.reshape(-1).nonzero().squeeze(1), (mask.shape[0], mask.shape[1]), block)
