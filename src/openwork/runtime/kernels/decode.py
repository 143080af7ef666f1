"""Gathered rows: weighted sums of rows of a matrix, out[r] = bias + sum_e v_e M[i_e], and their dot products with vectors.

A sum is what decodes sparse codes with a dictionary (Makhzani and Frey, "k-Sparse Autoencoders", ICLR 2014, section 2.1),
what its gradient to the dictionary is once the codes are sorted by atom, and what a linear layer is whose input is mostly
zero. A dot is the gradient to the codes.

Sums: the T accumulators of a tile of columns (T vectors) of an output row stay in registers while the row's entries go by,
in the order they are given, so neither tile nor thread changes a bit of the result. What bounds the speed is the traffic of
the gathered rows, so a coming entry's piece is asked for while the current one is summed. A unit is a run of output rows and
some neighbouring tiles, in one of two orders:

  - scattered entries, which seldom meet again: all tiles of one output row before the next row, so that a page of M is
    looked up once;
  - entries by ascending rows, shared by the output rows: one tile a unit, and M's rows in parts whose piece fits a cache.
    All output rows take the entries of one part before the next; in between their sums wait in `out`, exactly.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from openwork.runtime.kernels import jit
from openwork.runtime.kernels.emit import Emitter
from openwork.runtime.kernels.launch import Call
from openwork.runtime.kernels.target import Target

Kind = Literal["f32", "bf16"]
"""How the matrix is stored; sums are float32 in any case."""
Index = Literal["i32", "i64"]

SUM_WORDS = (
    "begins", "ends", "parts", "indices", "values", "matrix", "matrix_row", "bias", "out", "out_row", "rows", "run",
    "runs", "tiles", "across", "column", "tail", "last",
)  # fmt: skip
"""The slots of a sum. Strides are in bytes.

begins, ends (parts, rows) int64: the entries of each output row, part by part. indices (entries): rows of the matrix.
values (entries) float32. matrix, matrix_row: address and stride. bias (columns) float32. out, out_row: address and stride.
rows: output rows; run: those of a unit; runs: number of runs. tiles: of columns; across: those of a unit. column: first
column of tile 0. tail: columns of the last vector where it is not whole. last: number of the last entry that may be asked
for ahead of time.
"""
DOT_WORDS = (
    "indices", "values", "matrix", "matrix_row", "vectors", "vectors_row", "columns", "rows", "run", "entries"
)  # fmt: skip
"""The slots of dots. indices (rows, entries); values (rows, entries) float32, written; vectors (rows, columns) float32."""
_AHEAD = 4
_LINE = 64
_GROUP = 4
_UNROLL = 2
_BYTES_OF_A_UNIT = 1 << 18


@dataclass(frozen=True)
class Rows:
    """A matrix whose rows are gathered.

    Attributes:
        address: of the first element; the elements of a row lie side by side.
        row: bytes from a row to the next.
        columns: elements of a row.
        kind: f32 or bf16.
    """

    address: int
    row: int
    columns: int
    kind: Kind = "f32"


@dataclass(frozen=True)
class Entries:
    """Which rows are summed with which weights; all addresses.

    Attributes:
        begins, ends: int64 (parts, rows), the entries of each output row.
        indices: (entries) of `index`, each a row of the matrix: not checked here.
        values: float32 (entries).
        index: i32 or i64.
        total: entries that lie side by side without gaps, 0 where there are gaps.
        parts: how often a unit goes over its output rows.
    """

    begins: int
    ends: int
    indices: int
    values: int
    index: Index = "i64"
    total: int = 0
    parts: int = 1


def sums(
    target: Target, entries: Entries, matrix: Rows, bias: int, out: int, out_row: int, rows: int, *, run: int,
    across: int = 1, vectors: int | None = None,
) -> list[Call]:  # fmt: skip
    """Return the stage out[r] = bias + sum over the entries e of r of values[e] * matrix[indices[e]].

    NaN and infinity go by the arithmetic: an entry of value zero is multiplied like any other.

    Args:
        target: what to compile for.
        entries: which rows with which weights.
        matrix: what is gathered.
        bias: address of float32 (columns).
        out, out_row: address of float32 (rows, columns) and its row stride in bytes.
        rows: output rows.
        run: output rows of a unit.
        across: tiles of a unit.
        vectors: the most vectors of a tile, None for what suits the registers.
    """
    vectors = even(matrix.columns, target, vectors or widest(target, matrix.kind))
    whole, tail = divmod(matrix.columns, target.lanes)
    run = max(1, min(run, rows))
    full, rest = divmod(whole, vectors)
    runs = [(vectors, 0, full, False)] if full else []
    if rest or tail:
        runs.append((rest + (tail > 0), full * vectors, 1, tail > 0))
    found = []
    for width, first, count, masked in runs:
        values = {
            "begins": entries.begins, "ends": entries.ends, "parts": entries.parts, "indices": entries.indices,
            "values": entries.values, "matrix": matrix.address, "matrix_row": matrix.row, "bias": bias, "out": out,
            "out_row": out_row, "rows": rows, "run": run, "runs": -(-rows // run), "tiles": count, "across": across,
            "column": first * target.lanes, "tail": tail, "last": entries.total - 1,
        }  # fmt: skip
        where = _sum(target, width, matrix.kind, entries.index, masked, entries.total > 0)
        slots = np.array([values[word] for word in SUM_WORDS], np.int64)
        found.append(Call(where, slots, -(-count // across) * -(-rows // run)))
    return found


def dots(
    target: Target, indices: int, values: int, matrix: Rows, vectors: int, vectors_row: int, rows: int, entries: int,
    index: Index = "i64",
) -> list[Call]:  # fmt: skip
    """Return the stage values[r, j] = <vectors[r], matrix[indices[r, j]]>.

    The order of summation depends on the target only: lanes apart, then two by two.

    Args:
        target: what to compile for.
        indices: address of (rows, entries) of `index`, not checked here.
        values: address of float32 (rows, entries), written.
        matrix: what is gathered.
        vectors, vectors_row: address of float32 (rows, columns) and its row stride in bytes.
        rows, entries: sizes.
        index: i32 or i64.
    """
    run = few(entries, 4 * matrix.columns)
    words = {
        "indices": indices, "values": values, "matrix": matrix.address, "matrix_row": matrix.row, "vectors": vectors,
        "vectors_row": vectors_row, "columns": matrix.columns, "rows": rows, "run": run, "entries": entries,
    }  # fmt: skip
    slots = np.array([words[word] for word in DOT_WORDS], np.int64)
    return [Call(_dot(target, matrix.kind, index), slots, -(-rows // run) if entries else 0)]


def widest(target: Target, kind: Kind = "f32") -> int:
    """Return the vectors of the widest tile: what leaves registers for the weight and the loads, and to widen bf16."""
    return target.registers * 3 // 4 if kind == "f32" else target.registers * 3 // 8


def even(columns: int, target: Target, most: int) -> int:
    """Return the vectors of a tile, at most `most`, that cut the columns most evenly."""
    total = max(1, -(-columns // target.lanes))
    return -(-total // -(-total // most))


def few(entries: int, piece: int) -> int:
    """Return the output rows of a unit that gathers `entries` pieces of `piece` bytes for each: some microseconds' work."""
    return max(1, _BYTES_OF_A_UNIT // max(1, entries * piece))


def _sum(target: Target, vectors: int, kind: Kind, index: Index, masked: bool, joined: bool) -> int:
    flags = "".join(letter for letter, on in zip("mj", (masked, joined), strict=True) if on)
    name = f"openwork_gathered_sums_t{vectors}_{kind}_{index}{'_' + flags if flags else ''}_{target.name}"
    return jit.address(name, target, functools.partial(_build_sum, name, target, vectors, kind, index, masked, joined))


def _dot(target: Target, kind: Kind, index: Index) -> int:
    name = f"openwork_gathered_dots_{kind}_{index}_{target.name}"
    return jit.address(name, target, functools.partial(_build_dots, name, target, kind, index))


def _build_sum(name: str, target: Target, vectors: int, kind: Kind, index: Index, masked: bool, joined: bool) -> str:
    e = Emitter(name, target)
    b, size = e.b, 4 if kind == "f32" else 2
    word = {key: e.slot(place) for place, key in enumerate(SUM_WORDS)}
    operands = ("begins", "ends", "indices", "values", "matrix", "bias", "out")
    begins, ends, indices, values, matrix, bias, out = (e.pointer(SUM_WORDS.index(key)) for key in operands)
    run, group = b.srem(e.unit, word["runs"]), b.sdiv(e.unit, word["runs"])
    first, left = b.mul(run, word["run"]), b.mul(group, word["across"])
    stop = _least(e, b.add(first, word["run"]), word["rows"])
    right = _least(e, b.add(left, word["across"]), word["tiles"])
    mask = e.mask(word["tail"]) if masked else None
    wide = range(vectors)

    def masked_at(t: int) -> Any:
        return mask if t == vectors - 1 else None

    with e.loop(e.int(0), word["parts"]) as part, e.loop(first, stop) as row, e.loop(left, right) as tile:
        column = b.add(word["column"], b.mul(tile, e.int(vectors * e.lanes)))
        source = e.at(matrix, b.mul(column, e.int(size)))
        list_number = b.add(b.mul(part, word["rows"]), row)
        begin, end = e.index(begins, list_number, e.i64), e.index(ends, list_number, e.i64)
        last = word["last"] if joined else b.sub(end, e.int(1))
        place = e.at(out, b.add(b.mul(row, word["out_row"]), b.mul(column, e.int(4))))
        begun_at = e.at(bias, b.mul(column, e.int(4)))
        before = b.select(b.icmp_signed("==", part, e.int(0)), begun_at, place)
        begun = [_read(e, before, t, "f32", masked_at(t)) for t in wide]
        with e.loop_carrying(begin, end, begun) as (entry, held, give):
            ahead = _least(e, b.add(entry, e.int(_AHEAD)), last)
            coming = e.at(source, b.mul(e.index(indices, ahead, _int(e, index)), word["matrix_row"]))
            for byte in range(0, vectors * e.lanes * size, _LINE):
                e.prefetch(e.at(coming, e.int(byte)))
            piece = e.at(source, b.mul(e.index(indices, entry, _int(e, index)), word["matrix_row"]))
            weight = e.splat(e.load(e.item(values, entry, e.f32), e.f32))
            give([e.fma(weight, _read(e, piece, t, kind, masked_at(t)), held[t]) for t in wide])
        for t, value in zip(wide, e.carried, strict=True):
            where = e.at(place, e.int(t * e.lanes * 4))
            if masked_at(t) is None:
                e.store(value, where)
            else:
                e.masked_store(value, where, mask)
    return e.text()


def _build_dots(name: str, target: Target, kind: Kind, index: Index) -> str:
    e = Emitter(name, target)
    b, size = e.b, 4 if kind == "f32" else 2
    word = {key: e.slot(place) for place, key in enumerate(DOT_WORDS)}
    operands = ("indices", "values", "matrix", "vectors")
    indices, values, matrix, vectors = (e.pointer(DOT_WORDS.index(key)) for key in operands)
    entries, columns = word["entries"], word["columns"]
    first = b.mul(e.unit, word["run"])
    stop = _least(e, b.add(first, word["run"]), word["rows"])
    step = e.lanes * _UNROLL
    unrolled = b.mul(b.sdiv(columns, e.int(step)), e.int(step))
    whole = b.mul(b.sdiv(columns, e.int(e.lanes)), e.int(e.lanes))
    mask = e.mask(b.sub(columns, whole))
    zero = e.constant(0.0)
    grouped = b.mul(b.sdiv(entries, e.int(_GROUP)), e.int(_GROUP))

    last = b.sub(b.mul(word["rows"], entries), e.int(1))

    def rows_at(place: Any) -> Any:
        return e.at(matrix, b.mul(e.index(indices, place, _int(e, index)), word["matrix_row"]))

    def add(sums: list[Any], pieces: list[Any], vector: Any, column: Any, u: int, mask: Any = None) -> list[Any]:
        """Return the sums, unroll by unroll, with vector `u` after `column` of each piece multiplied in."""
        own = _read(e, e.at(vector, b.mul(column, e.int(4))), u, "f32", mask)
        made = list(sums)
        for g, piece in enumerate(pieces):
            there = _read(e, e.at(piece, b.mul(column, e.int(size))), u, kind, mask)
            made[g * _UNROLL + u] = e.fma(own, there, sums[g * _UNROLL + u])
        return made

    def dot(vector: Any, base: Any, at: Any, group: int) -> None:
        places = [b.add(base, b.add(at, e.int(g))) for g in range(group)]
        pieces = [rows_at(place) for place in places]
        coming = [rows_at(_least(e, b.add(place, e.int(group)), last)) for place in places]
        with e.loop_carrying(e.int(0), unrolled, [zero] * (group * _UNROLL), step) as (column, held, give):
            for piece in coming:
                for byte in range(0, step * size, _LINE):
                    e.prefetch(e.at(piece, b.add(b.mul(column, e.int(size)), e.int(byte))))
            sums = held
            for u in range(_UNROLL):
                sums = add(sums, pieces, vector, column, u)
            give(sums)
        with e.loop_carrying(unrolled, whole, list(e.carried), e.lanes) as (column, held, give):
            give(add(held, pieces, vector, column, 0))
        sums = add(list(e.carried), pieces, vector, whole, 0, mask)
        for g, place in enumerate(places):
            total = sums[g * _UNROLL]
            for u in range(1, _UNROLL):
                total = b.fadd(total, sums[g * _UNROLL + u])
            e.store(_across(e, total), e.item(values, place, e.f32))

    with e.loop(first, stop) as row:
        base, vector = b.mul(row, entries), e.at(vectors, b.mul(row, word["vectors_row"]))
        with e.loop(e.int(0), grouped, _GROUP) as at:
            dot(vector, base, at, _GROUP)
        with e.loop(grouped, entries) as at:
            dot(vector, base, at, 1)
    return e.text()


def _read(e: Emitter, base: Any, t: int, kind: Kind, mask: Any = None) -> Any:
    """Return vector `t` after `base` as float32, the lanes outside of `mask` zero and untouched."""
    b = e.b
    if kind == "f32":
        place = e.at(base, e.int(t * e.lanes * 4))
        return e.load(place, e.vector()) if mask is None else e.masked_load(place, mask)
    place, short = e.at(base, e.int(t * e.lanes * 2)), e.vector(e.i16)
    if mask is None:
        raw = e.load(place, short, 2)
    else:
        zero, align = e.ir.Constant(short, None), e.ir.Constant(e.i32, 2)
        raw = e.call(f"llvm.masked.load.v{e.lanes}i16.p0", short, [place, align, mask, zero])
    high = e.ir.Constant(e.vector(e.i32), [e.ir.Constant(e.i32, 16)] * e.lanes)
    return b.bitcast(b.shl(b.zext(raw, e.vector(e.i32)), high), e.vector())


def _across(e: Emitter, value: Any) -> Any:
    """Return the sum of the lanes, halves added to halves."""
    lanes = value.type.count
    while lanes > 1:
        lanes //= 2
        low, high = (e.shuffle(value, value, range(start, start + lanes)) for start in (0, lanes))
        value = e.b.fadd(low, high)
    return e.b.extract_element(value, e.ir.Constant(e.i32, 0))


def _least(e: Emitter, a: Any, c: Any) -> Any:
    return e.b.select(e.b.icmp_signed("<", a, c), a, c)


def _int(e: Emitter, index: Index) -> Any:
    return e.i32 if index == "i32" else e.i64
