"""Columns as the pixels of a plane, for peers whose operator is a convolution."""

from __future__ import annotations

import math


def sides(columns: int) -> tuple[int, int]:
    """Return height and width with height * width = columns, as square as whole numbers allow."""
    height = next(side for side in range(math.isqrt(columns), 0, -1) if columns % side == 0)
    return height, columns // height
