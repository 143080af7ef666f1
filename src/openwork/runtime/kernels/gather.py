"""A permuted copy, out[p] = values[order[p]]: what the transposed product reads after every change of the values."""

from __future__ import annotations

import functools

import numpy as np

from openwork.runtime.kernels import jit
from openwork.runtime.kernels.emit import Emitter
from openwork.runtime.kernels.launch import Call
from openwork.runtime.kernels.target import Target

WORDS = ("values", "order", "out", "count")
"""The slots: addresses of float32, int32 (count) and float32 (count); the number of entries."""
RUN = 16384
"""Entries of a unit."""
_UNROLL = 8


def calls(target: Target, values: int, order: int, out: int, count: int) -> list[Call]:
    """Return the stage that copies `count` entries: out[p] = values[order[p]], bit for bit.

    Args:
        target: what to compile for.
        values: address of float32.
        order: address of int32 (count), where each entry comes from; not checked.
        out: address of float32 (count).
        count: entries.
    """
    name = f"openwork_gather_{target.name}"
    where = jit.address(name, target, functools.partial(_build, name, target))
    return [Call(where, np.array([values, order, out, count], np.int64), -(-count // RUN))]


def _build(name: str, target: Target) -> str:
    e = Emitter(name, target)
    b = e.b
    values, order, out, count = e.pointer(0), e.pointer(1), e.pointer(2), e.slot(3)
    first = b.mul(e.unit, e.int(RUN))
    left = b.sub(count, first)
    stop = b.add(first, b.select(b.icmp_signed("<", left, e.int(RUN)), left, e.int(RUN)))
    middle = b.sub(stop, b.srem(b.sub(stop, first), e.int(_UNROLL)))

    def copy(entry: object) -> None:
        e.store(e.load(e.item(values, e.index(order, entry), e.i32), e.i32), e.item(out, entry, e.i32))

    with e.loop(first, middle, _UNROLL) as entry:
        for k in range(_UNROLL):
            copy(b.add(entry, e.int(k)))
    with e.loop(middle, stop) as entry:
        copy(entry)
    return e.text()
