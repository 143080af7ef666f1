"""torch's own compressed sparse rows, which call MKL on x86."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

ABOUT = "torch.sparse CSR"
DENSE, APART = False, False


def operator(weight: Tensor, bias: Tensor | None, x: Tensor) -> Callable[[], Tensor]:
    """Return the product with a CSR weight of 32-bit indices; one column takes the matrix-vector product."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        wide = weight.to_sparse_csr()
        parts = (wide.crow_indices().int(), wide.col_indices().int(), wide.values())
        rows = torch.sparse_csr_tensor(*parts, weight.shape, check_invariants=True)
    added = weight.new_zeros(weight.shape[0]) if bias is None else bias
    if x.shape[1] == 1:
        vector = x[:, 0].contiguous()
        return lambda: torch.addmv(added, rows, vector)[:, None]
    column = added[:, None]
    if bias is None:
        return lambda: rows @ x
    return lambda: torch.addmm(column, rows, x)
