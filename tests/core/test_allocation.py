from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from openwork.core import allocation
from openwork.core.allocation import er, erk, erk_plus, explicit, from_scores, top_globally, uniform, uniform_plus
from openwork.core.select import count_of
from openwork.errors import AllocationError, MaskError
from tests.strategies import best, densities, layers, quick, seeds, tensor, thorough


def named(*shapes):
    return {f"layer{k}": torch.Size(shape) for k, shape in enumerate(shapes)}


MLP = named((300, 784), (100, 300), (10, 100))
CONV = named((16, 1, 3, 3), (32, 16, 3, 3), (64, 32, 3, 3), (10, 64))
DEEP = named((16, 3, 3, 3), (16, 16, 3, 3), (32, 16, 3, 3), (64, 32, 3, 3), (10, 64))

# Worked numbers, solved by hand from the formulas; counts are integers, so a density may be off by a weight or so.
ANCHORS = [
    (erk, MLP, 0.1, [0.079568, 0.230189, 1.0]),
    (erk, MLP, 0.05, [0.038484, 0.111334, 0.918507]),
    (erk, MLP, 0.02, [0.015394, 0.044534, 0.367403]),
    (erk, CONV, 0.1, [1.0, 0.120072, 0.056701, 1.0]),
    (erk, CONV, 0.05, [0.75202, 0.055175, 0.026055, 0.544397]),
    (er, CONV, 0.1, [1.0, 0.153175, 0.076588, 0.188916]),
    (erk, DEEP, 0.1, [0.528919, 0.150742, 0.107106, 0.050578, 1.0]),
    (er, DEEP, 0.1, [0.571697, 0.180536, 0.135402, 0.067701, 0.166996]),
    (erk_plus, DEEP, 0.1, [0.528919, 0.150742, 0.107106, 0.050578, 1.0]),
    (uniform_plus, DEEP, 0.1, [1.0, 0.0821338, 0.0821338, 0.0821338, 0.2]),
    (erk, DEEP, 0.3, [1.0, 0.582596, 0.41395, 0.195476, 1.0]),
    (er, DEEP, 0.3, [1.0, 0.564897, 0.423673, 0.211837, 0.52253]),
    (uniform_plus, DEEP, 0.3, [1.0, 0.2883621, 0.2883621, 0.2883621, 0.2883621]),
    (uniform, DEEP, 0.1, [0.1] * 5),
]


@pytest.mark.parametrize(("rule", "shapes", "density", "expected"), ANCHORS)
def test_worked_numbers(rule, shapes, density, expected):
    found = rule(shapes, density)
    for (name, share), ideal in zip(found.items(), expected, strict=True):
        size = math.prod(shapes[name])
        assert abs(share - ideal) * size <= 1.0 + 1e-6 * size, name


def resnet(depth: int, width: int) -> dict[str, torch.Size]:
    """CIFAR's residual network: 3x3 convolutions, 1x1 projections, one linear layer."""
    shapes, blocks, inputs = [(width, 3, 3, 3)], (depth - 2) // 6, width
    for outputs in (width, 2 * width, 4 * width):
        for _ in range(blocks):
            shapes += [(outputs, inputs, 3, 3), (outputs, outputs, 3, 3)]
            if outputs != inputs:
                shapes.append((outputs, inputs, 1, 1))
            inputs = outputs
    return named(*shapes, (10, inputs))


@pytest.mark.parametrize(
    ("depth", "width", "total", "first", "linear"),
    [
        (20, 16, 270_896, 0.4748, 0.9486),
        (20, 8, 67_992, 0.3003, 0.5008),
        (20, 32, 1_081_440, None, 1.0),
        (32, 16, 464_432, None, None),
    ],
)
def test_erk_of_residual_networks(depth, width, total, first, linear):
    shapes = resnet(depth, width)
    assert sum(map(math.prod, shapes.values())) == total
    found = list(erk(shapes, 0.05).values())
    sizes = [math.prod(shape) for shape in shapes.values()]
    if first is not None:
        assert abs(found[0] - first) <= 1 / sizes[0]
    if linear is not None:
        assert abs(found[-1] - linear) <= 1 / sizes[-1]
    if (depth, width) == (20, 16):
        assert found[-2] == pytest.approx(0.02982, abs=1 / sizes[-2])
    if (depth, width) == (32, 16):
        epsilon = found[1] * sizes[1] / sum(list(shapes.values())[1])
        assert epsilon == pytest.approx(8.8729, abs=1 / sum(list(shapes.values())[1]))


RULES = [uniform, er, erk, erk_plus, uniform_plus]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
@given(shapes=layers(), density=densities)
@thorough
def test_counts_are_whole_and_sum_to_the_budget(rule, shapes, density):
    try:
        found = rule(shapes, density)
    except AllocationError:
        assert rule in (erk_plus, uniform_plus)
        return
    counts = counts_of(shapes, found)
    assert sum(counts) == count_of(density, sum(map(math.prod, shapes.values())))
    assert list(found) == list(shapes)


def counts_of(shapes, found):
    counts = []
    for name, shape in shapes.items():
        count = round(found[name] * math.prod(shape))
        assert found[name] == count / math.prod(shape)
        assert 0 <= count <= math.prod(shape)
        assert count_of(found[name], math.prod(shape)) == count
        counts.append(count)
    return counts


@given(layers(), densities)
@thorough
def test_erk_is_proportional_where_it_is_not_full(shapes, density):
    found = erk(shapes, density)
    raw = {name: sum(shape) / math.prod(shape) for name, shape in shapes.items()}
    slack = {name: 1.0 / math.prod(shape) for name, shape in shapes.items()}
    free = [name for name in shapes if found[name] < 1 - slack[name]]
    if not free:
        return
    low = max((found[name] - slack[name]) / raw[name] for name in free)
    high = min((found[name] + slack[name]) / raw[name] for name in free)
    assert low <= high + 1e-9  # one epsilon explains every layer that is not full, up to a weight each
    for name in set(shapes) - set(free):
        assert high * raw[name] >= 1 - 2 * slack[name] - 1e-9  # and asks the full ones to be full


@given(layers(), densities)
@quick
def test_er_is_erk_without_kernels(shapes, density):
    flat = {name: torch.Size([*shape[:2], *[1] * (len(shape) - 2)]) for name, shape in shapes.items()}
    matrices = {name: shape[:2] for name, shape in flat.items()}
    assert er(matrices, density) == erk(matrices, density)


@given(st.integers(1, 5), st.lists(st.integers(1, 5), min_size=2, max_size=4), densities)
@quick
def test_erk_of_equal_layers_and_of_power_zero_is_uniform(count, shape, density):
    equal = named(*[shape] * count)
    assert erk(equal, density) == uniform(equal, density)
    assert erk(DEEP, density, power=0.0) == uniform(DEEP, density)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_density_one_is_dense(rule):
    assert set(rule(DEEP, 1.0).values()) == {1.0}


def test_density_grows_with_raw():
    for density in (0.02, 0.1, 0.3, 0.7):
        found = erk(DEEP, density)
        order = sorted(DEEP, key=lambda name: sum(DEEP[name]) / math.prod(DEEP[name]))
        shares = [found[name] for name in order]
        assert all(a <= b + 1 / 432 for a, b in pairwise(shares))


def test_largest_remainder_then_order():
    # 3 of 12 weights in layers of 4: .25 of each is 1; 4 of 12: one more weight for the first layer
    assert list(uniform(named((2, 2), (2, 2), (2, 2)), 0.25).values()) == [0.25, 0.25, 0.25]
    assert list(uniform(named((2, 2), (2, 2), (2, 2)), 4 / 12).values()) == [0.5, 0.25, 0.25]
    # 5 of 10 weights in layers of 3 and 7: ideals 1.5 and 3.5 tie, the first goes up
    assert list(uniform(named((1, 3), (1, 7)), 0.5).values()) == [2 / 3, 3 / 7]
    # ideals .9 and 2.1 of 3: the larger remainder goes up
    assert list(uniform(named((1, 3), (1, 7)), 0.3).values()) == [1 / 3, 2 / 7]


@pytest.mark.parametrize(("rule", "density"), [(uniform_plus, 0.01), (erk_plus, 0.01)])
def test_fixed_layers_that_exceed_the_budget_are_refused(rule, density):
    with pytest.raises(AllocationError, match=f"density {density} of 26416 weights cannot hold"):
        rule(DEEP, density)


@given(layers(), seeds, densities)
@quick
def test_shares_from_scores_are_those_of_the_global_top(shapes, seed, density):
    scores = {name: tensor(shape, seed + k, levels=4) for k, (name, shape) in enumerate(shapes.items())}
    masks = top_globally(scores, density)
    flat = torch.cat([score.reshape(-1) for score in scores.values()])
    expected = best(flat, count_of(density, flat.numel()))
    assert torch.equal(torch.cat([mask.reshape(-1) for mask in masks.values()]), expected)
    assert from_scores(scores, density) == {name: masks[name].double().mean().item() for name in masks}


def test_global_top_refuses_nan_and_takes_nothing():
    assert top_globally({}, 0.5) == {}
    with pytest.raises(MaskError):
        top_globally({"a": torch.tensor([1.0, math.nan])}, 0.5)


@given(layers(smallest=2), densities)
@quick
def test_explicit_densities_are_kept(shapes, density):
    given_shares = erk(shapes, density)
    assert explicit(given_shares)(shapes, density) == given_shares


def test_explicit_densities_that_do_not_fit_are_refused():
    with pytest.raises(AllocationError, match="disagree on layer1, other"):
        explicit({"layer0": 0.1, "other": 0.5})(named((2, 2), (2, 2)), 0.1)
    with pytest.raises(AllocationError, match=r"keep 50 weights, but density 0.1 of 100 is 10; ask for density 0.5"):
        explicit({"layer0": 0.5})(named((10, 10)), 0.1)
    with pytest.raises(MaskError, match=r"1.5"):
        explicit({"layer0": 1.5})(named((10, 10)), 0.1)


@given(layers(), densities)
@quick
def test_names(shapes, density):
    assume(shapes)
    rules = {"uniform": uniform, "uniform+": uniform_plus, "er": er, "erk": erk, "erk+": erk_plus}
    for name, rule in rules.items():
        assert allocation.named(name) is rule


def test_unknown_names_are_refused():
    with pytest.raises(AllocationError, match="unknown allocation 'ERK': use one of uniform"):
        allocation.named("ERK")


@pytest.mark.parametrize("rule", [uniform, er, erk], ids=lambda rule: rule.__name__)
def test_no_layers_and_empty_layers(rule):
    assert rule({}, 0.5) == {}
    assert rule(named((0, 3), (2, 2)), 0.5) == {"layer0": 0.0, "layer1": 0.5}


@pytest.mark.parametrize("density", [-0.1, 1.5, math.nan])
def test_densities_out_of_range_are_refused(density):
    for rule in (uniform, er, erk):
        with pytest.raises((MaskError, AllocationError)):
            rule(DEEP, density)
