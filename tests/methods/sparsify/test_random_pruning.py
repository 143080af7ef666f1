from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from openwork.core import allocation
from openwork.core.masks import Masks
from openwork.core.rng import generator
from openwork.core.select import count_of
from openwork.errors import MethodError
from openwork.methods.sparsify.random_pruning import (
    RandomPruning,
    dead_lines,
    grasp_scores,
    shuffle_within_layers,
    snip_scores,
    uniform_plus_reference,
)
from openwork.testing import sparsifier_checks
from openwork.testing._toys import Loop, batch, network

DEEP = {
    "conv": torch.Size((16, 3, 3, 3)), "b1": torch.Size((16, 16, 3, 3)), "b2": torch.Size((32, 16, 3, 3)),
    "b3": torch.Size((64, 32, 3, 3)), "fc": torch.Size((10, 64)),
}  # fmt: skip


def plain(density, total_steps):
    return RandomPruning(density)


def scaled(density, total_steps):
    return RandomPruning(density, ratios="er", init="scaled")


@pytest.mark.parametrize(("name", "check"), sparsifier_checks(plain))
def test_conformance(name, check):
    check()


@pytest.mark.parametrize(("name", "check"), sparsifier_checks(scaled, total_steps=10))
def test_conformance_of_scaled_initialisation(name, check):
    check()


def test_the_mask_never_changes():
    run = Loop(RandomPruning(0.2))
    masks = dict(run.sparsifier.masks)
    run.run(20)
    assert all(torch.equal(mask, run.sparsifier.masks[name]) for name, mask in masks.items())
    assert len(run.sparsifier.history) == 1


@pytest.mark.parametrize("ratios", ["uniform", "er", "erk", "uniform+", "erk+"])
def test_ratios_by_name(ratios):
    masks = RandomPruning(0.75, ratios=ratios).attach(network()).masks
    assert masks.densities() == allocation.named(ratios)({n: m.shape for n, m in masks.items()}, 0.75)


def test_ratios_by_mapping_function_and_scores():
    given = {"0.weight": 0.25, "2.weight": 0.5, "4.weight": 1.0}
    density = (48 + 64 + 32) / 352
    assert RandomPruning(density, ratios=given).attach(network()).masks.densities() == given
    assert RandomPruning(density, ratios=lambda shapes, d: given).attach(network()).masks.densities() == given
    scores = snip_scores(network(), batch(0))
    masks = RandomPruning(0.2, ratios=scores).attach(network()).masks
    assert masks.densities() == allocation.from_scores(scores, 0.2)
    top = allocation.top_globally(scores, 0.2)
    assert any(not torch.equal(masks[name], top[name]) for name in masks)  # shares only; positions are drawn anew
    with pytest.raises(MethodError, match=r"the ratio scores lack 4.weight"):
        RandomPruning(0.2, ratios={k: v for k, v in scores.items() if k != "4.weight"}).attach(network())


def test_positions_are_uniform():
    counts = torch.zeros(16, 12)
    for seed in range(200):
        counts += RandomPruning(0.25, ratios="uniform", seed=seed).attach(network()).masks["0.weight"]
    assert int(counts.sum()) == 200 * 48
    spread = math.sqrt(200 * 0.25 * 0.75)
    assert (counts - 50).abs().max() < 4.5 * spread
    assert counts.std() == pytest.approx(spread, rel=0.15)


def test_the_released_uniform_plus_is_not_exact():
    sizes = {name: math.prod(shape) for name, shape in DEEP.items()}

    def total(density):
        shares = uniform_plus_reference(DEEP, density)
        return sum(shares[name] * sizes[name] for name in DEEP) / sum(sizes.values()), shares

    sparse, shares = total(0.1)
    assert sparse == pytest.approx(0.096802, abs=5e-7)
    assert shares["b1"] == pytest.approx(0.0788007, abs=5e-8)
    assert (shares["conv"], shares["fc"]) == (1.0, 0.2)
    assert total(0.3)[0] == pytest.approx(0.311448, abs=5e-7)
    assert total(0.3)[1] == {"conv": 1.0, "b1": 0.3, "b2": 0.3, "b3": 0.3, "fc": 0.3}


def test_scaled_initialisation_has_the_scale_of_a_dense_layer():
    model = nn.Sequential(nn.Linear(400, 300), nn.Conv2d(16, 32, 3))
    masks = RandomPruning(0.1, ratios={"0.weight": 0.1, "1.weight": 0.1}, init="scaled").attach(model).masks
    for name, fan_in in (("0.weight", 400), ("1.weight", 16 * 9)):
        kept = dict(model.named_parameters())[name].detach()[masks[name]].double()
        std = math.sqrt(2 / (fan_in * masks.densities()[name]))
        assert kept.std().item() == pytest.approx(std, rel=6 / math.sqrt(2 * len(kept)))
        assert abs(kept.mean().item()) < 5 * std / math.sqrt(len(kept))


def test_dense_initialisation_leaves_the_kept_weights_as_they_were():
    model = network()
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    masks = RandomPruning(0.3).attach(model).masks
    for name, param in model.named_parameters():
        expected = torch.where(masks[name], before[name], 0.0) if name in masks else before[name]
        assert torch.equal(param, expected)


def test_snip_on_a_linear_model_is_the_sensitivity():
    model = nn.Linear(5, 3, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.randn(3, 5, generator=generator(0, "w"), dtype=torch.float64))
    x = torch.randn(4, 5, generator=generator(0, "x"), dtype=torch.float64)
    y = torch.randn(4, 3, generator=generator(0, "y"), dtype=torch.float64)
    scores = snip_scores(model, (x, y), loss=F.mse_loss, redraw=False)
    error = x @ model.weight.detach().t() - y
    expected = (model.weight.detach() * (2 / 12 * error.t() @ x)).abs()
    assert torch.allclose(scores["weight"], expected, rtol=1e-12)


def test_snip_is_the_effect_of_a_mask_that_fades():
    model = network().double()
    x, y = batch(0)
    scores = snip_scores(model, (x.double(), y), redraw=False)

    def loss(scale):
        twin = copy.deepcopy(model)
        with torch.no_grad():
            twin[2].weight[3, 5] *= scale
            return F.cross_entropy(twin(x.double()), y).item()

    slope = (loss(1 + 1e-5) - loss(1 - 1e-5)) / 2e-5
    assert scores["2.weight"][3, 5].item() == pytest.approx(abs(slope), rel=1e-6)


def test_snip_redraws_a_copy_xavier_normal():
    model = nn.Linear(300, 200, bias=False)
    before = model.weight.detach().clone()
    batch_ = torch.ones(1, 300), torch.zeros(1, dtype=torch.int64)
    one, two, other = (snip_scores(model, batch_, loss=lambda out, y: out.sum(), seed=s)["weight"] for s in (0, 0, 1))
    assert torch.equal(model.weight, before)
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert one.square().mean().sqrt().item() == pytest.approx(math.sqrt(2 / 500), rel=0.02)  # the gradient is 1


def test_grasp_is_the_directional_change_of_the_gradient():
    model = network().double()
    batches = [(batch(step)[0].double(), batch(step)[1]) for step in range(2)]
    before = copy.deepcopy(model.state_dict())
    scores = grasp_scores(model, batches, temperature=2.0)
    params = {n: p for n, p in model.named_parameters() if p.dim() == 2}

    def gradient(twin):
        loss = sum(F.cross_entropy(twin(x) / 2.0, y) for x, y in batches) / 2
        named = dict(twin.named_parameters())
        return dict(zip(params, torch.autograd.grad(loss, [named[n] for n in params]), strict=True))

    g = gradient(model)

    def moved(sign):
        twin = copy.deepcopy(model)
        with torch.no_grad():
            for name, param in twin.named_parameters():
                if name in g:
                    param += sign * 1e-5 * g[name]
        return gradient(twin)

    ahead, behind = moved(1), moved(-1)
    for name, param in params.items():
        product = (ahead[name] - behind[name]) / 2e-5
        assert torch.allclose(scores[name], (param * product).detach(), rtol=1e-5, atol=1e-10)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_shuffling_keeps_every_layers_number():
    masks = Masks({"a": torch.arange(20).reshape(4, 5) < 7, "b": torch.arange(6) < 3})
    one, two, other = (shuffle_within_layers(masks, seed) for seed in (0, 0, 1))
    assert one.densities() == masks.densities() == other.densities()
    assert torch.equal(one["a"], two["a"])
    assert not torch.equal(one["a"], masks["a"])
    assert not torch.equal(one["a"], other["a"])


def test_dead_rows_and_columns_are_counted():
    mask = torch.ones(3, 4, 2, dtype=torch.bool)
    mask[1] = False
    mask[:, 2:] = False
    assert dead_lines({"conv": mask}) == {"conv": (1, 2)}


def test_exact_numbers_of_the_whole():
    masks = RandomPruning(0.1, ratios="er").attach(network()).masks
    assert masks.nnz() == count_of(0.1, masks.total())


def test_wrong_settings_are_refused():
    with pytest.raises(MethodError, match="init='sparse'"):
        RandomPruning(0.1, init="sparse")
