from __future__ import annotations

import pytest
import torch

from openwork.core import allocation
from openwork.core.select import count_of
from openwork.errors import MethodError
from openwork.methods.sparsify.magnitude import Magnitude, prune
from openwork.sparsifier.prune_grow import shrink
from openwork.testing import sparsifier_checks
from openwork.testing._toys import Loop, network

TOTAL = 352


@pytest.mark.parametrize(("name", "check"), sparsifier_checks(Magnitude))
def test_conformance(name, check):
    check()


@pytest.mark.parametrize(("at", "step"), [(0.0, 0), (0.25, 5), (0.5, 10), (1.0, 19)])
def test_it_prunes_once(at, step):
    run = Loop(Magnitude(0.1, total_steps=20, at=at)).run(20)
    history = [(at_step, sum(kept)) for at_step, kept in run.sparsifier.history]
    assert history == ([(0, 35)] if step == 0 else [(0, TOTAL), (step, 35)])


def test_until_then_training_is_dense():
    plain = network()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3)
    run = Loop(Magnitude(0.1, total_steps=20, at=0.5)).run(10)
    other = Loop(Magnitude(1.0, total_steps=20), plain, lambda _: optimizer).run(10)
    assert all(torch.equal(a, b) for a, b in zip(run.model.parameters(), other.model.parameters(), strict=True))


def test_it_keeps_the_largest_of_all_layers_and_a_weight_in_each():
    model = network()
    weights = {n: p.detach().clone() for n, p in model.named_parameters() if p.dim() == 2}
    masks = prune(model, 0.1)
    masks.check(model)
    assert masks.nnz() == count_of(0.1, TOTAL)
    flat = torch.cat([w.abs().reshape(-1) for w in weights.values()])
    limit = flat.sort(descending=True).values[34]
    assert all(torch.equal(masks[name], w.abs() >= limit) for name, w in weights.items())
    ones = {n: torch.ones_like(w, dtype=torch.bool) for n, w in weights.items()}
    expected = shrink(ones, {n: w.abs() for n, w in weights.items()}, 0.1, Magnitude(0.1).pattern)
    assert all(torch.equal(masks[name], expected[name]) for name in masks)


def test_scope_layers_keeps_allocated_densities():
    masks = prune(network(), 0.25, scope="layers", allocate="uniform")
    assert set(masks.densities().values()) == {0.25}
    masks = prune(network(), 0.25, scope="layers")
    assert masks.densities() == allocation.erk({n: m.shape for n, m in masks.items()}, 0.25)


def test_scaling_the_weights_changes_no_mask():
    model, scaled = network(), network()
    with torch.no_grad():
        for param in scaled.parameters():
            param.mul_(4.0)
    one, two = prune(model, 0.2), prune(scaled, 0.2)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_permuting_neurons_permutes_the_masks():
    model, moved = network(), network()
    order = torch.tensor([3, 1, 0, 2, *range(15, 3, -1)])
    with torch.no_grad():
        moved[0].weight.copy_(model[0].weight[order])
        moved[2].weight.copy_(model[2].weight[:, order])
    one, two = prune(model, 0.2), prune(moved, 0.2)
    assert torch.equal(two["0.weight"], one["0.weight"][order])
    assert torch.equal(two["2.weight"], one["2.weight"][:, order])


def test_density_one_is_the_dense_model():
    model = network()
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    assert prune(model, 1.0).density() == 1.0
    assert all(torch.equal(param, before[name]) for name, param in model.named_parameters())


@pytest.mark.parametrize("wrong", [{"at": 1.5}, {"scope": "all"}])
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(MethodError, match=next(iter(wrong))):
        Magnitude(0.1, total_steps=10, **wrong)
