from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from openwork.core.patterns import NM, Block, KernelGroup, Unstructured
from openwork.core.select import count_of
from openwork.errors import MaskError, PatternError
from openwork.oneshot.magnitude import magnitude
from openwork.oneshot.wanda import row_wise, score, wanda
from tests.oneshot.networks import correlated, normal
from tests.strategies import quick, seeds, tensor


def test_scores_are_weight_times_norm_of_the_input():
    W, X = normal(6, 10, dtype=torch.float64), correlated(40, 10)
    expected = torch.stack([torch.stack([W[o, i].abs() * X[:, i].norm() for i in range(10)]) for o in range(6)])
    assert torch.allclose(score(W, X.square().sum(0, keepdim=True)), expected, rtol=1e-12)


def test_every_row_keeps_its_best_as_brute_force_finds_them():
    W, X = normal(5, 6, dtype=torch.float64), correlated(30, 6)
    mask = wanda(W, X.square().sum(0, keepdim=True), 0.5, Unstructured())
    scores = (W.abs() * X.norm(dim=0)).tolist()
    for row, kept in zip(scores, mask.tolist(), strict=True):
        best = max(itertools.combinations(range(6), 3), key=lambda chosen: sum(row[i] for i in chosen))
        assert [i for i in range(6) if kept[i]] == list(best)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 4)])
def test_every_group_of_m_inputs_keeps_its_best_n(n, m):
    W, X = normal(3, 16, dtype=torch.float64), correlated(30, 16)
    mask = wanda(W, X.square().sum(0, keepdim=True), n / m, NM(n, m))
    scores = (W.abs() * X.norm(dim=0)).tolist()
    for o, start in itertools.product(range(3), range(0, 16, m)):
        group = scores[o][start : start + m]
        best = max(itertools.combinations(range(m), n), key=lambda chosen: sum(group[i] for i in chosen))
        assert [i for i in range(m) if mask[o, start + i]] == list(best)


@given(st.integers(1, 6), st.integers(1, 9), seeds, st.data())
@quick
def test_rows_share_an_exact_count_evenly(rows, width, seed, data):
    scores = tensor(torch.Size([rows, width]), seed, levels=data.draw(st.sampled_from([None, 2])))
    count = data.draw(st.integers(0, rows * width))
    mask = row_wise(scores, count)
    kept = mask.sum(dim=1)
    assert int(kept.sum()) == count
    assert int(kept.max() - kept.min()) <= 1
    for row, chosen in zip(scores, mask, strict=True):  # what stays is never below what goes
        if bool(chosen.any()) and not bool(chosen.all()):
            assert row[chosen].min() >= row[~chosen].max()


def test_the_odd_ones_go_to_the_rows_whose_next_score_is_highest():
    scores = torch.tensor([[9.0, 1.0, 0.0], [8.0, 3.0, 0.0], [7.0, 2.0, 0.0]])
    assert row_wise(scores, 5).sum(dim=1).tolist() == [1, 2, 2]


def test_groups_of_a_convolution_use_their_own_inputs():
    W = torch.ones(4, 2, 1, 1, dtype=torch.float64)  # two groups of two outputs, two inputs each
    squares = torch.tensor([[1.0, 4.0], [9.0, 1.0]], dtype=torch.float64)
    mask = wanda(W, squares, 0.5, Unstructured())
    assert mask.reshape(4, 2).tolist() == [[False, True], [False, True], [True, False], [True, False]]


@pytest.mark.parametrize("pattern", [Block(2, 2), KernelGroup(2, "point")])
def test_other_patterns_sum_the_scores_of_their_units(pattern):
    W, X = normal(4, 8, dtype=torch.float64), correlated(30, 8)
    squares = X.square().sum(0, keepdim=True)
    mask = wanda(W, squares, 0.5, pattern)
    assert torch.equal(mask, pattern.select(W.abs() * X.norm(dim=0), 0.5))
    pattern.check(mask)


def test_an_input_that_was_never_active_goes_first():
    W = torch.tensor([[100.0, 1.0, 2.0, 3.0]])
    assert wanda(W, torch.tensor([[0.0, 1.0, 1.0, 1.0]]), 0.75, Unstructured()).tolist() == [[False, True, True, True]]


def test_magnitude_compares_over_the_whole_layer():
    W = normal(7, 9)
    mask = magnitude(W, 0.4, Unstructured())
    assert int(mask.sum()) == count_of(0.4, 63)
    assert W.abs()[mask].min() >= W.abs()[~mask].max()


def test_what_cannot_be_done_is_refused():
    with pytest.raises(PatternError, match="multiple of 4"):
        wanda(normal(3, 6), torch.ones(1, 6), 0.5, NM(2, 4))
    with pytest.raises(MaskError, match="not finite"):
        row_wise(torch.tensor([[1.0, float("nan")]]), 1)
