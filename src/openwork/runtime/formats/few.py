"""Rows side by side for a few rows of x, float32, by openwork's own kernels (`runtime.few`)."""

from __future__ import annotations

from openwork.runtime.few import PackedFew, pack, unpack
from openwork.runtime.few import multiply as matmul

__all__ = ["matmul", "nbytes", "pack", "unpack"]


def nbytes(packed: PackedFew) -> int:
    """Return the bytes of weights, indices and bias."""
    return packed.nbytes
