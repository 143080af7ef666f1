from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from openwork.errors import DataError, ModelError, PatternError
from openwork.oneshot import walk
from openwork.oneshot.api import sparsify
from tests.oneshot.networks import Residual, mlp, normal
from tests.oneshot.test_walk import same, state


def test_everything_is_left_as_it_was_found():
    model = nn.Sequential(nn.Dropout(0.5), Residual(), nn.Dropout(0.1)).train()
    model[1].blocks[0].eval()
    model[1].entry.weight.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    grads = [param.requires_grad for param in model.parameters()]
    torch.manual_seed(3)
    drawn = torch.get_rng_state()
    sparsify(model, [normal(6, 5)], method="sparsegpt")
    assert torch.equal(torch.get_rng_state(), drawn)
    assert [module.training for module in model.modules()] == modes
    assert [param.requires_grad for param in model.parameters()] == grads
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all("forward" not in module.__dict__ for module in model.modules())
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("make", [Residual, mlp])
def test_an_interruption_puts_every_weight_back(monkeypatch, make, error):
    real, calls = walk.prune_layer, []

    def failing(*args):
        calls.append(args)
        if len(calls) == (4 if make is Residual else 2):
            raise error("stop")
        return real(*args)

    monkeypatch.setattr(walk, "prune_layer", failing)
    model = make()
    before = state(model)
    with pytest.raises(error, match="stop"):
        sparsify(model, [normal(6, 5 if make is Residual else 12)], method="sparsegpt")
    assert len(calls) == (4 if make is Residual else 2)
    assert same(before, state(model))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused_by_name(bad):
    model = Residual()
    model.blocks[1].down.weight.data[0, 3] = bad
    before = state(model)
    with pytest.raises(ModelError, match=r"1 of 128 weights of 'blocks.1.down.weight' are not finite"):
        sparsify(model, [normal(6, 5)])
    assert all(
        torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(before.values(), state(model).values(), strict=True)
    )


@pytest.mark.parametrize(("make", "width"), [(Residual, 5), (mlp, 12)])
def test_activations_that_are_not_finite_are_refused_before_a_weight_changes(make, width):
    model = make()
    before = state(model)
    with pytest.raises(DataError, match="not finite"):
        sparsify(model, [normal(6, width), torch.full((2, width), math.nan)])
    assert same(before, state(model))


def test_a_layer_that_no_input_reaches_is_named_before_a_weight_changes():
    class Idle(Residual):
        def __init__(self) -> None:
            super().__init__()
            self.blocks[2].idle = nn.Linear(3, 3)
            self.blocks[0].idle = nn.Linear(3, 3)

    model = Idle()
    before = state(model)
    with pytest.raises(DataError, match=r"no calibration input reached the layer 'blocks.0.idle'"):
        sparsify(model, [normal(6, 5)])
    assert same(before, state(model))
    assert len(sparsify(model, [normal(6, 5)], exclude="*.idle").report) == 7


def test_a_pattern_that_does_not_divide_a_layer_is_refused_with_its_name_and_width():
    model = Residual()
    before = state(model)
    with pytest.raises(PatternError, match=r"layer 'entry' has 5 inputs and 8 outputs: 2:4 needs .*exclude this layer"):
        sparsify(model, [normal(6, 5)], pattern="2:4")
    assert same(before, state(model))
    result = sparsify(model, [normal(6, 5)], pattern="2:4", exclude="entry")
    assert {row.density for row in result.report} == {0.5}


def test_progress_counts_every_block():
    told = []
    sparsify(Residual(), [normal(6, 5)], progress=lambda *args: told.append(args))
    assert [done for done, _, _ in told] == [1, 2, 3, 4]
    assert {total for _, total, _ in told} == {4}
    assert [name for _, _, name in told] == ["entry", "blocks.0", "blocks.1", "blocks.2"]


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"select": "nothing.*"}, ModelError, "'nothing.*'"),
        ({"select": lambda name, module: False}, ModelError, "nothing to prune"),
        ({"exclude": ["blocks.9"]}, ModelError, "'blocks.9'"),
    ],
)
def test_names_that_match_nothing_are_refused(settings, error, words):
    with pytest.raises(error, match=words.replace("*", r"\*")):
        sparsify(Residual(), [normal(6, 5)], **settings)


@pytest.mark.parametrize(
    ("calibration", "words"),
    [
        (None, "wanda needs calibration data"),
        ([], "no batch"),
        (3, "calibration is int"),
        ("text", "calibration is str"),
        (["text"], "batch 0 is str"),
        ([normal(3, 4)], "refuses calibration batch 0"),
        (nn.Linear(2, 2), "a model"),
    ],
    ids=str,
)
def test_calibration_that_cannot_be_used_is_refused(calibration, words):
    model = Residual()
    before = state(model)
    with pytest.raises(DataError, match=words):
        sparsify(model, calibration)
    assert same(before, state(model))


def test_what_is_no_model_or_has_no_layer_is_refused():
    with pytest.raises(ModelError, match="a dict is no model"):
        sparsify({}, [normal(1, 2)])
    with pytest.raises(ModelError, match="nothing to prune in ReLU"):
        sparsify(nn.ReLU(), [normal(1, 2)])
    with pytest.raises(ModelError, match="meta tensor"):
        sparsify(nn.Linear(3, 3, device="meta"), method="magnitude")
