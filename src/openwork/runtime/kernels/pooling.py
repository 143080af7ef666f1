"""Pools over planes: the largest or the mean of a window, and the mean of whole planes.

A window is reduced from top to bottom first, then from left to right, in every vector width in the same order. The mean
reads the zeros of the border as they are; for the largest they do not count: rows outside are replaced by the nearest
row inside, which is in the window too, and columns outside by minus infinity.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from openwork.errors import ModelError
from openwork.runtime.kernels import jit
from openwork.runtime.kernels.emit import Emitter
from openwork.runtime.kernels.launch import Call
from openwork.runtime.kernels.planes import LINE, Planes
from openwork.runtime.kernels.target import Target

Kind = Literal["max", "mean"]
WORDS = (
    "x", "x_plane", "x_row", "y", "y_plane", "y_row", "planes", "per", "height", "width", "rows", "columns", "gap", "high",
    "stride", "top", "left",
)  # fmt: skip
"""The slots of a pool, strides in bytes; after them float32: pixels that count by column, then by row of the output.

x, y: the first pixel; planes: batch * channels, `per` of them a unit; height, width: of the source; rows, columns, gap:
of the output; high, stride: rows of a window and from a window to the next; top, left: of the border.
"""
MEAN = ("x", "x_plane", "y", "y_plane", "planes", "per", "lines", "pixels", "gap")
"""The slots of `mean`: as above; lines: cache lines of a plane; pixels: height * width."""
_WORK = 4096
_UNROLLED = 8
_CHAINS = 4
"""Lines that are summed side by side, for an addition waits for the one before."""


def pool(
    target: Target, source: Planes, out: Planes, *, kind: Kind, kernel: tuple[int, int], stride: tuple[int, int],
    padding: tuple[int, int] = (0, 0), counts_padding: bool = True,
) -> list[Call]:  # fmt: skip
    """Return the stage out = the largest or the mean of each window of the source.

    The gaps between the rows of `out` are written as zero. A NaN in a window is the result of the window.

    Args:
        target: what to compile for.
        source: the input; its `pad` must hold the border.
        out: the output, of the size that kernel, stride and padding give.
        kind: max or mean.
        kernel, stride, padding: of rows and of columns; the padding at most half the kernel, as in torch.
        counts_padding: whether the border counts in the divisor of a mean.

    Raises:
        ModelError: if the sizes do not fit each other or the source has too few zeros between rows.
    """
    _check(source, out, kernel, stride, padding)
    planes = out.batch * out.channels
    if 0 in (planes, out.height, out.width):
        return []
    per = max(1, _WORK // (out.height * out.width))
    values = {
        "x": source.address, "x_plane": 4 * source.plane, "x_row": 4 * source.pitch, "y": out.address,
        "y_plane": 4 * out.plane, "y_row": 4 * out.pitch, "planes": planes, "per": per, "height": source.height,
        "width": source.width, "rows": out.height, "columns": out.width, "gap": out.pad, "high": kernel[0],
        "stride": stride[0], "top": padding[0], "left": padding[1],
    }  # fmt: skip
    counts = [
        np.full(count, size, np.float32) if counts_padding else _counted(count, size, step, border, length)
        for count, size, step, border, length in (
            (out.width, kernel[1], stride[1], padding[1], source.width),
            (out.height, kernel[0], stride[0], padding[0], source.height),
        )
    ]
    tail = np.concatenate([*counts, np.zeros((out.width + out.height) % 2, np.float32)])
    slots = np.concatenate((np.array([values[word] for word in WORDS], np.int64), tail.view(np.int64)))
    rows = kernel[0] if kernel[0] <= _UNROLLED else 0
    bordered = kind == "max" and padding[1] > 0
    name = f"openwork_pool_{kind}_k{rows}x{kernel[1]}_s{stride[1]}{'_b' if bordered else ''}_{target.name}"
    where = jit.address(name, target, functools.partial(_build, name, target, kind, rows, kernel[1], stride[1], bordered))
    return [Call(where, slots, -(-planes // per))]


def mean(target: Target, source: Planes, out: Planes | int) -> list[Call]:
    """Return the stage out[b, c] = the mean of source[b, c].

    Args:
        target: what to compile for.
        source: planes with pixels.
        out: planes of one pixel, or the address of float32 (batch, channels).

    Raises:
        ModelError: if the output is not one pixel for each channel of each image, or the source has no pixels.
    """
    if not isinstance(out, int) and (out.batch, out.channels, out.height, out.width) != (
        source.batch,
        source.channels,
        1,
        1,
    ):
        raise ModelError(f"the means of {source} cannot go to {out}: give one pixel for each channel of each image")
    if not source.height or not source.width:
        raise ModelError(f"planes of {source.height} x {source.width} pixels have no mean: give planes with pixels")
    planes = source.batch * source.channels
    per = max(1, _WORK // source.columns)
    address, plane, gap = (out, 4, 0) if isinstance(out, int) else (out.address, 4 * out.plane, out.pad)
    lines = -(-source.columns // LINE)
    pixels = source.height * source.width
    slots = np.array([source.address, 4 * source.plane, address, plane, planes, per, lines, pixels, gap], np.int64)
    name = f"openwork_pool_plane_mean_{target.name}"
    return [Call(jit.address(name, target, functools.partial(_build_mean, name, target)), slots, -(-planes // per))]


def _check(source: Planes, out: Planes, kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]) -> None:
    if (
        min(kernel) < 1
        or min(stride) < 1
        or max(stride) > LINE
        or any(not 0 <= 2 * p <= k for p, k in zip(padding, kernel, strict=True))
    ):
        raise ModelError(
            f"a window of {kernel} with stride {stride} and padding {padding}: give a size of at least 1, a stride of 1 to "
            f"{LINE} and a padding of at most half the size"
        )
    lengths = zip((source.height, source.width), kernel, stride, padding, strict=True)
    sizes = tuple(max(0, (length + 2 * border - size) // step + 1) for length, size, step, border in lengths)
    wanted = (source.batch, source.channels, *sizes)
    if (out.batch, out.channels, out.height, out.width) != wanted:
        raise ModelError(f"the output {out} of a pool should be {wanted} large: give it that size")
    if source.pad < max(padding):
        raise ModelError(
            f"the source has {source.pad} zeros between rows and a padding of {max(padding)} reaches further: "
            f"lay it out with a pad of at least {max(padding)}"
        )


def _counted(count: int, size: int, step: int, border: int, length: int) -> Any:
    """Return how many pixels of the image each of `count` windows holds along one axis."""
    starts = np.arange(count) * step - border
    return (np.minimum(starts + size, length) - np.maximum(starts, 0)).astype(np.float32)


def _build(name: str, target: Target, kind: Kind, rows: int, wide: int, step: int, bordered: bool) -> str:
    """Return the kernel; `rows` is 0 where a window has too many rows to write them all out."""
    e = Emitter(name, target)
    b = e.b
    slot = {word: e.pointer(k) if word in ("x", "y") else e.slot(k) for k, word in enumerate(WORDS)}
    across = e.item(e.slots, e.int(len(WORDS)), e.i64)
    down = e.item(across, slot["columns"], e.f32)
    first = b.mul(e.unit, slot["per"])
    with (
        e.loop(first, _least(e, b.add(first, slot["per"]), slot["planes"])) as plane,
        e.loop(e.int(0), slot["rows"]) as row,
    ):
        into = e.at(slot["y"], b.add(b.mul(plane, slot["y_plane"]), b.mul(row, slot["y_row"])))
        start = b.sub(b.mul(row, slot["stride"]), slot["top"])
        window = _Window(kind, e.at(slot["x"], b.mul(plane, slot["x_plane"])), start, rows, wide, step, slot)
        high = e.load(e.item(down, row, e.f32), e.f32)
        done: Any = e.int(0)
        for lanes in [lanes for lanes in (16, 8, 4) if lanes <= target.lanes and step <= 4] + [1]:
            enough = b.icmp_signed(">=", b.sub(slot["columns"], done), e.int(lanes))
            stop = b.select(enough, slot["columns"], done)
            with e.loop(done, stop, lanes) as turn:
                column = _least(e, turn, b.sub(slot["columns"], e.int(lanes)))
                value = _across(e, window, b.sub(b.mul(column, e.int(step)), slot["left"]), lanes, bordered)
                if kind == "mean":
                    count = e.load(e.item(across, column, e.f32), e.vector(lanes=lanes))
                    value = b.fdiv(value, b.fmul(count, e.splat(high, lanes)))
                e.store(value, e.item(into, column, e.f32))
            done = stop
        with e.loop(slot["columns"], b.add(slot["columns"], slot["gap"])) as column:
            e.store(e.float(0.0), e.item(into, column, e.f32))
    return e.text()


@dataclass(frozen=True)
class _Window:
    """The windows of one output row: the plane they are in, their first row, what is known of their size."""

    kind: Kind
    plane: Any
    first: Any
    rows: int
    wide: int
    step: int
    slot: dict[str, Any]


def _across(e: Emitter, window: _Window, left: Any, lanes: int, bordered: bool) -> Any:
    """Return the results of `lanes` windows, the first of which begins at column `left`."""
    b, step = e.b, window.step
    lines = _down(e, window, left, lanes)
    taps = []
    for begin in range(0, window.wide, step):
        taps += e.deinterleave(lines[begin : begin + step])
    if bordered:
        kind = e.vector(e.i32, lanes)
        start, width = (e.splat(b.trunc(value, e.i32), lanes) for value in (left, window.slot["width"]))
        for tap, value in enumerate(taps):
            columns = b.add(start, e.ir.Constant(kind, [e.ir.Constant(e.i32, step * i + tap) for i in range(lanes)]))
            taps[tap] = b.select(b.icmp_unsigned("<", columns, width), value, e.constant(-math.inf, lanes))
    return _reduced(e, window.kind, taps[: window.wide])


def _down(e: Emitter, window: _Window, left: Any, lanes: int) -> list[Any]:
    """Return the columns that the windows hold, each reduced from top to bottom, as they lie in memory."""
    b, step = e.b, window.step
    offsets = [begin + k * lanes for begin in range(0, window.wide, step) for k in range(step)]

    def read(number: Any) -> list[Any]:
        at = b.add(window.first, number)
        if window.kind == "max":
            at = _least(e, b.select(b.icmp_signed(">", at, e.int(0)), at, e.int(0)), b.sub(window.slot["height"], e.int(1)))
        line = e.item(e.at(window.plane, b.mul(at, window.slot["x_row"])), left, e.f32)
        return [e.load(e.item(line, e.int(offset), e.f32), e.vector(lanes=lanes)) for offset in offsets]

    if window.rows:
        rows = [read(e.int(number)) for number in range(window.rows)]
        return [_reduced(e, window.kind, column) for column in zip(*rows, strict=True)]
    with e.loop_carrying(e.int(1), window.slot["high"], read(e.int(0))) as (number, held, give):
        give([_reduced(e, window.kind, pair) for pair in zip(held, read(number), strict=True)])
    return list(e.carried)


def _reduced(e: Emitter, kind: Kind, values: Sequence[Any]) -> Any:
    """Return the sum, or the largest value: NaN where any is. A comparison sees whether either of two is NaN."""
    b = e.b
    if kind == "mean":
        return functools.reduce(b.fadd, values)
    if len(values) == 1:
        return values[0]
    largest = functools.reduce(lambda most, value: b.select(b.fcmp_ordered(">", value, most), value, most), values)
    pairs = itertools.zip_longest(values[::2], values[1::2], fillvalue=values[-1])
    failed = functools.reduce(b.or_, [b.fcmp_unordered("uno", one, two) for one, two in pairs])
    return b.select(failed, e.constant(math.nan, largest.type.count), largest)


def _build_mean(name: str, target: Target) -> str:
    e = Emitter(name, target)
    b = e.b
    slot = {word: e.pointer(k) if word in ("x", "y") else e.slot(k) for k, word in enumerate(MEAN)}
    pixels = b.sitofp(slot["pixels"], e.f32)
    first = b.mul(e.unit, slot["per"])
    with e.loop(first, _least(e, b.add(first, slot["per"]), slot["planes"])) as plane:
        source = e.at(slot["x"], b.mul(plane, slot["x_plane"]))
        zeros, parts = [e.constant(0.0)] * (_CHAINS * LINE // e.lanes), LINE // e.lanes
        whole = b.sub(slot["lines"], b.srem(slot["lines"], e.int(_CHAINS)))
        total = _added(e, source, e.int(0), whole, zeros)
        total = [*_added(e, source, whole, slot["lines"], total[:parts]), *total[parts:]]
        while len(total) > 1:
            total = [b.fadd(one, two) for one, two in zip(total[::2], total[1::2], strict=True)]
        value, lanes = total[0], e.lanes
        while lanes > 1:
            lanes //= 2
            value = b.fadd(e.shuffle(value, value, range(lanes)), e.shuffle(value, value, range(lanes, 2 * lanes)))
        value = b.fdiv(b.extract_element(value, e.ir.Constant(e.i32, 0)), pixels)
        into = e.at(slot["y"], b.mul(plane, slot["y_plane"]))
        e.store(value, into)
        with e.loop(e.int(1), b.add(slot["gap"], e.int(1))) as column:
            e.store(e.float(0.0), e.item(into, column, e.f32))
    return e.text()


def _added(e: Emitter, plane: Any, start: Any, stop: Any, sums: list[Any]) -> list[Any]:
    """Return the sums plus what lies in the lines from `start` to `stop`, as many lines a turn as there are sums."""
    with e.loop_carrying(start, stop, sums, len(sums) * e.lanes // LINE) as (line, held, give):
        place = e.item(plane, e.b.mul(line, e.int(LINE)), e.f32)
        parts = [e.load(e.item(place, e.int(k * e.lanes), e.f32), e.vector()) for k in range(len(sums))]
        give([e.b.fadd(one, part) for one, part in zip(held, parts, strict=True)])
    return list(e.carried)


def _least(e: Emitter, one: Any, two: Any) -> Any:
    return e.b.select(e.b.icmp_signed("<", one, two), one, two)
