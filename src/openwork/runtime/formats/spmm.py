"""Groups of rows for openwork's own kernels (`runtime.spmm`), float32; the block size is that of the weight's pattern."""

from __future__ import annotations

from torch import Tensor

from openwork.runtime import spmm
from openwork.runtime.kernels.activations import Act
from openwork.runtime.spmm import PackedSpMM, pack_spmm, spmm_chw, spmm_tokens, unpack_spmm

__all__ = ["columns", "matmul", "nbytes", "pack", "tune", "unpack"]


def pack(weight: Tensor, bias: Tensor | None = None) -> PackedSpMM:
    """Return weight (out, in) and bias (out) in groups of 4, 2 or 1 rows, as its pattern has them.

    Raises:
        ModelError: if they are not float32 on the CPU, or do not fit one another.
    """
    return pack_spmm(weight, bias)


def unpack(packed: PackedSpMM) -> tuple[Tensor, Tensor | None]:
    """Return weight (out, in) and bias (out)."""
    return unpack_spmm(packed)


def matmul(
    packed: PackedSpMM, x: Tensor, *, act: Act = "none", clamp: tuple[float, float] | None = None
) -> Tensor:  # fmt: skip
    """Return act(x @ weight.T + bias) for x (..., in).

    Raises:
        ModelError: if x does not fit.
    """
    return spmm_tokens(packed, x, act=act, clamp=clamp)


def columns(
    packed: PackedSpMM, x: Tensor, out: Tensor | None = None, *, act: Act = "none", clamp: tuple[float, float] | None = None
) -> Tensor:
    """Return act(weight @ x + bias) for x (in, columns) or (images, in, columns); formats need not have this.

    Raises:
        ModelError: if x or out does not fit.
    """
    return spmm_chw(packed, x, out, act=act, clamp=clamp)


def tune(packed: PackedSpMM, x: Tensor, tokens: bool, *, seconds: float) -> None:
    """Measure how products with inputs like x, of `matmul` or of `columns`, are fastest, unless that is known."""
    spmm.tune(packed, x, tokens=tokens, seconds=seconds)


def nbytes(packed: PackedSpMM) -> int:
    """Return the bytes of weights, indices and bias."""
    return packed.nbytes
