from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from openwork import models
from openwork.core.rng import generator
from openwork.errors import FormatError, ModelError, StoreError
from openwork.runtime import files
from openwork.saving import load, load_state, save


def thin(model: nn.Module, density: float, seed: int = 0, multiply: bool = False) -> nn.Module:
    """Zero all but `density` of each weight; `multiply` does it as most tools do, which makes negative zeros."""
    draw = generator(seed, "thin")
    for weight in model.parameters():
        if weight.ndim > 1:
            kept = torch.rand(weight.shape, generator=draw) < density
            weight.data = weight.data * kept if multiply else weight.data.masked_fill(~kept, 0)
    return model


def equal(one: nn.Module, two: nn.Module) -> bool:
    a, b = one.state_dict(), two.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def plain_size(model: nn.Module, path: Path) -> int:
    safetensors.torch.save_model(model, str(path))
    return path.stat().st_size


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.head = nn.Linear(16, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(x))


@pytest.mark.parametrize(("density", "most"), [(0.1, 0.25), (0.05, 0.15)])
@pytest.mark.parametrize("ref", ["resnet20", "cnn"])
@pytest.mark.parametrize("multiply", [False, True])
def test_sparse_models_are_small_and_come_back(
    tmp_path: Path, ref: str, density: float, most: float, multiply: bool
) -> None:
    model = thin(models.build(ref, input_shape=(3, 32, 32), classes=10, seed=1), density, multiply=multiply)
    saved = save(model, tmp_path / "m.safetensors")
    assert saved.bytes == (tmp_path / "m.safetensors").stat().st_size
    assert saved.dense_bytes == plain_size(model, tmp_path / "plain.safetensors")
    assert saved.ratio == saved.bytes / saved.dense_bytes <= most
    built = load(tmp_path / "m.safetensors")
    assert type(built) is type(model)
    assert equal(built, model)
    assert built.openwork_recipe == model.openwork_recipe


def test_a_dense_model_is_hardly_larger(tmp_path: Path) -> None:
    model = models.build("mlp-300-100", input_shape=(784,), classes=10, seed=0)
    assert save(model, tmp_path / "m.safetensors").ratio < 1.01


def test_a_module_of_ones_own_is_filled_in_place(tmp_path: Path) -> None:
    model = thin(nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5)), 0.4)
    model(torch.randn(9, 6, generator=generator(0, "x")))
    save(model, tmp_path / "m.safetensors", metadata={"epoch": 3, "note": ["ü"]})
    other = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5))
    weight = other[0].weight
    assert load(tmp_path / "m.safetensors", other) is other
    assert other[0].weight is weight
    assert equal(other, model)
    assert files.read_state(tmp_path / "m.safetensors")[1] == {"epoch": 3, "note": ["ü"]}
    assert load_state(tmp_path / "m.safetensors").keys() == model.state_dict().keys()


def test_plain_files_are_loaded(tmp_path: Path) -> None:
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    safetensors.torch.save_file(model.state_dict(), tmp_path / "p.safetensors")
    assert equal(load(tmp_path / "p.safetensors", other), model)
    with pytest.raises(FormatError, match="does not say which model it holds: pass the module"):
        load(tmp_path / "p.safetensors")


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 1)), r"missing in the file: 1\.weight, 1\.bias"),
        (nn.Sequential(nn.Linear(6, 5, bias=False)), r"not in the model: 0\.bias"),
        (nn.Sequential(nn.Linear(6, 4)), r"0\.weight \(file: 5x6 float32, model: 4x6 float32\), 0\.bias"),
        (nn.Sequential(nn.Linear(6, 5).double()), r"0\.weight \(file: 5x6 float32, model: 5x6 float64\)"),
    ],
    ids=["missing", "extra", "shape", "dtype"],
)
def test_a_misfit_is_named_and_changes_nothing(tmp_path: Path, other: nn.Module, words: str) -> None:
    save(nn.Sequential(nn.Linear(6, 5)), tmp_path / "m.safetensors")
    before = copy.deepcopy(other)
    with pytest.raises(FormatError, match=words):
        load(tmp_path / "m.safetensors", other)
    assert equal(other, before)


def test_a_damaged_file_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    model = nn.Linear(6, 5)
    save(model, path)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    before = copy.deepcopy(model)
    with pytest.raises(FormatError, match="corrupted"):
        load(path, model)
    assert equal(model, before)


def test_tied_weights(tmp_path: Path) -> None:
    model, other = thin(Tied(), 0.3), Tied()
    saved = save(model, tmp_path / "m.safetensors")
    assert saved.dense_bytes == len(safetensors.torch.save({"embed.weight": model.embed.weight.detach()}))
    load(tmp_path / "m.safetensors", other)
    assert other.head.weight is other.embed.weight
    assert equal(other, model)
    other = Tied()
    safetensors.torch.save_model(model, str(tmp_path / "plain.safetensors"))
    assert equal(load(tmp_path / "plain.safetensors", other), model)  # holds one of the two names
    untied = Tied()
    untied.head.weight = nn.Parameter(torch.zeros(50, 16))
    assert equal(load(tmp_path / "m.safetensors", untied), model)
    untied.head.weight.data[0, 0] += 1
    save(untied, tmp_path / "untied.safetensors")
    before = copy.deepcopy(other)
    with pytest.raises(FormatError, match=r"tied in the model but different in the file: head\.weight"):
        load(tmp_path / "untied.safetensors", other)
    assert equal(other, before)


def test_transformers_with_tied_weights(tmp_path: Path) -> None:
    import transformers

    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=40, n_positions=8)
    model, other = transformers.GPT2LMHeadModel(config).eval(), transformers.GPT2LMHeadModel(config).eval()
    thin(model, 0.2)
    assert model.lm_head.weight is model.transformer.wte.weight
    saved = save(model, tmp_path / "m.safetensors")
    assert saved.bytes < 0.5 * saved.dense_bytes
    load(tmp_path / "m.safetensors", other)
    tokens = torch.arange(8)[None]
    assert torch.equal(model(tokens).logits, other(tokens).logits)
    model.save_pretrained(tmp_path / "hf")
    again = transformers.GPT2LMHeadModel(config).eval()
    load(tmp_path / "hf" / "model.safetensors", again)
    assert torch.equal(model(tokens).logits, again(tokens).logits)


def test_compiled_models_are_saved_under_their_own_names(tmp_path: Path) -> None:
    model = models.build("mlp-8", input_shape=(6,), classes=3, seed=0)
    compiled = torch.compile(model, backend="eager")
    save(compiled, tmp_path / "m.safetensors")  # type: ignore[arg-type]
    assert load_state(tmp_path / "m.safetensors").keys() == model.state_dict().keys()
    assert equal(load(tmp_path / "m.safetensors"), model)
    wrapped = torch.compile(models.build("mlp-8", input_shape=(6,), classes=3, seed=5), backend="eager")
    assert load(tmp_path / "m.safetensors", wrapped) is wrapped  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(wrapped.state_dict().values(), model.state_dict().values(), strict=True))


def recipe_file(path: Path, recipe: Any) -> Path:
    model = models.build("mlp-8", input_shape=(6,), classes=3, seed=0)
    files.write_state(path, model.state_dict(), {"model": recipe})
    return path


GOOD = {"ref": "mlp-8", "input_shape": [6], "classes": 3, "options": {}}


@pytest.mark.parametrize("ref", ["os:getcwd", "evil.py:build", "hf:/tmp", "no-such-model", "", "mlp-8\n", "../mlp-8"])
def test_a_file_never_chooses_foreign_code(tmp_path: Path, ref: str) -> None:
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')\n")
    path = recipe_file(tmp_path / "m.safetensors", GOOD | {"ref": ref})
    with pytest.raises(FormatError, match=r"none of openwork's own.*pass the module"):
        load(path)


@pytest.mark.parametrize(
    "recipe",
    [
        [],
        "mlp-8",
        {"ref": "mlp-8"},
        GOOD | {"ref": ["mlp-8"]},
        GOOD | {"classes": 10**9},
        GOOD | {"classes": "3"},
        GOOD | {"classes": 0},
        GOOD | {"input_shape": 6},
        GOOD | {"input_shape": [6, 10**6]},
        GOOD | {"input_shape": []},
        GOOD | {"options": {"width": 2}},
        GOOD | {"options": [1]},
        GOOD | {"ref": "mlp-999999999"},
        GOOD | {"ref": "mlp-9"},
    ],
)
def test_recipes_that_make_no_sense_are_refused(tmp_path: Path, recipe: Any) -> None:
    with pytest.raises(FormatError):
        load(recipe_file(tmp_path / "m.safetensors", recipe))


def test_a_good_recipe_is_built(tmp_path: Path) -> None:
    model = load(recipe_file(tmp_path / "m.safetensors", GOOD))
    assert equal(model, models.build("mlp-8", input_shape=(6,), classes=3, seed=0))


def test_a_recipe_that_json_cannot_hold_is_left_out(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    model.openwork_recipe = {"ref": object()}  # type: ignore[assignment]
    save(model, tmp_path / "m.safetensors")
    assert files.read_state(tmp_path / "m.safetensors")[1] == {}


class Extra(nn.Linear):
    def get_extra_state(self) -> Any:
        return {"not": "a tensor"}

    def set_extra_state(self, state: Any) -> None:
        pass


def test_models_that_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"'_extra_state' in the state of Extra is a dict"):
        save(Extra(2, 2), tmp_path / "m")
    with pytest.raises(ModelError, match="meta tensor"):
        save(nn.Linear(2, 2, device="meta"), tmp_path / "m")
    with pytest.raises(ModelError, match="a dict is no model"):
        save({}, tmp_path / "m")  # type: ignore[arg-type]
    with pytest.raises(FormatError, match="metadata"):
        save(nn.Linear(2, 2), tmp_path / "m", metadata={"x": json})
    with pytest.raises(StoreError, match="there is no file"):
        load(tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_a_data_parallel_model_is_saved_and_loaded_under_its_own_names(tmp_path: Path) -> None:
    inner = nn.Linear(3, 2)
    save(nn.DataParallel(inner), tmp_path / "m.safetensors")
    assert set(load_state(tmp_path / "m.safetensors")) == {"weight", "bias"}
    other = nn.DataParallel(nn.Linear(3, 2))
    load(tmp_path / "m.safetensors", other)
    assert torch.equal(other.module.weight, inner.weight)
