"""Programs of kernels for the three products of a sparse weight, and for transposing what they multiply.

Operands are addresses; everything else about a program follows from the positions of the entries and a key.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from openwork.runtime.kernels import arrange, gather, sddmm, spmm, turn
from openwork.runtime.kernels.launch import Call, Program
from openwork.runtime.kernels.target import Target, first_cache, targets
from openwork.runtime.launching import Ready

LINE, PAGE = 64, 2048
"""Bytes: rows of a dense matrix should start on the first, and not be multiples of the second apart."""
WIDE = 64
"""Columns from which on it matters how rows lie."""
_ORDERS = 2  # orders of entries that are remembered
_UNITS = 4  # units a thread, so that none waits long for another
_WORTHWHILE = 8  # entries of a group in a part, below which going part by part costs more than it brings
_NONE = np.empty(0, np.float32)

Ints = npt.NDArray[np.int32]
Patch = tuple[npt.NDArray[np.int64], int, int]


class Key(NamedTuple):
    """What a program is made for; strides in bytes."""

    target: str
    columns: int
    x_row: int
    threads: int
    y_row: int = 0
    inputs: bool = False
    weights: bool = False
    sums: bool = False


class Turn(NamedTuple):
    """What a transposition is made for; the stride in bytes."""

    target: str
    rows: int
    width: int
    x_row: int


class Order(NamedTuple):
    """How a product goes over its entries: `weights.offsets` are rows of the dense matrix until its stride is known."""

    weights: arrange.Arranged
    gathered: Ints | None  # where the value of each entry comes from; None: they lie as they are read


@dataclass(frozen=True, eq=False)
class Layout:
    """The positions as the kernels read them."""

    shape: tuple[int, int]
    block: int
    starts: Ints
    columns: Ints
    orders: dict[tuple[bool, int, int], Order] = field(default_factory=dict)

    @functools.cached_property
    def zeros(self) -> npt.NDArray[np.float32]:
        """A bias for the transposed product, at least as long."""
        return np.zeros(max(self.shape), np.float32)

    @property
    def groups(self) -> int:
        """Groups of output rows."""
        return len(self.starts) - 1

    def order(self, turned: bool, part: int, chunks: int) -> Order:
        """Return the order of W, or of W^T if `turned`, in parts of `part` columns; one that was made is remembered."""
        key = (turned, part, chunks)
        found = self.orders.get(key)
        if found is None:
            if len(self.orders) >= _ORDERS:
                self.orders.clear()
            found = self.orders[key] = self._turned(part, chunks) if turned else self._straight(part, chunks)
        return found

    def _straight(self, part: int, chunks: int) -> Order:
        starts = self.starts.astype(np.int64)
        if part < self.shape[1]:
            numbers = np.arange(len(self.columns) * self.block, dtype=np.int32).reshape(-1, self.block)
            return _ordered(starts, self.columns, numbers, self.shape[1], part, chunks)
        order, bounds = np.arange(self.groups, dtype=np.int32)[None], sddmm.split(starts, chunks)
        plain = arrange.Arranged(self.block, self.groups, 1, chunks, self.columns, _NONE, self.starts[None], order, bounds)
        return Order(plain, None)

    def _turned(self, part: int, chunks: int) -> Order:
        from scipy.sparse import csr_array

        entry = np.arange(len(self.columns), dtype=np.int32)
        found = csr_array((entry, self.columns, self.starts), shape=(self.groups, self.shape[1])).tocsc()
        inside = np.arange(self.block, dtype=np.int32)
        rows, numbers = (one[:, None] * self.block + inside for one in (found.indices, found.data))
        starts = found.indptr.astype(np.int64) * self.block
        return _ordered(starts, rows.reshape(-1), numbers.reshape(-1, 1), self.shape[0], part, chunks)


def _tile(target: Target, rows: int, columns: int) -> int:
    """Return the vectors of a tile: as many as the registers hold sums of, in tiles of about equal width."""
    most = min(8, target.registers // 2 // rows)
    total = max(1, -(-columns // target.lanes))
    return -(-total // -(-total // most))


def _chunks(key: Key, tiles: int, groups: int) -> int:
    """Return the chunks of groups, one where there is one thread."""
    return 1 if key.threads == 1 else max(1, min(groups, -(-_UNITS * key.threads // tiles)))


def _part(target: Target, vectors: int, entries: int, groups: int, width: int) -> int:
    """Return the columns of a part: as many as fit the first cache where groups have enough entries there, else all."""
    part = max(1, first_cache() // (4 * target.lanes * vectors))
    return part if part < width and entries * part >= _WORTHWHILE * groups * width else width


def _ordered(starts: npt.NDArray[np.int64], columns: Ints, numbers: Ints, width: int, part: int, chunks: int) -> Order:
    """Return entries in the kernel's order; the numbers of the values ride along in place of the values."""
    numbers = np.ascontiguousarray(numbers, np.int32)
    section = arrange.Section(0, numbers.shape[1], starts, columns.astype(np.int32), numbers.view(np.float32))
    found = arrange.arrange(section, np.arange(width), part, chunks)
    return Order(replace(found, values=_NONE), found.values.view(np.int32).reshape(-1))


def forward_program(layout: Layout, key: Key) -> Ready:
    """Return the program of y = W x + b on operands x, y, values, bias, scratch."""
    target = targets()[key.target]
    stages, patches, keep = _product(target, layout, key, False, (0, 1, 2, 4))
    patches += [(call.slots, spmm.WORDS.index("bias"), 3) for call in stages[-1]]
    return Ready(Program(stages, target), tuple(patches), keep)


def backward_program(layout: Layout, key: Key) -> Ready:
    """Return the program of dx = W^T y, dv = y x^T at the entries and db = y 1 on x, y, values, scratch, dx, dv, db."""
    target = targets()[key.target]
    stages: list[list[Call]] = [[]]
    patches: list[Patch] = []
    keep: list[object] = []
    if key.inputs:
        stages, patches, product = _product(target, layout, key, True, (1, 4, 2, 3))
        keep.append(product)
    if key.weights:
        width, groups = layout.shape[1], layout.groups
        part = _part(target, sddmm.tile(target, layout.block), len(layout.columns), groups, width)
        kept = sddmm.cut(layout.block, layout.columns, layout.starts, width, part, _chunks(key, 1, groups))
        calls = sddmm.calls(
            target, kept, 0, 0, x_row=key.x_row, y_row=key.y_row, width=key.columns, values=0, sums=int(key.sums)
        )
        for word, operand in (("x", 0), ("y", 1), ("values", 5), ("sums", 6)):
            patches += [(call.slots, sddmm.WORDS.index(word), operand) for call in calls]
        stages[-1] += calls
        keep.append(kept)
    return Ready(Program(stages, target), tuple(patches), keep)


def turning_program(key: Turn) -> Ready:
    """Return the program that transposes a matrix (rows, width) on operands x, y."""
    target = targets()[key.target]
    calls = turn.calls(target, 0, 0, rows=key.rows, columns=key.width, x_row=key.x_row, y_row=4 * pitch(key.rows))
    patches = [(call.slots, turn.WORDS.index(word), k) for call in calls for k, word in enumerate("xy")]
    return Ready(Program([calls], target), tuple(patches))


def _product(
    target: Target, layout: Layout, key: Key, turned: bool, operands: tuple[int, int, int, int]
) -> tuple[list[list[Call]], list[Patch], object]:
    """Return stages, patches and what to keep of the product by W, or W^T; operands number x, y, values and scratch."""
    x, y, values, scratch = operands
    columns, row = key.columns, key.y_row if turned else key.x_row
    rows, groups, width = (1, layout.shape[1], layout.shape[0]) if turned else (layout.block, layout.groups, layout.shape[1])
    vectors = _tile(target, rows, columns)
    chunks = _chunks(key, -(-columns // (vectors * target.lanes)), groups)
    entries = len(layout.columns) * (layout.block if turned else 1)
    order = layout.order(turned, _part(target, vectors, entries, groups, width), chunks)
    offsets = (order.weights.offsets.astype(np.int64) * row).astype(np.int32)
    weights = replace(order.weights, offsets=offsets)
    calls = spmm.calls(
        target, weights, spmm.Matrix(0, 0, row), spmm.Matrix(0, 0, 4 * columns), vectors=vectors, columns=columns,
        bias=layout.zeros.ctypes.data,
    )  # fmt: skip
    stages = [calls]
    patches = [(call.slots, spmm.WORDS.index(word), operand) for call in calls for word, operand in (("x", x), ("y", y))]
    source = values
    if order.gathered is not None:
        copies = gather.calls(target, 0, order.gathered.ctypes.data, 0, len(order.gathered))
        for word, operand in (("values", values), ("out", scratch)):
            patches += [(call.slots, gather.WORDS.index(word), operand) for call in copies]
        stages, source = [copies, calls], scratch
    patches += [(call.slots, spmm.WORDS.index("values"), source) for call in calls]
    return stages, patches, (weights, order.gathered, layout.zeros)


def pitch(columns: int) -> int:
    """Return the floats from a row to the next in a copy: whole cache lines, not a multiple of a page apart."""
    floats = -(-columns // (LINE // 4)) * (LINE // 4)
    return floats if columns < WIDE or floats * 4 % PAGE else floats + LINE // 4
