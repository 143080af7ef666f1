"""The gradient of a sparse matrix, at its kept entries only: G[p] = sum_b Y[o_p, b] X[i_p, b], and sum_b Y[o, b] beside it.

For Z = W X with Y the gradient of Z this is dL/dW where W has entries: a sampled dense-dense product (SDDMM). The rows of Y
that a group shares stay in registers, T vectors of columns each, while the rows of X of its entries go by; each row of X
that is loaded feeds the R rows of the group. Four sums at a time are reduced together: their lanes are transposed while
they are added, so that the four results come out side by side, which costs three shuffles a sum rather than eight.

A unit is one chunk of groups and takes all tiles of columns, one after the other; between tiles the sums wait in G. The
entries of a tile come in parts, runs of rows of X whose slice of the tile fits the first cache. The order of summation
depends on the number of columns and the target alone, not on parts, chunks or threads: within a tile lane by lane, then
over the lanes, then tile by tile.
NaN and infinity in Y or X reach the entries that multiply them and no other.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from openwork.runtime.kernels import jit
from openwork.runtime.kernels.emit import Emitter
from openwork.runtime.kernels.launch import Call
from openwork.runtime.kernels.target import Target

WORDS = ("x", "x_row", "y", "y_row", "columns", "cuts", "groups", "parts", "bounds", "values", "sums", "tiles", "tail")
"""The slots. Strides are in bytes.

x, y: addresses of rows of columns; x_row, y_row: strides. columns int32 (entries): the row of X of each entry.
cuts (parts + 1, groups) int32: where each group's entries of each part begin, and at the end where those of the last end.
bounds (chunks + 1) int32: the groups of each chunk. values: float32 (entries, R) to be written. sums: float32 (groups * R)
to be written. tiles: whole tiles of columns. tail: columns of the last vector, 0 where it is whole.
"""
_PLACE = {word: place for place, word in enumerate(WORDS)}
_ADDRESSES = ("x", "y", "columns", "cuts", "bounds", "values", "sums")
Ints = npt.NDArray[np.int32]
_TOGETHER = 4  # sums that are reduced at once


@dataclass(frozen=True)
class Entries:
    """Which entries a sparse matrix has.

    Attributes:
        rows: output rows of a group (1, 2 or 4).
        columns: int32 (entries), the row of X of each entry, ascending within a group.
        cuts: int32 (parts + 1, groups), where the entries of each group and part begin, and those of the last part end.
        bounds: int32 (chunks + 1), the groups of each chunk.
    """

    rows: int
    columns: Ints
    cuts: Ints
    bounds: Ints


def cut(rows: int, columns: Ints, starts: npt.NDArray[Any], width: int, part: int, chunks: int) -> Entries:
    """Return the entries of groups in parts of `part` columns and `chunks` chunks of about equal work.

    Args:
        rows: output rows of a group.
        columns: int32 (entries), ascending within a group.
        starts: integers (groups + 1), where each group's entries begin.
        width: number of columns.
        part: columns of a part, at least 1.
        chunks: runs of groups.
    """
    groups, parts = len(starts) - 1, max(1, -(-width // part))
    cuts = np.empty((parts + 1, groups), np.int32)
    cuts[0], cuts[-1] = starts[:-1], starts[1:]
    if parts > 1:
        group = np.repeat(np.arange(groups), np.diff(starts))
        counts = np.bincount(columns.astype(np.int64) // part * groups + group, minlength=parts * groups)
        cuts[1:] = cuts[0] + np.cumsum(counts.reshape(parts, groups), axis=0)
    return Entries(rows, columns, cuts, split(starts, chunks))


def split(starts: npt.NDArray[Any], chunks: int) -> Ints:
    """Return the first group of each chunk and the end, int32 (chunks + 1): chunks of about equal work.

    Args:
        starts: integers (groups + 1), where each group's entries begin.
        chunks: how many; some are empty where there are more than groups.
    """
    work = starts + np.arange(len(starts))  # a group costs something even without entries
    inner = np.searchsorted(work, work[-1] * np.arange(1, chunks) / chunks)
    return np.concatenate(([0], inner, [len(starts) - 1])).astype(np.int32)


def calls(
    target: Target, entries: Entries, x: int, y: int, *, x_row: int, y_row: int, width: int, values: int, sums: int = 0,
) -> list[Call]:  # fmt: skip
    """Return the stage that writes the gradient at the entries, and the sums of Y's rows where `sums` is not 0.

    Args:
        target: what to compile for.
        entries: which entries there are; read from where they lie, keep them alive.
        x: address of X (rows, width) float32, columns contiguous; `x_row` is its stride in bytes.
        y: address of Y (groups * R, width) float32, columns contiguous; `y_row` is its stride in bytes.
        width: columns, at least 1. Nothing beyond them is read.
        values: address of float32 (entries, R).
        sums: address of float32 (groups * R), or 0.
    """
    size = tile(target, entries.rows)
    tiles, rest = divmod(width, size * target.lanes)
    last, tail = -(-rest // target.lanes), rest % target.lanes
    where = address(target, entries.rows, last, masked=tail > 0, summed=sums > 0)
    words = {
        "x": x, "x_row": x_row, "y": y, "y_row": y_row, "columns": entries.columns.ctypes.data,
        "cuts": entries.cuts.ctypes.data, "groups": entries.cuts.shape[1], "parts": len(entries.cuts) - 1,
        "bounds": entries.bounds.ctypes.data, "values": values, "sums": sums, "tiles": tiles, "tail": tail,
    }  # fmt: skip
    return [Call(where, np.array([words[word] for word in WORDS], np.int64), len(entries.bounds) - 1)]


def tile(target: Target, rows: int) -> int:
    """Return the vectors of a tile: half the registers hold Y, but no more than eight a row."""
    return min(8, target.registers // 2 // rows)


def address(target: Target, rows: int, last: int, *, masked: bool = False, summed: bool = False) -> int:
    """Return the address of the kernel.

    Args:
        target: what to compile for.
        rows: output rows of a group: 1, 2 or 4.
        last: vectors of the tile that follows the whole ones, 0 for none.
        masked: its last vector has only `tail` columns.
        summed: the sums of Y's rows are written too.
    """
    flags = "".join(letter for letter, on in zip("ms", (masked, summed), strict=True) if on)
    name = f"openwork_sddmm_r{rows}_l{last}{'_' + flags if flags else ''}_{target.name}"
    return jit.address(name, target, functools.partial(_build, name, target, rows, last, masked, summed))


def _build(name: str, target: Target, rows: int, last: int, masked: bool, summed: bool) -> str:
    e = Emitter(name, target)
    b, wide, size = e.b, e.lanes * 4, tile(target, rows)
    slot = {word: e.pointer(place) if word in _ADDRESSES else e.slot(place) for word, place in _PLACE.items()}
    first, end = e.index(slot["bounds"], e.unit), e.index(slot["bounds"], b.add(e.unit, e.int(1)))
    mask = e.mask(slot["tail"]) if masked else None

    def sweep(number: Any, vectors: int, mask: Any) -> None:
        """Take one tile of columns over all groups of the chunk."""
        offset = b.mul(number, e.int(size * wide))
        x, y = e.at(slot["x"], offset), e.at(slot["y"], offset)
        is_first = b.icmp_signed("==", number, e.int(0))

        def read(base: Any, t: int) -> Any:
            place = e.at(base, e.int(t * wide))
            return e.load(place, e.vector()) if mask is None or t < vectors - 1 else e.masked_load(place, mask)

        def dots(held: list[list[Any]], entries: list[Any]) -> list[Any]:
            """Return the sums, lane by lane, of each entry's row of X with each row held; side by side, not in turn."""
            sources = [e.at(x, b.mul(e.index(slot["columns"], entry), slot["x_row"])) for entry in entries]
            sums: list[Any] = []
            for t in range(vectors):
                pairs = [(line[t], one) for one in [read(source, t) for source in sources] for line in held]
                sums = (
                    [e.fma(*pair, one) for pair, one in zip(pairs, sums, strict=True)] if t else [b.fmul(*p) for p in pairs]
                )
            return sums

        def put(sums: list[Any], base: Any, at: Any, count: int, kept: Any = None) -> None:
            """Reduce up to four sums and write `count` of them (where `kept`), added to those of the tiles before."""
            place = e.item(base, at, e.f32)
            total, kind = _narrow(e, _reduce(e, sums), count), e.vector(lanes=count)
            before = e.load(place, kind) if kept is None else e.masked_load(place, kept)
            total = b.select(is_first, total, b.fadd(before, total))
            e.store(total, place) if kept is None else e.masked_store(total, place, kept)

        def gradient(group: Any, begin: Any, stop: Any, is_head: Any) -> None:
            """Take one group's entries of one part; the first part takes the sums as well."""
            row = b.mul(group, e.int(rows))
            lines = [e.at(y, b.mul(b.add(row, e.int(r)), slot["y_row"])) for r in range(rows)]
            held = [[read(line, t) for t in range(vectors)] for line in lines]
            if summed:
                with b.if_then(is_head):
                    put([_sum(e, line) for line in held], slot["sums"], row, rows)
            middle = b.add(begin, b.and_(b.sub(stop, begin), e.int(-step)))
            with e.loop(begin, middle, step) as entry:
                put(
                    dots(held, [b.add(entry, e.int(k)) for k in range(step)]),
                    slot["values"],
                    b.mul(entry, e.int(rows)),
                    _TOGETHER,
                )
            if step > 1:
                with b.if_then(b.icmp_signed("<", middle, stop)):
                    # what lies beyond the last entry is computed from the last
                    final, places = b.sub(stop, e.int(1)), [b.add(middle, e.int(k)) for k in range(step - 1)]
                    sums = dots(held, [b.select(b.icmp_signed("<", one, stop), one, final) for one in places])
                    kept = e.mask(b.mul(b.sub(stop, middle), e.int(rows)), _TOGETHER)
                    put(sums, slot["values"], b.mul(middle, e.int(rows)), _TOGETHER, kept)

        step = _TOGETHER // rows
        with e.loop(e.int(0), slot["parts"]) as part:
            cuts = e.item(slot["cuts"], b.mul(part, slot["groups"]), e.i32)
            is_head = b.icmp_signed("==", part, e.int(0))
            with e.loop(first, end) as group:
                gradient(group, e.index(cuts, group), e.index(cuts, b.add(group, slot["groups"])), is_head)

    with e.loop(e.int(0), slot["tiles"]) as number:
        sweep(number, size, None)
    if last:
        sweep(slot["tiles"], last, mask)
    return e.text()


def _sum(e: Emitter, line: list[Any]) -> Any:
    total = line[0]
    for one in line[1:]:
        total = e.b.fadd(total, one)
    return total


def _reduce(e: Emitter, sums: list[Any]) -> Any:
    """Return the sums over the lanes of up to four vectors, as one vector of four lanes."""
    b, lanes = e.b, e.lanes
    one, two, three, four = (*sums, *[sums[-1]] * (_TOGETHER - len(sums)))

    def pairs(left: Any, right: Any, low: tuple[int, ...], high: tuple[int, ...]) -> Any:
        """Add two shuffles of two vectors, alike in every 16 bytes; from 4 on the numbers mean `right`."""
        found = []
        for pick in (low, high):
            numbers = [k + i if i < 4 else lanes + k + i - 4 for k in range(0, lanes, 4) for i in pick]
            found.append(e.shuffle(left, right, numbers))
        return b.fadd(*found)

    left, right = (pairs(*two_, (0, 4, 1, 5), (2, 6, 3, 7)) for two_ in ((one, two), (three, four)))
    total = pairs(left, right, (0, 1, 4, 5), (2, 3, 6, 7))
    while lanes > _TOGETHER:
        lanes //= 2
        total = b.fadd(e.shuffle(total, total, range(lanes)), e.shuffle(total, total, range(lanes, 2 * lanes)))
    return total


def _narrow(e: Emitter, total: Any, count: int) -> Any:
    return total if count == _TOGETHER else e.shuffle(total, total, range(count))
