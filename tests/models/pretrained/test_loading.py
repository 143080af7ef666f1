from __future__ import annotations

import json
import os
import pickle
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from openwork.core.masks import Masks
from openwork.errors import FormatError, MissingExtra, ModelError, OpenworkError
from openwork.models import pretrained
from openwork.models.pretrained import checks, folder, tokenizing
from openwork.models.pretrained.pooling import Pooling
from openwork.runtime import files
from tests.models.pretrained import tiny

transformers = pytest.importorskip("transformers")

KINDS = {"llama": "causal", "gpt2": "causal", "bert": "masked", "encoder": "encoder"}
IDS = torch.tensor([[2, 5, 9, 7, 4, 11, 6, 3]])


def output(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        found = model(ids)
    return found.logits if "logits" in found else found.last_hidden_state


def change(path: Path, **changes: Any) -> None:
    """Rewrite a weights file: a tensor given as None goes."""
    state = load_file(path)
    for name, tensor in changes.items():
        state.pop(name, None)
        if tensor is not None:
            state[name] = tensor
    save_file(state, path, metadata={"format": "pt"})


def edit(path: Path, **changes: Any) -> None:
    entries = json.loads(path.read_text())
    path.write_text(json.dumps({**entries, **changes}))


@pytest.mark.parametrize("kind", KINDS)
def test_a_loaded_model_is_the_saved_one_bit_for_bit(kind, tmp_path):
    place = tiny.save(tmp_path / "m", kind, seed=3)
    found = pretrained.load(place)
    assert found.kind == KINDS[kind]
    assert not found.model.training
    assert torch.equal(output(found.model), output(tiny.build(kind, seed=3)))
    assert found.length == (24 if kind == "encoder" else 32)
    assert found.tokenizer.vocab_size == len(tiny.tokenizer(tiny.family(kind)))


def test_an_encoder_brings_its_pooling(tmp_path):
    assert pretrained.load(tiny.save(tmp_path / "m", "encoder")).pooling == Pooling("mean", True, 24)
    edit(tmp_path / "m" / "1_Pooling" / "config.json", pooling_mode_mean_tokens=False, pooling_mode_cls_token=True)
    assert pretrained.load(tmp_path / "m").pooling.mode == "cls"
    edit(tmp_path / "m" / "1_Pooling" / "config.json", pooling_mode_mean_tokens=True)
    with pytest.raises(ModelError, match="mean, cls or max alone"):
        pretrained.load(tmp_path / "m")


@pytest.mark.parametrize("mode", ["mean", "cls", "max"])
def test_pooling_counts_only_what_is_not_padding(mode):
    states = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]])
    pool = Pooling(mode, normalize=False)
    found = pool(states, mask)
    for row, count in enumerate(mask.sum(1).tolist()):
        kept = states[row, :count]
        expected = {"mean": kept.mean(0), "cls": kept[0], "max": kept.amax(0)}[mode]
        torch.testing.assert_close(found[row], expected)
    torch.testing.assert_close(Pooling(mode)(states, mask).norm(dim=1), torch.ones(3))


def test_shards_are_read_by_their_index(tmp_path):
    place = tiny.save(tmp_path / "m", "llama", seed=1, max_shard_size="4KB")
    shards = sorted(path.name for path in place.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert torch.equal(output(pretrained.load(place).model), output(tiny.build("llama", seed=1)))
    index = place / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    name, shard = next(iter(table["weight_map"].items()))

    other = next(each for each in shards if each != shard)
    index.write_text(json.dumps({**table, "weight_map": {**table["weight_map"], name: other}}))
    with pytest.raises(FormatError, match=f"(?s){name}.*lacks"):
        pretrained.load(place)
    index.write_text(json.dumps({**table, "weight_map": {**table["weight_map"], name: "../model.safetensors"}}))
    with pytest.raises(FormatError, match="no shard beside it"):
        pretrained.load(place)
    index.write_text(json.dumps(table))
    (place / shard).unlink()
    with pytest.raises(FormatError, match=f"lacks the shard '{shard}'"):
        pretrained.load(place)


def test_missing_extra_and_odd_tensors_are_named(tmp_path):
    place = tiny.save(tmp_path / "m", "llama")
    weights = place / "model.safetensors"
    name = "model.layers.1.mlp.up_proj.weight"
    whole = load_file(weights)

    change(weights, **{name: None})
    with pytest.raises(FormatError, match=f"missing in the files: {name}"):
        pretrained.load(place)
    change(weights, **{name: whole[name], "extra.weight": torch.ones(2)})
    with pytest.raises(FormatError, match=r"not in the model: extra\.weight"):
        pretrained.load(place)
    assert pretrained.load(place, ignore="extra.*").kind == "causal"
    change(weights, **{"extra.weight": None, name: torch.ones(3, 16)})
    with pytest.raises(FormatError, match=rf"of another shape: {name} \(file 3x16, model 24x16\)"):
        pretrained.load(place)


def test_a_tied_head_may_be_absent_and_an_untied_one_may_not(tmp_path):
    model = tiny.build("llama", tie_word_embeddings=True)
    tied = tiny.save(tmp_path / "tied", "llama", model=model)
    assert "lm_head.weight" not in load_file(tied / "model.safetensors")
    found = pretrained.load(tied).model
    assert found.lm_head.weight is found.model.embed_tokens.weight
    loose = tiny.save(tmp_path / "loose", "llama")
    change(loose / "model.safetensors", **{"lm_head.weight": None})
    with pytest.raises(FormatError, match=r"lm_head\.weight"):
        pretrained.load(loose)


def test_an_encoder_without_its_pooler_is_whole(tmp_path):
    place = tiny.save(tmp_path / "m", "encoder")
    change(place / "model.safetensors", **{"pooler.dense.weight": None, "pooler.dense.bias": None})
    found = pretrained.load(place)
    assert found.model.pooler is None
    assert torch.equal(output(found.model), output(tiny.build("encoder")))


@pytest.mark.parametrize(("value", "word"), [(float("nan"), "NaN"), (float("inf"), "infinity"), (float("-inf"), "infinity")])
def test_numbers_that_are_not_finite_are_named_by_tensor(value, word, tmp_path, monkeypatch):
    place = tiny.save(tmp_path / "m", "llama")
    name = "model.layers.0.mlp.down_proj.weight"
    bad = load_file(place / "model.safetensors")[name]
    bad[-1, -1] = value
    change(place / "model.safetensors", **{name: bad})
    with pytest.raises(FormatError, match=f"'{name}' in .* holds {word}"):
        pretrained.load(place)
    monkeypatch.setattr(checks, "_ENTRIES", 32)  # in parts, as tensors of billions of entries are
    with pytest.raises(FormatError, match=f"'{name}' in .* holds {word}"):
        checks.check_files(place)
    assert checks.check_files(place, values=False) == (place / "model.safetensors").stat().st_size


@pytest.mark.parametrize("damage", ["cut", "flipped header", "empty", "zip", "lfs"])
def test_damaged_weights_are_one_sentence(damage, tmp_path):
    place = tiny.save(tmp_path / "m", "llama")
    path = place / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes({
        "cut": data[: len(data) // 2], "flipped header": struct.pack("<Q", 2**60) + data[8:], "empty": b"",
        "zip": b"PK\x03\x04" + data, "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0",
    }[damage])  # fmt: skip
    with pytest.raises(FormatError) as caught:
        pretrained.load(place)
    assert "model.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)


class Bomb:
    """Leaves a mark when it is unpickled."""

    def __reduce__(self) -> tuple[Any, Any]:
        return (os.mkdir, ("exploded",))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pkl", "model.safetensors"])
def test_pickles_are_refused_and_never_read(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    place = tiny.save(tmp_path / "m", "llama")
    (place / "model.safetensors").unlink()
    (place / name).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(OpenworkError, match="pickle"):
        pretrained.load(place)
    assert not (tmp_path / "exploded").exists()


def test_what_is_no_model_is_said_in_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    with pytest.raises(ModelError, match=r"holds no config\.json"):
        pretrained.load(tmp_path / "empty")
    with pytest.raises(ModelError, match="is a file"):
        pretrained.load(tmp_path / "file")
    for missing in (tmp_path / "none", "./none", "a/b/c", "x\u202ey", "n" * 10_000, "a\x1b[31mb", "a\x00b"):
        with pytest.raises(ModelError) as caught:
            pretrained.load(missing)
        assert len(str(caught.value)) < 700
        assert str(caught.value).isprintable()
    with pytest.raises(ModelError, match="'org/none', and the hub may not be asked"):
        pretrained.load("org/none")
    with pytest.raises(ModelError, match="kind='seq2seq'"):
        pretrained.load(tmp_path, kind="seq2seq")
    with pytest.raises(ModelError, match="dtype='int8'"):
        pretrained.load(tmp_path, dtype="int8")


def test_a_hub_out_of_reach_is_one_sentence(monkeypatch):
    import huggingface_hub

    def fail(*_: object, **options: Any) -> str:
        assert options["local_files_only"] is False
        assert not any(pattern.endswith((".bin", ".py", "*")) for pattern in options["allow_patterns"])
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(folder, "is_offline", lambda: False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ModelError, match=r"hub cannot be reached \(ConnectionError\): check the network"):
        pretrained.load("org/name")


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ("{", "not JSON"), ("[]", "holds a list"), ('{"model_type": "none"}', "does not know"),
        ('{"model_type": "own", "auto_map": {"AutoModel": "own.Model"}}', "code of its own, which is never run"),
        ('{"model_type": "t5"}', "encoder-decoder"), ('{"model_type": "vit"}', "no text model"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "config"), ("\ud800", "not JSON"),
    ],
)  # fmt: skip
def test_a_config_that_makes_no_sense(entries, words, tmp_path):
    place = tiny.save(tmp_path / "m", "llama")
    (place / "config.json").write_bytes(entries.encode("utf-8", "surrogatepass"))
    with pytest.raises(ModelError, match=words):
        pretrained.load(place)


def test_the_kind_follows_the_config_and_can_be_chosen(tmp_path):
    place = tiny.save(tmp_path / "m", "bert")
    assert type(pretrained.load(place).model).__name__ == "BertForMaskedLM"
    with pytest.raises(FormatError, match=r"cls\.predictions"):
        pretrained.load(place, kind="encoder")
    found = pretrained.load(place, kind="encoder", ignore="cls.*")
    assert (found.kind, type(found.model).__name__) == ("encoder", "BertModel")
    edit(place / "config.json", architectures=None)
    assert pretrained.load(place).kind == "masked"


def test_dtypes(tmp_path):
    place = tiny.save(tmp_path / "m", "llama", model=tiny.build("llama").bfloat16())
    assert pretrained.load(place).model.dtype == torch.bfloat16
    assert pretrained.load(place, dtype="float32").model.dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int8, torch.bool])
def test_whole_numbers_where_the_model_has_real_ones_are_refused_by_name(kind, dtype, tmp_path):
    place = tiny.save(tmp_path / "m", kind)
    name = next(name for name in load_file(place / "model.safetensors") if name.endswith("weight"))
    change(place / "model.safetensors", **{name: torch.ones_like(load_file(place / "model.safetensors")[name]).to(dtype)})
    with pytest.raises(FormatError, match="whole numbers") as caught:
        pretrained.load(place)
    assert name in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_broken_tokenizer_is_one_sentence_and_none_is_none(tmp_path):
    place = tiny.save(tmp_path / "m", "llama")
    (place / "tokenizer.json").write_text('{"version": "1.0", "model": 3}')
    with pytest.raises(ModelError, match="tokenizer files"):
        pretrained.load(place)
    for name in folder.TOKENIZER:
        (place / name).unlink(missing_ok=True)
    assert pretrained.load(place).tokenizer is None


@pytest.mark.parametrize(("kind", "expected"), [("bert", ([2], [3])), ("llama", ([2], [])), ("gpt2", ([], []))])
def test_special_tokens_around_a_text(kind, expected):
    assert tokenizing.specials(tiny.tokenizer(kind)) == expected


def test_transformers_keeps_its_own_voice(tmp_path, capfd):
    logging = transformers.utils.logging
    before = logging.get_verbosity()
    place = tiny.save(tmp_path / "m", "llama")
    capfd.readouterr()
    pretrained.load(place)
    assert logging.get_verbosity() == before
    assert capfd.readouterr().err == ""


def test_without_transformers(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtra, match=r"openwork\[transformers\]"):
        pretrained.load(tmp_path)


def test_the_small_file_alone_is_enough(tmp_path):
    place = tiny.save(tmp_path / "m", "bert", seed=2)
    found = pretrained.load(place)
    out = pretrained.write(tmp_path / "out", found, Masks({})).folder
    (out / "model.safetensors").unlink()
    again = pretrained.load(out)
    assert torch.equal(output(again.model), output(found.model))
    state = {name: tensor.clone() for name, tensor in found.model.state_dict().items()}
    state["bert.encoder.layer.0.output.dense.bias"][0] = float("nan")
    files.write_state(out / folder.SMALL, state)
    with pytest.raises(FormatError, match=r"output\.dense\.bias.*NaN"):
        pretrained.load(out)
