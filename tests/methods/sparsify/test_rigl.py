from __future__ import annotations

import math

import pytest
import torch

from openwork.core import allocation
from openwork.errors import MethodError
from openwork.methods.sparsify.rigl import RigL
from openwork.testing import sparsifier_checks
from openwork.testing._toys import Loop, network
from tests.strategies import best


@pytest.mark.parametrize(("name", "check"), sparsifier_checks(RigL))
def test_conformance(name, check):
    check()


def test_the_start_is_random_at_erk_densities():
    one, two, other = (RigL(0.2, total_steps=10, seed=seed).attach(network()) for seed in (0, 0, 1))
    shapes = {name: mask.shape for name, mask in one.masks.items()}
    assert one.masks.densities() == other.masks.densities() == allocation.erk(shapes, 0.2)
    assert all(torch.equal(one.masks[name], two.masks[name]) for name in shapes)
    assert any(not torch.equal(one.masks[name], other.masks[name]) for name in shapes)


def test_the_share_is_the_papers():
    rigl = RigL(0.1, total_steps=1000)  # alpha .3, T_end .75 T
    assert [rigl.share(t) for t in (0, 100, 250, 500, 750)] == pytest.approx([0.3, 0.287032, 0.225, 0.075, 0.0], abs=5e-7)


def test_updates_come_every_so_many_steps_and_stop():
    run = Loop(RigL(0.2, total_steps=40, every=4, stop=0.75)).run(40)
    changes = [step for step, _ in run.sparsifier.history[1:]]
    assert changes == list(range(0, 30, 4))
    assert len({kept for _, kept in run.sparsifier.history}) == 1  # every layer keeps its number


def test_the_default_period_is_a_fortieth_and_at_most_a_hundred():
    assert [RigL(0.1, total_steps=t).every.period for t in (10, 400, 4000, 400_000)] == [1, 10, 100, 100]


def test_every_update_is_equations_three_and_four():
    run = Loop(RigL(0.2, total_steps=40, every=3))
    for step in range(30):
        masks, weights = dict(run.sparsifier.masks), {n: p.detach().clone() for n, p in run.model.named_parameters()}
        run.backward()
        grads = {n: p.grad.clone() for n, p in run.model.named_parameters()}
        run.optimizer.step()
        if step % 3:
            assert all(torch.equal(masks[n], run.sparsifier.masks[n]) for n in masks)
            continue
        share = 0.15 * (1 + math.cos(math.pi * step / 30))
        for name, mask in masks.items():
            count = math.floor(share * int(mask.sum()) + 1e-9)
            left = best(weights[name].abs(), int(mask.sum()) - count, among=mask)
            grown = best(grads[name].abs(), count, among=~left)
            assert torch.equal(run.sparsifier.masks[name], left | grown)


def test_returned_weights_keep_value_and_momentum_and_new_ones_are_zero():
    run = Loop(RigL(0.3, total_steps=40, every=5, drop=0.9, skip_step=True, start=5)).run(5)
    before = {n: p.detach().clone() for n, p in run.model.named_parameters()}
    momentum = {n: run.optimizer.state[p]["momentum_buffer"].clone() for n, p in run.model.named_parameters()}
    masks = dict(run.sparsifier.masks)
    run.step()
    returned = new = 0
    for name, mask in masks.items():
        after, param = run.sparsifier.masks[name], dict(run.model.named_parameters())[name]
        buffer = run.optimizer.state[param]["momentum_buffer"]
        both, born, gone = mask & after, after & ~mask, mask & ~after
        assert torch.equal(param[both], before[name][both])
        assert torch.equal(buffer[both], momentum[name][both])
        assert not param[born | gone].any()
        assert not buffer[born | gone].any()
        kept = int(mask.sum())
        survivors = best(before[name].abs(), kept - math.floor(0.9 * _cosine(5, 30) * kept), among=mask)
        returned += int((both & ~survivors).sum())
        new += int(born.sum())
    assert returned > 0  # dropped and grown again in one update
    assert new > 0


def _cosine(step, end):
    return 0.5 * (1 + math.cos(math.pi * step / end))


def test_the_papers_skipped_step_leaves_weights_alone():
    run = Loop(RigL(0.3, total_steps=20, every=4, skip_step=True))
    for step in range(12):
        before = {n: p.detach().clone() for n, p in run.model.named_parameters()}
        run.step()
        now, masks = dict(run.model.named_parameters()), run.sparsifier.masks
        if step % 4 == 0:
            for name, param in now.items():
                expected = torch.where(masks[name], before[name], 0.0) if name in masks else before[name]
                assert torch.equal(param, expected)
        else:
            assert not torch.equal(now["0.bias"], before["0.bias"])
    assert run.sparsifier.step == 12


def test_the_dense_gradient_is_asked_for_at_updates_only():
    rigl = RigL(0.1, total_steps=40, every=4)
    assert [step for step in range(40) if rigl.needs_dense_gradient(step)] == list(range(0, 30, 4))


@pytest.mark.parametrize("wrong", [{"drop": 1.5}, {"floor": -0.1}, {"stop": 2.0}, {"every": 0}, {"total_steps": 0}])
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(MethodError, match=next(iter(wrong))):
        RigL(0.1, **{"total_steps": 10, **wrong})
