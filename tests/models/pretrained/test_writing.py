from __future__ import annotations

import json

import pytest
import torch

import openwork
from openwork.core.masks import Masks
from openwork.errors import MaskError, StoreError
from openwork.models import pretrained
from openwork.models.pretrained import folder as folders
from openwork.models.pretrained import writing
from openwork.oneshot.report import Streamed
from tests.models.pretrained import tiny
from tests.models.pretrained.test_loading import output

transformers = pytest.importorskip("transformers")


def halved(found: pretrained.Pretrained) -> Masks:
    """Set half of each matrix of the blocks to zero, in place."""
    masks = {}
    for name, param in found.model.named_parameters():
        if param.dim() == 2 and "embed" not in name and "head" not in name:
            masks[name] = param.abs() >= param.abs().median()
    Masks(masks).apply(found.model)
    return Masks(masks)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "encoder"])
def test_transformers_and_openwork_open_what_is_written(kind, tmp_path):
    found = pretrained.load(tiny.save(tmp_path / "m", kind, seed=5))
    masks = halved(found)
    written = pretrained.write(tmp_path / "out", found, masks, metadata={"why": "test"})
    auto = {
        "llama": "AutoModelForCausalLM",
        "gpt2": "AutoModelForCausalLM",
        "bert": "AutoModelForMaskedLM",
        "encoder": "AutoModel",
    }
    opened = getattr(transformers, auto[kind]).from_pretrained(written.folder).eval()
    assert torch.equal(output(opened), output(found.model))
    masks.check(opened)
    assert transformers.AutoTokenizer.from_pretrained(written.folder)("the cat")["input_ids"]
    again = pretrained.load(written.folder)
    assert again.kind == found.kind
    assert again.pooling == found.pooling

    small = openwork.load(written.folder / folders.SMALL, tiny.build(kind, seed=6))
    assert torch.equal(output(small), output(found.model))
    assert written.small_bytes == (written.folder / folders.SMALL).stat().st_size
    assert written.dense_bytes == (written.folder / "model.safetensors").stat().st_size
    kept = Streamed(written.folder, (), (), 0).masks()
    assert all(torch.equal(kept[name], mask) for name, mask in masks.items())


def test_a_sparse_model_takes_less_room_as_a_small_file(tmp_path):
    model = tiny.build("llama", hidden_size=64, intermediate_size=256, num_attention_heads=4)
    found = pretrained.load(tiny.save(tmp_path / "m", "llama", model=model))
    masks = halved(found)
    written = pretrained.write(tmp_path / "out", found, masks)
    assert written.small_bytes < 0.65 * written.dense_bytes


def test_generation_config_and_sentence_files_go_along(tmp_path):
    place = tiny.save(tmp_path / "m", "encoder")
    (place / "LICENSE").write_text("free")
    (place / "run_me.py").write_text("raise SystemExit")
    out = pretrained.write(tmp_path / "out", pretrained.load(place), Masks({})).folder
    for name in ("modules.json", "sentence_bert_config.json", "1_Pooling/config.json", "LICENSE"):
        assert (out / name).read_bytes() == (place / name).read_bytes()
    assert not (out / "run_me.py").exists()
    place = tiny.save(tmp_path / "g", "llama")
    settings = json.loads((place / "generation_config.json").read_text())
    (place / "generation_config.json").write_text(json.dumps({**settings, "max_new_tokens": 7}))
    out = pretrained.write(tmp_path / "out2", pretrained.load(place), Masks({})).folder
    assert json.loads((out / "generation_config.json").read_text())["max_new_tokens"] == 7


def test_nothing_is_written_over(tmp_path):
    found = pretrained.load(tiny.save(tmp_path / "m", "llama"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    (tmp_path / "file").write_text("y")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name, words in (("full", "not empty"), ("file", "no folder"), ("link", "no folder"), ("n" * 5000, "cannot use")):
        with pytest.raises(StoreError, match=words):
            pretrained.write(tmp_path / name, found, Masks({}))
    assert (tmp_path / "full" / "mine").read_text() == "x"
    assert (tmp_path / "file").read_text() == "y"
    (tmp_path / "empty").mkdir()
    assert pretrained.write(tmp_path / "empty", found, Masks({})).dense_bytes > 0


def test_a_mask_that_the_weights_break_is_refused_and_leaves_nothing(tmp_path):
    found = pretrained.load(tiny.save(tmp_path / "m", "llama"))
    name = "model.layers.0.mlp.up_proj.weight"
    mask = torch.zeros_like(found.model.get_parameter(name), dtype=torch.bool)
    with pytest.raises(MaskError, match="not zero"):
        pretrained.write(tmp_path / "out", found, Masks({name: mask}))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m"]
    assert writing.check_target(tmp_path / "out") == tmp_path / "out"
