"""Copies between layouts: tensors of any strides, planes, the phases of a strided convolution, panels of tokens.

A convolution of stride s reads every s-th pixel of every s-th row. Split by phase, pixel (s y + a, s x + b) of channel c
becomes pixel (y, x) of plane (c, a, b), and the convolution becomes one of stride 1 over s * s times the channels.

Two kernels do all of it, bit for bit. `rows` copies runs of pixels, taking apart what is interleaved in them: the phases
of a row, or the channels of a pixel where there are few. `turn` transposes blocks in registers: channels that are next
to each other in memory become planes, tokens become panels, and back. Where neither axis is contiguous `turn` copies
number by number.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from openwork.errors import ModelError
from openwork.runtime.kernels import jit
from openwork.runtime.kernels.emit import Emitter
from openwork.runtime.kernels.launch import Call
from openwork.runtime.kernels.planes import Planes
from openwork.runtime.kernels.target import Target

ROWS = (
    "x", "x_image", "x_channel", "x_row", "y", "y_image", "y_channel", "y_row", "height", "width", "whole", "rows",
    "columns", "fill", "channels", "per", "blocks", "run", "runs",
)  # fmt: skip
"""The slots of `rows`; strides are in bytes.

height, width: of the source; whole: pixels of a row that all phases have; rows, columns: of the output; fill: columns
written, with zeros after the pixels; channels: runs of a row (channels, or 1 where a pixel holds them all); per: of them
in a unit, blocks: units of an image; run: output rows of a unit, runs: units of a channel.
"""
TURN = (
    "x", "x_image", "x_row", "x_phase", "x_i", "x_j", "y", "y_image", "y_row", "y_phase", "y_i", "y_j", "rows", "stride",
    "height", "reach", "less", "most", "reach_j", "less_j", "most_j", "fill", "cuts", "cut", "cuts_j", "cut_j",
)  # fmt: skip
"""The slots of `turn`: y[j, i] = x[i, j] for each image, row and phase; strides are in bytes.

x_j and y_i are one float, unless `single`. There are (reach - less * row - b) / stride of i, rounded up, at most `most`,
and as many of j as the same with their own; zeros follow the i up to `fill`. They are cut into `cuts` runs of `cut`.
"""
_WORK = 4096
_INTERLEAVED = 12


@dataclass(frozen=True)
class Images:
    """Where a float32 tensor (batch, channels, height, width) lies.

    Attributes:
        address: of its first number.
        batch, channels, height, width: sizes.
        strides: floats from an image, a channel, a row, a pixel to the next.
    """

    address: int
    batch: int
    channels: int
    height: int
    width: int
    strides: tuple[int, int, int, int]

    @staticmethod
    def of(planes: Planes) -> Images:
        """Return the pixels of planes."""
        strides = (planes.image, planes.plane, planes.pitch, 1)
        return Images(planes.address, planes.batch, planes.channels, planes.height, planes.width, strides)


def split(target: Target, source: Images | Planes, out: Planes, stride: int = 1) -> list[Call]:
    """Return the stage that copies images to planes, phase by phase: a plain copy for stride 1.

    Plane (c * stride + a) * stride + b of `out` gets the pixels (stride * y + a, stride * x + b) of channel c; pixels
    that the source does not have and the gaps between rows are written as zero. What does not fit `out` is left out, so
    it must be as large as the taps reach: ceil(size / stride) holds all.

    Args:
        target: what to compile for.
        source: the images, of any strides.
        out: the planes, with stride * stride times the channels; must not overlap the source.
        stride: of rows and columns.

    Raises:
        ModelError: if the numbers of images or channels do not fit each other.
    """
    source = Images.of(source) if isinstance(source, Planes) else source
    if stride < 1 or (out.batch, out.channels) != (source.batch, source.channels * stride * stride):
        raise ModelError(
            f"{source.batch} images of {source.channels} channels in phases of stride {stride} need {source.batch} images "
            f"of {source.channels * stride * stride} planes and not {out.batch} of {out.channels}: lay the output out so"
        )
    return _copy(target, source, Images.of(out), stride, out.pitch)


def merge(target: Target, source: Planes, out: Images) -> list[Call]:
    """Return the stage that copies planes to a tensor of any strides (no two of its entries at one place).

    Raises:
        ModelError: if the sizes are not the same.
    """
    sizes = [(one.batch, one.channels, one.height, one.width) for one in (source, out)]
    if sizes[0] != sizes[1]:
        raise ModelError(f"planes of {sizes[0]} cannot be copied to a tensor of {sizes[1]}: give it the same sizes")
    return _copy(target, Images.of(source), out, 1, out.width)


def pack_tokens(target: Target, x: int, stride: int, tokens: int, features: int, panels: int, wide: int) -> list[Call]:
    """Return the stage that copies rows of tokens to panels: panels[tile, f, n] = x[tile * wide + n, f].

    Args:
        target: what to compile for.
        x: address of float32 (tokens, features).
        stride: floats from a token to the next; a token's features are next to each other.
        tokens, features: sizes.
        panels: address of float32 (ceil(tokens / wide), features, wide); what follows the last token is written as zero.
        wide: tokens of a panel, vectors * lanes.
    """
    cuts = max(1, features // 64)
    values = {
        "x": x, "x_row": 4 * wide * stride, "x_i": 4 * stride, "x_j": 4, "y": panels, "y_row": 4 * wide * features,
        "y_i": 4, "y_j": 4 * wide, "rows": -(-tokens // wide), "reach": tokens, "less": wide, "most": wide,
        "reach_j": features, "most_j": features, "fill": wide, "cuts_j": cuts, "cut_j": features // cuts,
    }  # fmt: skip
    return _turn(target, values, 1, single=False)


def unpack_tokens(target: Target, panels: int, tokens: int, rows: int, out: int, stride: int, wide: int) -> list[Call]:
    """Return the stage that copies panels back to tokens: out[tile * wide + n, r] = panels[tile, r, n].

    Args:
        target: what to compile for.
        panels: address of float32 (ceil(tokens / wide), rows, wide).
        tokens, rows: sizes of the output.
        out: address of float32 (tokens, rows); nothing else is written.
        stride: floats from a token of `out` to the next.
        wide: tokens of a panel, vectors * lanes.
    """
    cuts = max(1, rows // 64)
    values = {
        "x": panels, "x_row": 4 * wide * rows, "x_i": 4 * wide, "x_j": 4, "y": out, "y_row": 4 * wide * stride, "y_i": 4,
        "y_j": 4 * stride, "rows": -(-tokens // wide), "reach": rows, "most": rows, "reach_j": tokens, "less_j": wide,
        "most_j": wide, "cuts": cuts, "cut": rows // cuts,
    }  # fmt: skip
    return _turn(target, values, 1, single=False)


def _copy(target: Target, source: Images, out: Images, stride: int, fill: int) -> list[Call]:
    """Return the copy of images to planes (`fill` their pitch), or of planes to images (`fill` their width)."""
    if 0 in (source.batch, source.channels, out.height, out.width):
        return []
    if 0 in (source.height, source.width):
        raise ModelError(f"images of {source.height} x {source.width} pixels have no phases: give images that have pixels")
    narrow = out.width == source.width == fill and out.width <= 64 and source.height == out.height
    if stride == 1 and narrow and all(one.strides[2] == one.width * one.strides[3] for one in (source, out)):
        source, out, fill = _flattened(source), _flattened(out), fill * out.height
    few = source.channels * stride <= _INTERLEAVED and source.strides[1] == 1 and source.strides[3] == source.channels
    if out.strides[3] == 1 and stride <= 4 and (source.strides[3] == 1 or few):
        return _rows(target, source, out, stride, fill, 1 if source.strides[3] == 1 else source.channels)
    return _blocks(target, source, out, stride, fill)


def _flattened(images: Images) -> Images:
    """Return images whose rows follow one another without a gap as images of one row."""
    count = images.height * images.width
    batch, channel, _, pixel = images.strides
    return Images(images.address, images.batch, images.channels, 1, count, (batch, channel, count * pixel, pixel))


def _rows(target: Target, source: Images, out: Images, stride: int, fill: int, group: int) -> list[Call]:
    channels = source.channels // group
    work = out.height * out.width * stride * stride * group
    per = max(1, min(channels, _WORK // work))
    run = max(1, min(out.height, _WORK * out.height // work))
    blocks, runs = -(-channels // per), -(-out.height // run)
    values = {
        "x": source.address, "x_image": 4 * source.strides[0], "x_channel": 4 * source.strides[1],
        "x_row": 4 * source.strides[2], "y": out.address, "y_image": 4 * out.strides[0], "y_channel": 4 * out.strides[1],
        "y_row": 4 * out.strides[2], "height": source.height, "width": source.width,
        "whole": min(source.width // stride, out.width), "rows": out.height, "columns": out.width, "fill": fill,
        "channels": channels, "per": per, "blocks": blocks, "run": run, "runs": runs,
    }  # fmt: skip
    name = f"openwork_layout_rows_s{stride}_g{group}_{target.name}"
    where = jit.address(name, target, functools.partial(_build_rows, name, target, stride, group))
    return [Call(where, np.array([values[word] for word in ROWS], np.int64), source.batch * blocks * runs)]


def _blocks(target: Target, source: Images, out: Images, stride: int, fill: int) -> list[Call]:
    (x_image, x_channel, x_row, x_pixel), (y_image, y_channel, y_row, y_pixel) = source.strides, out.strides
    values = {
        "x": source.address, "x_image": 4 * x_image, "x_row": 4 * x_row, "x_phase": 4 * x_pixel, "y": out.address,
        "y_image": 4 * y_image, "y_row": 4 * y_row, "y_phase": 4 * y_channel, "rows": out.height, "stride": stride,
        "height": source.height,
    }  # fmt: skip
    cuts = max(1, source.channels // 64)
    pixels = {"reach": source.width, "most": out.width}
    channels = {"reach": source.channels, "most": source.channels}
    if y_pixel == 1:  # pixels are i, which zeros may follow
        values |= {"x_i": 4 * stride * x_pixel, "x_j": 4 * x_channel, "y_i": 4, "y_j": 4 * stride * stride * y_channel}
        values |= pixels | {f"{word}_j": value for word, value in channels.items()}
        values |= {"fill": fill, "cuts_j": cuts, "cut_j": source.channels // cuts}
        single = x_channel != 1 and source.channels > 1
    else:
        values |= {"x_i": 4 * x_channel, "x_j": 4 * x_pixel, "y_i": 4 * y_channel, "y_j": 4 * y_pixel}
        values |= channels | {f"{word}_j": value for word, value in pixels.items()}
        values |= {"cuts": cuts, "cut": source.channels // cuts}
        single = (x_pixel != 1 and source.width > 1) or (y_channel != 1 and source.channels > 1)
    return _turn(target, values, source.batch, single=single)


def _turn(target: Target, values: dict[str, int], images: int, *, single: bool) -> list[Call]:
    values = {"height": values["rows"], "stride": 1, "cuts": 1, "cuts_j": 1} | values
    name = f"openwork_layout_turn{'_single' if single else ''}_{target.name}"
    where = jit.address(name, target, functools.partial(_build_turn, name, target, single))
    units = images * values["rows"] * values["stride"] ** 2 * values["cuts"] * values["cuts_j"]
    if not values["most"] or not values["most_j"]:
        return []
    return [Call(where, np.array([values.get(word, 0) for word in TURN], np.int64), units)]


def _build_rows(name: str, target: Target, stride: int, group: int) -> str:
    e = Emitter(name, target)
    b, count = e.b, stride * group
    slot = _read(e, ROWS)
    run, rest = b.srem(e.unit, slot["runs"]), b.sdiv(e.unit, slot["runs"])
    block, image = b.srem(rest, slot["blocks"]), b.sdiv(rest, slot["blocks"])
    x, y = (e.at(slot[word], b.mul(image, slot[f"{word}_image"])) for word in "xy")
    first, top = b.mul(block, slot["per"]), b.mul(run, slot["run"])
    with (
        e.loop(first, _least(e, b.add(first, slot["per"]), slot["channels"])) as channel,
        e.loop(top, _least(e, b.add(top, slot["run"]), slot["rows"])) as row,
        e.loop(e.int(0), e.int(stride)) as phase,
    ):
        line = b.add(b.mul(row, e.int(stride)), phase)
        there = b.icmp_signed("<", line, slot["height"])
        line, whole, width = (b.select(there, value, e.int(0)) for value in (line, slot["whole"], slot["width"]))
        source = e.at(x, b.add(b.mul(channel, slot["x_channel"]), b.mul(line, slot["x_row"])))
        plane = b.add(b.mul(channel, e.int(group * stride * stride)), b.mul(phase, e.int(stride)))
        into = e.at(y, b.add(b.mul(plane, slot["y_channel"]), b.mul(row, slot["y_row"])))
        offsets = [c * stride * stride + k for k in range(stride) for c in range(group)]
        places = [e.at(into, b.mul(slot["y_channel"], e.int(offset))) for offset in offsets]
        done = e.int(0)
        for lanes in _levels(target):
            ready = b.and_(b.icmp_signed("==", done, e.int(0)), b.icmp_signed(">=", whole, e.int(lanes)))
            now = b.select(ready, whole, e.int(0))
            with _covering(e, e.int(0), now, lanes) as column:
                start = e.item(source, b.mul(column, e.int(count)), e.f32)
                parts = [e.load(e.item(start, e.int(k * lanes), e.f32), e.vector(lanes=lanes)) for k in range(count)]
                for place, part in zip(places, e.deinterleave(parts), strict=True):
                    e.store(part, e.item(place, column, e.f32))
            done = b.add(done, now)
        with e.loop(done, slot["fill"]) as column:
            inside = b.icmp_signed("<", column, slot["columns"])
            for k, place in enumerate(places):
                pixel = b.add(b.mul(column, e.int(stride)), e.int(k // group))
                real = b.and_(inside, b.icmp_signed("<", pixel, width))
                at = b.select(real, b.add(b.mul(pixel, e.int(group)), e.int(k % group)), e.int(0))
                value = b.select(real, e.load(e.item(source, at, e.f32), e.f32), e.float(0.0))
                e.store(value, e.item(place, column, e.f32))
    return e.text()


def _build_turn(name: str, target: Target, single: bool) -> str:
    e = Emitter(name, target)
    b = e.b
    slot = _read(e, TURN)
    rest, places = e.unit, []
    for word in ("cuts", "cuts_j", "stride", "stride", "rows"):
        places.append(b.srem(rest, slot[word]))
        rest = b.sdiv(rest, slot[word])
    part, part_j, right, down, row = places
    line = b.add(b.mul(row, slot["stride"]), down)
    x_offset = b.add(b.mul(line, slot["x_row"]), b.mul(right, slot["x_phase"]))
    phase = b.add(b.mul(down, slot["stride"]), right)
    y_offset = b.add(b.mul(row, slot["y_row"]), b.mul(phase, slot["y_phase"]))
    x = e.at(slot["x"], b.add(b.mul(rest, slot["x_image"]), x_offset))
    y = e.at(slot["y"], b.add(b.mul(rest, slot["y_image"]), y_offset))
    left, left_j = (b.sub(slot[f"reach{mark}"], b.mul(row, slot[f"less{mark}"])) for mark in ("", "_j"))
    left = b.sub(b.add(left, b.sub(slot["stride"], e.int(1))), right)
    count = _least(e, b.sdiv(_most(e, left, e.int(0)), slot["stride"]), slot["most"])
    count = b.select(b.icmp_signed("<", line, slot["height"]), count, e.int(0))
    count_j = _least(e, _most(e, left_j, e.int(0)), slot["most_j"])
    begin, end = _cut(e, part, slot["cut"], slot["cuts"], count)
    begin_j, end_j = _cut(e, part_j, slot["cut_j"], slot["cuts_j"], count_j)
    long, long_j = b.sub(end, begin), b.sub(end_j, begin_j)
    _zero(e, y, slot["y_j"], begin_j, end_j, end, slot["fill"])
    done = b.icmp_signed("<=", long, e.int(0))
    for lanes in (1,) if single else (*_levels(target), 1):
        enough = b.and_(b.icmp_signed(">=", long, e.int(lanes)), b.icmp_signed(">=", long_j, e.int(lanes)))
        ready = b.and_(b.not_(done), enough)
        stop = b.select(ready, end_j, begin_j)
        with _covering(e, begin_j, stop, lanes) as j, _covering(e, begin, end, lanes) as i:
            source = e.at(x, b.add(b.mul(i, slot["x_i"]), b.mul(j, slot["x_j"])))
            into = e.at(y, b.add(b.mul(i, slot["y_i"]), b.mul(j, slot["y_j"])))
            kind = e.vector(lanes=lanes)
            block = [e.load(e.at(source, b.mul(slot["x_i"], e.int(k))), kind) for k in range(lanes)]
            for k, value in enumerate(e.transpose(block)):
                e.store(value, e.at(into, b.mul(slot["y_j"], e.int(k))))
        done = b.or_(done, ready)
    return e.text()


def _zero(e: Emitter, y: Any, y_j: Any, begin_j: Any, end_j: Any, start: Any, fill: Any) -> None:
    """Write zeros from i = `start` to before `fill`, for every j."""
    b = e.b
    whole = b.sdiv(_most(e, b.sub(fill, start), e.int(0)), e.int(e.lanes))
    middle = b.add(start, b.mul(whole, e.int(e.lanes)))
    with e.loop(begin_j, end_j) as j:
        place = e.at(y, b.mul(j, y_j))
        with e.loop(start, middle, e.lanes) as i:
            e.store(e.constant(0.0), e.item(place, i, e.f32))
        with e.loop(middle, fill) as i:
            e.store(e.float(0.0), e.item(place, i, e.f32))


def _cut(e: Emitter, part: Any, cut: Any, cuts: Any, count: Any) -> tuple[Any, Any]:
    """Return begin and end of one of `cuts` runs of `cut`; the last one has what is left."""
    last = e.b.icmp_signed("==", e.b.add(part, e.int(1)), cuts)
    begin = e.b.mul(part, cut)
    return begin, e.b.select(last, count, _least(e, e.b.add(begin, cut), count))


def _levels(target: Target) -> list[int]:
    """Return the lanes of the vectors to try, the widest first: what is shorter than one may fill another."""
    return [lanes for lanes in (16, 8, 4) if lanes <= target.lanes]


@contextmanager
def _covering(e: Emitter, start: Any, stop: Any, lanes: int) -> Iterator[Any]:
    """Run the block for the first of each `lanes` numbers from `start` to `stop`; the last ones begin further left."""
    with e.loop(start, stop, lanes) as step:
        yield _least(e, step, e.b.sub(stop, e.int(lanes)))


def _read(e: Emitter, words: Sequence[str]) -> dict[str, Any]:
    return {word: e.pointer(i) if word in ("x", "y") else e.slot(i) for i, word in enumerate(words)}


def _least(e: Emitter, one: Any, two: Any) -> Any:
    return e.b.select(e.b.icmp_signed("<", one, two), one, two)


def _most(e: Emitter, one: Any, two: Any) -> Any:
    return e.b.select(e.b.icmp_signed(">", one, two), one, two)
