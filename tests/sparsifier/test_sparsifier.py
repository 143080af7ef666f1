from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

from openwork.core import criteria
from openwork.core.masks import Masks
from openwork.core.patterns import NM, Block
from openwork.core.rng import generator
from openwork.core.schedules import Every
from openwork.errors import AllocationError, MaskError, OptimizerError, PatternError
from openwork.sparsifier.sparsifier import Fixed, Sparsifier
from openwork.testing import sparsifier_checks
from openwork.testing._toys import Loop, batch, fill, network, same_run, sgd


class Cycle(Sparsifier):
    """Random masks, exchanged by gradient at every third step: the smallest method that uses all of the base."""

    every = Every(3)

    def __init__(self, density=0.1, *, total_steps=20, share=0.4, **options):
        super().__init__(density, **options)
        self.share = share

    def initial(self, params):
        return self.random_masks(params)

    def revise(self, params, grads, step):
        return self.exchange(params, grads, self.masks, self.share) if step in self.every else None


def held(density, total_steps):
    """Fixed masks of an exact density."""
    params = dict(network().named_parameters())
    sizes = {name: param.shape for name, param in params.items() if param.dim() == 2}
    cycle = Cycle(density)
    return Fixed(cycle.random_masks({name: params[name] for name in sizes}))


@pytest.mark.parametrize(("name", "check"), sparsifier_checks(Cycle, total_steps=12))
def test_conformance(name, check):
    check()


HELD = ["final density", "model untouched", "hooks gone", "resume, loaded after attach", "same seed", "refusals"]


@pytest.mark.parametrize("name", HELD)
def test_conformance_of_fixed(name):
    dict(sparsifier_checks(held, total_steps=10))[name]()


@pytest.mark.parametrize("pattern", ["2:4", NM(1, 4), "block4x1", Block(2, 4), "group4", "channel"])
def test_conformance_of_patterns(pattern):
    density = pattern.n / pattern.m if isinstance(pattern, NM) else 0.5
    checks = dict(sparsifier_checks(lambda **given: Cycle(pattern=pattern, **given), density=density, total_steps=10))
    for name in ("final density", "resume, loaded before attach", "gradient clipping", "optimizer AdamW, fused"):
        checks[name]()


# ---- the moments of a step ----------------------------------------------------------------------------------------------


def one_layer(weights):
    """A linear layer without bias with given weights."""
    model = nn.Linear(len(weights[0]), len(weights), bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor(weights))
    return model


class Swap(Sparsifier):
    """Moves from one mask to another at step 1."""

    def __init__(self, before, after, **options):
        super().__init__(0.5, **options)
        self.before, self.after, self.seen = before, after, []

    def initial(self, params):
        return Masks(dict.fromkeys(params, self.before))

    def revise(self, params, grads, step):
        self.seen.append({name: grad.clone() for name, grad in grads.items()})
        return Masks(dict.fromkeys(params, self.after)) if step == 1 else None


BEFORE, AFTER = torch.tensor([[True, True, False, False]]), torch.tensor([[True, False, True, False]])


def swapped(optimizer, grads=([1.0, 1.0, 1.0, 1.0],) * 2, clip=False):
    model = one_layer([[1.0, 2.0, 3.0, 4.0]])
    made = optimizer(model.parameters())
    sparsifier = Swap(BEFORE, AFTER).attach(model, made)
    for grad in grads:
        model.weight.grad = torch.tensor([grad])
        if clip:
            sparsifier.mask_gradients()
        made.step()
    return model, made, sparsifier


@pytest.mark.parametrize("clip", [False, True])
def test_kept_weights_keep_value_and_momentum_and_new_ones_start_at_zero(clip):
    model, optimizer, sparsifier = swapped(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.5), clip=clip)
    # kept: 1 - .1 * 1 - .1 * 1.5; dropped: 0; new: 0 with no momentum, its first step is the next; off: 0
    assert model.weight.tolist() == [[pytest.approx(0.75), 0.0, 0.0, 0.0]]
    assert optimizer.state[model.weight]["momentum_buffer"].tolist() == [[1.5, 0.0, 0.0, 0.0]]
    model.weight.grad = torch.ones(1, 4)
    optimizer.step()
    assert model.weight.tolist() == [[pytest.approx(0.575), 0.0, pytest.approx(-0.1), 0.0]]
    assert sparsifier.history == [(0, (2,)), (1, (2,))]


@pytest.mark.parametrize("clip", [False, True])
def test_a_revision_sees_dense_gradients(clip):
    _, _, sparsifier = swapped(lambda p: torch.optim.SGD(p, lr=0.1), clip=clip)
    assert [seen["weight"].tolist() for seen in sparsifier.seen] == [[[1.0] * 4]] * 2


def test_all_state_of_the_parameters_shape_is_cleared():
    model, optimizer, _ = swapped(lambda p: torch.optim.Adam(p, amsgrad=True))
    state = optimizer.state[model.weight]
    for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        assert (state[key] != 0).tolist() == [[True, False, False, False]], key


def test_rprop_step_sizes_start_anew():
    model, optimizer, _ = swapped(lambda p: torch.optim.Rprop(p, lr=0.25), grads=([1.0] * 4,) * 2)
    assert optimizer.state[model.weight]["step_size"].tolist() == [[pytest.approx(0.3), 0.25, 0.25, 0.25]]


def test_skipping_the_step_leaves_all_weights_alone():
    class Skipping(Cycle):
        skip_step = True

    run = Loop(Skipping(0.5))
    run.run(3)
    before = {name: param.detach().clone() for name, param in run.model.named_parameters()}
    masks = run.sparsifier.masks
    run.step()  # step 3 revises
    for name, param in run.model.named_parameters():
        kept = masks[name] & run.sparsifier.masks[name] if name in masks else torch.ones_like(param, dtype=torch.bool)
        assert torch.equal(param[kept], before[name][kept])
        assert not param[~kept].any()
    run.step()
    assert not torch.equal(run.model[0].bias, before["0.bias"])


@pytest.mark.parametrize("in_place", [False, True])
def test_a_gradient_that_was_skipped_is_forgotten(in_place):
    model = one_layer([[1.0, 2.0, 3.0, 4.0]])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = Swap(BEFORE, AFTER).attach(model, optimizer)
    model.weight.grad = torch.tensor([[1.0, 1.0, math.inf, 1.0]])
    sparsifier.mask_gradients()  # the scaler finds the overflow and does not step
    fresh = torch.tensor([[1.0, 1.0, 2.0, 3.0]])
    if in_place:  # as after zero_grad(set_to_none=False)
        model.weight.grad.copy_(fresh)
    else:
        model.weight.grad = fresh
    sparsifier.mask_gradients()
    sparsifier.mask_gradients()
    optimizer.step()
    assert sparsifier.seen[0]["weight"].tolist() == [[1.0, 1.0, 2.0, 3.0]]
    assert model.weight.tolist() == [[pytest.approx(0.9), pytest.approx(1.9), 0.0, 0.0]]


def test_a_parameter_without_gradient_is_left_as_it_is():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = Cycle(0.3).attach(model, optimizer)
    masks = sparsifier.masks
    model[0].weight.grad = torch.randn(16, 12, generator=generator(0, "g"))
    optimizer.step()
    assert torch.equal(sparsifier.masks["2.weight"], masks["2.weight"])
    assert not torch.equal(sparsifier.masks["0.weight"], masks["0.weight"])


def test_an_infinite_weight_is_masked_to_zero_not_nan():
    model = network()
    with torch.no_grad():
        model[0].weight.fill_(math.inf)
    masks = {"0.weight": torch.zeros(16, 12, dtype=torch.bool)}
    Fixed(masks).attach(model)
    assert torch.equal(model[0].weight, torch.zeros(16, 12))


def test_without_an_optimizer_the_model_is_masked_once():
    model = network()
    sparsifier = Cycle(0.2).attach(model)
    sparsifier.masks.check(model)
    assert sparsifier.masks.nnz() == round(0.2 * 352)


def test_as_a_context_it_lets_go():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Cycle(0.2).attach(model, optimizer) as sparsifier:
        assert len(optimizer._optimizer_step_pre_hooks) == 1
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert sparsifier.masks.nnz() == round(0.2 * 352)


# ---- state --------------------------------------------------------------------------------------------------------------


def test_the_state_is_tensors_and_plain_values_and_packed():
    run = Loop(Cycle(0.2)).run(5)
    state = run.sparsifier.state_dict()
    plain = {key: value for key, value in state.items() if not isinstance(value, torch.Tensor)}
    assert json.loads(json.dumps(plain)) == {"step": 5}
    assert state["masks.0.weight"].numel() == 192 // 8
    assert state["history"].tolist() == [[step, *kept] for step, kept in run.sparsifier.history]


class Redrawn(Cycle):
    """Draws the weights anew when it starts, as scaled initialisation does, and keeps a count of its own."""

    def initial(self, params):
        with torch.no_grad():
            for param in params.values():
                param.copy_(torch.randn(param.shape, generator=self.generator))
        self.count = 0
        return super().initial(params)

    def revise(self, params, grads, step):
        self.count += 1
        return super().revise(params, grads, step)

    def extra_state(self):
        return {"count": self.count}

    def load_extra_state(self, state):
        self.count = state["count"]


def test_resuming_keeps_the_loaded_weights_where_a_fresh_start_would_draw_them():
    whole, first = Loop(Redrawn(0.3)).run(10), Loop(Redrawn(0.3)).run(5)
    states = first.states()
    second = Loop(Redrawn(0.3), network(3), attach=False)
    second.model.load_state_dict(states["model"])
    second.optimizer.load_state_dict(states["optimizers"][0])
    second.sparsifier.load_state_dict(states["sparsifier"])
    second.attach()
    second.run(5)
    same_run(second, whole, "resumed")
    assert second.sparsifier.count == 10


def test_a_state_that_does_not_fit_leaves_it_detached():
    other = Loop(Cycle(0.3), fill(nn.Sequential(nn.Linear(4, 4)), 0), attach=False)
    state = Loop(Cycle(0.3)).sparsifier.state_dict()
    other.sparsifier.load_state_dict(state)
    with pytest.raises(MaskError, match=r"'0.weight' needs a mask of shape"):
        other.attach()
    assert not other.optimizer._optimizer_step_pre_hooks


# ---- refusals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("density", [0.0, -0.1, 1.1, math.nan])
def test_densities_out_of_range_are_refused(density):
    with pytest.raises(MaskError, match="is not in"):
        Sparsifier(density)


def test_wrong_arguments_are_refused():
    with pytest.raises(AllocationError, match="unknown allocation 'best'"):
        Sparsifier(0.1, allocate="best")
    with pytest.raises(AllocationError, match="allocate=3 is neither"):
        Sparsifier(0.1, allocate=3)
    with pytest.raises(PatternError, match=r"2:4 keeps 0.5 of every layer, not 0.1"):
        Sparsifier(0.1, pattern="2:4")
    with pytest.raises(PatternError, match=r"does not divide 0.weight \(the first has shape \(3, 2\)\); leave them dense"):
        Sparsifier(0.5, pattern="2:4").attach(nn.Sequential(nn.Linear(2, 3), nn.Linear(4, 4)))
    with pytest.raises(OptimizerError, match="holds none of the model's masked parameters"):
        Sparsifier(0.5).attach(network(), torch.optim.SGD(network().parameters()))


def test_an_excluded_layer_stays_dense():
    sparsifier = Cycle(0.2, exclude=["4.weight"]).attach(network())
    assert list(sparsifier.masks) == ["0.weight", "2.weight"]
    assert sparsifier.masks.nnz() == round(0.2 * (192 + 128))


@pytest.mark.parametrize("wrong", ["missing", "shape"])
def test_masks_that_do_not_fit_are_refused(wrong):
    class Broken(Sparsifier):
        def initial(self, params):
            masks = {name: torch.ones_like(param, dtype=torch.bool) for name, param in params.items()}
            name = next(iter(masks))
            masks.pop(name) if wrong == "missing" else masks.update({name: torch.ones(1, dtype=torch.bool)})
            return Masks(masks)

    sparsifier = Broken(0.5)
    with pytest.raises(MaskError, match=r"'0.weight' needs a mask of shape"):
        sparsifier.attach(network())
    with pytest.raises(MaskError, match=r"'0.weight' needs a mask of shape"):  # not "attached already"
        sparsifier.attach(network())


def test_shares_and_global_and_layerwise_shrink():
    params = dict(network().named_parameters())
    params = {name: param for name, param in params.items() if param.dim() == 2}
    sparsifier = Sparsifier(0.25, allocate="uniform")
    ones = Masks.ones(params)
    assert sparsifier.shares(params) == {"0.weight": 0.25, "2.weight": 0.25, "4.weight": 0.25}
    layerwise = sparsifier.shrink(params, ones, 0.25, layerwise=True)
    assert layerwise.densities() == sparsifier.shares(params)
    everywhere = sparsifier.shrink(params, ones, 0.25)
    flat = torch.cat([param.detach().abs().reshape(-1) for param in params.values()])
    limit = flat.sort(descending=True).values[88 - 1]
    assert all(torch.equal(everywhere[name], param.abs() >= limit) for name, param in params.items())


def test_scores_that_are_not_finite_name_the_layer():
    model = network()
    with torch.no_grad():
        model[2].weight[0, 0] = math.nan
    sparsifier = Sparsifier(0.5)
    with pytest.raises(MaskError, match=r"scores of '2.weight' at step 0 are not finite"):
        sparsifier.score(dict(model.named_parameters()), criteria.magnitude)


def test_two_lines_in_a_users_loop():
    model = network()
    optimizer = sgd(model)
    sparsifier = Cycle(0.1).attach(model, optimizer)
    for step in range(4):
        x, y = batch(step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    masks = sparsifier.finalize()
    masks.check(model)
    assert repr(sparsifier).startswith("Cycle(density=0.1, step=4, Masks(3 parameters, 35 of 352 kept")
