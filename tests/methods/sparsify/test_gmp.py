from __future__ import annotations

import pytest
import torch

from openwork.core import allocation
from openwork.core.select import count_of
from openwork.errors import MethodError
from openwork.methods.sparsify.gmp import GMP
from openwork.sparsifier.prune_grow import shrink
from openwork.testing import sparsifier_checks
from openwork.testing._toys import Loop, network

TOTAL = 352


@pytest.mark.parametrize(("name", "check"), sparsifier_checks(GMP))
def test_conformance(name, check):
    check()


@pytest.mark.parametrize(
    ("density", "initial", "begin", "end", "every", "steps"),
    [(0.1, 1.0, 0.0, 0.5, 2, 50), (0.1, 0.5, 0.0, 0.8, 5, 50), (0.05, 1.0, 0.2, 0.6, 3, 60), (0.3, 1.0, 0.0, 1.0, 1, 30)],
)
def test_the_number_kept_follows_equation_one_exactly(density, initial, begin, end, every, steps):
    gmp = GMP(density, total_steps=steps, initial=initial, begin=begin, end=end, every=every)
    history = Loop(gmp).run(steps).sparsifier.history
    first, last = round(begin * steps), min(round(end * steps), steps - 1)
    updates = (last - first) // every
    assert [step for step, _ in history] == [0, *(first + j * every for j in range(1, updates + 1))]
    for j, (_, kept) in enumerate(history):
        target = density + (initial - density) * (1 - j / updates) ** 3
        assert sum(kept) == count_of(target, TOTAL)
    assert sum(history[-1][1]) == count_of(density, TOTAL)


def test_the_layers_compete_by_magnitude():
    run = Loop(GMP(0.1, total_steps=20, every=5, end=0.5)).run(5)
    params = {n: p.detach().clone() for n, p in run.model.named_parameters() if p.dim() == 2}
    masks = dict(run.sparsifier.masks)
    run.step()
    expected = shrink(masks, {n: p.abs() for n, p in params.items()}, 0.1 + 0.9 / 8, run.sparsifier.pattern)
    assert all(torch.equal(run.sparsifier.masks[name], expected[name]) for name in expected)


def test_a_pruned_weight_does_not_return():
    run = Loop(GMP(0.05, total_steps=40, every=2))
    for _ in range(40):
        before = dict(run.sparsifier.masks)
        run.step()
        assert not any(bool((run.sparsifier.masks[name] & ~mask).any()) for name, mask in before.items())


@pytest.mark.parametrize("allocate", ["erk", "uniform"])
def test_scope_layers_keeps_allocated_densities(allocate):
    gmp = GMP(0.2, total_steps=20, every=2, scope="layers", allocate=allocate)
    masks = Loop(gmp).run(20).sparsifier.masks
    shapes = {name: mask.shape for name, mask in masks.items()}
    assert masks.densities() == allocation.named(allocate)(shapes, 0.2)


def test_nm_tightens_group_by_group():
    gmp = GMP(0.5, total_steps=20, every=2, pattern="2:4")
    history = Loop(gmp).run(20).sparsifier.history
    kept = [sum(counts) / TOTAL for _, counts in history]
    assert kept[0] == 1.0
    assert kept[-1] == 0.5
    assert set(kept) <= {1.0, 0.75, 0.5}
    assert kept == sorted(kept, reverse=True)


def test_no_layer_is_cut_off():
    model = network()
    with torch.no_grad():
        model[2].weight.mul_(1e-6)
    masks = Loop(GMP(0.02, total_steps=10, every=1, end=0.3), model).run(5).sparsifier.masks
    assert all(mask.any() for mask in masks.values())
    assert masks.nnz() == count_of(0.02, TOTAL)


def test_a_run_too_short_for_any_update_is_refused():
    for wrong in ({"total_steps": 1}, {"total_steps": 50, "every": 50}, {"total_steps": 10, "begin": 0.95, "end": 1.0}):
        with pytest.raises(MethodError, match="no mask update fits into"):
            GMP(0.1, **wrong)


def test_an_end_before_the_first_period_waits_for_it():
    history = Loop(GMP(0.1, total_steps=50, every=20, end=0.2)).run(50).sparsifier.history
    assert [(step, sum(kept)) for step, kept in history] == [(0, TOTAL), (20, 35)]


@pytest.mark.parametrize("wrong", [{"scope": "layer"}, {"begin": 0.5, "end": 0.5}, {"initial": 0.05}, {"end": 1.5}])
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(MethodError, match=next(iter(wrong))):
        GMP(0.1, **{"total_steps": 10, **wrong})
