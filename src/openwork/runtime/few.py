"""Products with a few rows of x at once (a small batch, a short sequence): a sparse weight packed for 2 to 16 of them.

The rows are turned into panels, whose vectors hold one input of all rows, multiplied (`kernels.few`) and turned back. The
weights may be narrow as in `runtime.matvec`, and zeros are skipped as there.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from openwork.runtime.formats import _common as common
from openwork.runtime.kernels import arrange, few, launch, layout, matvec
from openwork.runtime.kernels.precision import Precision
from openwork.runtime.kernels.target import targets
from openwork.runtime.launching import Pool, Ready
from openwork.runtime.matvec import SMALL, by_torch, prepare

MOST = 64
"""Rows of x that go through the weights together; more are taken in turn."""


class _Weights(NamedTuple):
    """What programs are made from."""

    slices: matvec.Slices
    shape: tuple[int, int]
    target: str


@dataclass(frozen=True, eq=False)
class PackedFew:
    """A sparse weight (out, in) packed for products with a few rows. It never changes and may be shared.

    Attributes:
        slices: the weights, `kernels.few.rows_at_once` rows side by side.
        bias: (out) float32, or None.
        shape: (out, in).
        target: what it was packed for; empty if there are no kernels.
    """

    slices: matvec.Slices
    bias: Tensor | None
    shape: tuple[int, int]
    target: str

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        """Return itself: a packed weight never changes."""
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is made anew: programs, and the fallback."""
        return {name: self.__dict__[name] for name in ("slices", "bias", "shape", "target")}

    @property
    def nbytes(self) -> int:
        """Bytes of weights, indices and bias."""
        return self.slices.nbytes

    @functools.cached_property
    def _pool(self) -> Pool[int] | None:
        """The programs by number of rows; None where the kernels are not to be had."""
        if self.target not in targets():
            return None
        return Pool(functools.partial(_ready, _Weights(self.slices, self.shape, self.target)))

    @functools.cached_property
    def _plain(self) -> Any:
        from openwork.runtime.formats import csr_torch

        return csr_torch.pack(*unpack(self))


def pack(weight: Tensor, bias: Tensor | None = None, precision: Precision = "float32") -> PackedFew:
    """Return weight (out, in) and bias (out), float32, packed; any weight will do.

    Args:
        weight: its zeros are left out.
        bias: or None.
        precision: of the stored weights.

    Raises:
        ModelError: if they are not float32 on the CPU or do not fit one another; if int8 is asked for and a weight is
            not finite.
    """
    given = prepare(weight, bias, precision)
    lanes = 1 if given.target is None else few.rows_at_once(given.target)
    (section,) = arrange.sections(given.weight, 1)
    slices = matvec.pack(section, given.weight.shape[1], given.bias, given.scale, lanes=lanes, kind=precision)
    name = "" if given.target is None else given.target.name
    return PackedFew(slices, given.kept, given.shape, name)


def unpack(packed: PackedFew) -> tuple[Tensor, Tensor | None]:
    """Return weight (out, in) and bias (out) as they went in, a negative zero as zero; narrow weights as they are stored."""
    weight = np.zeros(packed.shape, np.float32)
    matvec.unpack(packed.slices, weight)
    return torch.from_numpy(weight), packed.bias


def multiply(packed: PackedFew, x: Tensor) -> Tensor:
    """Return `x @ weight.T + bias` for x (..., in) of any strides, without gradients: a contiguous tensor (..., out).

    The result is the same bit for bit for every number of threads and rows.

    Raises:
        ModelError: if x does not fit.
    """
    out, width = packed.shape
    common.check_input(x, width, torch.float32)
    pool = packed._pool
    if pool is None:
        return by_torch(packed._plain, x)
    leading = x.shape[:-1]
    if x.is_neg() or not x.is_contiguous():
        x = x.resolve_neg().contiguous()
    y = x.new_empty((*leading, out))
    if y.numel():
        rows = leading.numel()
        source, result = x.data_ptr(), y.data_ptr()
        threads = torch.get_num_threads() if rows * packed.slices.multiplies >= 4 * SMALL else 1
        for first in range(0, rows, MOST):
            some = min(MOST, rows - first)
            pool.run(some, (source + 4 * first * width, result + 4 * first * out), threads)
    return y


def _ready(weights: _Weights, rows: int) -> Ready:
    """Return the program for a number of rows of x, with the panels that it fills."""
    slices, (out, width), name = weights
    target = targets()[name]
    wide = next((width for width in few.widths(target) if width >= rows), few.widths(target)[-1])
    tiles = -(-rows // wide)
    x, y = (matvec.on_line(np.zeros((tiles, size, wide), np.float32)) for size in (width, out))
    before = layout.pack_tokens(target, 0, width, rows, width, x.ctypes.data, wide)
    product = few.calls(
        target, slices, x.ctypes.data, y.ctypes.data, wide, tiles=tiles, x_tile=4 * wide * width, y_tile=4 * wide * out
    )
    after = layout.unpack_tokens(target, y.ctypes.data, rows, out, 0, out, wide)
    word = layout.TURN.index
    patches = [(call.slots, word("x"), 0) for call in before] + [(call.slots, word("y"), 1) for call in after]
    return Ready(launch.Program([before, product, after], target), tuple(patches), (slices, x, y))
