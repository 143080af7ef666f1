"""The k greatest numbers of each row: one pass that compares with the k-th best so far and keeps what beats it.

A row's numbers go by in vectors. What is greater than the threshold is put into a buffer, in the order of its columns;
when the buffer is full it is cut down to its k best, the least of which is the new threshold. For numbers in random order
about k ln(n / k) of n pass the threshold, so the pass costs little more than reading the row. The cut finds the k-th best
by bisection over the bit patterns, which are ordered like the numbers once the sign is folded; it counts with vectors.

A later number equal to the threshold does not beat it, and the cut keeps the first of equals: ties go to the lowest column.
NaN counts as greater than every number and as equal to every NaN, -0.0 as equal to 0.0, both as in torch.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from openwork.runtime.kernels import jit
from openwork.runtime.kernels.emit import Emitter
from openwork.runtime.kernels.launch import Call
from openwork.runtime.kernels.target import Target

WORDS = ("x", "x_row", "rows", "columns", "count", "values", "indices", "room", "capacity", "units", "slots")
"""The slots. x: address of float32; x_row: its stride in bytes. rows, columns; count: how many are kept of each row.

values (rows, count) float32 and indices (rows, count) int64: written. room: bytes for each unit, `need` of them. capacity:
entries after which the buffer is cut. units: runs of rows. slots: entries that a buffer has room for.
"""
SORTED = 256
"""Up to this many are put in descending order by the kernel (each is compared with each); beyond that, order the result."""
_UNROLL = 4
LINE = 16
"""Numbers of a cache line; also the most lanes of a vector."""
SQUEEZING = "avx512"
"""The target that brings the chosen lanes of a vector together in one instruction."""
_LEAST = -(2**31)
_GREATEST = 2**31 - 1
_ROOM = 1 << 24


def units(rows: int, columns: int, count: int) -> int:
    """Return the runs of rows to make: enough for all threads, no more than their buffers have room for."""
    return max(1, min(rows, 256, max(16, _ROOM // need(columns, count))))


def need(columns: int, count: int) -> int:
    """Return the bytes of a unit's buffer: a key and a column for each entry."""
    return 2 * 4 * _slots(columns, count)


def calls(
    target: Target, x: int, x_row: int, rows: int, columns: int, count: int, values: int, indices: int, room: int, *,
    ordered: bool = True,
) -> list[Call]:  # fmt: skip
    """Return the stage that writes the `count` greatest of each row, and their columns.

    Args:
        target: what to compile for.
        x, x_row: address of float32 (rows, columns) and its row stride in bytes.
        rows, columns: sizes.
        count: how many, 1 to `columns`.
        values, indices: addresses of float32 and int64 (rows, count); may be neither x nor each other.
        room: address of `units(...) * need(...)` bytes on a cache line.
        ordered: in descending order, for `count` up to `SORTED`; else by column.
    """
    ordered = ordered and count <= SORTED
    parts = units(rows, columns, count)
    words = {
        "x": x, "x_row": x_row, "rows": rows, "columns": columns, "count": count, "values": values, "indices": indices,
        "room": room, "capacity": _capacity(count), "units": parts, "slots": _slots(columns, count),
    }  # fmt: skip
    name = f"openwork_topk_{'descending' if ordered else 'by_column'}_{target.name}"
    where = jit.address(name, target, functools.partial(_build, name, target, ordered))
    slots = np.array([words[word] for word in WORDS], np.int64)
    return [Call(where, slots, parts if rows and count else 0)]


def _capacity(count: int) -> int:
    """Return after how many entries the buffer is cut."""
    return max(2 * count, count + 96)


def _slots(columns: int, count: int) -> int:
    """Return the entries a buffer has room for: below the cut, an unrolled step and the row's end; a vector of filling."""
    step = _UNROLL * LINE
    return -(-min(columns, _capacity(count) + 2 * step) // LINE) * LINE + LINE


class _Buffer:
    """The entries kept of a row: their keys, their columns, and how many there are."""

    def __init__(self, e: Emitter, place: Any, slots: Any) -> None:
        self.e, self.keys, self.columns = e, place, e.item(place, slots, e.i32)
        self.count = e.cell(e.int(0))

    def held(self) -> Any:
        """Return the number of entries."""
        return self.e.b.load(self.count, typ=self.e.i64)

    def put(self, x: Any, start: Any, better: Any) -> None:
        """Add the lanes of `better` of a vector that starts at column `start`."""
        e, b = self.e, self.e.b
        keys, bits = _keys(e, x), e.bits(better)
        lanes = e.ir.Constant(e.vector(e.i32), [e.ir.Constant(e.i32, i) for i in range(e.lanes)])
        columns = b.add(e.splat(b.trunc(start, e.i32)), lanes)
        if e.target.name == SQUEEZING:
            b.store(self.squeeze(keys, columns, better, bits, self.held()), self.count)
            return
        full = b.icmp_unsigned("==", bits, e.int(2**e.lanes - 1))
        with b.if_else(full) as (all_lanes, some_lanes):
            with all_lanes:
                at = self.held()
                e.store(keys, e.item(self.keys, at, e.i32))
                e.store(columns, e.item(self.columns, at, e.i32))
                b.store(b.add(at, e.int(e.lanes)), self.count)
            with some_lanes, e.each_bit(bits) as lane:
                at = self.held()
                key = b.extract_element(keys, b.trunc(lane, e.i32))
                e.store(key, e.item(self.keys, at, e.i32))
                e.store(b.trunc(b.add(start, lane), e.i32), e.item(self.columns, at, e.i32))
                b.store(b.add(at, e.int(1)), self.count)

    def squeeze(self, keys: Any, columns: Any, mask: Any, bits: Any, at: Any) -> Any:
        """Write the lanes of `mask` from entry `at` on, and anything in what is left of a vector; return the entry after."""
        e, kind = self.e, self.e.vector(self.e.i32)
        for value, place in ((keys, self.keys), (columns, self.columns)):
            name, rest = f"llvm.experimental.vector.compress.v{e.lanes}i32", e.ir.Constant(kind, e.ir.Undefined)
            e.store(e.call(name, kind, [value, mask, rest]), e.item(place, at, e.i32))
        return e.b.add(at, e.call("llvm.ctpop.i64", e.i64, [bits]))

    def fill(self) -> None:
        """Put a vector of keys below every number after the entries, so that whole vectors may be read."""
        e = self.e
        least = e.ir.Constant(e.vector(e.i32), [e.ir.Constant(e.i32, _LEAST)] * e.lanes)
        e.store(least, e.item(self.keys, self.held(), e.i32))

    def at_least(self, key: Any) -> Any:
        """Return how many entries have a key of at least `key` (i32)."""
        e, b = self.e, self.e.b
        wanted, none = e.splat(key), e.ir.Constant(e.vector(e.i32), None)
        with e.loop_carrying(e.int(0), self.held(), [none], e.lanes) as (at, held, give):
            reached = b.icmp_signed(">=", e.load(e.item(self.keys, at, e.i32), e.vector(e.i32)), wanted)
            give([b.sub(held[0], b.sext(reached, e.vector(e.i32)))])
        total = e.carried[0]
        return b.sext(e.call(f"llvm.vector.reduce.add.v{e.lanes}i32", e.i32, [total]), e.i64)

    def limits(self) -> tuple[Any, Any]:
        """Return the least and the greatest key (i64)."""
        e, b = self.e, self.e.b
        kind = e.vector(e.i32)
        least, greatest = (e.ir.Constant(kind, [e.ir.Constant(e.i32, end)] * e.lanes) for end in (_LEAST, _GREATEST))
        with e.loop_carrying(e.int(0), self.held(), [greatest, least], e.lanes) as (at, (low, high), give):
            keys = e.load(e.item(self.keys, at, e.i32), kind)
            real = b.select(b.icmp_signed("==", keys, least), greatest, keys)
            give([b.select(b.icmp_signed("<", real, low), real, low), b.select(b.icmp_signed(">", keys, high), keys, high)])
        names = (f"llvm.vector.reduce.smin.v{e.lanes}i32", f"llvm.vector.reduce.smax.v{e.lanes}i32")
        low, high = (e.call(name, e.i32, [value]) for name, value in zip(names, e.carried, strict=True))
        return b.sext(low, e.i64), b.sext(high, e.i64)

    def cut(self, count: Any) -> Any:
        """Keep the first `count` of the greatest entries, in their order; return a key that what beats them is above."""
        e, b = self.e, self.e.b
        self.fill()
        low, high = (e.cell(value) for value in self.limits())

        def apart() -> Any:
            return b.icmp_signed("<", b.load(low, typ=e.i64), b.load(high, typ=e.i64))

        with e.turning(apart):
            bottom, top = b.load(low, typ=e.i64), b.load(high, typ=e.i64)
            middle = b.add(bottom, b.ashr(b.add(b.sub(top, bottom), e.int(1)), e.int(1)))
            found = self.at_least(b.trunc(middle, e.i32))
            enough, just = b.icmp_signed(">=", found, count), b.icmp_signed("==", found, count)
            b.store(b.select(enough, middle, bottom), low)
            b.store(b.select(just, middle, b.select(enough, top, b.sub(middle, e.int(1)))), high)
        edge = b.trunc(b.load(low, typ=e.i64), e.i32)
        above = self.at_least(b.add(edge, e.ir.Constant(e.i32, 1)))
        above = b.select(b.icmp_signed("==", edge, e.ir.Constant(e.i32, _GREATEST)), e.int(0), above)
        keep = self._keep_vectors if e.target.name == SQUEEZING else self._keep_one_by_one
        b.store(keep(edge, b.sub(count, above)), self.count)
        return edge

    def _keep_one_by_one(self, edge: Any, spare: Any) -> Any:
        """Move the entries above `edge`, and the first `spare` equal to it, to the front; return their number."""
        e, b = self.e, self.e.b
        with e.loop_carrying(e.int(0), self.held(), [e.int(0), spare]) as (at, (kept, left), give):
            key = e.load(e.item(self.keys, at, e.i32), e.i32)
            column = e.load(e.item(self.columns, at, e.i32), e.i32)
            equal = b.and_(b.icmp_signed("==", key, edge), b.icmp_signed(">", left, e.int(0)))
            stays = b.or_(b.icmp_signed(">", key, edge), equal)
            e.store(key, e.item(self.keys, kept, e.i32))
            e.store(column, e.item(self.columns, kept, e.i32))
            give([b.add(kept, b.zext(stays, e.i64)), b.sub(left, b.zext(equal, e.i64))])
        return e.carried[0]

    def _keep_vectors(self, edge: Any, spare: Any) -> Any:
        """Do the same a vector at a time; among equal lanes, the lowest set bits are dealt out one by one."""
        e, b, kind = self.e, self.e.b, self.e.vector(self.e.i32)
        wanted, most, lanes = e.splat(edge), e.int(e.lanes), e.ir.IntType(e.lanes)
        with e.loop_carrying(e.int(0), self.held(), [e.int(0), spare], e.lanes) as (at, (kept, left), give):
            keys, columns = (e.load(e.item(base, at, e.i32), kind) for base in (self.keys, self.columns))
            above, equal = (e.bits(b.icmp_signed(sign, keys, wanted)) for sign in (">", "=="))
            some = b.select(b.icmp_signed("<", left, most), left, most)
            ones = b.sub(b.shl(e.int(1), some), e.int(1))
            first = e.call("llvm.x86.bmi.pdep.64", e.i64, [ones, equal])
            bits = b.or_(above, first)
            mask = b.bitcast(b.trunc(bits, lanes), e.vector(e.i1))
            give([self.squeeze(keys, columns, mask, bits, kept), b.sub(left, e.call("llvm.ctpop.i64", e.i64, [first]))])
        return e.carried[0]


def _build(name: str, target: Target, ordered: bool) -> str:
    e = Emitter(name, target)
    b = e.b
    word = {key: e.slot(place) for place, key in enumerate(WORDS)}
    x, values, indices, room = (e.pointer(WORDS.index(key)) for key in ("x", "values", "indices", "room"))
    rows, columns, count, parts = (word[key] for key in ("rows", "columns", "count", "units"))
    first, last = (b.sdiv(b.mul(b.add(e.unit, e.int(i)), rows), parts) for i in (0, 1))
    place = e.at(room, b.mul(e.unit, b.mul(word["slots"], e.int(8))))
    buffer = _Buffer(e, place, word["slots"])
    with e.loop(first, last) as row:
        source = e.at(x, b.mul(row, word["x_row"]))
        b.store(e.int(0), buffer.count)
        _scan(e, source, columns, count, word["capacity"], buffer)
        base = b.mul(row, count)
        buffer.fill()
        with e.loop(e.int(0), count) as entry:
            column = e.index(buffer.columns, entry)
            rank = _rank(e, buffer, entry) if ordered else entry
            to = b.add(base, rank)
            e.store(e.load(e.item(source, column, e.f32), e.f32), e.item(values, to, e.f32))
            e.store(column, e.item(indices, to, e.i64), 8)
    return e.text()


def _scan(e: Emitter, source: Any, columns: Any, count: Any, capacity: Any, buffer: _Buffer) -> None:
    """Leave the `count` greatest of a row in the buffer."""
    b, step = e.b, e.lanes * _UNROLL
    unrolled = b.mul(b.sdiv(columns, e.int(step)), e.int(step))
    at = e.cell(e.int(0))
    threshold = e.cell(e.float(float("nan")))  # beaten by everything, as the comparison is unordered

    def here() -> Any:
        return b.load(at, typ=e.i64)

    def read(start: Any, valid: Any = None) -> Any:
        where = e.item(source, start, e.f32)
        return e.load(where, e.vector()) if valid is None else e.masked_load(where, valid)

    def better(value: Any, edge: Any) -> Any:
        return b.fcmp_unordered(">", value, edge)

    def room() -> Any:
        return b.and_(b.icmp_signed("<", here(), unrolled), b.icmp_signed("<", buffer.held(), capacity))

    with e.turning(lambda: b.icmp_signed("<", here(), columns)):
        edge = e.splat(b.load(threshold, typ=e.f32))
        with e.turning(room):
            starts = [b.add(here(), e.int(u * e.lanes)) for u in range(_UNROLL)]
            vectors = [read(start) for start in starts]
            found = [better(vector, edge) for vector in vectors]
            some = functools.reduce(b.or_, found)
            with b.if_then(b.icmp_unsigned("!=", e.bits(some), e.int(0)), likely=False):
                for start, vector, mask in zip(starts, vectors, found, strict=True):
                    buffer.put(vector, start, mask)
            b.store(b.add(here(), e.int(step)), at)
        with b.if_then(b.icmp_signed(">=", here(), unrolled)), e.turning(lambda: b.icmp_signed("<", here(), columns)):
            valid = e.mask(b.sub(columns, here()))
            vector = read(here(), valid)
            buffer.put(vector, here(), b.and_(better(vector, edge), valid))
            b.store(b.add(here(), e.int(e.lanes)), at)
        with b.if_then(b.icmp_signed(">", buffer.held(), count)):
            b.store(_number(e, buffer.cut(count)), threshold)


def _rank(e: Emitter, buffer: _Buffer, entry: Any) -> Any:
    """Return how many entries come before this one in descending order: greater ones, and equal ones of lower columns."""
    b, kind = e.b, e.vector(e.i32)
    own, number = e.splat(e.load(e.item(buffer.keys, entry, e.i32), e.i32)), e.splat(b.trunc(entry, e.i32))
    lanes = e.ir.Constant(kind, [e.ir.Constant(e.i32, i) for i in range(e.lanes)])
    with e.loop_carrying(e.int(0), buffer.held(), [e.ir.Constant(kind, None)], e.lanes) as (at, held, give):
        keys = e.load(e.item(buffer.keys, at, e.i32), kind)
        earlier = b.icmp_signed("<", b.add(e.splat(b.trunc(at, e.i32)), lanes), number)
        before = b.or_(b.icmp_signed(">", keys, own), b.and_(b.icmp_signed("==", keys, own), earlier))
        give([b.sub(held[0], b.sext(before, kind))])
    return b.sext(e.call(f"llvm.vector.reduce.add.v{e.lanes}i32", e.i32, [e.carried[0]]), e.i64)


def _keys(e: Emitter, x: Any) -> Any:
    """Return int32 keys in the order of the numbers: zeros equal, NaN equal and above all."""
    b, kind = e.b, e.vector(e.i32)

    def constant(value: int) -> Any:
        return e.ir.Constant(kind, [e.ir.Constant(e.i32, value)] * e.lanes)

    raw = b.bitcast(b.fadd(x, e.constant(0.0)), kind)  # turns -0.0 into 0.0
    folded = b.xor(raw, b.and_(b.ashr(raw, constant(31)), constant(_GREATEST)))
    return b.select(b.fcmp_unordered("uno", x, x), constant(_GREATEST), folded)


def _number(e: Emitter, key: Any) -> Any:
    """Return the float32 of a key (i32)."""
    b = e.b
    sign = b.ashr(key, e.ir.Constant(e.i32, 31))
    return b.bitcast(b.xor(key, b.and_(sign, e.ir.Constant(e.i32, _GREATEST))), e.f32)
