from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from openwork.core import criteria
from openwork.core.rng import generator
from openwork.core.schedules import Every
from openwork.errors import MethodError
from openwork.methods.sparsify.rigl import RigL
from openwork.methods.sparsify.set import SET, by_sign
from openwork.testing import sparsifier_checks
from openwork.testing._toys import Loop, network, same_run
from tests.strategies import best, quick, seeds, tensor


@pytest.mark.parametrize(("name", "check"), sparsifier_checks(SET))
def test_conformance(name, check):
    check()


def by_sign_and_normal(density, total_steps):
    return SET(density, total_steps=total_steps, removal="by_sign", new_value="normal")


@pytest.mark.parametrize(("name", "check"), sparsifier_checks(by_sign_and_normal, total_steps=15))
def test_conformance_of_the_papers_variant(name, check):
    check()


def test_by_sign_worked_example():
    values = torch.tensor([-0.9, -0.7, -0.5, -0.3, -0.1, 0.05, 0.15, 0.25, 0.35, 0.45, 0.55, 0.65])
    assert values[by_sign(values, 0.3)].tolist() == pytest.approx([-0.9, -0.7, -0.5, 0.35, 0.45, 0.55, 0.65])


@given(seeds, st.integers(1, 30), st.sampled_from([0.0, 0.1, 0.3, 0.5, 1.0]), st.sampled_from([None, 5]))
@quick
def test_by_sign_is_the_authors_thresholds(seed, size, zeta, levels):
    weight = tensor(torch.Size([size]), seed, levels=levels)
    v = sorted(weight.tolist())
    first, last = sum(x < 0 for x in v), sum(x <= 0 for x in v)
    low = v[min(first - 1, math.floor((1 - zeta) * first))] if first else -math.inf
    high = v[min(size - 1, math.floor(last + zeta * (size - last)))] if last < size else math.inf
    assert by_sign(weight, zeta).tolist() == [x < low or x > high for x in weight.tolist()]


class RandomGrowth(RigL):
    """RigL's machinery with random growth, a constant share and SET's steps."""

    def __init__(self, density, *, total_steps, every, zeta):
        super().__init__(density, total_steps=total_steps, every=every, drop=zeta, floor=zeta, stop=1.0, start=every)
        self.generator = generator(0, "sparsifier", "SET")

    def revise(self, params, grads, step):
        if step not in self.every:
            return None
        return self.exchange(params, grads, self.masks, self.share(step), grow=criteria.random)


def test_set_is_rigl_with_random_growth():
    settings = {"total_steps": 40, "every": 5, "zeta": 0.3}
    same_run(Loop(SET(0.2, **settings)).run(40), Loop(RandomGrowth(0.2, **settings)).run(40), "SET and RigL")


def test_updates_come_after_each_period_and_not_at_the_end():
    assert SET(0.1, total_steps=40, every=10).every == Every(10, 10, 40)
    run = Loop(SET(0.2, total_steps=40, every=10)).run(40)
    assert [step for step, _ in run.sparsifier.history] == [0, 10, 20, 30]
    assert len({kept for _, kept in run.sparsifier.history}) == 1


def test_the_smallest_share_leaves_whatever_the_gradients():
    run = Loop(SET(0.3, total_steps=40, every=5, zeta=0.4)).run(5)
    weights, masks = {n: p.detach().clone() for n, p in run.model.named_parameters()}, dict(run.sparsifier.masks)
    run.optimizer.zero_grad()
    run.optimizer.step()  # no gradients at all
    for name, mask in masks.items():
        after, kept = run.sparsifier.masks[name], int(mask.sum())
        left = best(weights[name].abs(), kept - math.floor(0.4 * kept + 1e-9), among=mask)
        assert bool(after[left].all())
        assert int(after.sum()) == kept
        assert not torch.equal(after, mask)


def test_by_sign_drops_those_nearest_zero_on_both_sides_and_grows_as_many():
    run = Loop(SET(0.5, total_steps=40, every=5, zeta=0.4, removal="by_sign")).run(5)
    weights, masks = {n: p.detach().clone() for n, p in run.model.named_parameters()}, dict(run.sparsifier.masks)
    run.step()
    for name, mask in masks.items():
        after, survivors = run.sparsifier.masks[name], by_sign(weights[name], 0.4)
        assert not bool((survivors & ~mask).any())
        assert bool(after[survivors].all())
        assert int(after.sum()) == int(mask.sum()) > int(survivors.sum())
        assert torch.equal(after, mask) == bool(mask.all())  # a full layer grows back what it drops


def test_epsilon_gives_erdos_renyi_numbers():
    sparsifier = SET(total_steps=10, epsilon=2).attach(network())
    kept = {name: int(mask.sum()) for name, mask in sparsifier.masks.items()}
    assert kept == {"0.weight": 2 * (16 + 12), "2.weight": 2 * (8 + 16), "4.weight": 2 * (4 + 8)}
    full = SET(total_steps=10, epsilon=20).attach(network())
    assert full.masks.density() == 1.0


def test_new_weights_are_zero_or_drawn():
    for new_value in ("zero", "normal"):
        run = Loop(SET(0.3, total_steps=40, every=5, zeta=0.5, new_value=new_value)).run(5)
        masks = dict(run.sparsifier.masks)
        for param in run.model.parameters():
            param.grad = None
        run.optimizer.step()
        params = dict(run.model.named_parameters())
        born = torch.cat([params[name][run.sparsifier.masks[name] & ~mask] for name, mask in masks.items()])
        assert len(born) > 10
        assert bool((born == 0).all()) == (new_value == "zero")
        assert born.abs().max() < 0.5
    assert 0.05 < born.std() < 0.2  # N(0, 1) / 10


def test_no_dense_gradient_is_asked_for():
    assert not any(map(SET(0.1, total_steps=40).needs_dense_gradient, range(40)))


@pytest.mark.parametrize("wrong", [{"zeta": 1.5}, {"removal": "sign"}, {"new_value": "one"}, {"every": 0}])
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(MethodError, match=next(iter(wrong))):
        SET(0.1, **{"total_steps": 10, **wrong})
