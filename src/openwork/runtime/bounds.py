"""How far a product may be from the exact one: the bound that every format is held to."""

from __future__ import annotations

import torch
from torch import Tensor


def bound(weight: Tensor, bias: Tensor | None, x: Tensor, factor: float = 2.0) -> Tensor:
    """Return the largest error allowed in each entry of `x @ weight.T + bias`: a float64 tensor (..., out).

    `factor * (k + 1) * eps * (sum |w| |x| + |b|)` with k the non-zero weights of the row and eps of weight's dtype.
    Any order of summation stays within half of it at factor 1 (Higham, "Accuracy and Stability of Numerical
    Algorithms", 2nd edition, Eq. (3.5)); what falls below the smallest normal number is allowed on top.

    Args:
        weight: (out, in).
        bias: (out), or None.
        x: (..., in).
        factor: slack; 2 leaves room for a reference that is rounded as well.
    """
    size = x.abs().double() @ weight.abs().double().t()
    if bias is not None:
        size = size + bias.abs().double()
    terms = (weight != 0).sum(dim=1).double() + 1
    kind = torch.finfo(weight.dtype)
    return factor * terms * (kind.eps * size + kind.tiny)
