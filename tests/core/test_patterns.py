from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from openwork.core.patterns import NM, Block, Channel, KernelGroup, Layer, Pattern, Unstructured, parse
from openwork.core.select import count_of
from openwork.errors import MaskError, PatternError
from openwork.testing import check_pattern
from openwork.testing.patterns import unit_of_weight
from tests.strategies import best, densities, dtypes, quick, scores, seeds, tensor, thorough

MATRICES = [(8, 12), (4, 4, 3, 3)]

CASES = [
    (Unstructured(), [(5, 7), (4, 3, 3, 3), (6,), (1, 1)]),
    (NM(2, 4), [(5, 8), (3, 4, 3, 3)]),
    (NM(1, 3, dim=0), [(6, 5), (3, 2, 2)]),
    (NM(4, 4), [(2, 8)]),
    (Block(4), MATRICES),
    (Block(2, 3), [(4, 6), (2, 3, 3)]),
    (Block(1, 4), MATRICES),
    (KernelGroup(4), MATRICES),
    (KernelGroup(2, "point"), MATRICES),
    (KernelGroup(4, balance="row"), MATRICES),
    (KernelGroup(2, "point", "row"), MATRICES),
    (Channel(0), [*MATRICES, (5,)]),
    (Channel(1), MATRICES),
    (Layer(), [*MATRICES, (3,)]),
]


@pytest.mark.parametrize(("pattern", "shapes"), CASES, ids=[str(pattern) for pattern, _ in CASES])
def test_conformance(pattern, shapes):
    check_pattern(pattern, shapes)


@given(scores(), densities)
@thorough
def test_unstructured_is_a_global_sort(score, density):
    assert torch.equal(Unstructured().select(score, density), best(score, count_of(density, score.numel())))


@given(seeds, st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), densities, dtypes)
@thorough
def test_blocks_of_any_size(seed, rows, cols, down, across, density, dtype):
    shape = torch.Size([rows * down, cols * across])
    score = tensor(shape, seed, dtype, levels=3)
    sums = score.double().reshape(down, rows, across, cols).sum(dim=(1, 3))
    kept = best(sums, count_of(density, sums.numel()))
    expected = kept.repeat_interleave(rows, 0).repeat_interleave(cols, 1)
    assert torch.equal(Block(rows, cols).select(score, density), expected)


@given(seeds, st.integers(1, 5), st.integers(1, 5), st.integers(1, 3), st.integers(1, 3), st.data())
@thorough
def test_nm_keeps_n_of_every_m(seed, n, more, groups, rows, data):
    m = n + more - 1
    dim = data.draw(st.integers(0, 2))
    shape = [rows, 2, 3]
    shape[dim] = groups * m
    score = tensor(torch.Size(shape), seed, levels=data.draw(st.sampled_from([None, 2])))
    mask = NM(n, m, dim).select(score, n / m)
    for line, marks in zip(score.movedim(dim, -1).reshape(-1, m), mask.movedim(dim, -1).reshape(-1, m), strict=True):
        assert torch.equal(marks, best(line, n))
    NM(n, m, dim).check(mask)


def test_two_of_four_along_the_input():
    score = torch.tensor([[1.0, 4.0, 3.0, 2.0, 5.0, 5.0, 5.0, 5.0]])
    assert NM(2, 4).select(score, 0.5).int().tolist() == [[0, 1, 1, 0, 1, 1, 0, 0]]
    assert NM(2, 4).select(score, 0.75).int().tolist() == [[0, 1, 1, 1, 1, 1, 1, 0]]  # on the way from dense
    assert NM(2, 4).select(score, 0.0).int().tolist() == [[0, 1, 1, 0, 1, 1, 0, 0]]  # never below N


def test_a_kernel_group_shares_its_pattern():
    score = torch.zeros(4, 3, 2, 2)
    score[2, 1, 0, 1] = 1.0
    mask = KernelGroup(2).select(score, 1 / 6)
    assert mask[2:, 1].all()
    assert int(mask.sum()) == 8
    point = KernelGroup(2, "point").select(score, 1 / 24)
    assert point.nonzero().tolist() == [[2, 1, 0, 1], [3, 1, 0, 1]]
    rows = KernelGroup(2, balance="row").select(score, 1 / 3)
    assert [int(rows[k].sum()) for k in range(4)] == [4, 4, 4, 4]
    assert rows[:2, 0].all()  # a group without scores keeps its first kernel
    assert rows[2:, 1].all()


GROUPS = st.builds(
    KernelGroup, st.integers(1, 6), st.sampled_from(["kernel", "point"]), st.sampled_from(["layer", "row"])
)  # fmt: skip


@given(GROUPS, st.integers(1, 13), st.integers(1, 4), st.sampled_from([(), (1, 1), (2, 3)]), densities, seeds)
@thorough
def test_leftover_channels_are_a_smaller_group_that_competes_by_its_mean(pattern, out, inputs, kernel, density, seed):
    shape = torch.Size([out, inputs, *kernel])
    score = tensor(shape, seed, torch.float64, levels=None)
    groups = [range(start, min(start + pattern.out, out)) for start in range(0, out, pattern.out)]
    columns = score.reshape(out, inputs, -1).sum(2) if pattern.unit == "kernel" else score.reshape(out, -1)
    means = torch.stack([columns[list(group)].mean(0) for group in groups])
    assert torch.allclose(pattern.tiles(score).reshape(len(groups), -1), means * pattern.out, rtol=1e-12)

    mask = pattern.select(score, density)
    pattern.check(mask)
    kept = mask.reshape(out, inputs, -1).all(2) if pattern.unit == "kernel" else mask.reshape(out, -1)
    rows = torch.stack([kept[list(group)].all(0) for group in groups])
    assert all(torch.equal(kept[list(group)].any(0), row) for group, row in zip(groups, rows, strict=True))
    if pattern.balance == "row":
        assert rows.sum(1).tolist() == [count_of(density, rows.shape[1])] * len(groups)
    else:
        assert int(rows.sum()) == count_of(density, rows.numel())
    sizes = pattern.sizes(shape)
    assert sizes.shape == pattern.tiles(score).shape
    assert int(sizes.sum()) == score.numel()
    assert int((sizes.reshape(rows.shape) * rows).sum()) == int(mask.sum())


def test_leftover_channels_are_not_cut_off():
    score = torch.ones(9, 6)
    score[8] = 1.5
    mask = KernelGroup(8).select(score, 0.5)
    assert mask[8].all()  # by plain sums, 1.5 a unit against 8, they would all go
    assert not mask[:8].any()
    assert KernelGroup(8).select(torch.ones(3, 4), 0.5).tolist() == [[True, True, False, False]] * 3


def test_channels_and_layers():
    score = torch.tensor([[1.0, 5.0], [2.0, 2.0], [0.0, 9.0]])
    assert Channel(0).select(score, 2 / 3).tolist() == [[True, True], [False, False], [True, True]]
    assert Channel(1).select(score, 0.5).tolist() == [[False, True]] * 3
    assert Layer().select(score, 1.0).all()
    assert not Layer().select(score, 0.4).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_of_half_precision_neither_overflow_nor_lose_order(dtype):
    score = torch.ones(2, 70_000, dtype=dtype)
    score[1, :70] = 2.0
    assert Channel(0).select(score, 0.5).any(dim=1).tolist() == [False, True]


@given(st.sampled_from([case for case in CASES if case[0] != Unstructured()]), seeds)
@quick
def test_masks_kept_in_part_are_refused(case, seed):
    pattern, shapes = case
    shape = torch.Size(shapes[0])
    if isinstance(pattern, NM):
        if pattern.n < pattern.m:
            with pytest.raises(PatternError, match=f"group 0 keeps {pattern.m} of {pattern.m}, allowed are {pattern.n}"):
                pattern.check(torch.ones(shape, dtype=torch.bool))
        return
    units = unit_of_weight(pattern, shape)
    mask = units == int(tensor(shape, seed).argmax()) % int(units.max() + 1)
    pattern.check(mask)
    mask.view(-1)[int(mask.reshape(-1).int().argmax())] = False
    with pytest.raises(PatternError, match="kept in part"):
        pattern.check(mask)


UNDIVIDED = [
    (NM(2, 4), (8, 6)), (NM(2, 4), (8,)), (Block(4), (6, 6)), (Block(1, 4), (4, 6)), (Block(1), (4,)),
    (KernelGroup(4), (4,)), (KernelGroup(4), (3,)), (KernelGroup(4), ()), (KernelGroup(4), (0, 4)), (KernelGroup(4), (6, 0)),
    (Channel(1), (4,)), (Block(2), (0, 4)),
]  # fmt: skip


@pytest.mark.parametrize(("pattern", "shape"), UNDIVIDED, ids=str)
def test_shapes_that_are_not_divided_are_refused(pattern, shape):
    assert not pattern.divides(torch.Size(shape))
    with pytest.raises(PatternError):
        pattern.select(torch.ones(shape), 0.5)


def test_patterns_that_make_no_sense_are_refused():
    for build in (
        lambda: NM(0, 4), lambda: NM(5, 4), lambda: Block(0), lambda: Block(2, 0), lambda: KernelGroup(0),
        lambda: KernelGroup(4, "row"), lambda: KernelGroup(4, balance="kernel"),
    ):  # fmt: skip
        with pytest.raises(PatternError):
            build()


WORDS = {
    "unstructured": Unstructured(), "2:4": NM(2, 4), " 1:8 ": NM(1, 8), "block4x1": Block(4, 1), "Block2x8": Block(2, 8),
    "group8": KernelGroup(8), "channel": Channel(0), "channel0": Channel(0), "channel1": Channel(1), "layer": Layer(),
}  # fmt: skip


@pytest.mark.parametrize("word", WORDS)
def test_words(word):
    assert parse(word) == WORDS[word]


@pytest.mark.parametrize("word", ["", "2:", "4x1", "block4", "channel2", "group", "0:4", "5:4", "block0x1", "group0"])
def test_other_words_are_refused(word):
    with pytest.raises(PatternError):
        parse(word)


def test_density_of_nm_is_fixed():
    NM(2, 4).check_density(0.5)
    with pytest.raises(PatternError, match=r"2:4 keeps 0.5 of every layer, not 0.1"):
        NM(2, 4).check_density(0.1)


def test_balance_says_whether_layers_may_compete():
    balanced = [NM(2, 4), KernelGroup(2, balance="row")]
    assert all(pattern.balanced for pattern in balanced)
    assert not any(p.balanced for p in (Unstructured(), Block(4), KernelGroup(2), Channel(), Layer()))


@given(st.sampled_from(CASES), densities)
@quick
def test_selecting_costs_a_score_of_nan_its_place_or_an_error(case, density):
    pattern, shapes = case
    score = torch.full(shapes[0], torch.nan)
    quota, width = pattern.quota(density, pattern.tiles(score).shape[1]), pattern.tiles(score).shape[1]
    if 0 < quota < width:
        with pytest.raises(MaskError):
            pattern.select(score, density)


def test_a_pattern_of_ones_own():
    class Diagonal(Pattern):
        """Cyclic diagonals of a square weight stay or go whole."""

        def tiles(self, score):
            n = len(score)
            return torch.stack([torch.diagonal(torch.cat([score, score], 1), k).sum() for k in range(n)]).reshape(1, n)

        def untile(self, units, shape):
            n = shape[0]
            place = (torch.arange(n).unsqueeze(0) - torch.arange(n).unsqueeze(1)) % n
            return units.reshape(-1)[place]

    check_pattern(Diagonal(), [(5, 5)])
