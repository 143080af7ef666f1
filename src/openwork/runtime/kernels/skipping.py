"""The non-zero numbers of each row of a matrix, listed: their columns and their values, in ascending order.

With a weight stored input by input, a linear layer is then a weighted sum of the rows that the list names
(`kernels.decode.sums`), and a zero input costs one comparison. NaN is not equal to zero, so it is listed; -0.0 is not.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from openwork.runtime.kernels import jit
from openwork.runtime.kernels.emit import Emitter
from openwork.runtime.kernels.launch import Call
from openwork.runtime.kernels.target import Target

WORDS = ("x", "x_row", "rows", "columns", "part", "parts", "begins", "ends", "indices", "values", "room")
"""The slots. x: address of float32; x_row: its stride in bytes; rows, columns; columns of a part, and number of parts.

begins, ends (parts, rows) int64: written, the entries of each row, part by part. indices (int32) and values (float32):
written, `room` entries from a row to the next.
"""


def room(columns: int) -> int:
    """Return the entries to leave for the list of a row: all of them, and a vector that may be written over the end."""
    return -(-columns // 16) * 16 + 16


def calls(
    target: Target, x: int, x_row: int, rows: int, columns: int, part: int, begins: int, ends: int, indices: int,
    values: int,
) -> list[Call]:  # fmt: skip
    """Return the stage that lists the non-zero numbers of each row.

    Args:
        target: what to compile for.
        x, x_row: address of float32 (rows, columns) and its row stride in bytes.
        rows, columns: sizes.
        part: columns of a part, a multiple of 16.
        begins, ends: addresses of int64 (parts, rows), written.
        indices, values: addresses of int32 and float32 (rows, room(columns)), written.
    """
    parts = max(1, -(-columns // part))
    name = f"openwork_nonzero_{target.name}"
    where = jit.address(name, target, functools.partial(_build, name, target))
    words = (x, x_row, rows, columns, part, parts, begins, ends, indices, values, room(columns))
    slots = np.array(words, np.int64)
    return [Call(where, slots, rows)]


def _build(name: str, target: Target) -> str:
    e = Emitter(name, target)
    b = e.b
    word = {key: e.slot(place) for place, key in enumerate(WORDS)}
    x, begins, ends, indices, values = (e.pointer(WORDS.index(key)) for key in ("x", "begins", "ends", "indices", "values"))
    source, columns = e.at(x, b.mul(e.unit, word["x_row"])), word["columns"]
    place = e.cell(b.mul(e.unit, word["room"]))
    lanes = e.ir.Constant(e.vector(e.i32), [e.ir.Constant(e.i32, i) for i in range(e.lanes)])

    def put(vector: Any, start: Any) -> None:
        kept = e.bits(b.fcmp_unordered("!=", vector, e.constant(0.0)))
        full = b.icmp_unsigned("==", kept, e.int(2**e.lanes - 1))
        with b.if_else(full) as (all_lanes, some_lanes):
            with all_lanes:
                at = b.load(place, typ=e.i64)
                e.store(vector, e.item(values, at, e.f32))
                e.store(b.add(e.splat(b.trunc(start, e.i32)), lanes), e.item(indices, at, e.i32))
                b.store(b.add(at, e.int(e.lanes)), place)
            with some_lanes, e.each_bit(kept) as lane:
                at, column = b.load(place, typ=e.i64), b.add(start, lane)
                e.store(e.load(e.item(source, column, e.f32), e.f32), e.item(values, at, e.f32))
                e.store(b.trunc(column, e.i32), e.item(indices, at, e.i32))
                b.store(b.add(at, e.int(1)), place)

    with e.loop(e.int(0), word["parts"]) as part:
        list_number = b.add(b.mul(part, word["rows"]), e.unit)
        e.store(b.load(place, typ=e.i64), e.item(begins, list_number, e.i64), 8)
        first = b.mul(part, word["part"])
        size = b.sub(columns, first)
        size = b.select(b.icmp_signed("<", size, word["part"]), size, word["part"])
        stop = b.add(first, size)
        whole = b.sub(stop, b.srem(size, e.int(e.lanes)))
        with e.loop(first, whole, e.lanes) as start:
            put(e.load(e.item(source, start, e.f32), e.vector()), start)
        with b.if_then(b.icmp_signed("<", whole, stop)):
            put(e.masked_load(e.item(source, whole, e.f32), e.mask(b.sub(stop, whole))), whole)
        e.store(b.load(place, typ=e.i64), e.item(ends, list_number, e.i64), 8)
    return e.text()
