"""The transpose of a matrix, a square of lanes x lanes numbers at a time in registers."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import numpy as np

from openwork.runtime.kernels import jit
from openwork.runtime.kernels.emit import Emitter
from openwork.runtime.kernels.launch import Call
from openwork.runtime.kernels.planes import LINE
from openwork.runtime.kernels.target import Target

WORDS = ("x", "x_row", "y", "y_row", "rows", "columns")
"""The slots: addresses; strides in bytes; sizes of x."""


def calls(target: Target, x: int, y: int, *, rows: int, columns: int, x_row: int, y_row: int) -> list[Call]:
    """Return the stage that writes y[c, r] = x[r, c], bit for bit.

    Args:
        target: what to compile for.
        x: address of float32 (rows, columns), columns contiguous; `x_row` is its stride in bytes.
        y: address of float32 (columns, rows), rows contiguous; `y_row` is its stride in bytes.
        rows, columns: sizes. Nothing beyond them is read or written.
    """
    name = f"openwork_turn_{target.name}"
    where = jit.address(name, target, functools.partial(_build, name, target))
    units = -(-rows // LINE) if columns else 0
    return [Call(where, np.array([x, x_row, y, y_row, rows, columns], np.int64), units)]


def _build(name: str, target: Target) -> str:
    e = Emitter(name, target)
    b, lanes = e.b, e.lanes
    x, x_row, y, y_row, rows, columns = (e.pointer(i) if word in "xy" else e.slot(i) for i, word in enumerate(WORDS))
    first = b.mul(e.unit, e.int(LINE))
    final, left, whole = b.sub(rows, e.int(1)), b.sub(rows, first), b.and_(columns, e.int(-lanes))
    rest = b.sub(columns, whole)

    def line(k: int) -> Any:
        """Return where a row of x is; of those that are not there the last one is read, and not written."""
        here = b.add(first, e.int(k))
        return e.at(x, b.mul(b.select(b.icmp_signed("<", here, rows), here, final), x_row))

    def square(lines: list[Any], out: Any, column: Any, kept: Any, mask: Any, count: Any) -> None:
        """Turn one square. `kept` masks its rows, `mask` its columns, of which `count` are there; None for all."""
        places = [e.item(one, column, e.f32) for one in lines]
        loaded = [e.load(one, e.vector()) if mask is None else e.masked_load(one, mask) for one in places]
        for k, value in enumerate(e.transpose(loaded)):
            place = e.at(out, b.mul(b.add(column, e.int(k)), y_row))
            with contextlib.nullcontext() if count is None else b.if_then(b.icmp_signed("<", e.int(k), count)):
                e.store(value, place) if kept is None else e.masked_store(value, place, kept)

    def band(all_there: bool) -> None:
        """Turn the rows of the unit; those of a cache line of y side by side, so that it is filled at once."""
        parts = []
        for k in range(0, LINE, lanes):
            kept = None if all_there else e.mask(b.sub(left, e.int(k)))
            parts.append(([line(k + i) for i in range(lanes)], e.item(y, b.add(first, e.int(k)), e.f32), kept))
        with e.loop(e.int(0), whole, lanes) as column:
            for lines, out, kept in parts:
                square(lines, out, column, kept, None, None)
        with b.if_then(b.icmp_signed(">", rest, e.int(0))):
            for lines, out, kept in parts:
                square(lines, out, whole, kept, e.mask(rest), rest)

    with b.if_else(b.icmp_signed(">=", left, e.int(LINE))) as (complete, partial):
        with complete:
            band(True)
        with partial:
            band(False)
    return e.text()
