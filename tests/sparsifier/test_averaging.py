from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from openwork.core.masks import Masks
from openwork.core.rng import generator
from openwork.errors import MaskError, MethodError, ModelError
from openwork.sparsifier.averaging import average_state, greedy_soup, same_masks


def states(count: int, *, seed: int = 0) -> list[dict[str, Tensor]]:
    """States as a convolution with batch norm has them, the integer counter different in each."""
    draw = generator(seed, "states")
    return [
        {
            "weight": torch.randn(3, 4, generator=draw),
            "half": torch.randn(5, generator=draw).half(),
            "running_mean": torch.randn(3, generator=draw),
            "num_batches_tracked": torch.tensor(10 + place),
        }
        for place in range(count)
    ]


def bits(tensor: Tensor) -> bytes:
    return tensor.numpy().tobytes()


def test_the_average_is_the_weighted_sum_taken_in_double_precision():
    parts, shares = states(3), [0.5, 0.3, 0.2]
    mean = average_state(parts, shares)
    for key in ("weight", "half", "running_mean"):
        wide = sum(share * part[key].double() for share, part in zip(shares, parts, strict=True))
        assert mean[key].dtype == parts[0][key].dtype
        assert torch.equal(mean[key], wide.to(parts[0][key].dtype))


def test_double_precision_is_what_keeps_large_values_that_cancel():
    parts = [{"w": torch.tensor([v])} for v in (1e8, 1.0, -1e8)]
    assert average_state(parts)["w"].item() == pytest.approx(1 / 3, rel=1e-6)
    assert sum(part["w"] / 3 for part in parts).item() != pytest.approx(1 / 3, rel=1e-2)  # what float32 gives


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_one_hot_weight_returns_that_member_bit_for_bit(place):
    parts = states(3)
    parts[place]["weight"][0, 0] = -0.0
    mean = average_state(parts, [float(i == place) for i in range(3)])
    for key in ("weight", "half", "running_mean"):
        assert bits(mean[key]) == bits(parts[place][key])
        assert mean[key].data_ptr() != parts[place][key].data_ptr()


def test_a_weight_of_zero_leaves_out_a_state_that_is_not_finite():
    parts = states(2)
    parts[1]["weight"].fill_(float("nan"))
    assert bits(average_state(parts, [1, 0])["weight"]) == bits(parts[0]["weight"])


@pytest.mark.parametrize("count", [2, 3, 7])
def test_identical_members_average_to_themselves(count):
    parts = [states(1)[0] for _ in range(count)]
    mean = average_state(parts)
    for key, value in parts[0].items():
        torch.testing.assert_close(mean[key], value, rtol=0, atol=1e-7)


def test_integers_and_plain_values_come_from_the_first():
    parts = [{**part, "extra": place} for place, part in enumerate(states(3))]
    mean = average_state(parts)
    assert mean["num_batches_tracked"].dtype is torch.int64
    assert mean["num_batches_tracked"].item() == 10
    assert mean["extra"] == 0


def test_masked_weights_of_the_average_are_exactly_zero():
    parts = states(2)
    mask = torch.arange(12).reshape(3, 4) % 3 == 0
    parts[1]["weight"][0, 1] = float("inf")  # masked: must not become NaN
    mean = average_state(parts, masks=Masks({"weight": mask}))
    assert torch.equal(mean["weight"] != 0, mask)


def test_states_whose_masks_differ_are_refused():
    one, other = torch.tensor([True, False]), torch.tensor([False, True])
    parts = [{"w": one.float()}, {"w": other.float()}]
    with pytest.raises(MaskError, match="'w' differ"):
        average_state(parts, masks=[{"w": one}, {"w": other}])
    with pytest.raises(MaskError, match="only some"):
        same_masks([{"w": one}, {"v": one}])
    assert torch.equal(average_state(parts, masks=[{"w": one}, {"w": one}])["w"], torch.tensor([0.5, 0.0]))


def test_masks_that_name_what_the_states_lack_are_refused():
    with pytest.raises(MaskError, match="'v'"):
        average_state(states(2), masks={"v": torch.ones(2, dtype=torch.bool)})


@given(st.integers(1, 5), st.integers(1, 30), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_averages_of_different_masks_keep_what_any_member_keeps(count, size, seed):
    draw = generator(seed, "masks")
    masks = [torch.rand(size, generator=draw) < 0.3 for _ in range(count)]
    parts = [{"w": mask * (1 + torch.rand(size, generator=draw))} for mask in masks]
    kept = average_state(parts)["w"] != 0
    assert torch.equal(kept, torch.stack(masks).any(dim=0))
    dropped_by_all = torch.stack([~mask for mask in masks]).double().prod(dim=0).sum().item()
    assert kept.double().mean().item() == pytest.approx(1 - dropped_by_all / size)
    assert all(kept.sum() >= mask.sum() for mask in masks)


def test_density_of_an_average_of_independent_masks_is_one_minus_the_product_of_the_sparsities():
    densities, size = (0.1, 0.2, 0.3), 200_000
    draw = generator(0, "independent")
    parts = [{"w": (torch.rand(size, generator=draw) < density).float()} for density in densities]
    expected = 1 - 0.9 * 0.8 * 0.7
    kept = (average_state(parts)["w"] != 0).double().mean().item()
    assert kept == pytest.approx(expected, abs=5 * (expected * (1 - expected) / size) ** 0.5)


def test_a_linear_model_under_squared_loss_gains_from_averaging():
    """Jensen, and exactly: mean loss minus loss of the mean is the weighted variance of the predictions."""
    draw = generator(3, "jensen")
    x, y = torch.randn(50, 6, generator=draw).double(), torch.randn(50, 2, generator=draw).double()
    shares = [0.2, 0.5, 0.3]
    parts = [{"weight": torch.randn(2, 6, generator=draw).double()} for _ in shares]
    mean = average_state(parts, shares)["weight"]
    loss = [float((x @ part["weight"].T - y).square().mean()) for part in parts]
    average_loss = sum(share * one for share, one in zip(shares, loss, strict=True))
    spread = sum(
        share * float((x @ (part["weight"] - mean).T).square().mean()) for share, part in zip(shares, parts, strict=True)
    )
    soup_loss = float((x @ mean.T - y).square().mean())
    assert soup_loss < average_loss
    assert average_loss - soup_loss == pytest.approx(spread, rel=1e-10)


def test_a_real_models_average_loads_and_gives_the_mean_output():
    models = [nn.Linear(3, 2, bias=False) for _ in range(2)]
    for place, model in enumerate(models):
        nn.init.normal_(model.weight, generator=generator(place, "linear"))
    mixed = nn.Linear(3, 2, bias=False)
    mixed.load_state_dict(average_state([model.state_dict() for model in models]))
    x = torch.randn(5, 3, generator=generator(0, "x"))
    torch.testing.assert_close(mixed(x), (models[0](x) + models[1](x)) / 2)


@pytest.mark.parametrize(
    ("weights", "message"),
    [([0.5], "1 weights for 2"), ([1.5, -0.5], "sum to 1"), ([0.5, 0.4], "sum to 1"), ([float("nan"), 1], "sum to 1")],
)
def test_weights_that_are_no_average_are_refused(weights, message):
    with pytest.raises(MethodError, match=message):
        average_state(states(2), weights)


def test_no_states_and_unlike_states_are_refused():
    with pytest.raises(MethodError, match="at least one"):
        average_state([])
    with pytest.raises(ModelError, match=r"'w' is torch\.float32 of shape"):
        average_state([{"w": torch.ones(2)}, {"w": torch.ones(3)}])
    with pytest.raises(ModelError, match="only some"):
        average_state([{"w": torch.ones(2)}, {"v": torch.ones(2)}])


# ---- the greedy choice ------------------------------------------------------------------------------------------------


def brute_greedy(values: list[float], score) -> list[int]:
    """The recipe on scalars, written out."""
    order = sorted(range(len(values)), key=lambda i: -score(values[i]))
    chosen = [order[0]]
    for i in order[1:]:
        with_it = score(sum(values[j] for j in [*chosen, i]) / (len(chosen) + 1))
        if with_it >= score(sum(values[j] for j in chosen) / len(chosen)):
            chosen.append(i)
    return chosen


@given(st.lists(st.integers(-8, 8).map(float), min_size=1, max_size=5))
@settings(max_examples=60, deadline=None)
def test_the_greedy_soup_is_never_worse_than_its_best_member(values):
    def score(value: float) -> float:
        return -abs(value - 1.0)

    parts = [{"w": torch.tensor([value], dtype=torch.float64)} for value in values]
    soup, chosen = greedy_soup(parts, lambda state: score(state["w"].item()))
    assert score(soup["w"].item()) >= max(map(score, values)) - 1e-12
    assert soup["w"].item() == pytest.approx(sum(values[i] for i in chosen) / len(chosen))


def test_the_greedy_soup_follows_the_recipe_step_by_step():
    def score(value: float) -> float:
        return -abs(value - 1.0)

    for values in itertools.product([-3.0, 0.0, 1.5, 4.0], repeat=3):
        parts = [{"w": torch.tensor([value], dtype=torch.float64)} for value in values]
        assert greedy_soup(parts, lambda state: score(state["w"].item()))[1] == brute_greedy(list(values), score)


def test_given_scores_are_used_and_ties_join():
    parts = [{"w": torch.tensor([float(v)])} for v in (0, 1, 2)]
    seen = []

    def evaluate(state):
        seen.append(state["w"].item())
        return 0.5

    soup, chosen = greedy_soup(parts, evaluate, scores=[0.1, 0.5, 0.2])
    assert seen == [1.5, 1.0]  # members themselves are not evaluated again; {1, 2}, then {1, 2, 0}
    assert chosen == [1, 2, 0]
    assert soup["w"].item() == 1.0


def test_the_greedy_soup_refuses_wrong_numbers():
    with pytest.raises(MethodError, match="at least one"):
        greedy_soup([], lambda state: 0.0)
    with pytest.raises(MethodError, match="2 scores for 1"):
        greedy_soup([{"w": torch.ones(1)}], lambda state: 0.0, scores=[1, 2])
