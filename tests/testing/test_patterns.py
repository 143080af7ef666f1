"""The suite of patterns must find what is broken."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from openwork.core.patterns import NM, Block, Unstructured
from openwork.core.select import count_of
from openwork.testing import check_pattern


class Threshold(Unstructured):
    """Keeps what is above a threshold: ties give the wrong count."""

    def select(self, score, density):
        count = count_of(density, score.numel())
        if count in (0, score.numel()):
            return super().select(score, density)
        return score >= score.reshape(-1).kthvalue(score.numel() - count + 1).values


class HighestIndex(Unstructured):
    """Gives ties to the highest index."""

    def select(self, score, density):
        return super().select(score.reshape(-1).flip(0), density).flip(0).reshape(score.shape)


class TakesNan(Unstructured):
    def select(self, score, density):
        return super().select(torch.nan_to_num(score), density)


class ChangesScore(Unstructured):
    def select(self, score, density):
        mask = super().select(score, density)
        score.masked_fill_(~mask, 0)
        return mask


@dataclass(frozen=True)
class Ragged(Block):
    """Its units overlap in the first row."""

    def untile(self, units, shape):
        mask = super().untile(units, shape).clone()
        mask[0] = True
        return mask


class Transposed(Block):
    """untile() lays blocks out in another order than tiles()."""

    def untile(self, units, shape):
        grid = units.reshape(shape[0] // self.rows, -1)
        return super().untile(grid.flip(1), shape)


class ForbidsAll(Block):
    def check(self, mask):
        super().check(~mask if bool(mask.all()) else torch.eye(*mask.shape) > 0)


class LessThanAll(NM):
    def quota(self, density, width):
        return min(self.n, super().quota(density, width))


BROKEN = [
    (Threshold(), "weights are kept, not"),
    (HighestIndex(), "not the best by|lowest index"),
    (TakesNan(), "is not refused with a MaskError"),
    (ChangesScore(), "changes the score"),
    (Ragged(2, 2), "units"),
    (Transposed(2, 2), "not the inverse"),
    (ForbidsAll(2, 2), "check\\(\\) refuses the selected mask"),
    (LessThanAll(2, 4), "not everything is kept"),
]


@pytest.mark.parametrize(("pattern", "message"), BROKEN, ids=lambda value: type(value).__name__)
def test_sabotage_is_found(pattern, message):
    with pytest.raises(AssertionError, match=message):
        check_pattern(pattern, [(4, 8)])


def test_a_shape_that_is_not_divided_is_named():
    with pytest.raises(AssertionError, match=r"does not divide \(4, 6\), one of the shapes given"):
        check_pattern(NM(2, 4), [(4, 8), (4, 6)])
