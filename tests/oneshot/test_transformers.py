from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from openwork.core.patterns import NM, Unstructured
from openwork.core.select import count_of
from openwork.oneshot.api import sparsify
from openwork.oneshot.blocks import find_stack
from openwork.oneshot.layers import choose
from openwork.oneshot.sparsegpt import sparsegpt
from openwork.oneshot.wanda import wanda
from tests.oneshot import networks
from tests.oneshot.networks import normal, padded, seeded, tokens

transformers = pytest.importorskip("transformers")

MODELS = {
    "llama": (networks.llama, lambda: padded(tokens()), "model.layers", 21),
    "gpt2": (networks.gpt2, lambda: padded(tokens()), "transformer.h", 12),
    "bert": (networks.bert, lambda: padded(tokens()), "encoder.layer", 18),
    "vit": (networks.vit, lambda: [normal(3, 3, 8, 8), {"pixel_values": normal(2, 3, 8, 8)}], None, 18),
    "t5": (networks.t5, lambda: [{"input_ids": t, "decoder_input_ids": t[:, :5]} for t in tokens()], "decoder.block", 32),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_transformers_go_by_blocks_and_embeddings_and_head_stay(name, method):
    make, data, stack, layers = MODELS[name]
    model = make()
    if stack:
        assert find_stack(model).name == stack
    tables = {
        n: p.detach().clone()
        for n, p in model.named_parameters()
        if p.dim() > 1 and ("emb" in n or "wte" in n or "shared" in n)
    }
    result = sparsify(model, data(), method=method, pattern="2:4")
    assert result.walk == "blocks"
    assert len(result.report) == layers
    result.masks.check(model)
    for weight, mask in result.masks.items():
        owner = model.get_submodule(weight.removesuffix(".weight"))
        NM(2, 4).check(mask.t() if type(owner).__name__ == "Conv1D" else mask)
    assert result.density == 0.5
    assert all(torch.equal(model.get_parameter(n), value) for n, value in tables.items())
    assert set(tables) <= set(result.left)
    assert all(0 < row.error < 1 for row in result.report)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_walk_is_running_the_whole_model_again_for_every_block(name, method):
    make, data, *_ = MODELS[name]
    model, batches = make(), data()
    plain = copy.deepcopy(model)
    expected = {}
    for block_name, block in find_stack(plain).blocks:
        found: dict[str, list[torch.Tensor]] = {}

        def hook(key, found=found):
            return lambda module, args: found.setdefault(key, []).append(args[0].double())

        layers = {
            f"{block_name}.{n}": m
            for n, m in block.named_modules()
            if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"
        }
        handles = [module.register_forward_pre_hook(hook(key)) for key, module in layers.items()]
        with torch.no_grad():
            for batch in batches:
                plain(**batch)
        keep = [batch["attention_mask"] != 0 for batch in batches]
        for handle in handles:
            handle.remove()
        for key, module in layers.items():
            X = torch.cat([part[mask] for part, mask in zip(found[key], keep, strict=True)])
            turned = type(module).__name__ == "Conv1D"
            W = module.weight.detach().t().contiguous() if turned else module.weight.detach()
            if method == "wanda":
                kept = wanda(W, X.square().sum(0, keepdim=True), 0.5, Unstructured())
                new = W.masked_fill(~kept, 0)
            else:
                new, kept = sparsegpt(W, (X.T @ X)[None], 0.5, Unstructured())
                new = new.float()
            module.weight.data = new.t().contiguous() if turned else new
            expected[f"{key}.weight"] = kept.t() if turned else kept
    result = sparsify(model, batches, method=method)
    assert set(result.masks) == set(expected)
    assert all(torch.equal(result.masks[key], mask) for key, mask in expected.items())
    for key, value in plain.state_dict().items():
        assert torch.allclose(model.state_dict()[key], value, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_padding_does_not_count(name):
    make = MODELS[name][0]
    (ids,) = tokens(1, batch=1, length=9)
    wide = torch.cat([ids, torch.full((1, 4), 7)], dim=1)
    mask = torch.cat([torch.ones_like(ids), torch.zeros(1, 4, dtype=torch.long)], dim=1)
    one, two = make(), make()
    bare = sparsify(one, [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}])
    longer = sparsify(two, [{"input_ids": wide, "attention_mask": mask}])
    assert [row.tokens for row in longer.report] == [9] * len(longer.report)
    assert all(torch.equal(bare.masks[key], longer.masks[key]) for key in bare.masks)
    assert [row.error for row in longer.report] == pytest.approx([row.error for row in bare.report], rel=1e-4)


def test_batches_of_one_and_of_eight_give_the_same_masks():
    ids = torch.cat(tokens(4))
    one, two = networks.llama(), networks.llama()
    single, many = sparsify(one, list(ids.split(1))), sparsify(two, [ids.flip(0)])
    assert all(torch.equal(single.masks[key], many.masks[key]) for key in single.masks)


def test_caches_are_off_while_it_runs_and_back_afterwards():
    model = networks.llama()
    model.config.use_cache = True
    seen = []
    handle = model.register_forward_hook(lambda module, args, output: seen.append(output.past_key_values))
    sparsify(model, tokens())
    handle.remove()
    assert seen
    assert all(cache is None for cache in seen)
    assert model.config.use_cache is True


def test_layers_with_their_own_masks_get_their_own():
    config = transformers.Gemma2Config(
        **networks.COMMON,
        num_key_value_heads=1,
        head_dim=8,
        sliding_window=4,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = seeded(transformers.Gemma2ForCausalLM(config))
    assert len(set(config.layer_types)) == 2
    assert sparsify(model, tokens(), method="sparsegpt").walk == "blocks"


def test_a_tied_head_can_be_named_and_prunes_the_table_with_it():
    model = networks.llama(tie_word_embeddings=True)
    assert "lm_head" not in {layer.name for layer in choose(model, None, (), "model.layers")}
    result = sparsify(model, tokens(), select="lm_head", density=0.25)
    (row,) = result.report
    table = model.model.embed_tokens.weight
    assert table is model.lm_head.weight
    assert int((table != 0).sum()) == row.kept == count_of(0.25, table.numel())


def test_sparsegpt_beats_wanda_beats_magnitude_on_the_blocks_of_a_llama():
    model = networks.llama(hidden_size=32, intermediate_size=64)
    with torch.no_grad():  # channels of very different size, as in real language models
        for block in model.model.layers:
            block.input_layernorm.weight *= torch.exp(1.5 * normal(32))
            block.post_attention_layernorm.weight *= torch.exp(1.5 * normal(32, seed=1))
    dense, data, errors = copy.deepcopy(model), tokens(6, batch=4), {}
    for method in ("magnitude", "wanda", "sparsegpt"):
        net = copy.deepcopy(dense)
        result = sparsify(net, data, method=method)
        errors[method] = sum(row.error for row in result.report)
    assert errors["sparsegpt"] < errors["wanda"] < errors["magnitude"]
