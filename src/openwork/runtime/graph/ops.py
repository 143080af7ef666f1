"""The operations that an island is made of: what each makes of shapes, which borders it reads, how it is run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from openwork.runtime.kernels import arrange, depthwise, layout, spmm
from openwork.runtime.kernels.activations import Act
from openwork.runtime.kernels.launch import Call
from openwork.runtime.kernels.planes import Planes
from openwork.runtime.kernels.target import Target, first_cache

Shape = tuple[int, int, int, int]
Stage = list[Call]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Tail:
    """What follows a sum before it is stored: the activation and the two bounds of `clamp`."""

    act: Act = "none"
    low: float = -np.inf
    high: float = np.inf

    @property
    def limits(self) -> Floats:
        """The bounds as the kernels read them."""
        return np.array([self.low, self.high], np.float32)


NOTHING = Tail()


@dataclass(frozen=True)
class Way:
    """How a product is run: rows of a group, vectors of a tile, input columns of a part. The result is the same."""

    block: int
    vectors: int
    part: int

    def __str__(self) -> str:
        return f"{self.block}x{self.vectors}"


@dataclass(frozen=True)
class Setting:
    """What an operation is run with.

    Attributes:
        target: what to compile for.
        threads: how many threads there are to be kept busy.
        keep: arrays that the calls point at are put here, to live as long as the program.
        arranged: packed weights that are in place already, by (operation, geometry); shared by all programs.
        ways: how products are run where that was measured, by `Conv.spot`.
    """

    target: Target
    threads: int
    keep: list[Any]
    arranged: dict[Any, Any]
    ways: Mapping[Any, Way]

    def held(self, array: npt.NDArray[Any]) -> int:
        """Keep an array alive and return its address."""
        self.keep.append(array)
        return int(array.ctypes.data)


class Op(Protocol):
    """What the compiler asks of an operation."""

    @property
    def name(self) -> str:
        """The node that it does the work of; no two of a chain have one name."""

    @property
    def inputs(self) -> tuple[int, ...]:
        """Numbers of the values that it reads; images all of them."""

    def tied(self) -> tuple[int, ...]:
        """Return the inputs whose planes must have the pitch of the output's."""

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        """Return the shape of what it makes of images of these shapes."""

    def reach(self) -> int:
        """Return how many zeros it reads beyond the border of its first input."""

    def scratch(self, ins: Sequence[Planes], out: Planes) -> list[Planes]:
        """Return the planes that it needs for itself; they start as zeros."""

    def stages(self, s: Setting, ins: Sequence[Planes], out: Planes, scratch: Sequence[Planes]) -> list[Stage]:
        """Return its calls, stage by stage."""


@dataclass(frozen=True)
class Geometry:
    """Kernel size, stride, padding (top, bottom, left, right) and dilation of a convolution or a pool."""

    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)

    def out(self, height: int, width: int) -> tuple[int, int]:
        """Return the size of the output."""
        top, bottom, left, right = self.padding
        sizes = zip((height + top + bottom, width + left + right), self.kernel, self.stride, self.dilation, strict=True)
        high, wide = ((size - step * (kernel - 1) - 1) // stride + 1 for size, kernel, stride, step in sizes)
        return high, wide

    @property
    def is_pointwise(self) -> bool:
        """Whether every output pixel reads the one input pixel at its place."""
        return self.kernel == (1, 1) and self.stride == (1, 1) and not any(self.padding)

    def taps(self) -> list[tuple[int, int, int, int]]:
        """Return for each tap, row by row, its phase (of rows, of columns) and its shift in the phase's own pixels."""
        (high, wide), (by_row, by_column), (row, column) = self.kernel, self.stride, self.dilation
        found = []
        for i in range(high):
            for j in range(wide):
                y, x = i * row - self.padding[0], j * column - self.padding[2]
                found.append((y % by_row, x % by_column, y // by_row, x // by_column))
        return found

    def reach(self) -> int:
        """Return how many zeros are read beyond the border of the (phase) planes."""
        return max(max(abs(y), abs(x)) for _, _, y, x in self.taps())


@dataclass(frozen=True, eq=False)
class Conv:
    """A convolution as a product of a sparse weight with flattened columns; groups are zeros of the weight.

    Attributes:
        weight: (out, in * kernel height * kernel width).
        bias: (out).
        geometry: kernel, stride, padding, dilation.
        tail: the activation.
        layer: name of the convolution.

    The second input, if any, is added before the activation.
    """

    name: str
    inputs: tuple[int, ...]
    weight: Floats
    bias: Floats
    geometry: Geometry
    tail: Tail = NOTHING
    layer: str = ""
    cuts: dict[int, Any] = field(default_factory=dict)

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        """Return (batch, out, height, width)."""
        batch, _, height, width = shapes[0]
        return (batch, len(self.bias), *self.geometry.out(height, width))

    @property
    def is_strided(self) -> bool:
        """Whether the input is split into phases first."""
        return self.geometry.stride != (1, 1)

    def tied(self) -> tuple[int, ...]:
        """Return the input, unless phase planes stand for it, and what is added: they share the flattened columns."""
        return self.inputs[1:] if self.is_strided else self.inputs

    def reach(self) -> int:
        """Return how many zeros are read beyond the border of the input, those of phase planes aside."""
        return 0 if self.is_strided else self.geometry.reach()

    def scratch(self, ins: Sequence[Planes], out: Planes) -> list[Planes]:
        """Return the phase planes, at the pitch of the output."""
        if not self.is_strided:
            return []
        rows, columns = self.geometry.stride
        source = ins[0]
        width = -(-source.width // columns)
        height = -(-source.height // rows)
        return [Planes(source.batch, source.channels * rows * columns, height, width, out.pitch - width)]

    def least_pitch(self, shape: Shape) -> int:
        """Return the pitch that the output needs for phase planes of an input of this shape."""
        return -(-shape[3] // self.geometry.stride[1]) + self.geometry.reach() if self.is_strided else 0

    def sections(self, block: int) -> tuple[arrange.Section, ...]:
        """Return the weight cut into groups of `block` rows."""
        if block not in self.cuts:
            self.cuts[block] = arrange.sections(self.weight, block)
        found: tuple[arrange.Section, ...] = self.cuts[block]
        return found

    def blocks(self) -> list[int]:
        """Return the numbers of rows a group may have that are worth a look, the most promising first."""
        costs = {
            block: sum(len(one.columns) * COSTS[one.rows] for one in self.sections(block))
            for block in COSTS
            if block <= len(self.bias)
        }
        best = min(costs.values(), default=0.0)
        return sorted((block for block, cost in costs.items() if cost <= 1.5 * best), key=lambda block: costs[block])

    def spot(self, out: Planes) -> tuple[Any, ...]:
        """Return what a measured way holds for: this product at this size."""
        return self.name, out.batch, out.height, out.width, out.pad

    def way(self, out: Planes, target: Target, ways: Mapping[Any, Way]) -> Way:
        """Return how the product is run: as it was measured, else as its size suggests."""
        found = ways.get(self.spot(out))
        if found is not None:
            return found
        block = self.blocks()[0]
        vectors = spread(-(-out.columns // target.lanes), target, block)
        return Way(block, vectors, reasonable_part(vectors, target, block, self.weight))

    def stages(self, s: Setting, ins: Sequence[Planes], out: Planes, scratch: Sequence[Planes]) -> list[Stage]:
        """Return the phase split, if there is one, and the product."""
        before: list[Stage] = []
        source = ins[0]
        if self.is_strided:
            before = [layout.split(s.target, source, scratch[0], self.geometry.stride[0])]
            source = scratch[0]
        way = self.way(out, s.target, s.ways)
        vectors, part = way.vectors, way.part
        tiles = out.batch * -(-out.columns // (vectors * s.target.lanes))
        limits, bias, kept = s.held(self.tail.limits), s.held(self.bias), s.held(out.kept())
        calls: Stage = []
        for section in self.sections(way.block):
            chunks = reasonable_chunks(section, tiles, vectors * s.target.lanes, s.threads)
            key = (self.name, way.block, section.first, source.plane, source.pitch, part, chunks)
            placed = s.arranged.get(key)
            if placed is None:
                placed = s.arranged[key] = arrange.arrange(section, self._offsets(source), part, chunks).join()
            calls += spmm.calls(
                s.target, placed, _matrix(source), _matrix(out, section.first), vectors=vectors, columns=out.columns,
                bias=bias + 4 * section.first, images=out.batch, act=self.tail.act, limits=limits,
                added=_matrix(ins[1], section.first) if len(ins) > 1 else None, kept=kept,
            )  # fmt: skip
        return [*before, calls]

    def _offsets(self, source: Planes) -> npt.NDArray[np.int64]:
        """Return for each column of the weight the bytes from a pixel to what it reads."""
        rows, columns = self.geometry.stride
        taps = [(row * columns + column) * source.plane + y * source.pitch + x for row, column, y, x in self.geometry.taps()]
        channels = np.arange(source.channels // (rows * columns), dtype=np.int64) * rows * columns * source.plane
        return 4 * (channels[:, None] + np.array(taps, np.int64)[None]).reshape(-1)


def _matrix(planes: Planes, row: int = 0) -> spmm.Matrix:
    return spmm.Matrix(planes.address + 4 * row * planes.plane, 4 * planes.image, 4 * planes.plane)


COSTS = {1: 0.75, 2: 1.1, 4: 2.05}
"""Cycles of one entry and vector by rows of a group: one row waits for its load, four for their multiply-adds."""


def spread(total: int, target: Target, rows: int, most: int = 0) -> int:
    """Return the vectors of a tile so that `total` vectors make tiles of about equal size that fit the registers."""
    most = most or {1: 8, 2: 6, 4: 6, 8: 3}.get(rows, 1) if target.registers >= 32 else {1: 6, 2: 4, 4: 2}.get(rows, 1)
    return -(-total // max(1, -(-total // most)))


def reasonable_part(vectors: int, target: Target, rows: int, weight: Floats) -> int:
    """Return how many input columns a part has: their slice of a tile fits the first cache, groups keep some entries."""
    width: int = weight.shape[1]
    fits = first_cache() // (vectors * target.lanes * 4)
    if rows > 1:
        fits *= 4  # each load feeds several multiply-adds, so the second cache is near enough
    density = int(np.count_nonzero(weight)) / max(1, weight.size)
    part = int(max(fits, 8 / max(density, 1e-3)))
    return max(1, -(-width // max(1, round(width / part))))


def reasonable_chunks(section: arrange.Section, tiles: int, columns: int, threads: int) -> int:
    """Return into how many runs the groups are cut: units for all threads, and outputs of a run that stay near."""
    wanted = 1 if threads == 1 else -(-4 * threads // max(1, tiles))
    near = -(-section.groups * section.rows * columns * 4 // 2**18)
    return max(1, min(max(wanted, near), section.groups))


@dataclass(frozen=True, eq=False)
class Depthwise:
    """A convolution with one filter a channel: weight (channels, kernel height * kernel width), bias (channels)."""

    name: str
    inputs: tuple[int, ...]
    weight: Floats
    bias: Floats
    geometry: Geometry
    tail: Tail = NOTHING
    layer: str = ""

    def tied(self) -> tuple[int, ...]:
        """Return nothing: rows are addressed one by one."""
        return ()

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        """Return (batch, channels, height, width)."""
        batch, channels, height, width = shapes[0]
        return (batch, channels, *self.geometry.out(height, width))

    def reach(self) -> int:
        """Return how many zeros are read beyond the border."""
        return max(self.geometry.padding)

    def scratch(self, ins: Sequence[Planes], out: Planes) -> list[Planes]:
        """Return nothing."""
        return []

    def stages(self, s: Setting, ins: Sequence[Planes], out: Planes, scratch: Sequence[Planes]) -> list[Stage]:
        """Return one stage."""
        calls = depthwise.calls(
            s.target, ins[0], out, s.held(self.weight), s.held(self.bias), kernel=self.geometry.kernel[0],
            stride=self.geometry.stride[0], padding=self.geometry.padding[0], act=self.tail.act,
            limits=s.held(self.tail.limits),
        )  # fmt: skip
        return [calls]
