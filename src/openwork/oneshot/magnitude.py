"""Magnitude: the largest weights of a layer stay; the humble baseline that needs no data."""

from __future__ import annotations

from torch import Tensor

from openwork.core.patterns import Pattern


def magnitude(weight: Tensor, density: float, pattern: Pattern) -> Tensor:
    """Return the mask of the largest |w| that `pattern` allows, compared over the whole layer.

    Args:
        weight: (out, in, *kernel), finite.
        density: kept share, in [0, 1].
        pattern: which masks are legal.

    Returns:
        bool tensor of the weight's shape with an exact count.

    Raises:
        PatternError: if the pattern does not divide the weight.
    """
    return pattern.select(weight.detach().abs(), density)
