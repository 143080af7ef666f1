from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from openwork.core.patterns import Unstructured
from openwork.core.rng import generator
from openwork.core.select import count_of
from openwork.errors import MethodError
from openwork.methods.sparsify.gmp import GMP
from openwork.methods.sparsify.granet import GraNet, pruning_plasticity
from openwork.methods.sparsify.magnitude import prune
from openwork.methods.sparsify.rigl import RigL
from openwork.sparsifier.prune_grow import shrink
from openwork.testing import sparsifier_checks
from openwork.testing._toys import Loop, batch, network, same_masks, same_run
from tests.strategies import best

TOTAL = 352


@pytest.mark.parametrize(("name", "check"), sparsifier_checks(GraNet))
def test_conformance(name, check):
    check()


@pytest.mark.parametrize("initial", [1.0, 0.5])
def test_the_number_kept_follows_the_cubic_schedule_exactly(initial):
    history = Loop(GraNet(0.1, total_steps=64, initial=initial, every=4)).run(64).sparsifier.history
    assert [step for step, _ in history] == [0, *range(4, 64, 4)]  # regeneration goes on to the end
    for j, (_, kept) in enumerate(history):
        assert sum(kept) == count_of(0.1 + (initial - 0.1) * max(0.0, 1 - j / 8) ** 3, TOTAL)


def test_the_worked_schedule():
    granet = GraNet(0.1, total_steps=1000, initial=0.5, every=50, end=0.4)
    assert granet.shrink_until == 400
    expected = [0.5, 0.367969, 0.26875, 0.197656, 0.15, 0.121094, 0.10625, 0.100781, 0.1]
    assert [granet.target(50 * j) for j in range(9)] == pytest.approx(expected, abs=5e-7)
    assert [granet.share(t) for t in (0, 250, 500, 750, 1000)] == pytest.approx(
        [0.5, 0.427509, 0.2525, 0.077491, 0.005], abs=5e-7
    )


def test_every_update_shrinks_over_all_layers_and_regenerates_within_each():
    run = Loop(GraNet(0.1, total_steps=40, every=4))
    for step in range(40):
        masks = dict(run.sparsifier.masks)
        run.backward()
        params = {n: p.detach().clone() for n, p in run.model.named_parameters() if n in masks}
        grads = {n: p.grad.clone() for n, p in run.model.named_parameters() if n in masks}
        run.optimizer.step()
        if step == 0 or step % 4:
            assert all(torch.equal(masks[n], run.sparsifier.masks[n]) for n in masks)
            continue
        if step <= 20:
            density = 0.1 + 0.4 * (1 - step / 20) ** 3
            masks = shrink(masks, {n: p.abs() for n, p in params.items()}, density, run.sparsifier.pattern)
        share = 0.005 + 0.2475 * (1 + math.cos(math.pi * step / 40))
        for name, mask in masks.items():
            kept = int(mask.sum())
            left = best(params[name].abs(), kept - math.ceil(share * kept - 1e-9), among=mask)
            expected = left | best(grads[name].abs(), kept - int(left.sum()), among=~left)
            assert torch.equal(run.sparsifier.masks[name], expected)


def test_without_regeneration_it_is_gmp_bit_for_bit():
    settings = {"total_steps": 50, "every": 3, "initial": 1.0, "end": 0.6}
    granet = Loop(GraNet(0.1, death=0.0, floor=0.0, **settings)).run(31)
    gmp = Loop(GMP(0.1, **settings)).run(31)
    same_run(granet, gmp, "GraNet without regeneration and GMP")
    assert gmp.sparsifier.masks.nnz() == 35


class LikeGraNet(RigL):
    """RigL as its successors run it: half to .005 until the end, counts rounded up, from GraNet's own masks."""

    def __init__(self, density, *, total_steps, every):
        super().__init__(density, total_steps=total_steps, every=every, drop=0.5, floor=0.005, stop=1.0, start=every)
        self.generator = generator(0, "sparsifier", "GraNet")

    def revise(self, params, grads, step):
        if step not in self.every:
            return None
        return self.exchange(params, grads, self.masks, self.share(step), round_up=True)


def test_without_shrinking_it_is_rigl_to_the_end():
    granet = Loop(GraNet(0.2, total_steps=40, initial=0.2, every=4)).run(40)
    rigl = Loop(LikeGraNet(0.2, total_steps=40, every=4)).run(40)
    same_run(granet, rigl, "GraNet at constant density and RigL")


def test_random_growth_is_the_control():
    settings = {"total_steps": 20, "every": 2}
    gradient = Loop(GraNet(0.2, **settings)).run(20)
    one, two = (Loop(GraNet(0.2, grow="random", **settings)).run(20) for _ in range(2))
    same_masks(one.sparsifier, two.sparsifier, "random growth twice")
    assert [s for s in range(20) if gradient.sparsifier.needs_dense_gradient(s)] == list(range(2, 20, 2))
    assert not any(map(one.sparsifier.needs_dense_gradient, range(20)))
    assert any(not torch.equal(m, one.sparsifier.masks[n]) for n, m in gradient.sparsifier.masks.items())
    assert one.sparsifier.masks.nnz() == gradient.sparsifier.masks.nnz() == count_of(0.2, TOTAL)


@pytest.mark.parametrize(
    "wrong", [{"grow": "magnitude"}, {"initial": 0.05}, {"death": 1.5}, {"floor": -1.0}, {"end": 2.0}, {"total_steps": 1}]
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(MethodError, match=next(iter(wrong))):
        GraNet(0.1, **{"total_steps": 10, **wrong})


# ---- pruning plasticity -------------------------------------------------------------------------------------------------


def first_gradients(model):
    x, y = batch(0)
    params = dict(model.named_parameters())
    grads = torch.autograd.grad(nn.functional.cross_entropy(model(x), y), list(params.values()))
    return dict(zip(params, grads, strict=True))


def zeros_of(model):
    return float(sum((param == 0).sum() for param in model.parameters()))


class Training:
    """Trains nothing; remembers what it was asked."""

    def __init__(self):
        self.legs, self.masks, self.weights = [], [], []

    def __call__(self, model, sparsifier, leg):
        self.weights.append({name: param.detach().clone() for name, param in model.named_parameters()})
        sparsifier.attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
        self.legs.append(leg)
        self.masks.append(sparsifier.finalize())
        return model


def test_plasticity_is_accuracy_after_minus_before():
    checkpoints = {"dense": network(1), "sparse": network(2)}
    prune(checkpoints["sparse"], 0.4)
    states = {name: copy.deepcopy(model.state_dict()) for name, model in checkpoints.items()}
    train = Training()
    rows = pruning_plasticity(checkpoints, train, zeros_of, rates=(0.5, 0.9), steps=7, regenerate=first_gradients)
    assert [(row["checkpoint"], row["rate"], row["regenerated"]) for row in rows] == [
        (name, rate, grown) for name in checkpoints for rate in (0.5, 0.9) for grown in (False, True)
    ]
    assert all(row["plasticity"] == row["after"] - row["before"] for row in rows)
    assert [row["before"] for row in rows] == [0.0] * 4 + [TOTAL - 141.0] * 4
    assert all(leg.steps == 7 for leg in train.legs)
    assert len({leg.name for leg in train.legs}) == len(rows)
    for name, model in checkpoints.items():  # the checkpoints are left alone
        assert all(torch.equal(value, states[name][key]) for key, value in model.state_dict().items())
    assert len(pruning_plasticity(checkpoints, Training(), zeros_of, rates=(0.5,), steps=1)) == 2


def test_plasticity_prunes_by_magnitude_and_grows_as_many_back_by_gradient():
    model, train = network(2), Training()
    alive = prune(model, 0.4)
    rates = (0.5, 0.9)
    pruning_plasticity({"epoch": model}, train, zeros_of, rates=rates, steps=7, regenerate=first_gradients)
    scores = {name: dict(model.named_parameters())[name].detach().abs() for name in alive}
    for k, rate in enumerate(rates):
        left, grown = train.masks[2 * k : 2 * k + 2]
        goal = (1 - rate) * alive.density()
        assert left.nnz() == count_of(goal, TOTAL)
        expected = shrink(alive, scores, goal, Unstructured())
        pruned = copy.deepcopy(model)
        left.apply(pruned)
        grads = first_gradients(pruned)
        for name, mask in left.items():
            assert torch.equal(mask, expected[name])
            missing = int(alive[name].sum()) - int(mask.sum())
            assert torch.equal(grown[name], mask | best(grads[name].abs(), missing, among=~mask))
            kept = train.weights[2 * k + 1][name]
            assert torch.equal(kept, torch.where(mask, dict(model.named_parameters())[name].detach(), 0.0))
