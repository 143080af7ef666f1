"""The product of a sparse matrix with few columns, each by itself: y[o] = act(s_o * sum_i q_oi x_i + b_o).

With one column a weight is used once, so the product waits for weights, indices and the gathered x. Layout: sliced
ELLPACK (Kreutzer, Hager, Wellein, Fehske, Bishop, "A unified sparse matrix data format ...", SIAM J. Sci. Comput. 36(5),
2014), rows sorted by their number of non-zeros over the whole matrix, indices of 16 bits where they fit. Three ways:

    lanes of rows   a vector register has one row a lane and x is gathered: one step serves `lanes` rows
    one row         x is read entry by entry: for processors that gather slowly, and those that cannot
    groups of rows  R rows with the same input columns: one x, one index and a vector of R weights an entry

Every row is summed in the same order in all ways and on all processors that fuse multiply and add: entry k goes to sum
k mod 4, the four are added as (0 + 1) + (2 + 3). Lanes whose row is at its end are masked out, so no product is computed
that the matrix does not have: a zero weight skips its x, be it infinite or NaN (an explicit zero inside a group of rows
does not). Rows that fill up the last slice are copies of the last row and write the same sum.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from openwork.runtime.kernels import jit, precision
from openwork.runtime.kernels.activations import Act, apply
from openwork.runtime.kernels.arrange import Section
from openwork.runtime.kernels.emit import Emitter
from openwork.runtime.kernels.launch import Call
from openwork.runtime.kernels.precision import Precision
from openwork.runtime.kernels.target import Target

WORDS = (
    "x", "x_step", "y", "y_step", "first", "values", "indices", "slices", "counts", "places", "scales", "bias", "limits",
    "bounds", "columns",
)  # fmt: skip
"""The slots. x, y: addresses of the first column; x_step, y_step: bytes from a column to the next; first: the first row.

values (steps, lanes, rows), indices (steps, lanes) of 16 unsigned or 32 signed bits. slices (slices, 3) int32: the first
step of a slice, how many steps all of its rows take (a multiple of 4), how many any of them takes. counts (slices, lanes)
int32: entries of each row. places (slices, lanes) int32: where in y, in groups of rows. scales, bias (slices, lanes, rows)
float32. limits: two float32 for `clamp`. bounds (chunks + 1) int32: the slices of each chunk. columns: how many.
A unit is one column of one chunk; the columns of a chunk follow each other, while its weights are in the cache.
"""
SUMS = 4
GATHERING = ("avx512", "avx2")
"""Targets that can gather."""
CHUNK = 8192
"""Multiply-adds that a unit has at least."""
CHUNKS = 32
LINE = 64
"""Bytes of a cache line."""
_PLACE = {word: place for place, word in enumerate(WORDS)}


class OnLines:
    """What packed arrays have in common: the large ones start on a cache line, in copies and after pickling too."""

    values: npt.NDArray[Any]
    indices: npt.NDArray[Any]

    def __post_init__(self) -> None:
        for name in ("values", "indices"):
            object.__setattr__(self, name, on_line(getattr(self, name)))

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return type(self), tuple(getattr(self, one.name) for one in fields(self))  # type: ignore[arg-type]

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(part.nbytes for part in vars(self).values() if isinstance(part, np.ndarray))

    @property
    def multiplies(self) -> int:
        """Multiply-adds for one column, those that only fill up included."""
        return int(self.values.size)


@dataclass(frozen=True)
class Slices(OnLines):
    """A section of a matrix in the order of the kernel's loops; see `WORDS` for the arrays.

    Attributes:
        lanes: groups of rows side by side in a slice, 1 or the target's lanes.
        rows: rows of a group.
        first: the first row of the section.
        height: rows of the section.
        kind: how the weights are stored.
        onto: whether the product is added to what stands in y, in place of the bias.
    """

    lanes: int
    rows: int
    first: int
    height: int
    kind: Precision
    onto: bool
    values: npt.NDArray[Any]
    indices: npt.NDArray[Any]
    slices: npt.NDArray[np.int32]
    counts: npt.NDArray[np.int32]
    places: npt.NDArray[np.int32]
    scales: npt.NDArray[np.float32]
    bias: npt.NDArray[np.float32]
    bounds: npt.NDArray[np.int32]


def pack(
    section: Section, width: int, bias: npt.NDArray[np.float32], scale: npt.NDArray[np.float32], *, lanes: int = 1,
    kind: Precision = "float32", onto: bool = False,
) -> Slices:  # fmt: skip
    """Return a section in slices.

    Args:
        section: groups of rows, for `lanes` > 1 of one row each.
        width: columns of the matrix; up to 65536 the indices have 16 bits.
        bias: (out) float32, zeros where there is none.
        scale: (out) of `precision.scales`.
        lanes: groups side by side.
        kind: of the stored weights.
        onto: add to what stands in y, not to the bias.
    """
    rows, groups = section.rows, section.groups
    own = slice(section.first, section.first + groups * rows)
    scale, bias = scale[own].reshape(groups, rows), bias[own].reshape(groups, rows)
    counts = np.diff(section.starts)
    stored = precision.narrow(section.values, scale[np.repeat(np.arange(groups), counts)], kind)
    order = np.argsort(-counts, kind="stable")
    order = np.concatenate((order, np.repeat(order[-1:], -groups % lanes)))
    number = -(-groups // lanes)
    count = counts[order].reshape(number, lanes)
    steps, whole = count.max(axis=1, initial=0), count.min(axis=1, initial=2**31) // SUMS * SUMS
    begins = np.concatenate(([0], np.cumsum(steps)))
    if int(begins[-1]) >= 2**31:
        raise ValueError(f"{int(begins[-1])} steps are too many for 32-bit numbers")
    lane = np.repeat(np.arange(number * lanes), count.reshape(-1))
    turn = np.arange(lane.size) - np.repeat(np.cumsum(count) - count.reshape(-1), count.reshape(-1))
    source = section.starts[order[lane]] + turn
    place = (begins[lane // lanes] + turn) * lanes + lane % lanes
    total = int(begins[-1]) * lanes
    indices = np.zeros(total, np.uint16 if width <= 2**16 else np.int32)
    values = np.zeros((total, rows), stored.dtype)
    indices[place], values[place] = section.columns[source], stored[source]
    return Slices(
        lanes,
        rows,
        section.first,
        groups * rows,
        kind,
        onto,
        values,
        indices,
        np.stack((begins[:-1], whole, steps), axis=1).astype(np.int32),
        count.astype(np.int32),
        order.reshape(number, lanes).astype(np.int32),
        np.ascontiguousarray(scale[order]),
        np.ascontiguousarray(bias[order]),
        _bounds(begins, lanes * rows),
    )


def unpack(slices: Slices, weight: npt.NDArray[np.float32]) -> None:
    """Write the weights that the slices stand for (rounded, scaled) into their places of a matrix (out, in) of zeros."""
    lanes, rows = slices.lanes, slices.rows
    for (begin, _, steps), counts, places, scales in zip(
        slices.slices, slices.counts, slices.places, slices.scales.reshape(-1, lanes, rows), strict=True
    ):
        part = slice(int(begin) * lanes, (int(begin) + int(steps)) * lanes)
        index, stored = slices.indices[part].reshape(-1, lanes), slices.values[part].reshape(-1, lanes, rows)
        for lane, (count, place) in enumerate(zip(counts, places, strict=True)):
            row = slices.first + int(place) * rows
            found = precision.widen(stored[:count, lane], scales[lane])
            weight[row : row + rows, index[:count, lane]] = found.T


def on_line(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the array, copied unless it starts on a cache line: a vector that lies on two costs two reads."""
    if array.flags.c_contiguous and array.ctypes.data % LINE == 0:
        return array
    room = np.empty(array.nbytes + LINE, np.uint8)
    start = -room.ctypes.data % LINE
    copy = room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def calls(
    target: Target, slices: Slices, x: int, y: int, *, columns: int = 1, x_step: int = 0, y_step: int = 0,
    act: Act = "none", limits: int = 0,
) -> list[Call]:  # fmt: skip
    """Return the stage that multiplies; other sections of the same matrix may be in it too.

    Args:
        target: what to compile for.
        slices: from `pack`; must stay alive as long as the calls.
        x: address of the first column, (in) float32 side by side.
        y: address of the first column of the whole y, (out) float32.
        columns: how many.
        x_step: bytes from a column of x to the next.
        y_step: bytes from a column of y to the next.
        act: what follows the sum.
        limits: address of two float32 for `clamp`.
    """
    bits = 8 * slices.indices.itemsize
    slots = np.zeros(len(WORDS), np.int64)
    arrays = (slices.values, slices.indices, slices.slices, slices.counts, slices.places, slices.scales, slices.bias)
    words = (x, x_step, y, y_step, slices.first, *(one.ctypes.data for one in arrays), limits)
    slots[:] = (*words, slices.bounds.ctypes.data, columns)
    code = address(target, slices.lanes, slices.rows, slices.kind, bits, slices.onto, act)
    return [Call(code, slots, columns * (len(slices.bounds) - 1))] if slices.height else []


def address(
    target: Target, lanes: int, rows: int, kind: Precision = "float32", bits: int = 16, onto: bool = False,
    act: Act = "none",
) -> int:  # fmt: skip
    """Return the address of the kernel for `lanes` groups of `rows` rows side by side; one of both is 1."""
    name = f"openwork_matvec_l{lanes}_r{rows}_{kind}_i{bits}{'_onto' if onto else ''}_{act}_{target.name}"
    return jit.address(name, target, functools.partial(_build, name, target, lanes, rows, kind, bits, onto, act))


def _bounds(begins: npt.NDArray[np.int64], width: int) -> npt.NDArray[np.int32]:
    """Return the slices of each chunk: about equal work, at least CHUNK multiply-adds."""
    number = len(begins) - 1
    chunks = max(1, min(int(begins[-1]) * width // CHUNK, CHUNKS, number))
    inner = np.searchsorted(begins, begins[-1] * np.arange(1, chunks) / chunks)
    return np.concatenate(([0], inner, [number])).astype(np.int32)


def _build(name: str, target: Target, lanes: int, rows: int, kind: Precision, bits: int, onto: bool, act: Act) -> str:
    e = Emitter(name, target)
    b, width = e.b, lanes * rows
    number = e.i16 if bits == 16 else e.i32
    x, y, values, indices, slices, counts, places, scales, bias, limits, bounds = (
        e.pointer(_PLACE[word])
        for word in ("x", "y", "values", "indices", "slices", "counts", "places", "scales", "bias", "limits", "bounds")
    )
    columns = e.slot(_PLACE["columns"])
    chunk, column = b.sdiv(e.unit, columns), b.srem(e.unit, columns)
    x = e.at(x, b.mul(column, e.slot(_PLACE["x_step"])))
    y = e.item(e.at(y, b.mul(column, e.slot(_PLACE["y_step"]))), e.slot(_PLACE["first"]), e.f32)
    words = e.vector(e.i32, lanes)

    def source(entry: Any, mask: Any) -> Any:
        """Return x as `width` lanes for one step."""
        place = e.at(indices, b.mul(entry, e.int(lanes * bits // 8)))
        if lanes > 1:
            index = e.load(place, e.vector(number, lanes), bits // 8)
            return _gather(e, x, index if bits == 32 else b.zext(index, words), mask)
        index = e.load(place, number, bits // 8)
        index = b.zext(index, e.i64) if bits == 16 else b.sext(index, e.i64)
        return e.splat(e.load(e.item(x, index, e.f32), e.f32), rows)

    def step(entry: Any, total: Any, mask: Any = None) -> Any:
        weight = precision.load(e, values, b.mul(entry, e.int(width)), width, kind)
        following = e.fma(weight, source(entry, mask), total)
        return following if mask is None else b.select(mask, following, total)

    def rest_of_row(begin: Any, whole: Any, steps: Any, sums: list[Any]) -> list[Any]:
        """Add the last entries, fewer than SUMS, of a single group."""
        sums, left = list(sums), b.sub(steps, whole)
        for i in range(SUMS - 1):
            before, more, after = b.block, e.function.append_basic_block("more"), e.function.append_basic_block("after")
            b.cbranch(b.icmp_signed("<", e.int(i), left), more, after)
            b.position_at_end(more)
            added = step(b.add(begin, b.add(whole, e.int(i))), sums[i])
            b.branch(after)
            b.position_at_end(after)
            total = b.phi(sums[i].type)
            total.add_incoming(sums[i], before)
            total.add_incoming(added, more)
            sums[i] = total
        return sums

    def rest_of_lanes(number_: Any, begin: Any, whole: Any, steps: Any, sums: list[Any]) -> list[Any]:
        """Add the entries that not all lanes have."""
        count = e.load(e.item(counts, b.mul(number_, e.int(lanes)), e.i32), words)
        with e.loop_carrying(whole, steps, sums, SUMS) as (k, held, give):
            following = []
            for i, total in enumerate(held):
                now = b.add(k, e.int(i))
                mask = b.icmp_signed(">", count, e.splat(b.trunc(now, e.i32), lanes))
                # a group of four steps may end after the slice does: read its last step again, masked out
                inside = b.select(b.icmp_signed("<", now, steps), now, b.sub(steps, e.int(1)))
                following.append(step(b.add(begin, inside), total, mask))
            give(following)
        return list(e.carried)

    with e.loop(e.index(bounds, chunk), e.index(bounds, b.add(chunk, e.int(1)))) as one:
        begin, whole, steps = (e.index(slices, b.add(b.mul(one, e.int(3)), e.int(i))) for i in range(3))
        zero = e.constant(0.0, width)
        with e.loop_carrying(e.int(0), whole, [zero] * SUMS, SUMS) as (k, held, give):
            at = b.add(begin, k)
            give([step(b.add(at, e.int(i)), total) for i, total in enumerate(held)])
        sums = list(e.carried)
        sums = rest_of_lanes(one, begin, whole, steps, sums) if lanes > 1 else rest_of_row(begin, whole, steps, sums)
        total = b.fadd(b.fadd(sums[0], sums[1]), b.fadd(sums[2], sums[3]))
        spot, first = b.mul(one, e.int(width)), b.mul(one, e.int(lanes))
        if not onto:
            added = e.load(e.item(bias, spot, e.f32), e.vector(lanes=width))
        elif lanes > 1:
            added = _gather(e, y, e.load(e.item(places, first, e.i32), words), None)
        else:
            added = e.load(e.item(y, b.mul(e.index(places, one), e.int(rows)), e.f32), e.vector(lanes=width))
        if kind == "int8":
            total = e.fma(total, e.load(e.item(scales, spot, e.f32), e.vector(lanes=width)), added)
        else:
            total = b.fadd(total, added)
        total = apply(e, act, total, limits)
        for lane in range(lanes):
            to = b.mul(e.index(places, b.add(first, e.int(lane))), e.int(rows))
            part = total if lanes == 1 else e.shuffle(total, total, [lane])
            e.store(part, e.item(y, to, e.f32))
    return e.text()


def _gather(e: Emitter, base: Any, index: Any, mask: Any) -> Any:
    """Return the float32 numbers at these places (int32) of an array; lanes masked out are zero and not touched."""
    lanes, kind, constant = index.type.count, e.vector(lanes=index.type.count), e.ir.Constant
    bits = e.vector(e.i1, lanes)
    mask = constant(bits, [constant(e.i1, 1)] * lanes) if mask is None else mask
    if e.target.name == "avx2" and lanes == 8:  # LLVM takes such gathers apart unless it is told not to
        signs = e.b.bitcast(e.b.sext(mask, e.vector(e.i32, lanes)), kind)
        none, four = constant(kind, None), constant(e.i8, 4)
        return e.call("llvm.x86.avx2.gather.d.ps.256", kind, [none, base, index, signs, four])
    places = e.b.gep(base, [index], source_etype=e.f32)
    places.type = e.vector(e.ptr, lanes)  # one address a lane
    arguments = [places, constant(e.i32, 4), mask, constant(kind, None)]
    return e.call(f"llvm.masked.gather.v{lanes}f32.v{lanes}p0", kind, arguments)
