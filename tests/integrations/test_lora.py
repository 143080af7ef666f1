from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from openwork.core.masks import Masks
from openwork.errors import MaskError, MissingExtra, RecipeError
from openwork.integrations import lora
from openwork.train import language, tuning
from tests.models.pretrained import tiny

pytest.importorskip("transformers")
pytest.importorskip("peft")

ENDS = ("proj.weight", "c_attn.weight", "c_fc.weight", "c_proj.weight", "dense.weight", "query.weight", "value.weight")


def masked_model(kind: str) -> tuple[Any, Masks]:
    model = tiny.build(kind)
    masks = Masks({
        name: param.abs() >= param.abs().median() for name, param in model.named_parameters()
        if name.endswith(ENDS) and "predictions" not in name
    })  # fmt: skip
    masks.apply(model)
    return model, masks


def trained(kind: str, under_mask: bool) -> tuple[Any, Masks, torch.Tensor, dict[str, torch.Tensor]]:
    model, masks = masked_model(kind)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    blocks = torch.randint(4, 30, (12, 10), generator=torch.Generator().manual_seed(0))
    wrapped = lora.adapted(model, masks, rank=4, under_mask=under_mask)
    loss = tuning.masked_loss(4) if kind == "bert" else tuning.causal_loss
    tuning.tune(wrapped, blocks, loss, steps=15, rate=2e-2, batch=6)
    return wrapped, masks, blocks, before


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_an_adapter_trained_under_the_mask_merges_without_loss(kind):
    wrapped, masks, blocks, before = trained(kind, under_mask=True)
    with torch.no_grad():
        apart = wrapped(blocks).logits
    merged = lora.merged(wrapped, masks)
    masks.check(merged.model)
    with torch.no_grad():
        together = merged.model(blocks).logits
    torch.testing.assert_close(together, apart, atol=2e-5, rtol=1e-4)
    assert merged.most == 0.0
    assert min(merged.change.values()) > 0.0
    assert {name for name, _ in merged.model.named_parameters()} == set(before)
    for name, param in merged.model.named_parameters():
        assert param.requires_grad
        assert torch.equal(param, before[name]) != (name in masks)  # the masked weights moved, nothing else did


def test_the_merge_loss_of_a_usual_adapter_is_reported():
    wrapped, masks, blocks, before = trained("llama", under_mask=False)
    apart = language.causal(wrapped, blocks).nll
    updates = {
        f"{name}.weight": layer.get_delta_weight("openwork").detach().clone() for name, layer in lora._layers(wrapped)
    }
    merged = lora.merged(wrapped, masks)
    masks.check(merged.model)
    together = language.causal(merged.model, blocks).nll
    assert apart < together < language.causal(tiny_sparse(before), blocks).nll  # half the update is gone, half helps
    for name, update in updates.items():
        gone = float(update[~masks[name]].square().sum() / update.square().sum())
        assert merged.cut[name] == pytest.approx(gone, rel=1e-4)
        expected = before[name] + update * masks[name]
        torch.testing.assert_close(merged.model.get_parameter(name).detach(), expected)
    assert 0.2 < merged.most < 0.8


def tiny_sparse(before: dict[str, torch.Tensor]) -> Any:
    model = tiny.build("llama")
    model.load_state_dict(before, strict=True)
    return model


def test_only_adapters_train_and_the_first_values_are_the_seeds():
    model, masks = masked_model("llama")
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    wrapped = lora.adapted(model, masks, rank=2, targets=["model.layers.0.mlp.up_proj"], seed=3)
    assert torch.equal(state, torch.random.get_rng_state())
    training = [name for name, param in wrapped.named_parameters() if param.requires_grad]
    assert len(training) == 2
    assert all("lora_" in name and "layers.0.mlp.up_proj" in name for name in training)
    other = lora.adapted(masked_model("llama")[0], masks, rank=2, targets=["model.layers.0.mlp.up_proj"], seed=3)
    first, second = (dict(one.named_parameters()) for one in (wrapped, other))
    assert all(torch.equal(first[name], second[name]) for name in training)


def test_what_cannot_be_adapted_is_said(monkeypatch):
    model, masks = masked_model("llama")
    with pytest.raises(RecipeError, match="rank=0"):
        lora.adapted(model, masks, rank=0)
    with pytest.raises(MaskError, match=r"no adapter fits model\.norm"):
        lora.adapted(model, masks, targets=["model.norm"])
    with pytest.raises(MaskError, match="not zero"):
        lora.adapted(tiny.build("llama", seed=1), masks)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtra, match=r"openwork\[transformers\]"):
        lora.adapted(model, masks)
