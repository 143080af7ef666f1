from __future__ import annotations

import pytest
import torch
from torch import nn

from openwork import models
from openwork.errors import MaskError
from openwork.sparsifier.parameters import maskable, unwrap
from openwork.testing._toys import network, tied


def test_connections_of_a_vision_transformer():
    model = models.build("vit-tiny", input_shape=(1, 8, 8), classes=3, seed=0)
    found = list(maskable(model))
    dense = [name for name in dict(model.named_parameters()) if name not in found]
    assert all(dict(model.named_parameters())[name].dim() >= 2 for name in found)
    assert any("attention" in name or "attn" in name or "qkv" in name for name in found)
    for name in dense:
        param = dict(model.named_parameters())[name]
        assert param.dim() < 2 or "pos" in name or "token" in name or "emb" in name, name


def test_tables_of_a_module_of_ones_own_stay_dense():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.wte = nn.Embedding(10, 4)
            self.bag = nn.EmbeddingBag(10, 4)
            self.pos_embed = nn.Parameter(torch.zeros(1, 5, 4))
            self.cls_token = nn.Parameter(torch.zeros(1, 1, 4))
            self.norm = nn.LayerNorm([3, 4])
            self.rms = nn.RMSNorm([3, 4])
            self.bias = nn.Parameter(torch.zeros(3, 3))
            self.mix = nn.Parameter(torch.zeros(4, 4))
            self.conv = nn.Conv1d(2, 3, 3)
            self.head = nn.Linear(4, 2)
            self.counts = nn.Parameter(torch.zeros(2, 2, dtype=torch.int64), requires_grad=False)
            self.frozen = nn.Linear(4, 4).requires_grad_(False)

    assert list(maskable(Reader())) == ["mix", "conv.weight", "head.weight"]


def test_recurrent_layers():
    for kind, gates in ((nn.GRU, 3), (nn.LSTM, 4)):
        found = maskable(kind(5, 6, num_layers=2, bidirectional=True))
        assert set(found) == {
            f"weight_{which}_l{layer}{way}" for which in ("ih", "hh") for layer in (0, 1) for way in ("", "_reverse")
        }
        assert found["weight_hh_l0"].shape == (gates * 6, 6)


def test_attention_with_biases_as_extra_keys():
    model = nn.MultiheadAttention(8, 2, add_bias_kv=True)
    assert model.bias_k.dim() == 3
    assert list(maskable(model)) == ["in_proj_weight", "out_proj.weight"]
    apart = nn.MultiheadAttention(8, 2, kdim=4, vdim=4)
    assert list(maskable(apart)) == ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"]


def test_bert():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=12,
    )  # fmt: skip
    model = transformers.BertForMaskedLM(config)
    found = list(maskable(model))
    layer = "bert.encoder.layer.0"
    assert found == [
        *(f"{layer}.attention.self.{part}.weight" for part in ("query", "key", "value")),
        f"{layer}.attention.output.dense.weight",
        f"{layer}.intermediate.dense.weight",
        f"{layer}.output.dense.weight",
        "cls.predictions.transform.dense.weight",
    ]  # the decoder is tied to the word embeddings and goes by their name


def test_tied_parameters_go_by_their_first_name():
    assert list(maskable(tied())) == ["first.weight", "middle.weight", "last.weight"]


def test_choices():
    model = network()
    assert list(maskable(model, ["2"])) == ["2.weight", "2.bias"]
    assert list(maskable(model, "*.weight")) == ["0.weight", "2.weight", "4.weight"]
    assert list(maskable(model, exclude="4.*")) == ["0.weight", "2.weight"]
    assert list(maskable(model, exclude=["0", "2.weight"])) == ["4.weight"]
    assert list(maskable(model, lambda name, param: param.dim() == 1)) == ["0.bias", "2.bias", "4.bias"]
    assert list(maskable(model, lambda name, param: True, "*.bias")) == ["0.weight", "2.weight", "4.weight"]


@pytest.mark.parametrize(("choose", "exclude"), [(["3.weight"], ()), (None, ["conv*"]), (["2", "w*"], ())])
def test_names_that_match_nothing_are_refused(choose, exclude):
    with pytest.raises(MaskError, match="no parameter is called or matches"):
        maskable(network(), choose, exclude)


def test_a_model_without_connections_is_refused():
    with pytest.raises(MaskError, match=r"no parameter to mask in BatchNorm1d: name some .* it has weight, bias"):
        maskable(nn.BatchNorm1d(3))
    with pytest.raises(MaskError, match=r"no parameter to mask in ReLU: .* it has no parameters"):
        maskable(nn.ReLU())


def test_wrappers_are_looked_through():
    model = network()
    assert unwrap(model) is model
    assert unwrap(torch.compile(model, backend="eager")) is model
    parallel = nn.DataParallel(model)
    assert unwrap(parallel) is model
    assert unwrap(torch.compile(parallel, backend="eager")) is model
