"""What is done pixel by pixel on planes: sums, activations, a factor for each channel or each channel of each image.

Planes of one layout are walked as flattened columns, whole cache lines at a time, gaps included. Where the result of a
gap would not be zero (a shift, a bound above zero, infinity times zero) a bit for each column says what is a pixel. The
bits lie behind the slots of the call, so they live as long as it does.
"""

from __future__ import annotations

import functools
from typing import Any, Literal, get_args

import numpy as np

from openwork.errors import ModelError
from openwork.runtime.kernels import jit
from openwork.runtime.kernels.activations import Act, apply, keeps_zero
from openwork.runtime.kernels.emit import Emitter
from openwork.runtime.kernels.launch import Call
from openwork.runtime.kernels.planes import LINE, Planes
from openwork.runtime.kernels.target import Target

Kind = Literal["activate", "add", "affine", "scale"]
KINDS: tuple[Kind, ...] = get_args(Kind)
WORDS = (
    "x", "y", "plane", "planes", "per", "lines", "run", "runs", "channels", "other", "factor", "factor_plane", "limits",
)  # fmt: skip
"""The slots, strides in bytes; after them the bits of a plane's columns.

x, y: the first pixel; plane: from a plane to the next, of all tensors; planes: batch * channels, `per` of them a unit;
lines: cache lines of a plane, `run` of them a unit, `runs` units; other: what `add` adds, or the shifts of `affine`;
factor: the factors of `affine` (channels) or `scale`, there `factor_plane` apart; limits: two float32 for `clamp`.
"""
_WORK = 8192


def activate(target: Target, source: Planes, out: Planes, *, act: Act, limits: int = 0) -> list[Call]:
    """Return the stage out = act(source); `out` may be the source.

    Args:
        target: what to compile for.
        source, out: planes of one layout.
        act, limits: the activation, and the address of the two bounds of `clamp`.

    Raises:
        ModelError: if the layouts differ.
    """
    return _calls(target, "activate", source, out, act, limits)


def add(target: Target, one: Planes, two: Planes, out: Planes, *, act: Act = "none", limits: int = 0) -> list[Call]:
    """Return the stage out = act(one + two); `out` may be one of them.

    Args:
        target: what to compile for.
        one, two, out: planes of one layout.
        act, limits: what follows the sum, and the address of the two bounds of `clamp`.

    Raises:
        ModelError: if the layouts differ.
    """
    _same(one, two)
    return _calls(target, "add", one, out, act, limits, other=two.address)


def affine(
    target: Target, source: Planes, out: Planes, factor: int, shift: int, *, act: Act = "none", limits: int = 0
) -> list[Call]:
    """Return the stage out[c] = act(factor[c] * source[c] + shift[c]), a batch norm; `out` may be the source.

    Args:
        target: what to compile for.
        source, out: planes of one layout.
        factor, shift: addresses of float32 (channels).
        act, limits: what follows, and the address of the two bounds of `clamp`.

    Raises:
        ModelError: if the layouts differ.
    """
    return _calls(target, "affine", source, out, act, limits, other=shift, factor=factor)


def scale(target: Target, source: Planes, factors: Planes, out: Planes, *, act: Act = "none", limits: int = 0) -> list[Call]:
    """Return the stage out[b, c] = act(factors[b, c] * source[b, c]), as in squeeze and excitation.

    Args:
        target: what to compile for.
        source, out: planes of one layout; `out` may be the source.
        factors: planes of one pixel, as many as the source has.
        act, limits: what follows, and the address of the two bounds of `clamp`.

    Raises:
        ModelError: if the layouts differ, or the factors are not one a channel and image.
    """
    if (factors.batch, factors.channels, factors.height, factors.width) != (source.batch, source.channels, 1, 1):
        raise ModelError(f"{factors} cannot scale {source}: give one pixel for each channel of each image")
    return _calls(target, "scale", source, out, act, limits, factor=factors.address, factor_plane=4 * factors.plane)


def _same(one: Planes, two: Planes) -> None:
    layouts = [(planes.batch, planes.channels, planes.height, planes.width, planes.pad) for planes in (one, two)]
    if layouts[0] != layouts[1]:
        raise ModelError(
            f"planes of (batch, channels, height, width, pad) {layouts[0]} and {layouts[1]}: lay them out alike"
        )


def _calls(target: Target, kind: Kind, source: Planes, out: Planes, act: Act, limits: int, **words: int) -> list[Call]:
    _same(source, out)
    planes, lines = source.batch * source.channels, -(-source.columns // LINE)
    if not planes or not source.height or not source.width:
        return []
    whole = source.pad == 0 and source.columns % LINE == 0
    masked = not whole and (kind in ("affine", "scale") or not keeps_zero(act))
    per, run = max(1, _WORK // (lines * LINE)), min(lines, _WORK // LINE)
    runs = -(-lines // run)
    values = {
        "x": source.address, "y": out.address, "plane": 4 * source.plane, "planes": planes, "per": per, "lines": lines,
        "run": run, "runs": runs, "channels": source.channels, "limits": limits,
    } | words  # fmt: skip
    slots = np.array([values.get(word, 0) for word in WORDS], np.int64)
    if masked:
        bits = np.packbits(source.kept().astype(bool), bitorder="little")
        slots = np.concatenate((slots, np.resize(bits, -(-len(bits) // 8) * 8).view(np.int64)))
    name = f"openwork_elementwise_{kind}_{act}{'_m' if masked else ''}_{target.name}"
    where = jit.address(name, target, functools.partial(_build, name, target, kind, act, masked))
    return [Call(where, slots, -(-planes // per) * runs)]


def _build(name: str, target: Target, kind: Kind, act: Act, masked: bool) -> str:
    e = Emitter(name, target)
    b = e.b
    slot = {word: e.slot(place) for place, word in enumerate(WORDS)}
    x, y, other, factor, limits = (e.pointer(WORDS.index(word)) for word in ("x", "y", "other", "factor", "limits"))
    bits = e.item(e.slots, e.int(len(WORDS)), e.i64)
    begin = b.mul(b.srem(e.unit, slot["runs"]), slot["run"])
    end = _least(e, b.add(begin, slot["run"]), slot["lines"])
    first = b.mul(b.sdiv(e.unit, slot["runs"]), slot["per"])
    with e.loop(first, _least(e, b.add(first, slot["per"]), slot["planes"])) as plane:
        offset = b.mul(plane, slot["plane"])
        source, into, added = (e.at(base, offset) for base in (x, y, other))
        times = plus = None
        if kind == "affine":
            channel = b.srem(plane, slot["channels"])
            times, plus = (e.splat(e.load(e.item(base, channel, e.f32), e.f32)) for base in (factor, other))
        if kind == "scale":
            times = e.splat(e.load(e.at(factor, b.mul(plane, slot["factor_plane"])), e.f32))
        with e.loop(begin, end) as line:
            for part in range(LINE // e.lanes):
                column = b.add(b.mul(line, e.int(LINE)), e.int(part * e.lanes))
                value = e.load(e.item(source, column, e.f32), e.vector())
                if kind == "add":
                    value = b.fadd(value, e.load(e.item(added, column, e.f32), e.vector()))
                elif plus is not None:
                    value = e.fma(times, value, plus)
                elif times is not None:
                    value = b.fmul(times, value)
                value = apply(e, act, value, limits)
                if masked:
                    value = b.select(_pixels(e, bits, line, part), value, e.constant(0.0))
                e.store(value, e.item(into, column, e.f32))
    return e.text()


def _pixels(e: Emitter, bits: Any, line: Any, part: int) -> Any:
    """Return which lanes of the `part`-th vector of a line are pixels."""
    b = e.b
    if e.lanes == LINE:
        return b.bitcast(e.load(e.item(bits, line, e.i16), e.i16, 2), e.vector(e.i1))
    byte = b.add(b.mul(line, e.int(2)), e.int(part * e.lanes // 8))
    word = e.load(e.item(bits, byte, e.i8), e.i8, 1)
    if e.lanes < 8:
        word = b.lshr(word, e.ir.Constant(e.i8, part * e.lanes % 8))
        word = b.trunc(word, e.ir.IntType(e.lanes))
    return b.bitcast(word, e.vector(e.i1))


def _least(e: Emitter, one: Any, two: Any) -> Any:
    return e.b.select(e.b.icmp_signed("<", one, two), one, two)
