"""N:M weights for few columns, float32, by openwork's own kernels (`runtime.matvec.pack_nm`)."""

from __future__ import annotations

from openwork.runtime.matvec import PackedMatVec, unpack
from openwork.runtime.matvec import multiply as matmul
from openwork.runtime.matvec import pack_nm as pack

__all__ = ["matmul", "nbytes", "pack", "unpack"]


def nbytes(packed: PackedMatVec) -> int:
    """Return the bytes of weights, indices and bias."""
    return packed.nbytes
