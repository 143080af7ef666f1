"""The product of a sparse matrix with a dense one, its accumulators in registers: Y[o, n] = act(b_o + sum_i W_oi X[i, n]).

A unit is one tile of columns (T vectors) and one chunk of row groups. A group is R output rows with the same input rows:
its R x T accumulators stay in registers while its non-zeros go by, so that each load of X feeds R multiply-adds.
What is added to the tile's address for each non-zero is a byte offset, so the same code multiplies rows of X (1x1
convolutions, linear layers) and pixels of a padded plane (k x k convolutions).

The non-zeros come in parts (runs of input rows whose slice of the tile fits the first cache); between parts a group's
sums wait in Y, so the order of summation, and with it every bit of the result, is the same for all tiles and parts.
Within a chunk groups go by their number of non-zeros: a loop that is as long as the one before is well predicted. Where
registers allow, two or three groups go side by side, so that no multiply-add waits for the one before it; each group's own
order stays what it is.

Rows of X that do not start on a cache line cost two lines a vector, and rows a power of two apart fall on the same lines
of the cache. Then a unit is staged: before each part it copies the part's slice of the tile into a room of its own, and
its sums wait there as well, so that X and Y are touched once each.

Tiles outermost and groups inside after Elsen, Dukhan, Gale, Simonyan, "Fast Sparse ConvNets", CVPR 2020, section 3.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np

from openwork.runtime.kernels import jit
from openwork.runtime.kernels.activations import Act, apply
from openwork.runtime.kernels.arrange import Arranged
from openwork.runtime.kernels.emit import Emitter
from openwork.runtime.kernels.launch import Call
from openwork.runtime.kernels.target import Target

WORDS = (
    "x", "x_image", "x_tile", "y", "y_image", "y_tile", "y_row", "offsets", "values", "starts", "order", "bias", "groups",
    "bounds", "chunks", "parts", "tiles", "first", "limits", "added", "added_image", "added_row", "kept", "tail",
    "x_row", "width", "part", "pitch", "rooms", "room", "sums", "free",
)  # fmt: skip
"""The slots. Strides are in bytes.

x, y: addresses of the first image; x_image, x_tile, y_image, y_tile, y_row: strides; first: number of the first tile.
offsets, values: int32 byte offset and R float32 weights of each non-zero group column, part by part. Where groups are
single rows whose weights never change, `offsets` is int64 words, offset low and weight high: one load an entry less.
starts (parts, groups + 1) int32: where each group's entries begin, in the order of `order` (parts, groups) int32, which
numbers the groups. bounds (chunks + 1) int32: the groups of each chunk. bias (groups * R) float32.
limits: two float32 for `clamp`. added: a tensor with Y's tiles that is added before the activation. kept (columns) int32:
zero where `padded` writes zero. tail: columns of the last vector where `masked`.
Staged: x_row, width: stride and number of x's rows; part: rows of a part; rooms: address of as many rooms of `room` bytes
as `free` points to bits that are one; in a room each row of the slice takes `pitch` bytes, and the sums begin at `sums`.
"""
_LINE = 64
_AHEAD = 1024
"""Bytes from the entries of a group to those that are fetched meanwhile, `_LINES` lines of them."""
_LINES = 4
_PLACE = {word: place for place, word in enumerate(WORDS)}


@dataclass(frozen=True)
class Matrix:
    """Where a dense matrix (images, rows, columns) lies; everything in bytes.

    Attributes:
        address: of the first element.
        image: from an image to the next.
        row: from a row to the next.
        tile: from a tile of columns to the next; 0 where tiles follow one another in the rows.
    """

    address: int
    image: int
    row: int
    tile: int = 0


@dataclass(frozen=True)
class Rooms:
    """Memory for units that are staged: as many may run at once as there are rooms, others wait.

    Attributes:
        address: of the first room, on a cache line.
        size: bytes of a room, a multiple of a cache line; `room_bytes` says how many are needed.
        free: address of an int64 with one bit set a room (at most 63), alone on its cache line.
        width: rows of x.
        part: rows of a part, as the weights were arranged.
    """

    address: int
    size: int
    free: int
    width: int
    part: int


def room_bytes(target: Target, weights: Arranged, vectors: int, part: int) -> int:
    """Return the bytes of a room for tiles of `vectors` vectors: the slice of a part, and the sums of a chunk."""
    wide = 4 * target.lanes * vectors
    groups = int(np.diff(weights.bounds).max(initial=0)) if weights.parts > 1 else 0
    return -(-wide * (part + groups * weights.rows) // _LINE) * _LINE


def calls(
    target: Target, weights: Arranged, x: Matrix, y: Matrix, *, vectors: int, columns: int, bias: int, images: int = 1,
    act: Act = "none", limits: int = 0, added: Matrix | None = None, kept: int = 0, staged: Rooms | None = None,
) -> list[Call]:  # fmt: skip
    """Return the calls of one product, to be run in one stage; sections of one weight go to the same stage.

    Args:
        target: what to compile for.
        weights: the entries, their offsets into `x`. They are read from where they lie: keep them alive.
        x: what is multiplied; its `row` is used where `staged` only, else the offsets say it.
        y: where the section's first row goes.
        vectors: vectors of a tile.
        columns: columns of x and y. Without `kept` nothing beyond them is written, and read only in tiles of a panel.
        bias: address of float32 (groups * rows), the section's own.
        images: products with the same weights.
        act, limits: what follows the sum, and the address of the two bounds of `clamp`.
        added: added before `act`; has y's tiles.
        kept: address of int32 words for all columns, rounded up to whole vectors: zero where zero is to be written.
        staged: rooms to copy x into; then the weights' offsets are those of rows of `vectors` vectors within a part.
    """
    wide = 4 * target.lanes
    total = -(-columns // target.lanes)
    whole, rest = divmod(total, vectors)
    tail = columns % target.lanes if not kept else 0
    runs = [(vectors, 0, whole, False), (rest, whole, 1, tail > 0)] if rest else [(vectors, 0, whole, False)]
    if tail and not rest:
        runs = [(vectors, 0, whole - 1, False), (vectors, whole - 1, 1, True)]
    found = []
    for size, first, count, masked in runs:
        if not count or not weights.groups or not images:
            continue
        values = {
            "x": x.address, "x_image": x.image, "x_tile": x.tile or vectors * wide, "y": y.address, "y_image": y.image,
            "y_tile": y.tile or vectors * wide, "y_row": y.row, "offsets": weights.words.ctypes.data,
            "values": weights.values.ctypes.data, "starts": weights.starts.ctypes.data, "order": weights.order.ctypes.data,
            "bias": bias, "groups": weights.groups, "bounds": weights.bounds.ctypes.data, "chunks": weights.chunks,
            "parts": weights.parts, "tiles": count, "first": first, "limits": limits, "kept": kept, "tail": tail,
            "added": added.address if added else 0, "added_image": added.image if added else 0,
            "added_row": added.row if added else 0, "x_row": x.row, "pitch": vectors * wide,
            "width": staged.width if staged else 0, "part": staged.part if staged else 0,
            "rooms": staged.address if staged else 0, "room": staged.size if staged else 0,
            "sums": staged.part * vectors * wide if staged else 0, "free": staged.free if staged else 0,
        }  # fmt: skip
        where = address(
            target, weights.rows, size, act, masked=masked, added=added is not None, padded=kept > 0,
            staged=staged is not None, joined=weights.joined is not None,
        )  # fmt: skip
        slots = np.array([values[word] for word in WORDS], np.int64)
        found.append(Call(where, slots, images * count * weights.chunks))
    return found


def address(
    target: Target, rows: int, vectors: int, act: Act = "none", *, masked: bool = False, added: bool = False,
    padded: bool = False, staged: bool = False, joined: bool = False,
) -> int:  # fmt: skip
    """Return the address of the kernel for groups of `rows` rows and tiles of `vectors` vectors.

    Args:
        target: what to compile for.
        rows: output rows of a group.
        vectors: vector registers of columns in a tile; rows * vectors accumulators should fit the registers.
        act: what follows the sum.
        masked: the last vector of the tile has only `tail` columns; nothing beyond is read or written.
        added: a second tensor is added before `act`.
        padded: columns whose `kept` is zero are written as zero (the border of a padded plane).
        staged: x is copied and the sums wait in a room.
        joined: offset and weight of an entry are one word; groups of one row only.
    """
    on = (masked, added, padded, staged, joined)
    flags = "".join(letter for letter, one in zip("mapsj", on, strict=True) if one)
    name = f"openwork_spmm_r{rows}_t{vectors}_{act}{'_' + flags if flags else ''}_{target.name}"
    build = functools.partial(_build, name, target, rows, vectors, act, on)
    return jit.address(name, target, build)


def _build(name: str, target: Target, rows: int, vectors: int, act: Act, on: tuple[bool, ...]) -> str:
    writer = _Writer(Emitter(name, target), rows, vectors, act, *on)
    writer.write()
    return writer.e.text()


class _Writer:
    """Writes the kernel: what the whole unit needs is found once, at the entry."""

    def __init__(
        self, e: Emitter, rows: int, vectors: int, act: Act,
        masked: bool, added: bool, padded: bool, staged: bool, joined: bool,
    ) -> None:  # fmt: skip
        self.e, self.rows, self.vectors, self.act = e, rows, vectors, act
        self.masked, self.added, self.padded, self.staged, self.joined = masked, added, padded, staged, joined
        self.wide = 4 * e.lanes
        self.grid = [(r, t) for r in range(rows) for t in range(vectors)]
        b = e.b
        chunks, tiles = self.slot("chunks"), self.slot("tiles")
        chunk, rest = b.srem(e.unit, chunks), b.sdiv(e.unit, chunks)
        tile, image = b.add(self.slot("first"), b.srem(rest, tiles)), b.sdiv(rest, tiles)
        self.x = e.at(self.pointer("x"), b.add(b.mul(image, self.slot("x_image")), b.mul(tile, self.slot("x_tile"))))
        y_offset = b.mul(tile, self.slot("y_tile"))
        self.y = e.at(self.pointer("y"), b.add(b.mul(image, self.slot("y_image")), y_offset))
        self.y_row, self.groups, self.parts = self.slot("y_row"), self.slot("groups"), self.slot("parts")
        self.offsets, self.values, self.bias = self.pointer("offsets"), self.pointer("values"), self.pointer("bias")
        bounds = self.pointer("bounds")
        self.first, self.last = e.index(bounds, chunk), e.index(bounds, b.add(chunk, e.int(1)))
        self.mask = e.mask(self.slot("tail")) if masked else None
        if added:
            self.plus = e.at(self.pointer("added"), b.add(b.mul(image, self.slot("added_image")), y_offset))
        if padded:
            zero, words = e.ir.Constant(e.vector(e.i32), None), e.at(self.pointer("kept"), y_offset)
            loaded = [e.load(e.at(words, e.int(t * self.wide)), e.vector(e.i32)) for t in range(vectors)]
            self.kept = [b.icmp_signed("!=", word, zero) for word in loaded]
        if staged:
            self.number = _take(e, self.pointer("free"))
            self.room = e.at(self.pointer("rooms"), b.mul(self.number, self.slot("room")))
            self.sums = e.at(self.room, self.slot("sums"))
            self.pitch = self.slot("pitch")

    def write(self) -> None:
        """Write the loops: parts, then groups, several at once as long as there are as many, then one by one."""
        e, b = self.e, self.e.b
        with e.loop(e.int(0), self.parts) as part:
            if self.staged:
                self._stage(part)
            self.table = e.item(self.pointer("starts"), b.mul(part, b.add(self.groups, e.int(1))), e.i32)
            self.names = e.item(self.pointer("order"), b.mul(part, self.groups), e.i32)
            self.is_first = b.icmp_signed("==", part, e.int(0))
            self.is_last = b.icmp_signed("==", b.add(part, e.int(1)), self.parts)
            start = self.first
            together = _together(e.target, self.rows, self.vectors)
            if together > 1:
                count = b.sdiv(b.sub(self.last, self.first), e.int(together))
                start = b.add(self.first, b.mul(count, e.int(together)))
                with e.loop(self.first, start, together) as group:
                    self._work(group, together)
            with e.loop(start, self.last) as group:
                self._work(group, 1)
        if self.staged:
            _give_back(e, self.pointer("free"), self.number)

    def _work(self, group: Any, together: int) -> None:
        """Multiply `together` groups from `group` on: as long as all have entries side by side, then each to its end."""
        e, b = self.e, self.e.b
        places = [b.add(group, e.int(i)) for i in range(together)]
        names = [e.index(self.names, place) for place in places]
        rows = [b.mul(name, e.int(self.rows)) for name in names]
        begins = [e.index(self.table, place) for place in (*places, b.add(places[-1], e.int(1)))]
        self._prefetch(begins[0])
        held = self._begin(names, rows)
        if together > 1:
            counts = [b.sub(end, begin) for begin, end in itertools.pairwise(begins)]
            common = functools.reduce(lambda one, two: b.select(b.icmp_signed("<", one, two), one, two), counts)
            with e.loop_carrying(e.int(0), common, [value for sums in held for value in sums]) as (turn, now, give):
                size = len(self.grid)
                mine = [now[i * size : (i + 1) * size] for i in range(together)]
                after = [self._multiply(b.add(begin, turn), sums) for begin, sums in zip(begins, mine, strict=False)]
                give([value for sums in after for value in sums])
            held = [e.carried[i * size : (i + 1) * size] for i in range(together)]
            begins = [*(b.add(begin, common) for begin in begins[:-1]), begins[-1]]
            ends = [b.add(begin, b.sub(count, common)) for begin, count in zip(begins, counts, strict=False)]
        else:
            ends = begins[1:]
        done = []
        for begin, end, sums in zip(begins, ends, held, strict=False):
            with e.loop_carrying(begin, end, sums) as (entry, now, give):
                give(self._multiply(entry, now))
            done.append(list(e.carried))
        self._end(names, rows, done)

    def _begin(self, names: list[Any], rows: list[Any]) -> list[list[Any]]:
        """Return the sums of groups at the start of a part: their biases, or what earlier parts left."""
        e, b = self.e, self.e.b
        fresh, resumed, ready = (e.function.append_basic_block(word) for word in ("fresh", "resumed", "ready"))
        b.cbranch(self.is_first, fresh, resumed)
        b.position_at_end(fresh)
        begun = [
            [e.splat(e.load(e.item(self.bias, b.add(row, e.int(r)), e.f32), e.f32)) for r in range(self.rows)]
            for row in rows
        ]
        b.branch(ready)
        b.position_at_end(resumed)
        read = (lambda place, t: e.load(place, e.vector())) if self.staged else self._read
        left = [
            [read(self._waiting(name, row, r, t), t) for r, t in self.grid] for name, row in zip(names, rows, strict=True)
        ]
        b.branch(ready)
        b.position_at_end(ready)
        sums = [[b.phi(e.vector()) for _ in self.grid] for _ in names]
        for mine, biases, partial in zip(sums, begun, left, strict=True):
            for one, (r, _), value in zip(mine, self.grid, partial, strict=True):
                one.add_incoming(biases[r], fresh)
                one.add_incoming(value, resumed)
        return sums

    def _multiply(self, entry: Any, sums: list[Any]) -> list[Any]:
        """Return the sums with one more entry: its weights times its row of x."""
        e = self.e
        offset, weights = self._joined(entry) if self.joined else self._apart(entry)
        source = e.at(self.room if self.staged else self.x, offset)
        spots = [e.at(source, e.int(t * self.wide)) for t in range(self.vectors)]
        columns = [e.load(spot, e.vector()) if self.staged else self._read(spot, t) for t, spot in enumerate(spots)]
        return [e.fma(weights[r], columns[t], value) for (r, t), value in zip(self.grid, sums, strict=True)]

    def _prefetch(self, entry: Any) -> None:
        """Ask for the entries of groups to come: a weight that the caches have lost is read at the pace of memory."""
        e, b = self.e, self.e.b
        first = e.item(self.offsets, entry, e.i64 if self.joined else e.i32)
        streams = [(first, _LINES if self.joined else 1)]
        if not self.joined:
            streams.append((e.item(self.values, b.mul(entry, e.int(self.rows)), e.f32), _LINES))
        for place, lines in streams:
            for line in range(lines):
                e.prefetch(e.at(place, e.int(_AHEAD + line * _LINE)))

    def _apart(self, entry: Any) -> tuple[Any, list[Any]]:
        """Return an entry's offset and its weights, each in all lanes."""
        e = self.e
        weight = e.item(self.values, e.b.mul(entry, e.int(self.rows)), e.f32)
        weights = [e.splat(e.load(e.item(weight, e.int(r), e.f32), e.f32)) for r in range(self.rows)]
        return e.index(self.offsets, entry), weights

    def _joined(self, entry: Any) -> tuple[Any, list[Any]]:
        """Return both from one word: the loads of a multiply-add are what runs out first."""
        e, b = self.e, self.e.b
        word = e.load(e.item(self.offsets, entry, e.i64), e.i64, 8)
        high = b.trunc(b.lshr(word, e.int(32)), e.i32)
        return b.sext(b.trunc(word, e.i32), e.i64), [b.bitcast(e.splat(high), e.vector())]

    def _end(self, names: list[Any], rows: list[Any], sums: list[list[Any]]) -> None:
        """Write the sums: to where they wait for the next part, or after the last what follows them to y."""
        e, b = self.e, self.e.b
        finish, keep, following = (e.function.append_basic_block(word) for word in ("finish", "keep", "following"))
        b.cbranch(self.is_last, finish, keep)
        b.position_at_end(keep)
        for name, row, mine in zip(names, rows, sums, strict=True):
            for (r, t), value in zip(self.grid, mine, strict=True):
                place = self._waiting(name, row, r, t)
                if self.staged:
                    e.store(value, place)
                else:
                    self._write(value, place, t)
        b.branch(following)
        b.position_at_end(finish)
        limits = self.pointer("limits")
        for row, mine in zip(rows, sums, strict=True):
            for (r, t), value in zip(self.grid, mine, strict=True):
                if self.added:
                    value = b.fadd(value, self._read(self._spot(self.plus, self.slot("added_row"), row, r, t), t))
                value = apply(e, self.act, value, limits)
                if self.padded:
                    value = b.select(self.kept[t], value, e.constant(0.0))
                self._write(value, self._spot(self.y, self.y_row, row, r, t), t)
        b.branch(following)
        b.position_at_end(following)

    def _stage(self, part: Any) -> None:
        """Copy the part's rows of x into the room."""
        e, b = self.e, self.e.b
        size, stride = self.slot("part"), self.slot("x_row")
        begin = b.mul(part, size)
        left = b.sub(self.slot("width"), begin)
        with e.loop(e.int(0), b.select(b.icmp_signed("<", left, size), left, size)) as row:
            source, there = e.at(self.x, b.mul(b.add(begin, row), stride)), e.at(self.room, b.mul(row, self.pitch))
            for t in range(self.vectors):
                e.store(self._read(e.at(source, e.int(t * self.wide)), t), e.at(there, e.int(t * self.wide)))

    def _waiting(self, name: Any, row: Any, r: int, t: int) -> Any:
        """Return where a group's sum waits between parts."""
        b = self.e.b
        if not self.staged:
            return self._spot(self.y, self.y_row, row, r, t)
        return self._spot(self.sums, self.pitch, b.mul(b.sub(name, self.first), self.e.int(self.rows)), r, t)

    def _spot(self, base: Any, stride: Any, row: Any, r: int, t: int) -> Any:
        e, b = self.e, self.e.b
        return e.at(base, b.add(b.mul(b.add(row, e.int(r)), stride), e.int(t * self.wide)))

    def _read(self, place: Any, t: int) -> Any:
        last = self.masked and t == self.vectors - 1
        return self.e.masked_load(place, self.mask) if last else self.e.load(place, self.e.vector())

    def _write(self, value: Any, place: Any, t: int) -> None:
        if self.masked and t == self.vectors - 1:
            self.e.masked_store(value, place, self.mask)
        else:
            self.e.store(value, place)

    def slot(self, word: str) -> Any:
        """Return a word of the slots."""
        return self.e.slot(_PLACE[word])

    def pointer(self, word: str) -> Any:
        """Return a word of the slots as an address."""
        return self.e.pointer(_PLACE[word])


def _together(target: Target, rows: int, vectors: int) -> int:
    """Return how many groups go side by side: sums of one group wait for one another, those of two do not."""
    if rows * vectors <= 2:
        return 3
    return 2 if 2 * rows * vectors <= 3 * target.registers // 4 else 1


def _take(e: Emitter, free: Any) -> Any:
    """Wait for a free room, take the first one and return its number."""
    b = e.b
    look, seen, taken = (e.function.append_basic_block(word) for word in ("look", "seen", "taken"))
    b.branch(look)
    b.position_at_end(look)
    rooms = b.load_atomic(free, "monotonic", 8, typ=e.i64)
    b.cbranch(b.icmp_signed("==", rooms, e.int(0)), look, seen)
    b.position_at_end(seen)
    left = b.and_(rooms, b.sub(rooms, e.int(1)))
    swapped = b.extract_value(b.cmpxchg(free, rooms, left, "acquire", "monotonic"), 1)
    b.cbranch(swapped, taken, look)
    b.position_at_end(taken)
    return e.call("llvm.cttz.i64", e.i64, [rooms, e.ir.Constant(e.i1, 1)])


def _give_back(e: Emitter, free: Any, number: Any) -> None:
    e.b.atomic_rmw("or", free, e.b.shl(e.int(1), number), "release")
