"""Choosing how each product of an island is run, by running it: rows of a group, vectors of a tile, columns of a part."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from openwork.runtime.graph.compile import Plot, place
from openwork.runtime.graph.ops import Conv, Op, Setting, Way, reasonable_part, spread
from openwork.runtime.kernels.launch import Program
from openwork.runtime.kernels.planes import Planes
from openwork.runtime.kernels.target import Target
from openwork.runtime.timing import interleave


@dataclass(frozen=True)
class Timed:
    """What one operation of an island takes.

    Attributes:
        name: of the operation.
        layer: the layer whose weight it holds, empty if none.
        ms: milliseconds of one run.
        way: how a product is run.
    """

    name: str
    layer: str
    ms: float
    way: Way | None = None


def profile(made: Plot, target: Target, threads: int, *, repeats: int = 5) -> list[Timed]:
    """Return what every operation takes, each run by itself on zeros, in turn with the others."""
    keep: list[Any] = []
    s = Setting(target, threads, keep, made.arranged, made.ways)
    programs = {n: Program(op.stages(s, ins, out, own), target) for n, op, ins, out, own in _placed(made, keep)}
    calls = {str(n): (lambda one=program: one.run(threads)) for n, program in programs.items()}
    times = interleave(calls, repeats=repeats)
    found = []
    for n, op in enumerate(made.chain.ops):
        way = made.way(n, target) if isinstance(op, Conv) else None
        found.append(Timed(op.name, getattr(op, "layer", ""), 1e3 * times[str(n)], way))
    return found


def tune(made: Plot, target: Target, threads: int, *, seconds: float = 0.15) -> dict[Any, Way]:
    """Return the fastest way found for every product, by `Conv.spot`; `seconds` is the budget of one product.

    Products of the same size and about as many entries are measured once.
    """
    keep: list[Any] = []
    found: dict[Any, Way] = {}
    alike: dict[Any, Way] = {}
    for _, op, ins, out, scratch in _placed(made, keep):
        if not isinstance(op, Conv):
            continue
        kind = (
            op.weight.shape,
            op.geometry,
            round(20 * np.log(1 + np.count_nonzero(op.weight))),
            _size(out),
            len(ins),
            op.tail.act,
        )
        if kind not in alike:
            alike[kind] = _fastest(made, op, ins, out, scratch, target, threads, seconds)
        found[op.spot(out)] = alike[kind]
    return found


def _fastest(
    made: Plot, op: Conv, ins: Sequence[Planes], out: Planes, scratch: Sequence[Planes], target: Target, threads: int,
    seconds: float,
) -> Way:  # fmt: skip
    ways = list(dict.fromkeys(_ways(op, out, target)))
    calls = {}
    for i, way in enumerate(ways):
        own: dict[Any, Any] = {}
        keep: list[Any] = []
        stages = op.stages(Setting(target, threads, keep, own, {op.spot(out): way}), ins, out, scratch)
        program = Program(stages[-1:], target)  # what comes before is the same for all
        calls[str(i)] = lambda program=program, keep=keep, own=own: program.run(threads)
    times = interleave(calls, repeats=7, seconds=seconds)
    return ways[int(min(times, key=lambda key: times[key]))]


def _ways(op: Conv, out: Planes, target: Target) -> Iterator[Way]:
    total = -(-out.columns // target.lanes)
    for block in op.blocks():
        best = spread(total, target, block)
        for vectors in dict.fromkeys((best, *(spread(total, target, block, most) for most in (4, 7, 10)))):
            if block * vectors > target.registers - 2 and vectors != best:
                continue
            part = reasonable_part(vectors, target, block, op.weight)
            yield Way(block, vectors, part)
            if vectors == best:
                yield Way(block, vectors, max(1, part // 2))
                yield Way(block, vectors, op.weight.shape[1])


def _size(planes: Planes) -> tuple[int, ...]:
    return planes.batch, planes.channels, planes.height, planes.width, planes.pad


def _placed(made: Plot, keep: list[Any]) -> Iterator[tuple[int, Op, list[Planes], Planes, list[Planes]]]:
    """Yield every operation with its planes in memory."""
    values, rooms = place(made, keep)
    for n, op in enumerate(made.chain.ops):
        yield n, op, [values[i] for i in op.inputs], values[made.chain.inputs + n], rooms[n]
