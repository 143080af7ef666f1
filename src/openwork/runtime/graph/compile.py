"""Laying an island out for one input shape: planes for every value, memory used again, calls in order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from openwork.runtime.graph.ops import Conv, Op, Setting, Shape, Stage, Way
from openwork.runtime.kernels import layout
from openwork.runtime.kernels.launch import Program
from openwork.runtime.kernels.planes import LINE, Planes
from openwork.runtime.kernels.target import Target
from openwork.runtime.launching import Ready


@dataclass(frozen=True)
class Chain:
    """The operations of an island in order.

    Attributes:
        inputs: how many tensors come in; they are the values 0, 1, ...
        ops: operation i makes value `inputs + i`.
        outputs: numbers of the values that are given back.
    """

    inputs: int
    ops: tuple[Op, ...]
    outputs: tuple[int, ...]


@dataclass(frozen=True)
class Plot:
    """A chain laid out for one shape of its inputs.

    Attributes:
        chain: the operations.
        planes: the layout of every value, without addresses.
        scratch: the layouts of the planes that each operation has for itself.
        slots: memory number of every value.
        rooms: memory number of each operation's scratch.
        sizes: floats of each memory.
        arranged: packed weights, shared by all programs of this chain.
        ways: how products are run where that was measured.
    """

    chain: Chain
    planes: tuple[Planes, ...]
    scratch: tuple[tuple[Planes, ...], ...]
    slots: tuple[int, ...]
    rooms: tuple[tuple[int, ...], ...]
    sizes: tuple[int, ...]
    arranged: dict[Any, Any] = field(default_factory=dict)
    ways: Mapping[Any, Way] = field(default_factory=dict)

    def way(self, number: int, target: Target) -> Way:
        """Return how product `number` of the chain is run."""
        op = self.chain.ops[number]
        if not isinstance(op, Conv):
            raise TypeError(f"{op.name} is no product")
        return op.way(self.planes[self.chain.inputs + number], target, self.ways)

    @property
    def nbytes(self) -> int:
        """Bytes that the memory of one program takes."""
        return 4 * sum(self.sizes)


def plot(
    chain: Chain, shapes: Sequence[Shape], arranged: dict[Any, Any] | None = None, ways: Mapping[Any, Way] | None = None
) -> Plot:
    """Choose a layout for every value and give values memory that is free again when they are not read any more."""
    full = list(shapes)
    for op in chain.ops:
        full.append(op.shape([full[i] for i in op.inputs]))
    planes = _layouts(chain, full)
    scratch = tuple(
        tuple(op.scratch([planes[i] for i in op.inputs], planes[chain.inputs + n])) for n, op in enumerate(chain.ops)
    )
    slots, rooms, sizes = _memory(chain, planes, scratch)
    return Plot(chain, tuple(planes), scratch, slots, rooms, sizes, {} if arranged is None else arranged, ways or {})


def _layouts(chain: Chain, shapes: Sequence[Shape]) -> list[Planes]:
    """Return planes in which values that an operation ties have the same pitch, wide enough for every reader."""
    parent = list(range(len(shapes)))

    def find(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    least = [width for _, _, _, width in shapes]
    for n, op in enumerate(chain.ops):
        out, first = chain.inputs + n, op.inputs[0]
        least[first] = max(least[first], shapes[first][3] + op.reach())
        if isinstance(op, Conv):
            least[out] = max(least[out], op.least_pitch(shapes[first]))
        for i in op.tied():
            parent[find(i)] = find(out)
    pitches: dict[int, int] = {}
    for i, pitch in enumerate(least):
        pitches[find(i)] = max(pitches.get(find(i), 0), pitch)
    return [Planes(*shape, pad=pitches[find(i)] - shape[3]) for i, shape in enumerate(shapes)]


def _memory(
    chain: Chain, planes: Sequence[Planes], scratch: Sequence[Sequence[Planes]]
) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...], tuple[int, ...]]:
    """Give every value and scratch a memory; one whose values have all been read is given again to planes alike."""
    last = [max((n for n, op in enumerate(chain.ops) if i in op.inputs), default=-1) for i in range(len(planes))]
    for i in chain.outputs:
        last[i] = len(chain.ops)
    sizes: list[int] = []
    free: dict[tuple[int, int, int], list[int]] = {}

    def take(one: Planes) -> int:
        idle = free.get((one.height, one.width, one.pad), [])
        if idle:
            number = max(idle, key=lambda k: sizes[k])
            idle.remove(number)
        else:
            number = len(sizes)
            sizes.append(0)
        sizes[number] = max(sizes[number], one.floats)
        return number

    def give(one: Planes, number: int) -> None:
        free.setdefault((one.height, one.width, one.pad), []).append(number)

    slots = [take(planes[i]) for i in range(chain.inputs)]
    rooms: list[tuple[int, ...]] = []
    for n, op in enumerate(chain.ops):
        slots.append(take(planes[chain.inputs + n]))
        rooms.append(tuple(take(one) for one in scratch[n]))
        for one, number in zip(scratch[n], rooms[-1], strict=True):
            give(one, number)
        for i in dict.fromkeys((*op.inputs, chain.inputs + n)):
            if last[i] <= n:
                give(planes[i], slots[i])
    return tuple(slots), tuple(rooms), tuple(sizes)


_LATER = 2**60
"""Stands for the address of a tensor that is not there yet."""


def _patches(calls: Stage, operand: int) -> list[tuple[npt.NDArray[np.int64], int, int]]:
    """Return where the address of an operand goes."""
    return [(call.slots, int(word), operand) for call in calls for word in np.flatnonzero(call.slots == _LATER)]


def bind(made: Plot, target: Target, threads: int, strides: Sequence[tuple[int, int, int, int]]) -> Ready:
    """Allocate memory and return a program that copies tensors in, runs the operations and copies the outputs out.

    Args:
        made: the plot.
        target: what to compile for.
        threads: how many threads will run it at most.
        strides: of the input tensors, in floats.
    """
    chain = made.chain
    keep: list[Any] = []
    s = Setting(target, threads, keep, made.arranged, made.ways)
    values, rooms = place(made, keep)
    stages: list[Stage] = []
    patches = []
    for i in range(chain.inputs):
        one = values[i]
        tensor = layout.Images(_LATER, one.batch, one.channels, one.height, one.width, strides[i])
        stages.append(layout.split(target, tensor, one))
        patches += _patches(stages[-1], i)
    for n, op in enumerate(chain.ops):
        stages += op.stages(s, [values[i] for i in op.inputs], values[chain.inputs + n], rooms[n])
    last: Stage = []
    for n, i in enumerate(chain.outputs):
        one = values[i]
        size = one.height * one.width
        tensor = layout.Images(
            _LATER, one.batch, one.channels, one.height, one.width, (one.channels * size, size, one.width, 1)
        )
        calls = layout.merge(target, one, tensor)
        patches += _patches(calls, chain.inputs + n)
        last += calls
    stages.append(last)
    return Ready(Program(stages, target), tuple(patches), keep)


def place(made: Plot, keep: list[Any]) -> tuple[list[Planes], list[list[Planes]]]:
    """Allocate the memory of a plot, put it into `keep`, and return all values and all scratch with their addresses."""
    lengths = [-(-size // LINE) * LINE for size in made.sizes]
    memory = np.zeros(sum(lengths) + LINE, np.float32)
    keep.append(memory)
    base = -(-memory.ctypes.data // (4 * LINE)) * 4 * LINE
    starts = base + 4 * np.concatenate(([0], np.cumsum(lengths)))

    def placed(one: Planes, number: int) -> Planes:
        return replace(one, address=int(starts[number]) + 4 * one.origin)

    values = [placed(one, number) for one, number in zip(made.planes, made.slots, strict=True)]
    rooms = [
        [placed(one, number) for one, number in zip(scratch, numbers, strict=True)]
        for scratch, numbers in zip(made.scratch, made.rooms, strict=True)
    ]
    return values, rooms
