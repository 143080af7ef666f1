"""Depthwise convolution over planes, bias and activation included: each channel with its own k x k weights.

A unit is a block of channels of one image. Strips of R output rows are computed together, a vector of columns of each
at a time: a row of the source is loaded once for all the output rows that need it, the R sums stay in registers, and
the zeros between the rows of a plane stand for the border, so no pixel is a special case.

The sum of a pixel is bias, then taps column by column and from top to bottom, whatever the strips and vectors.

Several output rows at once after Elsen, Dukhan, Gale, Simonyan, "Fast Sparse ConvNets", CVPR 2020, section 3.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import numpy as np

from openwork.errors import ModelError
from openwork.runtime.kernels import jit
from openwork.runtime.kernels.activations import Act, apply
from openwork.runtime.kernels.emit import Emitter
from openwork.runtime.kernels.launch import Call
from openwork.runtime.kernels.planes import Planes
from openwork.runtime.kernels.target import Target

WORDS = (
    "x", "x_image", "x_plane", "x_row", "y", "y_image", "y_plane", "y_row", "weights", "bias", "limits", "channels",
    "block", "blocks", "height", "width", "gap",
)  # fmt: skip
"""The slots. x: address of the first tap of the first pixel; y: of the first pixel; strides are in bytes.

weights (channels, k * k), bias (channels) float32; limits: two float32 for `clamp`; block: channels of a unit, blocks:
units of an image; height, width, gap: of the output, the gap in floats.
"""
LARGEST = 7
"""The widest kernel."""
STRIPS = (1, 2, 3, 4, 7, 8, 14)
"""Output rows that a strip may have: few, for each is a kernel of its own."""
_WORK = 4096


def calls(
    target: Target, source: Planes, out: Planes, weights: int, bias: int, kernel: int, stride: int = 1, padding: int = 0,
    act: Act = "none", limits: int = 0,
) -> list[Call]:  # fmt: skip
    """Return the stage out[c] = act(bias[c] + weights[c] * source[c]) (a correlation, as in `torch.conv2d`).

    The gaps between the rows of `out` are written as zero. The border is multiplied like any pixel (an infinite weight
    makes NaN of it, as in torch); a NaN or infinity reaches the pixels whose window holds it and no other.

    Args:
        target: what to compile for.
        source: the input; its `pad` must hold the border that the taps reach.
        out: the output, of the size that kernel, stride and padding give.
        weights: address of float32 (channels, kernel, kernel).
        bias: address of float32 (channels).
        kernel: 1 to 7.
        stride: of rows and columns; 1 and 2 are the fast ones.
        padding: zeros around the image, at most `kernel - 1`.
        act, limits: what follows the sum, and the address of the two bounds of `clamp`.

    Raises:
        ModelError: if the sizes do not fit each other or the source has too few zeros between rows.
    """
    _check(source, out, kernel, stride, padding)
    if 0 in (out.batch, out.channels, out.height, out.width):
        return []
    lanes, masked = _lanes(target, source, out, kernel, stride, padding)
    rows = _rows(target, out.height, kernel, stride)
    block = max(1, min(_WORK // (out.height * out.width), -(-out.batch * out.channels // 32)))
    blocks = -(-out.channels // block)
    values = {
        "x": source.address - 4 * padding * (source.pitch + 1), "x_image": 4 * source.image, "x_plane": 4 * source.plane,
        "x_row": 4 * source.pitch, "y": out.address, "y_image": 4 * out.image, "y_plane": 4 * out.plane,
        "y_row": 4 * out.pitch, "weights": weights, "bias": bias, "limits": limits, "channels": out.channels,
        "block": block, "blocks": blocks, "height": out.height, "width": out.width, "gap": out.pad,
    }  # fmt: skip
    where = address(target, kernel, stride, rows, lanes, act, masked=masked)
    return [Call(where, np.array([values[word] for word in WORDS], np.int64), out.batch * blocks)]


def address(
    target: Target, kernel: int, stride: int, rows: int, lanes: int, act: Act = "none", *, masked: bool = False
) -> int:
    """Return the address of the kernel.

    Args:
        target: what to compile for.
        kernel, stride: sizes.
        rows: output rows of a strip; at most the height.
        lanes: columns of a vector; at most the width, unless `masked`.
        act: what follows the sum.
        masked: the last vector of a row is stored in part; else it begins further left and repeats some columns.
    """
    name = f"openwork_depthwise_k{kernel}_s{stride}_r{rows}_l{lanes}{'m' if masked else ''}_{act}_{target.name}"
    return jit.address(name, target, functools.partial(_build, name, target, kernel, stride, rows, lanes, act, masked))


def _check(source: Planes, out: Planes, kernel: int, stride: int, padding: int) -> None:
    if not 1 <= kernel <= LARGEST or stride < 1 or not 0 <= padding < kernel:
        raise ModelError(
            f"a depthwise kernel of size {kernel}, stride {stride}, padding {padding}: give a size of 1 to {LARGEST}, "
            "a stride of at least 1 and a padding below the size"
        )
    sizes = tuple(max(0, (size + 2 * padding - kernel) // stride + 1) for size in (source.height, source.width))
    wanted = (source.batch, source.channels, *sizes)
    if (out.batch, out.channels, out.height, out.width) != wanted:
        raise ModelError(f"the output {out} of a depthwise convolution should be {wanted} large: give it that size")
    if source.pad < padding:
        raise ModelError(
            f"the source has {source.pad} zeros between rows and a padding of {padding} reaches further: "
            f"lay it out with a pad of at least {padding}"
        )


def _lanes(target: Target, source: Planes, out: Planes, kernel: int, stride: int, padding: int) -> tuple[int, bool]:
    """Return the columns of a vector, and whether the last one of a row is masked.

    Masks cost nothing where the processor has mask registers. There the last vector may read past the row: into what
    follows the last pixel of the last plane, which has room for some floats, not for any number.
    """
    if stride > 4:
        return 1, False
    if target.name == "avx512":
        last = (source.height - 1 + padding) * source.pitch + stride * -(-out.width // target.lanes) * target.lanes
        if last + stride * kernel <= source.plane + source.border:
            return target.lanes, True
    return max(lanes for lanes in (1, 2, 4, 8, 16) if lanes <= min(target.lanes, out.width)), False


def _rows(target: Target, height: int, kernel: int, stride: int) -> int:
    """Return the output rows of a strip, at most the height: the fewest loads and multiply-adds, the last strip's included.

    Long strips load less; how long they may be was measured (a strip whose lines do not fit the registers spills them).
    """
    longest = 4 if stride > 1 else 14 if target.registers > 16 or kernel > 3 else 8

    def cost(rows: int) -> int:
        lines = (rows - 1) * stride + kernel
        return -(-height // rows) * (rows * kernel * kernel + 2 * lines * kernel + 24)

    return min((rows for rows in STRIPS if rows <= min(height, longest)), key=cost)


def _build(name: str, target: Target, kernel: int, stride: int, rows: int, lanes: int, act: Act, masked: bool) -> str:
    e = Emitter(name, target)
    b = e.b
    slot = {word: e.slot(place) for place, word in enumerate(WORDS)}
    x, y, weights, bias, limits = (e.pointer(WORDS.index(word)) for word in ("x", "y", "weights", "bias", "limits"))
    image, block = b.sdiv(e.unit, slot["blocks"]), b.srem(e.unit, slot["blocks"])
    first = b.mul(block, slot["block"])
    last = _least(e, b.add(first, slot["block"]), slot["channels"])
    source = e.at(x, b.mul(image, slot["x_image"]))
    result = e.at(y, b.mul(image, slot["y_image"]))
    height, width = slot["height"], slot["width"]
    with e.loop(first, last) as channel:
        plane = e.at(source, b.mul(channel, slot["x_plane"]))
        drawn = e.at(result, b.mul(channel, slot["y_plane"]))
        table = e.item(weights, b.mul(channel, e.int(kernel * kernel)), e.f32)
        start = e.splat(e.load(e.item(bias, channel, e.f32), e.f32), lanes)
        with e.loop(e.int(0), height, rows) as strip:
            row = _least(e, strip, b.sub(height, e.int(rows)))
            top = e.at(plane, b.mul(b.mul(row, e.int(stride)), slot["x_row"]))
            into = [e.at(drawn, b.mul(b.add(row, e.int(r)), slot["y_row"])) for r in range(rows)]
            with e.loop(e.int(0), width, lanes) as step:
                column = step if masked else _least(e, step, b.sub(width, e.int(lanes)))
                corner = e.item(top, b.mul(column, e.int(stride)), e.f32)
                sums = _sums(e, corner, slot["x_row"], table, start, kernel, stride, rows, lanes)
                mask = e.mask(b.sub(width, column), lanes) if masked else None
                for place, value in zip(into, sums, strict=True):
                    value = apply(e, act, value, limits)
                    if masked:
                        e.masked_store(value, e.item(place, column, e.f32), mask)
                    else:
                        e.store(value, e.item(place, column, e.f32))
            for place in into:
                with e.loop(width, b.add(width, slot["gap"])) as column:
                    e.store(e.float(0.0), e.item(place, column, e.f32))
    return e.text()


def _sums(
    e: Emitter, corner: Any, x_row: Any, table: Any, start: Any, kernel: int, stride: int, rows: int, lanes: int
) -> list[Any]:
    """Return the sums of `rows` output rows at `lanes` columns; `corner` is the first tap of the first of them.

    Between two multiply-adds of one sum there are those of all others, so that none waits for the one before.
    """
    sums = [start] * rows
    places = [e.at(corner, e.b.mul(x_row, e.int(line))) for line in range((rows - 1) * stride + kernel)]
    for begin in range(0, kernel, stride):
        count = min(stride, kernel - begin)
        lines = []
        for place in places:
            parts = [e.load(e.item(place, e.int(begin + k * lanes), e.f32), e.vector(lanes=lanes)) for k in range(stride)]
            lines.append(e.deinterleave(parts)[:count])
        for column, down in itertools.product(range(count), range(kernel)):
            tap = e.splat(e.load(e.item(table, e.int(down * kernel + begin + column), e.f32), e.f32), lanes)
            sums = [e.fma(tap, lines[r * stride + down][column], value) for r, value in enumerate(sums)]
    return sums


def _least(e: Emitter, one: Any, two: Any) -> Any:
    return e.b.select(e.b.icmp_signed("<", one, two), one, two)
