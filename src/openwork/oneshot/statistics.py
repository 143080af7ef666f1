"""Streaming statistics of what a layer multiplies: sums of squares, Gram matrices and the number of inputs.

Sums are float64 however the calibration data are cut into batches, so that they differ by rounding alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_CHUNK = 2**18  # entries of a weight that are weighed at a time


@dataclass
class Statistics:
    """Sums over the inputs that a layer saw; `add` grows them.

    Attributes:
        squares: (groups, inputs) float64, sum of x_i^2.
        gram: (groups, inputs, inputs), sum of x_i x_j, or None where it is not wanted.
        tokens: how many inputs.
    """

    squares: Tensor
    gram: Tensor | None
    tokens: int = 0

    @classmethod
    def zeros(
        cls, groups: int, width: int, *, gram: torch.dtype | None = None, device: torch.device | str = "cpu"
    ) -> Statistics:
        """Return empty sums; `gram` is the dtype of the Gram matrix and of its arithmetic, None for none."""
        return cls(
            torch.zeros(groups, width, dtype=torch.float64, device=device),
            None if gram is None else torch.zeros(groups, width, width, dtype=gram, device=device),
        )

    def add(self, x: Tensor) -> bool:
        """Add inputs (groups, tokens, inputs) of any floating dtype; tell whether all of them are finite."""
        squares = x.double().square().sum(dim=1)
        self.squares += squares
        self.tokens += x.shape[1]
        if self.gram is not None:
            wide = x.to(self.gram.dtype)
            self.gram.baddbmm_(wide.transpose(1, 2), wide)
        return bool(torch.isfinite(squares).all())


def relative_error(before: Tensor, after: Tensor, gram: Tensor) -> float:
    """Return ||(W - W') X||^2 / ||W X||^2 from the Gram matrix of X; 0 where both are 0.

    Args:
        before: W, (groups, outputs, inputs).
        after: W', of the same shape.
        gram: sum of x x^T, (groups, inputs, inputs).
    """
    whole = lost = 0.0
    rows = max(1, _CHUNK // max(1, before.shape[2]))
    for old, new in zip(torch.split(before, rows, 1), torch.split(after, rows, 1), strict=True):
        whole += _energy(old.to(gram.dtype), gram)
        lost += _energy((old.double() - new.double()).to(gram.dtype), gram)
    return max(0.0, lost) / whole if whole > 0 else 0.0


def _energy(weight: Tensor, gram: Tensor) -> float:
    return float(((weight @ gram) * weight).sum(dtype=torch.float64))
