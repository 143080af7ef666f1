"""The product of an N:M sparse matrix with few columns: of every M inputs in a row, an output has at most N weights.

A vector register has one row a lane. A register (or two) of x holds the columns of whole groups, and each lane takes its
own of them by a permutation within the register, so that there is no gather: an entry costs a shift of its index, a
permutation and a multiply-add for all lanes. Indices are 3 or 4 bits, weights 32, 16 or 8: a 2:4 matrix in float32 is 56 %
of the dense one, in int8 19 %.

A step is as many columns as fill a word with indices. Rows whose groups have fewer than N weights are filled up with zeros;
then, and at the end of a row, lanes whose weight is zero read no x, so that an infinity there makes no NaN. The order of
summation is that of the columns, entry q of a step going to sum q mod 4, the four added as (0 + 1) + (2 + 3).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from openwork.runtime.kernels import jit, precision
from openwork.runtime.kernels.activations import Act, apply
from openwork.runtime.kernels.emit import Emitter
from openwork.runtime.kernels.launch import Call
from openwork.runtime.kernels.matvec import CHUNK, CHUNKS, SUMS, OnLines
from openwork.runtime.kernels.precision import Precision
from openwork.runtime.kernels.target import Target

WORDS = (
    "x", "x_step", "y", "y_step", "first", "values", "indices", "scales", "bias", "limits", "bounds", "blocks", "whole",
    "steps", "width", "height",
)  # fmt: skip
"""The slots. x, y: addresses of column 0; x_step, y_step: bytes from a column to the next; first: the first column to do.

values (slices, steps, entries, lanes), indices (slices, steps, words, lanes) uint32, scales, bias (slices, lanes) float32.
limits: two float32 for `clamp`. bounds (chunks + 1) int32: the slices of each chunk. blocks: how many blocks of columns.
whole: steps whose x can be read without looking at its end; steps: all. width, height: of the matrix.
"""
PERMUTING = ("avx512", "avx2")
"""Targets that permute a register by indices in another."""
WIDEST = 16
"""The largest M."""
_PLACE = {word: place for place, word in enumerate(WORDS)}
_ROWS = 1024


@dataclass(frozen=True)
class Steps:
    """How the columns of a row are cut.

    Attributes:
        n, m: weights and columns of a group.
        lanes: rows of a slice.
        table: floats of x at hand, one register or two.
        bits: of an index, which counts from the table's start.
        slab: columns that a table serves: as many whole groups as it holds.
        slabs: slabs of a step.
    """

    n: int
    m: int
    lanes: int
    table: int
    bits: int
    slab: int
    slabs: int

    @property
    def columns(self) -> int:
        """Columns of a step."""
        return self.slab * self.slabs

    @property
    def entries(self) -> int:
        """Weights of a step in each row."""
        return self.columns // self.m * self.n

    @property
    def words(self) -> int:
        """32-bit words of indices of a step in each row."""
        return -(-self.entries // (32 // self.bits))


@dataclass(frozen=True)
class Packed(OnLines):
    """A matrix in slices; see `WORDS` for the arrays.

    Attributes:
        cut: how its columns are cut.
        shape: (out, in).
        kind: how the weights are stored.
        hollow: whether a whole step has a zero among its weights, which must not touch its x.
    """

    cut: Steps
    shape: tuple[int, int]
    kind: Precision
    hollow: bool
    values: npt.NDArray[Any]
    indices: npt.NDArray[np.uint32]
    scales: npt.NDArray[np.float32]
    bias: npt.NDArray[np.float32]
    bounds: npt.NDArray[np.int32]


def steps(target: Target, n: int, m: int) -> Steps:
    """Return how rows of an n:m matrix (n <= m <= 16) are cut for a target that permutes."""
    table = max(target.lanes, 16 if m > target.lanes else 0)
    bits = 4 if table == 16 else 3
    slab = table // m * m
    return Steps(n, m, target.lanes, table, bits, slab, max(1, 32 // bits // (slab // m * n)))


def fits(weight: npt.NDArray[np.float32], m: int) -> int:
    """Return the most non-zeros that a group of m columns of a row has; the last group of a row may be shorter."""
    kept = weight != 0
    width = weight.shape[1]
    whole = kept[:, : width // m * m].reshape(len(kept), width // m, m).sum(axis=2, dtype=np.uint8).max(initial=0)
    return int(max(whole, kept[:, width // m * m :].sum(axis=1, dtype=np.uint8).max(initial=0)))


def level(weight: npt.NDArray[np.float32], m: int, price: float) -> int:
    """Return the n for which the n:m part of any matrix (`split`) and the rest are cheapest together.

    Args:
        weight: (out, in).
        m: columns of a group.
        price: of a weight of the rest, where a place of the n:m part costs 1.
    """
    kept = np.pad(weight != 0, ((0, 0), (0, -weight.shape[1] % m)))
    counts = np.bincount(kept.reshape(-1, m).sum(axis=1, dtype=np.uint8), minlength=m + 1)
    least = counts[::-1].cumsum()[::-1]  # groups that have at least so many
    return int(np.count_nonzero(price * least[1:] > max(1, least[0])))


def split(weight: npt.NDArray[np.float32], n: int, m: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Return the first n non-zeros of every group of m columns of a row, and the other ones, each (out, in)."""
    out, width = weight.shape
    groups = -(-width // m)
    kept = np.pad(weight != 0, ((0, 0), (0, -width % m))).reshape(out, groups, m)
    early = (kept.cumsum(axis=2, dtype=np.uint8) <= n).reshape(out, groups * m)[:, :width]
    return np.where(early, weight, np.float32(0)), np.where(early, np.float32(0), weight)


def pack(
    weight: npt.NDArray[np.float32], bias: npt.NDArray[np.float32], scale: npt.NDArray[np.float32], n: int, m: int,
    target: Target, kind: Precision = "float32",
) -> Packed:  # fmt: skip
    """Return a matrix of which every group of m columns of a row has at most n non-zeros (`fits`), packed for a target.

    Args:
        weight: (out, in).
        bias: (out), zeros where there is none.
        scale: (out) of `precision.scales`.
        n: weights of a group.
        m: columns of a group.
        target: one of PERMUTING.
        kind: of the stored weights.
    """
    cut = steps(target, n, m)
    out, width = weight.shape
    slices, count = -(-out // cut.lanes), -(-width // cut.columns)
    scale = np.pad(scale, (0, slices * cut.lanes - out), constant_values=1)
    added = np.pad(bias, (0, slices * cut.lanes - out))
    values = np.zeros((slices, count, cut.entries, cut.lanes), precision.stored(kind))
    indices = np.zeros((slices, count, cut.words, cut.lanes), np.uint32)
    hollow, whole = False, _whole(cut, width)
    for first in range(0, slices, _ROWS // cut.lanes):
        part = slice(first, first + _ROWS // cut.lanes)
        rows = slice(first * cut.lanes, min(part.stop, slices) * cut.lanes)
        found, position = _entries(weight[rows], cut, count)
        stored = precision.narrow(found, scale[rows][: len(found), None, None], kind)
        hollow = hollow or not bool((stored[:, :whole] != 0).all())
        values[part] = _lanes(stored, cut.lanes)
        indices[part] = _lanes(_packed(position, cut), cut.lanes)
    chunks = max(1, min(values.size // CHUNK, CHUNKS, slices))
    bounds = np.arange(chunks + 1) * slices // chunks
    return Packed(cut, (out, width), kind, hollow, values, indices, scale, added, bounds.astype(np.int32))


def unpack(packed: Packed, weight: npt.NDArray[np.float32]) -> None:
    """Write the weights that are multiplied by (rounded, scaled) into their places of a matrix (out, in) of zeros."""
    cut, (out, _) = packed.cut, packed.shape
    slices, count = packed.values.shape[:2]
    each = 32 // cut.bits
    shifts = np.uint32(cut.bits) * np.arange(each, dtype=np.uint32)
    words = packed.indices[:, :, :, None] >> shifts[:, None] & np.uint32(2**cut.bits - 1)
    position = words.reshape(slices, count, -1, cut.lanes)[:, :, : cut.entries]
    slab = np.repeat(np.arange(cut.slabs), cut.entries // cut.slabs) * cut.slab
    column = position + slab[:, None] + (np.arange(count) * cut.columns)[:, None, None]
    found = precision.widen(packed.values, packed.scales.reshape(slices, 1, 1, cut.lanes))
    row = np.arange(slices * cut.lanes).reshape(slices, 1, 1, cut.lanes)
    kept = (found != 0) & (row < out)
    weight[np.broadcast_to(row, kept.shape)[kept], column[kept]] = found[kept]


def calls(
    target: Target, packed: Packed, x: int, y: int, *, columns: int = 1, x_step: int = 0, y_step: int = 0,
    act: Act = "none", limits: int = 0,
) -> list[Call]:  # fmt: skip
    """Return the stage that multiplies: y[c] = act(scale * sum + bias) for each column c.

    Args:
        target: what `packed` was packed for.
        packed: from `pack`; must stay alive as long as the calls.
        x: address of the first column, (in) float32 side by side.
        y: address of the first column, (out) float32.
        columns: how many; up to 4 go through the weights together.
        x_step: bytes from a column of x to the next.
        y_step: bytes from a column of y to the next.
        act: what follows the sum.
        limits: address of two float32 for `clamp`.
    """
    found, first = [], 0
    arrays = (packed.values, packed.indices, packed.scales, packed.bias)
    out, width = packed.shape
    for block in (4, 2, 1) if target.registers >= 32 else (2, 1):
        blocks = (columns - first) // block
        if blocks and out:
            places = (one.ctypes.data for one in arrays)
            sizes = (packed.bounds.ctypes.data, blocks, _whole(packed.cut, width), packed.values.shape[1], width, out)
            slots = np.array([x, x_step, y, y_step, first, *places, limits, *sizes], np.int64)
            code = address(target, packed.cut.n, packed.cut.m, block, packed.kind, packed.hollow, act)
            found.append(Call(code, slots, blocks * (len(packed.bounds) - 1)))
        first += blocks * block
    return found


def address(
    target: Target, n: int, m: int, block: int = 1, kind: Precision = "float32", hollow: bool = False, act: Act = "none"
) -> int:
    """Return the address of the kernel for n:m matrices that does `block` columns at once."""
    name = f"openwork_nm_{n}_{m}_c{block}_{kind}{'_hollow' if hollow else ''}_{act}_{target.name}"
    return jit.address(name, target, functools.partial(_build, name, target, n, m, block, kind, hollow, act))


def _whole(cut: Steps, width: int) -> int:
    """Return how many steps read tables that lie within a row of x."""
    reach = (cut.slabs - 1) * cut.slab + cut.table
    return max(0, (width - reach) // cut.columns + 1)


def _entries(
    weight: npt.NDArray[np.float32], cut: Steps, count: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.uint32]]:
    """Return weights and positions in the table (rows, steps, entries), zeros last in their groups."""
    row, column = np.nonzero(weight)
    group = row * -(-weight.shape[1] // cut.m) + column // cut.m
    turn = np.arange(len(group))
    first = np.maximum.accumulate(np.where(np.diff(group, prepend=-1) != 0, turn, 0))  # where the entry's group begins
    slab = column % cut.columns // cut.slab
    entry = (slab * (cut.slab // cut.m) + column % cut.slab // cut.m) * cut.n + turn - first
    place = (row * count + column // cut.columns) * cut.entries + entry
    found = np.zeros((len(weight), count, cut.entries), np.float32)
    position = np.zeros((len(weight), count, cut.entries), np.uint32)
    found.reshape(-1)[place] = weight[row, column]
    position.reshape(-1)[place] = column % cut.slab
    return found, position


def _packed(position: npt.NDArray[np.uint32], cut: Steps) -> npt.NDArray[np.uint32]:
    """Return the words (rows, steps, words) of positions (rows, steps, entries), the first in the lowest bits."""
    rows, count, entries = position.shape
    each = 32 // cut.bits
    room = np.zeros((rows, count, cut.words * each), np.uint32)
    room[:, :, :entries] = position
    shifts = np.uint32(cut.bits) * np.arange(each, dtype=np.uint32)
    found: npt.NDArray[np.uint32] = np.bitwise_or.reduce(room.reshape(rows, count, cut.words, each) << shifts, axis=3)
    return found


def _lanes(rows: npt.NDArray[Any], lanes: int) -> npt.NDArray[Any]:
    """Return (rows, steps, entries) as (slices, steps, entries, lanes), zeros in the lanes that have no row."""
    padded = np.zeros((-(-len(rows) // lanes) * lanes, *rows.shape[1:]), rows.dtype)
    padded[: len(rows)] = rows
    return padded.reshape(-1, lanes, *rows.shape[1:]).transpose(0, 2, 3, 1)


def _build(name: str, target: Target, n: int, m: int, block: int, kind: Precision, hollow: bool, act: Act) -> str:
    e, cut = Emitter(name, target), steps(target, n, m)
    b, lanes, each = e.b, cut.lanes, 32 // cut.bits
    x, y, values, indices, scales, bias, limits, bounds = (
        e.pointer(_PLACE[word]) for word in ("x", "y", "values", "indices", "scales", "bias", "limits", "bounds")
    )
    x_step, y_step, first, blocks, whole, count, width, height = (
        e.slot(_PLACE[word]) for word in ("x_step", "y_step", "first", "blocks", "whole", "steps", "width", "height")
    )
    chunk = b.sdiv(e.unit, blocks)
    column = b.add(first, b.mul(b.srem(e.unit, blocks), e.int(block)))
    sources = [e.at(x, b.mul(b.add(column, e.int(c)), x_step)) for c in range(block)]
    results = [e.at(y, b.mul(b.add(column, e.int(c)), y_step)) for c in range(block)]
    words = e.vector(e.i32)

    def tables(source: Any, start: Any) -> list[Any]:
        """Return the registers of a slab that starts at column `start`."""
        return [e.load(e.item(source, b.add(start, e.int(i)), e.f32), e.vector()) for i in range(0, cut.table, lanes)]

    def tables_at_end(source: Any, start: Any) -> list[Any]:
        starts = [b.add(start, e.int(i)) for i in range(0, cut.table, lanes)]
        return [e.masked_load(e.item(source, at, e.f32), e.mask(b.sub(width, at))) for at in starts]

    def step(row: Any, number: Any, sums: Sequence[Any], read: Any, careful: bool) -> list[Any]:
        sums, place, held = list(sums), b.add(b.mul(row, count), number), []
        for entry in range(cut.entries):
            if entry % each == 0:
                at = b.mul(b.add(b.mul(place, e.int(cut.words)), e.int(entry // each)), e.int(4 * lanes))
                word = e.load(e.at(indices, at), words)
            if entry % (cut.entries // cut.slabs) == 0:
                slab = entry // (cut.entries // cut.slabs) * cut.slab
                start = b.add(b.mul(number, e.int(cut.columns)), e.int(slab))
                held = [read(source, start) for source in sources]
            shift = e.splat(e.ir.Constant(e.i32, entry % each * cut.bits))
            index = b.lshr(word, shift)
            at = b.mul(b.add(b.mul(place, e.int(cut.entries)), e.int(entry)), e.int(lanes))
            weight = precision.load(e, values, at, lanes, kind)
            kept = b.fcmp_unordered("!=", weight, e.constant(0.0)) if careful else None
            for c in range(block):
                taken = _take(e, held[c], index)
                if kept is not None:
                    taken = b.select(kept, taken, e.constant(0.0))
                sums[c * SUMS + entry % SUMS] = e.fma(weight, taken, sums[c * SUMS + entry % SUMS])
        return sums

    with e.loop(e.index(bounds, chunk), e.index(bounds, b.add(chunk, e.int(1)))) as row:
        sums: Sequence[Any] = [e.constant(0.0)] * (SUMS * block)
        with e.loop_carrying(e.int(0), whole, sums) as (number, held, give):
            give(step(row, number, held, tables, hollow))
        with e.loop_carrying(whole, count, e.carried) as (number, held, give):
            give(step(row, number, held, tables_at_end, True))
        sums = e.carried
        spot = b.mul(row, e.int(lanes))
        added = e.load(e.item(bias, spot, e.f32), e.vector())
        mask = e.mask(b.sub(height, spot))
        for c in range(block):
            one, two, three, four = sums[c * SUMS : (c + 1) * SUMS]
            total = b.fadd(b.fadd(one, two), b.fadd(three, four))
            if kind == "int8":
                total = e.fma(total, e.load(e.item(scales, spot, e.f32), e.vector()), added)
            else:
                total = b.fadd(total, added)
            e.masked_store(apply(e, act, total, limits), e.item(results[c], spot, e.f32), mask)
    return e.text()


def _take(e: Emitter, tables: Sequence[Any], index: Any) -> Any:
    """Return in each lane the float of the tables that the lowest bits of its index say."""
    kind = e.vector()
    if e.target.name == "avx512":
        return e.call("llvm.x86.avx512.permvar.sf.512", kind, [tables[0], index])
    found = [e.call("llvm.x86.avx2.permps", kind, [table, index]) for table in tables]
    if len(found) == 1:
        return found[0]
    top = e.b.shl(index, e.splat(e.ir.Constant(e.i32, 28)))
    return e.b.select(e.b.icmp_signed("<", top, e.ir.Constant(e.vector(e.i32), None)), found[1], found[0])
