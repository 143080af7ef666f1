"""Linear layers one after the other on tokens, as one program: what is between them never leaves its panels.

A sparse product works on panels: some tokens side by side, feature by feature. Each layer by itself turns tokens into
panels and back; a chain does so once at either end, and what follows a sum (GELU, ReLU) happens before it is stored. The
order of every sum is that of `spmm.spmm_tokens`, so the product parts are equal bit for bit.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from openwork.runtime import tuning
from openwork.runtime.formats import _common as common
from openwork.runtime.kernels import launch
from openwork.runtime.kernels import layout as copies
from openwork.runtime.kernels import spmm as kernel
from openwork.runtime.kernels.activations import Act
from openwork.runtime.kernels.target import Target, host, targets
from openwork.runtime.launching import KEYS, Pool, Ready
from openwork.runtime.product import HELD, LINE
from openwork.runtime.spmm import PackedSpMM, spmm_tokens, then
from openwork.runtime.timing import interleave
from openwork.runtime.tuning import Tiling

WIDEST = (4, 5, 3, 6, 2, 8)
"""Vectors of a tile that are tried, the first one where nothing was measured."""


@dataclass(frozen=True, eq=False)
class Link:
    """One layer of a chain: a packed weight (out, in) and what follows its sum.

    Attributes:
        packed: the weight and its bias.
        act: of `kernels.activations.ACTS`, but for `clamp`.
        clamp: low and high bound instead.
    """

    packed: PackedSpMM
    act: Act = "none"
    clamp: tuple[float, float] | None = None


class Key(NamedTuple):
    """What a program is made for; `row` are the bytes from a token to the next."""

    target: str
    tokens: int
    row: int
    threads: int
    vectors: int


class Chain:
    """Links whose sizes follow one another; any number of threads may call `run` at once. A copy makes its programs anew."""

    def __init__(self, links: Sequence[Link]) -> None:
        self.links = tuple(links)
        self._pool: Pool[Key] = Pool(self._ready)
        self._known: dict[Key, int] = {}  # vectors of a tile by key, so that a call asks no file and writes no string

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return type(self), (self.links,)

    def __deepcopy__(self, memo: dict[int, object]) -> Chain:
        """Return one with the same weights, which never change."""
        return Chain(self.links)

    @property
    def width(self) -> int:
        """Features of an input."""
        return self.links[0].packed.shape[1]

    @property
    def height(self) -> int:
        """Features of an output."""
        return self.links[-1].packed.shape[0]

    def run(self, x: Tensor, *, threads: int | None = None, vectors: int | None = None) -> Tensor:
        """Return the output (..., out) for x (..., in), float32 on the CPU, of any strides; without gradients.

        Args:
            x: the input.
            threads: at most; None is torch's number, one where there is little to do.
            vectors: vectors of a tile; None takes what was measured by `tune`.

        Raises:
            ModelError: if x does not fit.
        """
        common.check_input(x, self.width, torch.float32)
        target = host()
        if target is None or x.numel() == 0 or min(link.packed.multiplies for link in self.links) == 0:
            return apart(self.links, x)
        flat = x.detach().reshape(-1, self.width)
        if flat.stride(1) != 1 and self.width > 1:
            flat = flat.contiguous()
        count = len(flat)
        key = self._key(flat, target, threads, vectors)
        out = torch.empty(count, self.height, dtype=torch.float32)
        for first in range(0, count, key.tokens):
            some = key._replace(tokens=min(key.tokens, count - first))
            self._multiply(some, flat.data_ptr() + first * key.row, out.data_ptr() + 4 * first * self.height)
        return out.view(*x.shape[:-1], self.height)

    def tune(self, x: Tensor, seconds: float = tuning.SECONDS) -> None:
        """Measure tiles of several widths on inputs like x (..., in) and keep the fastest, in this process and the next."""
        target = host()
        if target is None or x.numel() == 0:
            return
        flat = x.detach().reshape(-1, self.width)
        place = self._kept_under(self._key(flat, target, None, WIDEST[0]))
        if tuning.recall(place) is not None:
            return
        rows = max(link.packed.block for link in self.links)
        fits = [one for one in WIDEST if one * rows <= 3 * target.registers // 4] or [1]
        total = -(-len(flat) // target.lanes)
        sizes = {-(-total // -(-total // one)): one for one in fits}  # widths that come to the same are tried once
        calls = {str(one): functools.partial(self.run, x, vectors=one) for one in sizes}
        times = interleave(calls, seconds=seconds)
        tuning.keep(place, Tiling(int(min(times, key=lambda name: times[name])), 1))
        self._known = {}

    def _key(self, x: Tensor, target: Target, threads: int | None, vectors: int | None) -> Key:
        count = len(x)
        work = sum(link.packed.multiplies for link in self.links) * count
        threads = threads or tuning.useful_threads(work, target, torch.get_num_threads())
        sizes = self.width + sum(link.packed.shape[0] for link in self.links)
        some = min(count, 64 * max(1, HELD * threads // (256 * sizes)))
        key = Key(target.name, some, 4 * x.stride(0), threads, vectors or 0)
        if vectors is None:
            key = key._replace(vectors=self._known.get(key) or self._recalled(key))
        total = -(-key.tokens // target.lanes)
        return key._replace(vectors=-(-total // -(-total // key.vectors)))

    def _recalled(self, key: Key) -> int:
        found = tuning.recall(self._kept_under(key))
        vectors = WIDEST[0] if found is None else found.vectors
        if len(self._known) >= KEYS:
            self._known = {}
        self._known[key] = vectors
        return vectors

    def _kept_under(self, key: Key) -> str:
        shapes = "-".join(f"{link.packed.shape[0]}x{link.packed.shape[1]}r{link.packed.block}" for link in self.links)
        entries = sum(link.packed.multiplies for link in self.links)
        sizes = (1, entries, (entries, 1), key.tokens, targets()[key.target], key.threads)
        return f"chain {shapes} {round(4 * math.log2(entries))} {tuning.key_of('chain', *sizes)}"

    def _multiply(self, key: Key, x: int, y: int) -> None:
        places, floats = self._places(key)
        held = torch.empty(floats, dtype=torch.float32)
        start = -(-held.data_ptr() // LINE) * LINE
        self._pool.run(key, [x, y, *(start + place for place in places)], key.threads)

    def _places(self, key: Key) -> tuple[list[int], int]:
        """Return the bytes from the start of the panels to those of x and of every section's y, and the floats of all.

        Two rooms are used in turn: panels that were multiplied are free when their product is done.
        """
        wide = 4 * key.vectors * targets()[key.target].lanes
        tiles = -(-4 * key.tokens // wide)
        sizes = [tiles * wide * size for size in (self.width, *(link.packed.shape[0] for link in self.links))]
        rooms = 0, max(sizes[0::2])
        firsts = [(number, section.first) for number, link in enumerate(self.links) for section in link.packed.sections]
        places = [0, *(rooms[(number + 1) % 2] + first * wide for number, first in firsts)]
        return places, (rooms[1] + max(sizes[1::2])) // 4 + LINE // 4

    def _ready(self, key: Key) -> Ready:
        """Return a program: tokens to panels, the products, panels to tokens; x and y are operands 0 and 1."""
        target = targets()[key.target]
        lanes = key.vectors * target.lanes
        wide, tiles = 4 * lanes, -(-key.tokens // lanes)
        keep: list[object] = []
        patches: list[tuple[npt.NDArray[np.int64], int, int]] = []

        def patch(calls: list[launch.Call], words: tuple[str, ...], **operands: int) -> None:
            patches.extend((call.slots, words.index(word), operand) for call in calls for word, operand in operands.items())

        read, write = 2, 3  # the operands with a link's x and the first section of its y
        stages = [copies.pack_tokens(target, 0, key.row // 4, key.tokens, self.width, 0, lanes)]
        patch(stages[0], copies.TURN, x=0, y=read)
        for link in self.links:
            product, limits = link.packed._product, np.array(link.clamp or (0, 0), np.float32)
            (height, width), main = product.shape, product.sections[0]
            sizes = (main.rows, len(main.columns), product.shape, key.tokens, target, key.threads)
            tiling = tuning.tiling_of(key.vectors, *sizes)
            stage: list[launch.Call] = []
            for number, section in enumerate(product.sections):
                arranged = product.arranged(number, wide, False, tiling)
                calls = kernel.calls(
                    target, arranged, kernel.Matrix(0, 0, wide, width * wide), kernel.Matrix(0, 0, wide, height * wide),
                    vectors=key.vectors, columns=tiles * lanes, act=link.act if link.clamp is None else "clamp",
                    bias=product.bias.ctypes.data + 4 * section.first, limits=limits.ctypes.data,
                )  # fmt: skip
                patch(calls, kernel.WORDS, x=read, y=write + number)
                stage += calls
                keep += [arranged, limits]
            stages.append(stage)
            read, write = write, write + len(product.sections)
        after = copies.unpack_tokens(target, 0, key.tokens, self.height, 0, self.height, lanes)
        patch(after, copies.TURN, x=read, y=1)
        return Ready(launch.Program([*stages, after], target), tuple(patches), keep)


def apart(links: Sequence[Link], x: Tensor) -> Tensor:
    """Return what a chain gives, layer by layer."""
    for link in links:
        x = then(spmm_tokens(link.packed, x), link.act, link.clamp)
    return x
