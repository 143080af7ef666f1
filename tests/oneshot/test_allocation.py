from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from openwork.core.allocation import top_globally
from openwork.core.select import count_of
from openwork.errors import AllocationError
from openwork.oneshot.allocation import by_global_magnitude, explicit, outlier_share, owl, uniform
from tests.strategies import densities, dtypes, quick, seeds, tensor

sizes = st.lists(st.integers(1, 200), min_size=1, max_size=6).map(
    lambda found: {f"l{k}.weight": n for k, n in enumerate(found)}
)


@given(sizes, densities)
@quick
def test_uniform_sums_exactly_and_departs_by_less_than_a_weight(layers, density):
    counts = uniform(layers, density)
    assert sum(counts.values()) == count_of(density, sum(layers.values()))
    assert all(abs(counts[name] - density * size) < 1 + 1e-6 for name, size in layers.items())


@given(sizes, densities, st.floats(0, 0.3), seeds)
@quick
def test_owl_sums_exactly_stays_within_the_spread_and_orders_by_outliers(layers, density, spread, seed):
    shares = dict(zip(layers, tensor(torch.Size([len(layers)]), seed).abs().tolist(), strict=True))
    counts = owl(layers, shares, density, spread)
    assert sum(counts.values()) == count_of(density, sum(layers.values()))
    for name, size in layers.items():
        assert 0 <= counts[name] <= size
        assert abs(counts[name] / size - density) <= spread + 1.001 / size


def test_owl_reaches_the_spread_and_is_affine_in_the_shares():
    layers = dict.fromkeys(["a", "b", "c"], 100_000)
    counts = owl(layers, {"a": 0.01, "b": 0.02, "c": 0.06}, 0.5, 0.08)
    found = {name: count / 100_000 for name, count in counts.items()}
    assert found == pytest.approx({"a": 0.5 - 0.16 / 3, "b": 0.5 - 0.08 / 3, "c": 0.58}, abs=1e-5)
    assert owl(layers, dict.fromkeys(layers, 0.3), 0.5, 0.08) == uniform(layers, 0.5)


def test_outliers_are_scores_above_a_multiple_of_the_mean():
    score = torch.ones(100)
    score[:3] = 1000.0
    assert outlier_share(score, 5.0) == pytest.approx(0.03)
    assert outlier_share(torch.zeros(4), 5.0) == 0.0


@given(st.lists(st.integers(1, 30), min_size=1, max_size=4), seeds, dtypes, densities, st.sampled_from([None, 3]))
@quick
def test_the_global_ranking_is_a_top_k_over_everything(widths, seed, dtype, density, levels):
    weights = {f"l{k}": tensor(torch.Size([n]), seed + k, dtype, levels) for k, n in enumerate(widths)}
    masks = top_globally({name: weight.abs() for name, weight in weights.items()}, density)
    assert by_global_magnitude(lambda: weights.items(), density) == {name: int(mask.sum()) for name, mask in masks.items()}


def test_explicit_densities_go_by_layer_parameter_or_glob():
    layers = {"h.0.fc.weight": 10, "h.1.fc.weight": 10, "out.weight": 10}
    assert explicit(layers, {"*": 0.5, "h.1": 0.2, "out.weight": 1}, None) == {
        "h.0.fc.weight": 5, "h.1.fc.weight": 2, "out.weight": 10,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("given", "density", "words"),
    [
        ({"a": 0.5}, None, "no density for b.weight"),
        ({"*": 0.5, "c": 0.5}, None, "names 'c'"),
        ({"*": 1.5}, None, "density 1.5"),
        ({"*": True}, None, "density True"),
        ({"*": 0.5}, 0.8, "ask for 0.5"),
    ],
)
def test_explicit_densities_that_do_not_fit_are_refused(given, density, words):
    with pytest.raises(AllocationError, match=words):
        explicit({"a.weight": 10, "b.weight": 10}, given, density)
