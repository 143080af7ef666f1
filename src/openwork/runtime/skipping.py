"""A linear layer that skips the zeros of its input: ReLU networks, top-k codes, masked tokens.

y[b] = bias + sum over i with x[b, i] != 0 of x[b, i] * W[:, i]. The weight is held input by input, so that a zero input
spares the reading of its row; for one row of x, where a dense product reads the whole weight once, the time goes with the
share of non-zeros (Liu et al., "Deja Vu", ICML 2023, section 2; Mirzadeh et al., "ReLU Strikes Back", ICLR 2024, section 3).
For many rows at once a dense product reuses what it reads, and few non-zeros must be left for skipping to pay.

The functions are those of `formats.Format`; what is fast depends on the input's zeros, so measure on real inputs.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from openwork.errors import ModelError
from openwork.runtime import modules
from openwork.runtime.formats import _common as common
from openwork.runtime.kernels import decode as gathering
from openwork.runtime.kernels import skipping as listing
from openwork.runtime.kernels.launch import Program
from openwork.runtime.kernels.target import Target, host, targets
from openwork.runtime.launching import Pool, Ready
from openwork.runtime.wrapping import WrappedLinear

SMALL = 1 << 20
"""Bytes of the weight below which a second thread costs more than it brings."""
_PIECE = 512
"""Bytes of a row of the weight that a tile takes at once."""
_PART = 1 << 18
"""Bytes of a part of a tile, to be found in the second cache by all rows of x."""
_UNITS = 4
"""Units a thread should find at least."""


class _Key(NamedTuple):
    """What a program is made for; strides in bytes."""

    target: str
    rows: int
    x_row: int
    shape: tuple[int, int]
    kind: gathering.Kind
    threads: int


@dataclass(frozen=True, eq=False)
class Packed:
    """A weight held input by input. It never changes and may be shared.

    Attributes:
        rows: (in, out), the transposed weight: float32, float64, or bfloat16 for inputs of float32.
        bias: (out), or None.
        densest: share of non-zero inputs above which the product is dense.
    """

    rows: Tensor
    bias: Tensor | None
    densest: float = 1.0

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        """Return itself: a packed weight never changes."""
        return self

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of inputs and outputs."""
        return torch.float32 if self.rows.dtype == torch.bfloat16 else self.rows.dtype


def pack(weight: Tensor, bias: Tensor | None = None, *, halved: bool = False, densest: float = 1.0) -> Packed:
    """Return weight (out, in) and bias (out) packed.

    Args:
        weight: float32 or float64, on the CPU.
        bias: of weight's dtype, or None.
        halved: round a float32 weight to bfloat16, which halves what is read; sums stay float32.
        densest: share of non-zero inputs above which `matmul` multiplies densely; 1 never does. It is what was measured:
            the share at which skipping takes as long as the dense product, for the number of rows that will come.

    Raises:
        ModelError: if they are not float32 or float64 on the CPU, do not fit one another, or `densest` is no share.
    """
    common.check_weight(weight, bias)
    densest = _share(densest)
    if halved and weight.dtype != torch.float32:
        raise ModelError(f"cannot halve a weight of {weight.dtype}: give float32")
    rows = weight.detach().to(torch.bfloat16 if halved else weight.dtype).t().clone(memory_format=torch.contiguous_format)
    return Packed(rows, None if bias is None else bias.detach().clone(memory_format=torch.contiguous_format), densest)


def unpack(packed: Packed) -> tuple[Tensor, Tensor | None]:
    """Return weight (out, in), a view in inputs' dtype, and bias (out) as they went in; `halved` ones were rounded."""
    return packed.rows.t().to(packed.dtype), packed.bias


def nbytes(packed: Packed) -> int:
    """Return the bytes of weight and bias."""
    return sum(part.numel() * part.element_size() for part in (packed.rows, packed.bias) if part is not None)


@torch.no_grad()
def matmul(packed: Packed, x: Tensor, *, threads: int | None = None) -> Tensor:
    """Return `x @ weight.T + bias` for x (..., in), its zeros skipped: (..., out).

    A NaN in x is never skipped; 0.0 and -0.0 are, so that an infinity or NaN in the weight does no harm under a zero. The
    result is the same bit for bit for every number of threads, and for a row alone or among others. float32 runs on
    kernels where there are any, everything else on torch's `embedding_bag`. No gradient flows.

    Args:
        packed: from `pack`.
        x: of `packed.dtype`, on the CPU, any strides.
        threads: at most; None is torch's number, one where the product is small.

    Raises:
        ModelError: if x does not fit.
    """
    width, out = packed.rows.shape
    common.check_input(x, width, packed.dtype)
    flat = x.detach().reshape(math.prod(x.shape[:-1]), width)
    if packed.densest < 1.0 and int(torch.count_nonzero(flat)) > packed.densest * flat.numel():
        return functional.linear(x.detach(), *unpack(packed))
    y = torch.empty(flat.shape[0], out, dtype=x.dtype)
    if y.numel():
        _product(packed, flat, y, threads)
    return y.reshape(*x.shape[:-1], out)


def _product(packed: Packed, x: Tensor, y: Tensor, threads: int | None) -> None:
    """Write the product of x (rows, in) to y (rows, out)."""
    width, out = packed.rows.shape
    target = host()
    if target is None or packed.dtype != torch.float32 or width == 0:
        y.copy_(_plain(packed, x))
        return
    if x.stride(1) != 1 and width > 1:
        x = x.contiguous()
    rows = len(x)
    if threads is None:
        threads = torch.get_num_threads() if nbytes(packed) > SMALL else 1
    kind: gathering.Kind = "f32" if packed.rows.dtype == torch.float32 else "bf16"
    bias = torch.zeros(out) if packed.bias is None else packed.bias
    key = _Key(target.name, rows, 4 * x.stride(0), (out, width), kind, threads)
    _pool().run(key, (x.data_ptr(), packed.rows.data_ptr(), bias.data_ptr(), y.data_ptr()), threads)


def _plain(packed: Packed, x: Tensor) -> Tensor:
    """Return the product of x (rows, in) by torch alone, zeros skipped all the same."""
    row, column = x.nonzero(as_tuple=True)
    starts = torch.zeros(len(x), dtype=torch.int64)
    torch.cumsum((x != 0).sum(dim=1)[:-1], 0, out=starts[1:])
    rows = packed.rows.to(packed.dtype)
    if not rows.numel():
        y = x.new_zeros(len(x), rows.shape[1])
    else:
        y = functional.embedding_bag(column, rows, starts, mode="sum", per_sample_weights=x[row, column])
    return y if packed.bias is None else y + packed.bias


def _ready(key: _Key) -> Ready:
    """Return the program: list the non-zeros of every row of x, then sum the weight's rows that they name."""
    target, (out, width) = targets()[key.target], key.shape
    vectors, part, run = _tiling(key, target)
    parts, size = max(1, -(-width // part)), listing.room(width)
    begins, ends = np.zeros((parts, key.rows), np.int64), np.zeros((parts, key.rows), np.int64)
    indices, values = np.empty(key.rows * size, np.int32), np.empty(key.rows * size, np.float32)
    places = [array.ctypes.data for array in (begins, ends, indices, values)]
    lists = listing.calls(target, 0, key.x_row, key.rows, width, part, *places)
    entries = gathering.Entries(places[0], places[1], places[2], places[3], "i32", parts=parts)
    matrix = gathering.Rows(0, out * (4 if key.kind == "f32" else 2), out, key.kind)
    sums = gathering.sums(target, entries, matrix, 0, 0, 4 * out, key.rows, run=run, vectors=vectors)
    patches = [(call.slots, listing.WORDS.index("x"), 0) for call in lists]
    for call in sums:
        patches += [(call.slots, gathering.SUM_WORDS.index(word), i) for i, word in enumerate(("matrix", "bias", "out"), 1)]
    return Ready(Program([lists, sums], target), tuple(patches), (begins, ends, indices, values))


def _tiling(key: _Key, target: Target) -> tuple[int, int, int]:
    """Return the vectors of a tile, the inputs of a part and the rows of x of a unit."""
    out, width = key.shape
    size = target.lanes * (4 if key.kind == "f32" else 2)
    most = min(gathering.widest(target, key.kind), _PIECE // size)
    vectors = gathering.even(out, target, most)
    part = width if key.rows == 1 else _PART // (vectors * size)
    tiles = -(-out // (vectors * target.lanes))
    runs = min(key.rows, -(-_UNITS * key.threads // tiles)) if key.threads > 1 else 1
    return vectors, max(16, -(-part // 16) * 16), -(-key.rows // runs)


@functools.cache
def _pool() -> Pool[_Key]:
    return Pool(_ready)


class SkippingLinear(WrappedLinear):
    """A linear layer (..., in) -> (..., out) that skips the zeros of its input; inference only."""

    packed: Packed

    def __init__(self, layer: nn.Linear, *, halved: bool = False, densest: float = 1.0) -> None:
        """Pack a layer, which is left as it is.

        Args:
            layer: a plain linear layer, float32 or float64 on the CPU.
            halved, densest: see `pack`.

        Raises:
            ModelError: if the layer cannot be packed.
        """
        reason = modules.obstacle(layer)
        if reason is not None or not isinstance(layer, nn.Linear):
            raise ModelError(f"this {type(layer).__name__} cannot skip zeros: it {reason or 'is no linear layer'}")
        super().__init__(layer, "skipping", pack(layer.weight, layer.bias, halved=halved, densest=densest))

    def until(self, densest: float) -> None:
        """Multiply densely from now on where more than this share of the inputs is not zero."""
        self.packed = replace(self.packed, densest=_share(densest))

    def extra_repr(self) -> str:
        """Return what `print` shows."""
        return f"{super().extra_repr()}, densest={self.packed.densest:.3g}"


def _share(densest: float) -> float:
    if not 0.0 <= densest <= 1.0:
        raise ModelError(f"densest is {densest!r}: give the share of non-zero inputs, 0 to 1, above which to stay dense")
    return densest
