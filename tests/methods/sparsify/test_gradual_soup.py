from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from openwork.errors import MaskError, MethodError
from openwork.methods.sparsify.dpf import DPF
from openwork.methods.sparsify.gmp import GMP
from openwork.methods.sparsify.rigl import RigL
from openwork.methods.sparsify.sparse_model_soups import GradualSoup
from openwork.sparsifier.averaging import average_state
from openwork.sparsifier.procedure import Leg
from openwork.sparsifier.sparsifier import Sparsifier
from tests.methods.sparsify.retrain_toys import (
    INPUTS,
    LABELS,
    PROBE,
    TRAIN,
    Loop,
    accuracy,
    network,
    one_thread,  # noqa: F401
)

TOTAL = 10 * 20 + 20 * 4  # masked weights of `network`


def learned(loop: Loop, name: str) -> dict[str, torch.Tensor]:
    """What a leg ended with, without what recalibration changes."""
    return {key: value for key, value in loop.after[name].items() if "running" not in key}


def test_a_gradual_soup_is_cut_at_the_prunings():
    loop, model = Loop(), network()
    gradual = GradualSoup(0.1, total_steps=60, members=2, phases=3)
    assert gradual.cuts == [0, 10, 20, 30, 60]
    assert gradual.steps == 10 + 2 * 50
    assert gradual.run(model, loop, PROBE) is model
    names = ["start", *(f"stretch{k}-member{i}" for k in (1, 2, 3) for i in range(2))]
    assert [leg.name for leg in loop.legs] == names
    assert sum(leg.steps for leg in loop.legs) == gradual.steps
    assert len({leg.stream for leg in loop.legs}) == len(loop.legs)
    assert gradual.masks.nnz() == round(0.1 * TOTAL)
    gradual.masks.check(model)
    cubic = [1.0, *(round((0.1 + 0.9 * (1 - k / 3) ** 3) * TOTAL) / TOTAL for k in (1, 2, 3))]
    assert [row["density"] for row in gradual.report] == pytest.approx(cubic)
    assert [row["step"] for row in gradual.report] == [10, 20, 30, 60]
    assert gradual.report[-1]["accuracy"] == accuracy(model) > 0.5


def test_a_gradual_soup_prunes_the_average():
    loop = Loop()
    gradual = GradualSoup(0.1, total_steps=40, members=2, phases=2)
    gradual.run(network(norm=False), loop, PROBE)
    mean = average_state([learned(loop, f"stretch1-member{i}") for i in range(2)])
    magnitudes = torch.cat([mean[name].abs().flatten() for name in gradual.masks])
    threshold = magnitudes.sort(descending=True).values[gradual.masks.nnz() - 1]
    for i in range(2):
        assert all(torch.equal(loop.before[f"stretch2-member{i}"][key], value) for key, value in mean.items())
        for name, mask in gradual.masks.items():
            assert torch.equal(mask, mean[name].abs() >= threshold)
            assert torch.equal(loop.after[f"stretch2-member{i}"][name] != 0, mask)


def test_the_rate_of_a_gradual_soup_runs_on_through_the_cuts():
    loop = Loop()
    GradualSoup(0.1, total_steps=40, members=2, phases=2).run(network(), loop, PROBE)
    path = [rate for name in ("start", "stretch1-member0", "stretch2-member0") for rate in loop.rates[name]]
    assert path == pytest.approx([1 - step / 40 for step in range(40)])


def plain_run(make: type[Sparsifier], steps: int, **options: int) -> nn.Module:
    """The same training in one piece: no momentum, so that fresh optimizers make no difference."""
    model = network(norm=False)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sparsifier = make(0.1, total_steps=steps, **options).attach(model, optimizer)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(INPUTS[TRAIN]), LABELS[TRAIN]).backward()
        optimizer.step()
    sparsifier.finalize()
    return model


@pytest.mark.parametrize("make", [GMP, DPF])
def test_a_gradual_soup_of_equal_members_is_the_uncut_run(make):
    """Full batches and no momentum: cutting, copying, averaging and resuming must change nothing."""

    def train(model: nn.Module, sparsifier: Sparsifier | None, leg: Leg) -> nn.Module:
        assert sparsifier is not None
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        sparsifier.attach(model, optimizer)
        for _ in range(leg.steps):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(INPUTS[TRAIN]), LABELS[TRAIN]).backward()
            optimizer.step()
        sparsifier.finalize()
        return model

    gradual = GradualSoup(0.1, total_steps=40, members=2, phases=2, make=make)
    model = gradual.run(network(norm=False), train, PROBE)
    uncut = plain_run(make, 40, every=10)
    for key, value in uncut.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key
    assert gradual.masks.nnz() == round(0.1 * TOTAL)


def test_the_dense_weights_behind_the_mask_are_averaged_too():
    """DPF's next mask is chosen among the means of the members' dense weights, so pruned weights may come back."""
    loop, states = Loop(rate=0.3), {}

    def train(model: nn.Module, sparsifier: Sparsifier | None, leg: Leg) -> nn.Module:
        assert sparsifier is not None
        loop(model, sparsifier, leg)
        states[leg.name] = sparsifier.state_dict()
        return model

    gradual = GradualSoup(0.3, total_steps=120, members=2, make=DPF, every=15)
    model = gradual.run(network(norm=False), train, PROBE)
    gradual.masks.check(model)
    names, back = list(gradual.masks), 0
    for place in range(4, len(gradual.cuts) - 1):  # from the stretch at whose start the final density is reached
        pair = [states[f"stretch{place - 1}-member{i}"] for i in range(2)]
        assert not torch.equal(pair[0]["extra.0.weight"], pair[1]["extra.0.weight"])
        dense = {n: (pair[0][f"extra.{n}"].double() + pair[1][f"extra.{n}"].double()).abs() for n in names}
        threshold = torch.cat([dense[n].flatten() for n in names]).sort(descending=True).values[gradual.masks.nnz() - 1]
        for n in names:
            kept = loop.after[f"stretch{place}-member1"][n] != 0
            assert torch.equal(kept, dense[n] >= threshold)
            back += int((kept & (loop.after[f"stretch{place - 1}-member1"][n] == 0)).sum())
    assert back > 0


def test_a_method_that_follows_the_batch_or_tells_no_steps_is_refused():
    gradual = GradualSoup(0.3, total_steps=40, members=2, phases=2, make=RigL)
    with pytest.raises(MaskError, match="differ"):
        gradual.run(network(), Loop(), PROBE)

    class Anytime(Sparsifier):
        """Says nothing about when."""

        def __init__(self, density: float, *, total_steps: int, every: int) -> None:
            super().__init__(density)

    with pytest.raises(MethodError, match="Anytime does not say when"):
        GradualSoup(0.3, total_steps=40, make=Anytime)
    with pytest.raises(MethodError, match="at least 1"):
        GradualSoup(0.3, total_steps=40, members=0)


@given(st.integers(1, 4), st.integers(1, 6), st.integers(30, 200))
@settings(max_examples=30, deadline=None)
def test_steps_of_a_gradual_soup_grow_with_the_path(members, phases, total):
    build = partial(GradualSoup, 0.1, members=members, phases=phases)
    assert build(total_steps=total + 1).steps >= build(total_steps=total).steps >= total
