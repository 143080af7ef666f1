"""From a sparse weight to what the product's kernel reads: groups of rows, offsets and values in the order of its loops."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Section:
    """Consecutive groups of `rows` output rows; the rows of a group have the same input columns.

    Attributes:
        first: the first output row.
        rows: output rows of a group.
        starts: int64 (groups + 1); group g has the entries `starts[g]:starts[g + 1]`.
        columns: int32 (entries), ascending within a group.
        values: float32 (entries, rows).
    """

    first: int
    rows: int
    starts: npt.NDArray[np.int64]
    columns: Ints
    values: Floats

    @property
    def groups(self) -> int:
        """Number of groups."""
        return len(self.starts) - 1

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return self.starts.nbytes + self.columns.nbytes + self.values.nbytes


@dataclass(frozen=True)
class Arranged:
    """A section in the order of the kernel's loops; see `kernels.spmm.WORDS`."""

    rows: int
    groups: int
    parts: int
    chunks: int
    offsets: Ints
    values: Floats
    starts: Ints
    order: Ints
    bounds: Ints
    joined: npt.NDArray[np.int64] | None = None

    @property
    def words(self) -> npt.NDArray[Any]:
        """What the kernel reads first of an entry: offset and weight in one word where they are joined."""
        return self.offsets if self.joined is None else self.joined

    def join(self) -> Arranged:
        """Return it with offset and weight of each entry in one word; itself where groups have more than one row."""
        if self.rows != 1 or sys.byteorder != "little":
            return self
        words = np.empty((len(self.offsets), 2), np.int32)
        words[:, 0], words[:, 1] = self.offsets, self.values[:, 0].view(np.int32)
        return replace(self, joined=words.view(np.int64)[:, 0])


def sections(weight: npt.NDArray[np.float32], block: int) -> tuple[Section, ...]:
    """Cut a weight (out, in) into groups of `block` rows, the rows left over into groups of one.

    A group has an entry for every column in which any of its rows is not zero; the others' zeros are stored.
    """
    out = weight.shape[0] // block * block
    found = []
    if out:
        found.append(_section(weight[:out], 0, block))
    if out < weight.shape[0] or weight.shape[0] == 0:
        found.append(_section(weight[out:], out, 1))
    return tuple(found)


def _section(weight: npt.NDArray[np.float32], first: int, rows: int) -> Section:
    groups = weight.reshape(len(weight) // rows, rows, weight.shape[1])
    kept = (groups != 0).any(axis=1)
    group, column = np.nonzero(kept)
    starts = np.concatenate(([0], np.cumsum(kept.sum(axis=1, dtype=np.int64))))
    values = np.ascontiguousarray(groups[group, :, column], dtype=np.float32)
    return Section(first, rows, starts, column.astype(np.int32), values)


def dense(cut: tuple[Section, ...], shape: tuple[int, int]) -> npt.NDArray[np.float32]:
    """Return the matrix (out, in) that was cut."""
    weight = np.zeros(shape, np.float32)
    for section in cut:
        group = np.repeat(np.arange(section.groups), np.diff(section.starts))
        for r in range(section.rows):
            weight[section.first + group * section.rows + r, section.columns] = section.values[:, r]
    return weight


def choose_block(weight: npt.NDArray[np.float32], blocks: tuple[int, ...] = (4, 2)) -> int:
    """Return the largest of `blocks` whose stored entries would be at least 90 % non-zero, else 1 (XNNPACK's rule)."""
    for block in blocks:
        whole = weight[: weight.shape[0] // block * block]
        kept = whole.reshape(-1, block, weight.shape[1]) != 0
        stored = block * int(kept.any(axis=1).sum())
        if stored and int(kept.sum()) >= 0.9 * stored:
            return block
    return 1


def arrange(section: Section, offsets: npt.NDArray[Any], part: int, chunks: int) -> Arranged:
    """Put the entries of a section in the order of the kernel's loops: by part, chunk, number of entries, column.

    Args:
        section: the groups.
        offsets: bytes (in) from the tile's address to what each input column reads.
        part: input columns of a part.
        chunks: runs of groups with about the same number of entries each; at most one a group.
    """
    groups, width = section.groups, len(offsets)
    parts = max(1, -(-width // part))
    chunks = max(1, min(chunks, groups))
    group = np.repeat(np.arange(groups), np.diff(section.starts))
    key = section.columns.astype(np.int64) // part * groups + group
    counts = np.bincount(key, minlength=parts * groups).reshape(parts, groups)
    bounds = _bounds(section.starts, chunks)
    chunk = np.repeat(np.arange(chunks), np.diff(bounds))
    order = np.stack([np.lexsort((line, chunk)) for line in counts]) if groups else np.zeros((parts, 0), np.int64)
    place = np.empty_like(order)
    np.put_along_axis(place, order, np.arange(groups)[None], axis=1)
    sequence = np.argsort((np.arange(parts)[:, None] * groups + place).reshape(-1)[key], kind="stable")
    ordered = np.take_along_axis(counts, order, axis=1)
    ends = np.cumsum(ordered.reshape(-1)).reshape(parts, groups)
    begins = np.concatenate(([0], ends[:-1, -1])) if groups else np.zeros(parts)
    return Arranged(
        section.rows,
        groups,
        parts,
        chunks,
        np.ascontiguousarray(offsets[section.columns[sequence]], np.int32),
        np.ascontiguousarray(section.values[sequence]),
        np.concatenate((begins[:, None], ends), axis=1).astype(np.int32),
        order.astype(np.int32),
        bounds.astype(np.int32),
    )


def _bounds(starts: npt.NDArray[np.int64], chunks: int) -> npt.NDArray[np.int64]:
    """Return the first group of each chunk, and the end: chunks of about equal work, none empty."""
    groups = len(starts) - 1
    work = starts + np.arange(groups + 1)  # a group costs something even without entries
    inner = np.searchsorted(work, work[-1] * np.arange(1, chunks) / chunks)
    bounds = np.concatenate(([0], inner, [groups]))
    for i in range(1, chunks):  # at least one group each, while there are enough
        bounds[i] = min(max(bounds[i], bounds[i - 1] + 1), groups - (chunks - i))
    return bounds
