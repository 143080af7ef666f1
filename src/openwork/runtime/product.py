"""The programs that multiply by one packed weight: which stages a product takes, and the memory it takes meanwhile.

Columns side by side in memory are read where they lie if they start on cache lines that spread over the whole cache, else
tile by tile through a small room. Tokens side by side are turned into panels before the product and back after it.
Programs are made once a shape; memory is taken for the call only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from openwork.runtime import tuning
from openwork.runtime.kernels import arrange, launch
from openwork.runtime.kernels import layout as copies
from openwork.runtime.kernels import spmm as kernel
from openwork.runtime.kernels.activations import Act
from openwork.runtime.kernels.target import Target, targets
from openwork.runtime.launching import Pool, Ready
from openwork.runtime.tuning import Tiling

Layout = Literal["columns", "tokens", "turned"]
"""How x and y lie: both (features, columns); both (tokens, features); x the first and y the second."""
LINE = 64
"""Bytes of a cache line."""
SETS = 64
"""Cache lines after which the first cache begins again."""
FARTHEST = 2**31
"""Bytes that an offset of the kernel cannot reach."""
ROOMS = 63
HELD = 2 * 2**20
"""Bytes of panels, a thread, that tokens fill before they start over: about the second cache."""
PLANS = 1024
"""Plans that are kept before all are made anew."""
KEPT = 16
"""Arrangements of a weight that are kept for further shapes."""


class Asked(NamedTuple):
    """What a caller wants of a product, its operands aside; `threads` and `tiling` may be left open."""

    target: Target
    act: Act = "none"
    limits: tuple[float, float] | None = None
    threads: int | None = None
    tiling: Tiling | None = None


class Key(NamedTuple):
    """What a program is made for. Strides are in bytes, from a row of (features, columns) or a token to the next."""

    target: str
    layout: Layout
    images: int
    columns: int
    x_image: int
    x_row: int
    y_image: int
    y_row: int
    aligned: bool
    act: Act
    limits: tuple[float, float] | None
    added_row: int
    added_image: int
    threads: int
    tiling: Tiling | None


@dataclass(frozen=True)
class _Way:
    """How a product is run.

    Attributes:
        tiling: of the kernel.
        staged: whether x is copied tile by tile.
        floats: memory of a call.
        rows: bytes from y to the first row of each section.
        places: bytes from that memory's start to rooms or panels of x, and to the panels of y of each section.
        room: bytes of a room.
        rooms: how many there are.
    """

    tiling: Tiling
    staged: bool
    floats: int
    rows: tuple[int, ...]
    places: tuple[int, ...]
    room: int = 0
    rooms: int = 0


@dataclass(frozen=True, eq=False)
class Plan:
    """A key and how its product is run; one a key, told from others by what it is, not by what it holds."""

    key: Key
    way: _Way


class Product:
    """A packed weight with its programs; any number of threads may multiply at once.

    Attributes:
        sections, bias, shape: of the weight; zeros where it has no bias.
        multiplies: multiply-adds for one column.
        seen: plans of inputs that were looked at before, for the caller to fill; emptied when plans change.
    """

    def __init__(self, sections: tuple[arrange.Section, ...], bias: npt.NDArray[np.float32], shape: tuple[int, int]) -> None:
        self.sections, self.bias, self.shape = sections, bias, shape
        self.multiplies = sum(section.values.size for section in sections)
        self.seen: dict[Any, tuple[Plan, torch.Size]] = {}
        self._plans: dict[Key, Plan] = {}
        self._arranged: dict[tuple[int, int, bool, int, int], arrange.Arranged] = {}
        self._pool: Pool[Plan] = Pool(self._ready)

    def columns_key(self, x: Tensor, out: Tensor, added: Tensor | None, asked: Asked) -> Key:
        """Return the key of a product of x (in, columns) or (images, in, columns), columns side by side, into out."""
        many, columns = x.ndim == 3, x.shape[-1]
        images = x.shape[0] if many else 1
        return Key(
            asked.target.name,
            "columns",
            images,
            columns,
            4 * x.stride(0) if many else 0,
            4 * x.stride(-2),
            4 * out.stride(0) if many else 0,
            4 * out.stride(-2),
            x.data_ptr() % LINE == 0,
            asked.act,
            asked.limits,
            0 if added is None else 4 * added.stride(-2),
            0 if added is None or not many else 4 * added.stride(0),
            asked.threads or self._threads(images * columns, asked.target),
            asked.tiling,
        )

    def tokens_key(self, x: Tensor, asked: Asked) -> tuple[Tensor, Key]:
        """Return x (tokens, in) as it is read, and the key of the first tokens of it: all, if they are not too many."""
        (height, width), (count, _), (token, feature) = self.shape, x.shape, x.stride()
        threads = asked.threads or self._threads(count, asked.target)
        some = min(count, 64 * max(1, HELD * threads // (256 * (height + width))))
        turned = feature >= count > 1 == token and width > 1
        if not turned and feature != 1 and width > 1:
            x = x.detach().contiguous()
        layout: Layout = "turned" if turned else "tokens"
        aligned = turned and x.data_ptr() % LINE == 0
        step = 4 * x.stride(1 if turned else 0)
        end = (aligned, asked.act, asked.limits, 0, 0, threads, asked.tiling)
        return x, Key(asked.target.name, layout, 1, some, 0, step, 0, 4 * height, *end)

    def plan(self, key: Key) -> Plan:
        """Return the plan of a key, made at the first call."""
        found = self._plans.get(key)
        if found is None:
            if len(self._plans) >= PLANS:
                self.forget()
            found = self._plans[key] = Plan(key, self._way(key))
        return found

    def run(self, plan: Plan, x: int, y: int, added: int = 0) -> None:
        """Multiply: x and y are addresses, laid out as the key says, `added` that of a tensor with y's columns."""
        way = plan.way
        held = torch.empty(way.floats, dtype=torch.float32) if way.floats else None
        start = 0 if held is None else -(-held.data_ptr() // LINE) * LINE
        plus = [added + step for step in way.rows] if added else ()
        operands = [x, *[y + step for step in way.rows], *[start + place for place in way.places], *plus]
        self._pool.run(plan, operands, plan.key.threads)

    def forget(self) -> None:
        """Make programs anew at the next call, with the tilings that are best known then."""
        self.seen, self._plans, self._pool = {}, {}, Pool(self._ready)

    def _threads(self, columns: int, target: Target) -> int:
        """Return how many of torch's threads pay for a product with so many columns."""
        return tuning.useful_threads(self.multiplies * columns, target, torch.get_num_threads())

    def kept_under(self, key: Key) -> str:
        """Return what the tiling of a key is kept under."""
        main = self.sections[0]
        kind = f"{key.layout}{'' if key.aligned and key.x_row % LINE == 0 else ' split'}"
        sizes = (main.rows, len(main.columns), self.shape, key.columns, targets()[key.target], key.threads, key.images)
        return tuning.key_of(kind, *sizes)

    def tiling(self, key: Key) -> Tiling:
        """Return the tiling of a key: its own, what was measured, else the default, with no tile wider than x."""
        main, target = self.sections[0], targets()[key.target]
        found = key.tiling or tuning.recall(self.kept_under(key))
        if found is None:
            sizes = (main.rows, len(main.columns), self.shape, key.columns, target, key.threads, key.images)
            found = tuning.default_tiling(*sizes)
        return Tiling(min(found.vectors, -(-key.columns // target.lanes)), found.part, found.chunks)

    def _way(self, key: Key) -> _Way:
        target, tiling, (height, width) = targets()[key.target], self.tiling(key), self.shape
        wide = 4 * tiling.vectors * target.lanes
        tiles = -(-4 * key.columns // wide)
        first = [section.first for section in self.sections]
        staged = key.layout != "tokens" and not (_spread(key, wide) and width * key.x_row < FARTHEST)
        rows = tuple(row * key.y_row for row in first)
        room = rooms = x_bytes = 0
        if staged:
            arranged = [self.arranged(number, wide, True, tiling) for number in range(len(first))]
            room = max(kernel.room_bytes(target, one, tiling.vectors, tiling.part) for one in arranged)
            rooms = min(ROOMS, key.threads)
            x_bytes = room * rooms
        elif key.layout == "tokens":
            x_bytes = tiles * width * wide
        y_bytes = 0 if key.layout == "columns" else tiles * height * wide
        places = (0, *(x_bytes + row * wide for row in first)) if x_bytes + y_bytes else ()
        floats = -(-(x_bytes + y_bytes) // 4) + LINE // 4 if places else 0
        return _Way(tiling, staged, floats, rows, places, room, rooms)

    def arranged(self, number: int, step: int, staged: bool, tiling: Tiling) -> arrange.Arranged:
        """Return a section arranged for rows of x that are `step` bytes apart."""
        key = (number, step, staged, tiling.part, tiling.chunks)
        found = self._arranged.get(key)
        if found is None:
            columns = np.arange(self.shape[1], dtype=np.int64)
            offsets = (columns % tiling.part if staged else columns) * step
            found = arrange.arrange(self.sections[number], offsets, tiling.part, tiling.chunks).join()
            if len(self._arranged) >= KEPT:
                self._arranged = {}
            self._arranged[key] = found
        return found

    def _ready(self, plan: Plan) -> Ready:
        """Return a program of a plan."""
        key, way, (height, width) = plan.key, plan.way, self.shape
        target = targets()[key.target]
        vectors, count = way.tiling.vectors, len(self.sections)
        lanes = vectors * target.lanes
        wide, tiles = 4 * lanes, -(-key.columns // lanes)
        memory = 1 + count
        words = np.full(3 * LINE // 8, 2**way.rooms - 1, np.int64)
        free = -(-words.ctypes.data // LINE) * LINE  # alone on its line
        limits = np.array(key.limits or (0, 0), np.float32)
        keep: list[object] = [words, limits]
        patches: list[tuple[npt.NDArray[np.int64], int, int]] = []

        def patch(calls: list[launch.Call], words: tuple[str, ...], word: str, operand: int) -> None:
            patches.extend((call.slots, words.index(word), operand) for call in calls)

        before: list[launch.Call] = []
        after: list[launch.Call] = []
        stages = [before]
        x = kernel.Matrix(0, key.x_image, key.x_row)
        if key.layout == "tokens":
            before += copies.pack_tokens(target, 0, key.x_row // 4, key.columns, width, 0, lanes)
            patch(before, copies.TURN, "x", 0)
            patch(before, copies.TURN, "y", memory)
            x = kernel.Matrix(0, 0, wide, width * wide)
        if key.layout == "columns":
            y = kernel.Matrix(0, key.y_image, key.y_row)
            columns = key.columns
        else:
            y, columns = kernel.Matrix(0, 0, wide, height * wide), tiles * lanes if key.layout == "tokens" else key.columns
            after += copies.unpack_tokens(target, 0, key.columns, height, 0, key.y_row // 4, lanes)
            patch(after, copies.TURN, "x", memory + 1)
            patch(after, copies.TURN, "y", 1)
        rooms = kernel.Rooms(0, way.room, free, width, way.tiling.part) if way.staged else None
        product: list[launch.Call] = []
        for number, section in enumerate(self.sections):
            arranged = self.arranged(number, wide if way.staged else x.row, way.staged, way.tiling)
            keep.append(arranged)
            calls = kernel.calls(
                target, arranged, x, y, vectors=vectors, columns=columns, images=key.images, act=key.act, staged=rooms,
                bias=self.bias.ctypes.data + 4 * section.first, limits=limits.ctypes.data,
                added=kernel.Matrix(0, key.added_image, key.added_row) if key.added_row else None,
            )  # fmt: skip
            patch(calls, kernel.WORDS, "x", memory if key.layout == "tokens" else 0)
            patch(calls, kernel.WORDS, "y", 1 + number if key.layout == "columns" else memory + 1 + number)
            if way.staged:
                patch(calls, kernel.WORDS, "rooms", memory)
            if key.added_row:
                patch(calls, kernel.WORDS, "added", memory + len(way.places) + number)
            product += calls
        stages += [product, after]
        return Ready(launch.Program([stage for stage in stages if stage], target), tuple(patches), keep)


def _spread(key: Key, wide: int) -> bool:
    """Tell whether the columns of a tile can be read where they lie: on whole lines that use most of the first cache."""
    if not key.aligned or key.x_row % LINE or key.x_image % LINE:
        return False
    lines = key.x_row // LINE
    apart = math.gcd(lines, SETS)  # rows start on every so many of the sets
    return wide // LINE >= 0.7 * apart or 4 * key.columns <= LINE
