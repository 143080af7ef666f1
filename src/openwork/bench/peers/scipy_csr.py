"""scipy's compressed sparse rows: always one thread."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

ABOUT = "scipy.sparse CSR, one thread"
DENSE, APART = False, False


def operator(weight: Tensor, bias: Tensor | None, x: Tensor) -> Callable[[], Tensor]:
    """Return the product of a scipy CSR array with the activations."""
    from scipy import sparse

    rows = sparse.csr_array(weight.numpy())
    dense = x[:, 0].contiguous().numpy() if x.shape[1] == 1 else x.numpy()
    shape = (weight.shape[0], x.shape[1])

    def call() -> Tensor:
        y = torch.from_numpy(rows @ dense).reshape(shape)
        return y if bias is None else y.add_(bias[:, None])

    return call
