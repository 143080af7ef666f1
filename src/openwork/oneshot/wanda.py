"""Wanda: prune by weights and activations.

Sun, Liu, Bair, Kolter. "A Simple and Effective Pruning Approach for Large Language Models". ICLR 2024.
Claim: |W_oi| ||X_i||_2, compared within each output, finds masks of large language models that need no weight update.
Equations: S_oi = |W_oi| ||X_i||_2 (Eq. 1); the comparison group is one output (section 3); N:M compares the M consecutive
weights of one output.
Departures: the count of a layer is exact: where the outputs cannot all keep the same number, those whose next score is
highest keep one more. Patterns other than unstructured and N:M compare their units over the whole layer.
Cost: one vector of sums a layer, and one sort.
"""

from __future__ import annotations

from torch import Tensor

from openwork.core.patterns import Pattern, Unstructured
from openwork.core.select import check_finite, count_of, top, top_rows


def score(weight: Tensor, squares: Tensor) -> Tensor:
    """Return |W_oi| ||X_i||_2 (Eq. 1) in float64.

    Args:
        weight: (out, in, *kernel).
        squares: (groups, inputs), sum of x_i^2; an output's inputs are in * kernel.
    """
    groups, width = squares.shape
    W_goi = weight.detach().double().abs().reshape(groups, -1, width)
    return (W_goi * squares.double().sqrt().unsqueeze(1)).reshape(weight.shape)


def wanda(weight: Tensor, squares: Tensor, density: float, pattern: Pattern) -> Tensor:
    """Return the mask of the highest scores of every output, or of the units of `pattern`.

    Args:
        weight: (out, in, *kernel), finite.
        squares: (groups, inputs), sum of x_i^2.
        density: kept share of the layer, in [0, 1].
        pattern: which masks are legal.

    Returns:
        bool tensor of the weight's shape with an exact count.

    Raises:
        PatternError: if the pattern does not divide the weight.
    """
    scores = score(weight, squares)
    if not isinstance(pattern, Unstructured):
        return pattern.select(scores, density)
    rows = scores.reshape(weight.shape[0], -1)
    return row_wise(rows, count_of(density, rows.numel())).reshape(weight.shape)


def row_wise(scores: Tensor, count: int) -> Tensor:
    """Return the mask of the `count` highest scores that are spread evenly over the rows.

    Args:
        scores: (rows, width), finite.
        count: how many to keep in all; rows keep count // rows each, and the rest go to the highest of what is left, at
            most one a row.
    """
    each, more = divmod(count, scores.shape[0])
    mask = top_rows(scores, each)
    if more:
        check_finite(scores)
        order = scores.argsort(dim=1, descending=True, stable=True)
        following = order[:, each].unsqueeze(1)
        mask.scatter_(1, following, top(scores.gather(1, following), more))
    return mask
