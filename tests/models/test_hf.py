from __future__ import annotations

import json
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from openwork import models
from openwork.errors import MissingExtra, ModelError

transformers = pytest.importorskip("transformers")

BERT = {
    "model_type": "bert", "vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 24, "max_position_embeddings": 12,
}  # fmt: skip
VIT = {
    "model_type": "vit", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24,
    "image_size": 8, "patch_size": 4, "num_channels": 1,
}  # fmt: skip
GPT2 = {
    "model_type": "gpt2", "vocab_size": 20, "n_positions": 12, "n_embd": 16, "n_layer": 1, "n_head": 2,
    "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a model from a config must not touch the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def write(folder: Path, entries: Any) -> str:
    (folder / "config.json").write_text(json.dumps(entries))
    return f"hf:{folder / 'config.json'}"


def build(ref: str, shape: tuple[int, ...], classes: int, seed: int = 0, **options: Any) -> Any:
    return models.build(ref, input_shape=shape, classes=classes, seed=seed, options=options)


@pytest.mark.parametrize(
    ("entries", "shape", "classes", "expected", "output"),
    [
        (VIT, (1, 8, 8), 7, "ViTForImageClassification", (2, 7)),
        (BERT, (12,), 3, "BertForSequenceClassification", (2, 3)),
        (GPT2, (12,), 20, "GPT2LMHeadModel", (2, 12, 20)),
        (GPT2, (12,), 4, "GPT2ForSequenceClassification", (2, 4)),
        ({**GPT2, "architectures": ["GPT2LMHeadModel"]}, (12,), 4, "GPT2LMHeadModel", (2, 12, 20)),
        ({**BERT, "architectures": ["BertForMaskedLM"]}, (12,), 20, "BertForMaskedLM", (2, 12, 20)),
        ({**BERT, "architectures": ["NoSuchClass"]}, (12,), 3, "BertForSequenceClassification", (2, 3)),
        ({**BERT, "architectures": ["AutoConfig"]}, (12,), 3, "BertForSequenceClassification", (2, 3)),
    ],
)
def test_the_class_and_its_output(
    tmp_path: Path, entries: Any, shape: tuple[int, ...], classes: int, expected: str, output: tuple[int, ...]
) -> None:
    model = build(write(tmp_path, entries), shape, classes)
    assert type(model).__name__ == expected
    assert model.training
    x = torch.zeros(2, *shape) if len(shape) == 3 else torch.ones(2, *shape, dtype=torch.int64)
    y = torch.zeros(output[:-1], dtype=torch.int64)
    models.preflight(model, x, y)
    assert models.logits(model(x)).shape == output


def test_a_folder_is_as_good_as_its_file(tmp_path: Path) -> None:
    write(tmp_path, VIT)
    assert type(build(f"hf:{tmp_path}", (1, 8, 8), 7)) is transformers.ViTForImageClassification


def test_seed_decides_and_the_global_generator_is_untouched(tmp_path: Path) -> None:
    ref, before = write(tmp_path, BERT), torch.get_rng_state()
    first, again, other = (build(ref, (12,), 3, seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["classifier.weight"], other["classifier.weight"])


def test_options_replace_entries_and_sizes_are_those_of_the_config(tmp_path: Path) -> None:
    model = build(write(tmp_path, BERT), (12,), 3, num_hidden_layers=2, hidden_act="relu")
    assert model.config.num_hidden_layers == 2
    h, f = 16, 24
    embeddings = (20 + 12 + 2) * h + 2 * h
    layer = 4 * (h * h + h) + (h * f + f) + (f * h + h) + 4 * h
    assert sum(p.numel() for p in model.parameters()) == embeddings + 2 * layer + (h * h + h) + (3 * h + 3)


def test_labels_of_the_config_are_replaced(tmp_path: Path) -> None:
    model = build(write(tmp_path, {**VIT, "id2label": {"0": "cat", "1": "dog"}}), (1, 8, 8), 7)
    assert model.config.num_labels == 7 == model.classifier.out_features


def test_foreign_code_named_by_a_config_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    entries = {**BERT, "auto_map": {"AutoModelForSequenceClassification": "evil.Model", "AutoConfig": "evil.Config"}}
    assert type(build(write(tmp_path, entries), (12,), 3)) is transformers.BertForSequenceClassification


@pytest.mark.parametrize(
    ("entries", "options", "message"),
    [
        ([], {}, "holds a list: a config is a JSON object"),
        ({}, {}, "has model_type None"),
        ({"model_type": "brontosaurus"}, {}, "model_type 'brontosaurus'"),
        (BERT, {"hidden": 3}, "no option 'hidden'; the entries of a bert config: .*hidden_size"),
        ({**BERT, "num_attention_heads": 3}, {}, "makes no model: ValueError"),
        ({**GPT2, "architectures": ["GPT2LMHeadModel"]}, {"vocab_size": 8}, "vocabulary of 8, the data one of 9"),
        ({"model_type": "sam"}, {}, "maps SamConfig to no classifier"),
    ],
)
def test_bad_configs_are_refused_in_one_line(tmp_path: Path, entries: Any, options: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        build(write(tmp_path, entries), (12,), 9, **options)
    assert "\n" not in str(caught.value)


def test_files_that_are_missing_or_no_json(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no file 'bert-base-uncased': .*never downloads"):
        build("hf:bert-base-uncased", (12,), 3)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="is not JSON"):
        build(f"hf:{tmp_path}", (12,), 3)


def test_without_transformers_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtra, match=r"pip install 'openwork\[transformers\]'"):
        build(write(tmp_path, BERT), (12,), 3)
