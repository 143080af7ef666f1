from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from openwork.core.select import count_of, ranks, top, top_rows
from openwork.errors import MaskError
from tests.strategies import best, dtypes, scores, seeds, tensor, thorough


@given(scores(), st.data())
@thorough
def test_top_is_the_sort_by_score_then_index(score, data):
    count = data.draw(st.integers(0, score.numel()))
    mask = top(score, count)
    assert mask.dtype is torch.bool
    assert int(mask.sum()) == count
    assert torch.equal(mask, best(score, count))


@given(seeds, st.integers(1, 5), st.integers(1, 7), dtypes, st.data())
@thorough
def test_top_rows_is_top_of_every_row(seed, rows, width, dtype, data):
    score = tensor(torch.Size([rows, width]), seed, dtype, data.draw(st.sampled_from([None, 2])))
    count = data.draw(st.integers(0, width))
    assert torch.equal(top_rows(score, count), torch.stack([top(row, count) for row in score]))


@given(scores(), st.data())
@thorough
def test_ranks_are_the_order_that_top_uses(score, data):
    place = ranks(score)
    assert sorted(place.reshape(-1).tolist()) == list(range(score.numel()))
    count = data.draw(st.integers(0, score.numel()))
    assert torch.equal(place >= score.numel() - count, top(score, count))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_scores_that_cannot_be_ranked_are_refused(bad, dtype):
    score = torch.ones(3, 4, dtype=dtype)
    score[1, 2] = bad
    for refuse in (lambda: top(score, 5), lambda: top_rows(score, 2), lambda: ranks(score)):
        with pytest.raises(MaskError, match=r"1 of 12 scores are not finite .the first at flat index 6"):
            refuse()


def test_half_precision_ties_keep_an_exact_count():
    score = torch.full((1000,), 0.1, dtype=torch.float16)
    score[500:] = 0.09999  # the same number in half precision
    assert top(score, 300).nonzero().squeeze(1).tolist() == list(range(300))


def test_minus_zero_ties_with_zero():
    assert top(torch.tensor([-0.0, 0.0, -0.0]), 2).tolist() == [True, True, False]


def test_integers_are_ranked_exactly():
    big = 2**60
    assert top(torch.tensor([big, big + 1, big - 1]), 1).tolist() == [False, True, False]


def test_the_score_is_not_changed_and_needs_no_contiguity():
    score = torch.arange(12.0).reshape(3, 4).t()
    before = score.clone()
    assert torch.equal(top(score, 5), best(before, 5))
    assert torch.equal(score, before)


@pytest.mark.parametrize("count", [-1, 5])
def test_counts_out_of_range_are_refused(count):
    with pytest.raises(MaskError, match=f"cannot keep {count} of 4"):
        top(torch.ones(4), count)


@given(st.floats(0.0, 1.0), st.integers(0, 10_000))
@thorough
def test_count_is_the_nearest_integer(density, total):
    count = count_of(density, total)
    assert 0 <= count <= total
    assert abs(Fraction(density) * total - count) <= Fraction(1, 2) + Fraction(1, 10**9)


@given(st.integers(1, 10_000), st.data())
@thorough
def test_count_over_total_gives_the_count_again(total, data):
    count = data.draw(st.integers(0, total))
    assert count_of(count / total, total) == count


def test_halves_go_up():
    assert [count_of(0.5, n) for n in (1, 3, 5)] == [1, 2, 3]


@pytest.mark.parametrize("density", [-0.1, 1.1, math.nan])
def test_densities_out_of_range_are_refused(density):
    with pytest.raises(MaskError, match="is not in \\[0, 1\\]"):
        count_of(density, 10)
