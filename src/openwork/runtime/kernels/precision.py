"""Weights in 32, 16 or 8 bits: how they are rounded, and how a kernel turns them into float32 in registers.

A product with few columns waits for its weights to come from memory, so fewer bytes are more speed. Sums are in float32
whatever the weights are. Both narrow kinds are lossy; `error` bounds what is lost.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from openwork.errors import ModelError
from openwork.runtime.kernels.emit import Emitter

Precision = Literal["float32", "bfloat16", "int8"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
Floats = npt.NDArray[np.float32]

_STORED = {"float32": np.float32, "bfloat16": np.uint16, "int8": np.int8}
_STEPS = 127
"""Whole numbers on each side of zero that int8 weights take."""


def scales(largest: Floats, precision: Precision) -> Floats:
    """Return what each row's stored weights are multiplied by: max |w| / 127 of the row for int8, else 1.

    Args:
        largest: (rows) max |w| of each row, 0 where it is empty.
        precision: of the weights.

    Raises:
        ModelError: if the weights are int8 and a row's largest is not finite.
    """
    if precision != "int8":
        return np.ones_like(largest)
    if not np.isfinite(largest).all():
        row = int(np.flatnonzero(~np.isfinite(largest))[0])
        raise ModelError(f"row {row} has a weight of {largest[row]}: int8 needs finite weights, keep this layer in float32")
    scale = (largest / np.float32(_STEPS)).astype(np.float32)
    tiny = np.finfo(np.float32).tiny
    return np.where(largest > 0, np.maximum(scale, tiny), np.float32(1))


def narrow(values: Floats, scale: Floats, precision: Precision) -> npt.NDArray[Any]:
    """Return weights as they are stored, rounded to the nearest (ties to even).

    bfloat16 is the upper half of float32 (uint16 here); int8 is the nearest multiple of the row's scale, in [-127, 127].

    Args:
        values: float32 weights.
        scale: of each weight's row, of a shape that broadcasts to that of `values`.
        precision: float32, bfloat16 or int8.
    """
    if precision == "float32":
        return np.ascontiguousarray(values, np.float32)
    if precision == "int8":
        whole: npt.NDArray[np.int8] = np.clip(np.rint(values / scale), -_STEPS, _STEPS).astype(np.int8)
        return whole
    words = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = words + np.uint32(0x7FFF) + ((words >> np.uint32(16)) & np.uint32(1))
    quiet = words | np.uint32(0x00400000)  # a NaN whose payload is cut must not become an infinity
    return (np.where(np.isnan(values), quiet, rounded) >> np.uint32(16)).astype(np.uint16)


def widen(stored: npt.NDArray[Any], scale: Floats) -> Floats:
    """Return the float32 weights that stored ones stand for: what kernels multiply by, the scale included."""
    if stored.dtype == np.uint16:
        return (stored.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return stored.astype(np.float32) * scale if stored.dtype == np.int8 else stored.astype(np.float32)


def error(values: Floats, scale: Floats, precision: Precision) -> Floats:
    """Return the most that rounding may change each weight: half a unit in the last place kept, half a step for int8.

    A product is off by at most the sum of `error * |x|` for this, next to the error of its summation.
    """
    if precision == "float32":
        return np.zeros_like(values)
    if precision == "int8":
        # a quotient that rounds to the wrong side of a tie, and the product with the scale, cost a few more ulps
        return (np.float32(0.5) + np.float32(_STEPS * 2**-22)) * scale * np.ones_like(values)
    subnormal = np.float32(2.0**-134)  # half the step of bfloat16's subnormal numbers
    return np.maximum(np.abs(values) * np.float32(2.0**-8), subnormal)


def stored(precision: Precision) -> np.dtype[Any]:
    """Return numpy's type of the stored weights."""
    return np.dtype(_STORED[precision])


def load(e: Emitter, base: Any, index: Any, lanes: int, precision: Precision) -> Any:
    """Return `lanes` weights from number `index` (i64) on as a float32 vector; int8 are not yet scaled."""
    place = e.at(base, e.b.mul(index, e.int(stored(precision).itemsize)))
    if precision == "float32":
        return e.load(place, e.vector(lanes=lanes))
    words = e.vector(e.i32, lanes)
    if precision == "int8":
        raw = e.load(place, e.vector(e.i8, lanes), 1)
        return e.b.sitofp(e.b.sext(raw, words), e.vector(lanes=lanes))
    raw = e.load(place, e.vector(e.i16, lanes), 2)
    return e.b.bitcast(e.b.shl(e.b.zext(raw, words), e.splat(e.ir.Constant(e.i32, 16), lanes)), e.vector(lanes=lanes))
