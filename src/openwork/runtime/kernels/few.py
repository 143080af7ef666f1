"""The product of a sparse matrix with a few columns at once: Y[o, c] = act(s_o sum_i q_oi X[i, c] + b_o).

With so few columns a row has one vector of sums, and a row by itself would wait for each multiply-add to end before the
next. So the rows of a slice (`kernels.matvec.pack` with `rows_at_once` lanes) go side by side: one step takes an entry of
each, whose sums are independent. An entry costs a weight, an index and a vector of X, whatever the number of columns.

Each row is summed in the order of its entries, so the result is the same bit for bit for every number of threads and
columns; only entries that exist are multiplied, so a zero weight skips its x, be it infinite or NaN.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from openwork.runtime.kernels import jit, precision
from openwork.runtime.kernels.activations import Act, apply
from openwork.runtime.kernels.emit import Emitter
from openwork.runtime.kernels.launch import Call
from openwork.runtime.kernels.matvec import Slices
from openwork.runtime.kernels.precision import Precision
from openwork.runtime.kernels.target import Target

WORDS = (
    "x", "x_tile", "y", "y_tile", "values", "indices", "slices", "counts", "places", "scales", "bias", "limits", "bounds",
    "tiles",
)  # fmt: skip
"""The slots. x: (tiles, in, columns), y: (tiles, out, columns), whose tiles are x_tile and y_tile bytes apart.
The other arrays as in `kernels.matvec.WORDS`; a unit is one tile of one chunk."""
NARROWEST = 4
"""Columns of the narrowest tile."""
_PLACE = {word: place for place, word in enumerate(WORDS)}


def rows_at_once(target: Target) -> int:
    """Return the rows of a slice: their sums take half of the registers."""
    return target.registers // 2


def widths(target: Target) -> tuple[int, ...]:
    """Return how many columns a tile may have: 4, 8, up to the lanes of the target."""
    return tuple(width for width in (4, 8, 16) if width <= target.lanes)


def calls(
    target: Target, slices: Slices, x: int, y: int, columns: int, *, tiles: int = 1, x_tile: int = 0, y_tile: int = 0,
    act: Act = "none", limits: int = 0,
) -> list[Call]:  # fmt: skip
    """Return the stage that multiplies.

    Args:
        target: what to compile for.
        slices: from `matvec.pack` with `rows_at_once` lanes and one row a group; must stay alive as long as the calls.
        x: address of X (in, columns), rows side by side.
        y: address of Y (out, columns).
        columns: of a tile, one of `widths`.
        tiles: how many, one after the other.
        x_tile: bytes from a tile of X to the next.
        y_tile: bytes from a tile of Y to the next.
        act: what follows the sum.
        limits: address of two float32 for `clamp`.
    """
    arrays = (slices.values, slices.indices, slices.slices, slices.counts, slices.places, slices.scales, slices.bias)
    words = (x, x_tile, y, y_tile, *(one.ctypes.data for one in arrays), limits, slices.bounds.ctypes.data, tiles)
    code = address(target, columns, slices.lanes, slices.kind, 8 * slices.indices.itemsize, act)
    return [Call(code, np.array(words, np.int64), tiles * (len(slices.bounds) - 1))] if slices.height else []


def address(target: Target, columns: int, lanes: int, kind: Precision = "float32", bits: int = 16, act: Act = "none") -> int:
    """Return the address of the kernel for `columns` columns and slices of `lanes` rows."""
    name = f"openwork_few_c{columns}_l{lanes}_{kind}_i{bits}_{act}_{target.name}"
    return jit.address(name, target, functools.partial(_build, name, target, columns, lanes, kind, bits, act))


def _build(name: str, target: Target, columns: int, lanes: int, kind: Precision, bits: int, act: Act) -> str:
    e = Emitter(name, target)
    b, number = e.b, e.i16 if bits == 16 else e.i32
    x, y, values, indices, slices, counts, places, scales, bias, limits, bounds = (
        e.pointer(_PLACE[word])
        for word in ("x", "y", "values", "indices", "slices", "counts", "places", "scales", "bias", "limits", "bounds")
    )
    tiles = e.slot(_PLACE["tiles"])
    chunk, tile = b.sdiv(e.unit, tiles), b.srem(e.unit, tiles)
    x = e.at(x, b.mul(tile, e.slot(_PLACE["x_tile"])))
    y = e.at(y, b.mul(tile, e.slot(_PLACE["y_tile"])))

    def scalar(base: Any, at: Any) -> Any:
        return e.splat(e.load(e.item(base, at, e.f32), e.f32), columns)

    def add(step: Any, lane: int, total: Any) -> Any:
        """Add the entry of one row in one step."""
        at = b.add(b.mul(step, e.int(lanes)), e.int(lane))
        index = e.load(e.item(indices, at, number), number, bits // 8)
        index = b.zext(index, e.i64) if bits == 16 else b.sext(index, e.i64)
        weight = b.extract_element(precision.load(e, values, at, 1, kind), e.ir.Constant(e.i32, 0))
        source = e.load(e.at(x, b.mul(index, e.int(4 * columns))), e.vector(lanes=columns))
        return e.fma(e.splat(weight, columns), source, total)

    with e.loop(e.index(bounds, chunk), e.index(bounds, b.add(chunk, e.int(1)))) as one:
        begin, whole = (e.index(slices, b.add(b.mul(one, e.int(3)), e.int(i))) for i in range(2))
        first = b.mul(one, e.int(lanes))
        with e.loop_carrying(e.int(0), whole, [e.constant(0.0, columns)] * lanes) as (k, held, give):
            give([add(b.add(begin, k), lane, total) for lane, total in enumerate(held)])
        sums = list(e.carried)
        for lane in range(lanes):
            spot = b.add(first, e.int(lane))
            with e.loop_carrying(whole, e.index(counts, spot), [sums[lane]]) as (k, held, give):
                give([add(b.add(begin, k), lane, held[0])])
            (total,) = e.carried
            if kind == "int8":
                total = e.fma(total, scalar(scales, spot), scalar(bias, spot))
            else:
                total = b.fadd(total, scalar(bias, spot))
            to = b.mul(e.index(places, spot), e.int(4 * columns))
            e.store(apply(e, act, total, limits), e.at(y, to))
    return e.text()
