from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from openwork.core.patterns import NM, Block, Channel, KernelGroup, Unstructured
from openwork.core.select import count_of
from openwork.errors import MaskError
from openwork.sparsifier.prune_grow import keep, prune_and_grow, shrink, tighten
from tests.strategies import best, bools, densities, layers, quick, seeds, tensor, thorough, weights

shares = st.sampled_from([0.0, 0.1, 0.25, 0.3, 0.5, 0.9, 1.0])


def test_the_worked_example():
    w = torch.tensor([0.9, -0.05, 0.3, 0, 0, -0.6, 0, 0.02, 0, -0.4])
    g = torch.tensor([0.1, 0.7, -0.2, 0.3, -0.9, 0.05, 0.2, -0.8, 0.6, 0.01])
    mask = w != 0
    survivors = keep(mask, w.abs(), 4)
    assert (mask & ~survivors).nonzero().squeeze(1).tolist() == [1, 7]
    after = prune_and_grow(mask, w.abs(), g.abs(), 2 / 6)
    assert (after & ~survivors).nonzero().squeeze(1).tolist() == [4, 7]
    assert int(after.sum()) == 6


@given(weights, st.data())
@thorough
def test_keep_is_a_sort_of_what_is_on(shape, data):
    active = data.draw(bools(shape))
    score = tensor(shape, data.draw(seeds), levels=3)
    count = data.draw(st.integers(0, int(active.sum())))
    kept = keep(active, score, count)
    assert torch.equal(kept, best(score, count, among=active))
    with pytest.raises(MaskError, match=f"cannot keep {int(active.sum()) + 1} of {int(active.sum())} active"):
        keep(active, score, int(active.sum()) + 1)


@given(weights, st.data(), shares, st.booleans(), st.sampled_from([None, 3]))
@thorough
def test_prune_and_grow_against_brute_force(shape, data, share, round_up, levels):
    mask = data.draw(bools(shape))
    drop, grow = tensor(shape, data.draw(seeds), levels=levels).abs(), tensor(shape, data.draw(seeds), levels=levels).abs()
    after = prune_and_grow(mask, drop, grow, share, round_up=round_up)
    kept = int(mask.sum())
    exact = share * kept
    count = round(exact) if abs(exact - round(exact)) < 1e-9 else math.ceil(exact) if round_up else math.floor(exact)
    survivors = best(drop, kept - count, among=mask)
    assert torch.equal(after, survivors | best(grow, count, among=~survivors))
    assert int(after.sum()) == kept


@given(st.integers(1, 4), st.integers(1, 4), st.data(), shares)
@thorough
def test_prune_and_grow_of_nm_keeps_every_group_full(rows, groups, data, share):
    shape = torch.Size([rows, 4 * groups])
    pattern = NM(2, 4)
    drop, grow = (tensor(shape, data.draw(seeds), levels=5).abs() for _ in range(2))
    mask = pattern.select(tensor(shape, data.draw(seeds)), 0.5)
    after = prune_and_grow(mask, drop, grow, share, pattern=pattern)
    survivors = best(drop, int(mask.sum()) - math.floor(share * int(mask.sum()) + 1e-9), among=mask)
    for line, grown, marks in zip(*(t.reshape(-1, 4) for t in (survivors, grow, after)), strict=True):
        assert torch.equal(marks, line | best(grown, 2 - int(line.sum()), among=~line))
    pattern.check(after)


@given(st.integers(1, 3), st.integers(1, 3), st.data(), shares)
@quick
def test_prune_and_grow_of_blocks_moves_whole_blocks(down, across, data, share):
    shape, pattern = torch.Size([2 * down, 3 * across]), Block(2, 3)
    drop, grow = (tensor(shape, data.draw(seeds)).abs() for _ in range(2))
    mask = pattern.select(tensor(shape, data.draw(seeds)), data.draw(densities))
    after = prune_and_grow(mask, drop, grow, share, pattern=pattern)
    pattern.check(after)
    units = [pattern.tiles(t.double()).reshape(-1) for t in (mask, drop, grow)]
    expected = prune_and_grow(units[0] > 0, units[1], units[2], share)
    assert torch.equal(pattern.tiles(after.double()).reshape(-1) > 0, expected)


def test_a_kept_zero_never_loses_to_what_is_off():
    mask = torch.tensor([True, True, False, False])
    drop = torch.tensor([0.0, 1.0, 5.0, 5.0])  # what is off has higher scores
    assert torch.equal(prune_and_grow(mask, drop, torch.zeros(4), 0.0), mask)
    assert keep(mask, drop, 2).tolist() == mask.tolist()
    assert tighten(mask, drop, 0.5, Unstructured()).tolist() == mask.tolist()
    assert shrink({"a": mask}, {"a": drop}, 0.5, Unstructured())["a"].tolist() == mask.tolist()


@given(layers(), st.data(), densities)
@thorough
def test_shrink_against_brute_force(shapes, data, density):
    masks = {name: data.draw(bools(shape)) for name, shape in shapes.items()}
    scores = {name: tensor(shape, data.draw(seeds), levels=4).abs() for name, shape in shapes.items()}
    after = shrink(masks, scores, density, Unstructured())
    reserved = {name: best(scores[name], 1, among=mask) for name, mask in masks.items()}
    flat_on = torch.cat([mask.reshape(-1) for mask in masks.values()])
    flat_score = torch.cat([score.reshape(-1) for score in scores.values()])
    first = torch.cat([mask.reshape(-1) for mask in reserved.values()])
    goal = min(count_of(density, flat_on.numel()), int(flat_on.sum()))
    expected = first | best(flat_score, max(0, goal - int(first.sum())), among=flat_on & ~first)
    assert torch.equal(torch.cat([mask.reshape(-1) for mask in after.values()]), expected)
    assert sum(int(mask.sum()) for mask in after.values()) == max(goal, int(first.sum()))
    assert all(not bool((after[name] & ~masks[name]).any()) for name in masks)


@given(st.integers(2, 4), seeds, st.floats(0.2, 1.0))
@quick
def test_shrink_of_larger_units_ranks_their_mean_and_keeps_within_the_goal(count, seed, density):
    masks = {f"l{k}": torch.ones(4, 2 + k, dtype=torch.bool) for k in range(count)}
    scores = {name: tensor(mask.shape, seed + k).abs() for k, (name, mask) in enumerate(masks.items())}
    after = shrink(masks, scores, density, Channel(0))
    goal = count_of(density, sum(mask.numel() for mask in masks.values()))
    smallest = sum(mask.shape[1] for mask in masks.values())  # one channel of each layer
    kept = sum(int(mask.sum()) for mask in after.values())
    assert kept <= max(goal, smallest)
    assert kept > goal - max(mask.shape[1] for mask in masks.values()) or kept == smallest
    means = {(name, row): scores[name][row].mean().item() for name in masks for row in range(4)}
    on = {(name, row) for name, row in means if after[name][row].all()}
    for name, mask in after.items():
        Channel(0).check(mask)
        rows = [row for row in range(4) if (name, row) in on]
        assert max(range(4), key=lambda row: means[name, row]) in rows
    free = {unit for unit in on if means[unit] < max(means[unit[0], row] for row in range(4))}
    off = set(means) - on
    if free and off:
        assert min(means[unit] for unit in free) >= max(means[unit] for unit in off)


@given(weights, st.data(), densities, st.sampled_from([None, 3]))
@thorough
def test_tighten_against_brute_force(shape, data, density, levels):
    mask = data.draw(bools(shape))
    score = tensor(shape, data.draw(seeds), levels=levels)
    after = tighten(mask, score, density, Unstructured())
    goal = min(count_of(density, mask.numel()), int(mask.sum()))
    assert torch.equal(after, best(score, goal, among=mask))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_tighten_of_large_scores_never_wakes_what_is_off(dtype):
    score = torch.full((4,), 3e4, dtype=dtype)  # 3e4 - 1 is 3e4 in half precision
    mask = torch.tensor([False, False, True, True])
    assert tighten(mask, score, 0.5, Unstructured()).tolist() == mask.tolist()
    assert tighten(mask, 1e3 * score.float(), 0.25, Unstructured()).tolist() == [False, False, True, False]


def test_nm_tightens_from_dense_by_one_weight_of_a_group():
    pattern = NM(2, 4)
    score = torch.tensor([[4.0, 3.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0]])
    mask = torch.ones(1, 8, dtype=torch.bool)
    mask = tighten(mask, score, 0.75, pattern)
    assert mask.int().tolist() == [[1, 1, 1, 0, 1, 1, 1, 0]]
    assert tighten(mask, score, 0.5, pattern).int().tolist() == [[1, 1, 0, 0, 1, 1, 0, 0]]


@given(weights, st.data(), densities)
@quick
def test_revising_twice_without_news_is_a_fixed_point(shape, data, density):
    score = tensor(shape, data.draw(seeds)).abs()
    mask = Unstructured().select(score, density)
    grow = torch.where(mask, score, 0.0)
    assert torch.equal(prune_and_grow(mask, score, grow, 0.5), mask)
    assert torch.equal(tighten(mask, score, density, Unstructured()), mask)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_scores_that_cannot_be_ranked_are_refused(bad):
    mask = torch.tensor([True, True, True, False])
    score = torch.tensor([1.0, bad, 2.0, 0.0])
    with pytest.raises(MaskError):
        prune_and_grow(mask, score, torch.ones(4), 0.4)
    with pytest.raises(MaskError):
        prune_and_grow(mask, torch.ones(4), torch.tensor([1.0, 2.0, bad, bad]), 0.4)
    with pytest.raises(MaskError):
        tighten(mask, score, 0.25, Unstructured())


@given(st.integers(1, 19), st.integers(1, 19), st.integers(2, 8), densities, seeds)
@quick
def test_a_smaller_last_group_counts_what_it_has(one, two, group, density, seed):
    pattern = KernelGroup(group)
    shapes = {"a": (one, 6), "b": (two, 5)}
    scores = {name: tensor(shape, seed + i).abs() for i, (name, shape) in enumerate(shapes.items())}
    masks = {name: torch.ones(shape, dtype=torch.bool) for name, shape in shapes.items()}
    left = shrink(masks, scores, density, pattern)
    for mask in left.values():
        pattern.check(mask)
    kept = sum(int(mask.sum()) for mask in left.values())
    goal = count_of(density, sum(mask.numel() for mask in masks.values()))
    assert goal - group < kept <= max(goal, 2 * group)
