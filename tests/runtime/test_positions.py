from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from openwork.core.rng import generator
from openwork.errors import PatternError
from openwork.runtime.positions import BLOCKS, Positions, from_flat, from_mask
from tests.strategies import densities, quick, seeds


def blocks_mask(groups: int, block: int, width: int, density: float, seed: int) -> Tensor:
    kept = torch.rand(groups, 1, width, generator=generator(seed, "positions")) < density
    return kept.expand(groups, block, width).reshape(groups * block, width)


@given(groups=st.integers(1, 6), block=st.sampled_from(BLOCKS), width=st.integers(1, 9), density=densities, seed=seeds)
@quick
def test_a_mask_survives(groups: int, block: int, width: int, density: float, seed: int) -> None:
    mask = blocks_mask(groups, block, width, density, seed)
    found = from_mask(mask, block)
    assert torch.equal(found.mask(), mask)
    assert (found.nnz, found.entries * block) == (int(mask.sum()), int(mask.sum()))
    assert found.total == groups * width
    weight = torch.arange(mask.numel()).reshape(mask.shape)
    by_group = [weight[g * block : (g + 1) * block].t()[mask[g * block]].reshape(-1) for g in range(groups)]
    assert torch.equal(weight[found.pairs()], torch.cat(by_group))
    again = from_flat(found.flat(), found.shape, block)
    assert torch.equal(again.starts, found.starts)
    assert torch.equal(again.columns, found.columns)
    assert bool((found.flat().diff() > 0).all())


def ints(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


@pytest.mark.parametrize(
    ("starts", "columns"),
    [
        (ints(0, 1, 2), ints(0, 3)),  # a column outside
        (ints(0, 1, 2), ints(0, -1)),
        (ints(0, 2, 2), ints(1, 0)),  # descending
        (ints(0, 2, 2), ints(1, 1)),  # twice
        (ints(0, 2, 1), ints(0)),  # starts descend
        (ints(0, 1, 3), ints(0, 1)),  # beyond the end
        (ints(1, 1, 2), ints(0, 1)),  # not from the beginning
        (ints(0, 2), ints(0, 1)),  # a group is missing
        (ints(0, 1, 2).long(), ints(0, 1)),
        (ints(0, 1, 2), ints(0, 1).float()),
        (ints(0, 0, 1, 1, 2, 2)[::2], ints(0, 1)),  # not contiguous
    ],
)
def test_what_are_no_positions_is_refused(starts: Tensor, columns: Tensor) -> None:
    Positions((2, 3), 1, ints(0, 1, 2), ints(0, 2))
    with pytest.raises(PatternError, match="no positions of a weight"):
        Positions((2, 3), 1, starts, columns)


@pytest.mark.parametrize(("shape", "block"), [((3, 2), 2), ((0, 2), 1), ((2, 0), 1), ((6, 2), 3)])
def test_sizes_that_do_not_fit_are_refused(shape: tuple[int, int], block: int) -> None:
    with pytest.raises(PatternError, match="divides the rows"):
        Positions(shape, block, torch.zeros(shape[0] // block + 1, dtype=torch.int32), ints())


def test_masks_that_cut_blocks_are_refused() -> None:
    mask = torch.ones(4, 3, dtype=torch.bool)
    mask[1, 2] = False
    with pytest.raises(PatternError, match="parts of blocks"):
        from_mask(mask, 2)
    for bad, block in ((mask.float(), 1), (mask[None], 1), (mask[:3], 2), (mask, 3)):
        with pytest.raises(PatternError, match="cannot cut a mask"):
            from_mask(bad, block)
