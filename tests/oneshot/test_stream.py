from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from openwork.errors import DataError, FormatError, ModelError, PatternError, RecipeError, StoreError
from openwork.oneshot import stream as streaming
from openwork.oneshot.api import sparsify, stream
from tests.oneshot import networks
from tests.oneshot.networks import normal, padded, tokens

transformers = pytest.importorskip("transformers")


def saved(model: nn.Module, folder: Path, **options: object) -> Path:
    model.save_pretrained(folder, **options)
    (folder / "tokenizer.model").write_bytes(b"pieces")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def loaded(model: nn.Module, folder: Path) -> nn.Module:
    return type(model).from_pretrained(folder).eval()


def assert_same(one: nn.Module, two: nn.Module) -> None:
    for (name, a), (_, b) in zip(one.state_dict().items(), two.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


CASES = {
    "llama": (networks.llama, lambda: padded(tokens()), None),
    "gpt2": (networks.gpt2, lambda: padded(tokens()), None),
    "bert": (networks.bert, lambda: padded(tokens()), "*[!s]"),  # the pooler behind the blocks as well
    "vit": (networks.vit, lambda: [normal(3, 3, 8, 8)], lambda name, module: isinstance(module, nn.Linear | nn.Conv2d)),
    "t5": (networks.t5, lambda: [{"input_ids": t, "decoder_input_ids": t[:, :5]} for t in tokens()], None),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    ("method", "allocation", "hidden"),
    [("wanda", "uniform", "memory"), ("sparsegpt", "owl", "disk"), ("magnitude", "global", "memory")],
)
def test_a_streamed_folder_is_the_model_that_sparsify_makes(name, method, allocation, hidden, tmp_path):
    make, data, select = CASES[name]
    if callable(select) is False and select:
        select = ["encoder", "pooler"]
    source = saved(make(), tmp_path / "in")
    before = files(source)
    calibration = None if method == "magnitude" else data()
    whole = loaded(make(), source)
    result = sparsify(whole, calibration, method=method, allocation=allocation, select=select)
    told = []
    streamed = stream(
        source, tmp_path / "out", calibration, method=method, allocation=allocation, select=select, hidden=hidden,
        progress=lambda *args: told.append(args),
    )  # fmt: skip
    assert_same(loaded(make(), tmp_path / "out"), whole)
    masks = streamed.masks()
    assert set(masks) == set(result.masks)
    assert all(torch.equal(masks[key], result.masks[key]) for key in masks)
    assert streamed.report == result.report
    assert streamed.left == result.left
    assert streamed.resumed == 0
    assert files(source) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == b"pieces"
    assert (tmp_path / "out" / "1_Pooling" / "config.json").is_file()
    assert [done for done, _, _ in told] == list(range(1, told[0][1] + 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_of_the_file_stays(dtype, tmp_path):
    source = saved(networks.llama().to(dtype), tmp_path / "in", max_shard_size="10KB")
    assert len(list(source.glob("*.safetensors"))) == 2
    whole = loaded(networks.llama(), source)
    sparsify(whole, tokens(), method="sparsegpt", pattern="2:4")
    stream(source, tmp_path / "out", tokens(), method="sparsegpt", pattern="2:4")
    found = loaded(networks.llama(), tmp_path / "out")
    assert {param.dtype for param in found.parameters()} == {dtype}
    assert_same(found, whole)


def test_a_function_and_explicit_densities_may_be_given(tmp_path):
    source = saved(networks.llama(), tmp_path / "in")

    def run(model: nn.Module) -> None:
        for ids in tokens():
            model(input_ids=ids)

    rule = {"model.layers.*": 0.5, "model.layers.1": 0.75}
    whole = loaded(networks.llama(), source)
    sparsify(whole, tokens(), allocation=rule)
    (tmp_path / "out").mkdir()  # an empty folder may be there
    stream(source, tmp_path / "out", run, allocation=rule)
    assert_same(loaded(networks.llama(), tmp_path / "out"), whole)


class Stop(Exception):
    pass


def stopping(monkeypatch, at: int) -> None:
    real, calls = streaming.prune_layer, []

    def failing(*args):
        calls.append(args)
        if len(calls) == at:
            raise Stop
        return real(*args)

    monkeypatch.setattr(streaming, "prune_layer", failing)


@pytest.mark.parametrize(
    ("hidden", "allocation", "at"),
    [("memory", "uniform", 16), ("memory", "owl", 10), ("disk", "uniform", 3), ("disk", "owl", 16)],
)
def test_a_run_that_stopped_goes_on_where_it_stopped(monkeypatch, tmp_path, hidden, allocation, at):
    source = saved(networks.llama(), tmp_path / "in")
    settings = {"method": "sparsegpt", "allocation": allocation, "hidden": hidden}
    whole = stream(source, tmp_path / "whole", padded(tokens()), **settings)
    with monkeypatch.context() as patch:
        stopping(patch, at)
        with pytest.raises(Stop):
            stream(source, tmp_path / "out", padded(tokens()), **settings)
    assert not (tmp_path / "out").exists()
    with pytest.raises(StoreError, match="other settings"):
        stream(source, tmp_path / "out", tokens(), **settings)
    with pytest.raises(StoreError, match="other settings"):
        stream(source, tmp_path / "out", padded(tokens()), **settings, damping=0.1)
    calls = []
    real = streaming.prune_layer
    monkeypatch.setattr(streaming, "prune_layer", lambda *args: calls.append(args) or real(*args))
    found = stream(source, tmp_path / "out", padded(tokens()), **settings)
    assert found.resumed == (at - 1) // 7
    assert len(calls) == 21 - 7 * found.resumed
    assert found.report == whole.report
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out", "whole"]


def test_a_killed_process_leaves_nothing_half_done(tmp_path):
    source = saved(networks.llama(), tmp_path / "in")
    script = textwrap.dedent(
        """
        import os, signal, sys
        from openwork.oneshot.api import stream
        from tests.oneshot.networks import tokens
        stream(sys.argv[1], sys.argv[2], tokens(), hidden="disk",
               progress=lambda done, total, name: done == 2 and os.kill(os.getpid(), signal.SIGKILL))
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(source), str(tmp_path / "out")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "out").exists()
    found = stream(source, tmp_path / "out", tokens(), hidden="disk")
    assert found.resumed == 2
    stream(source, tmp_path / "whole", tokens())
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_two_processes_do_not_work_on_one_folder(tmp_path):
    pytest.importorskip("fcntl")
    source = saved(networks.llama(), tmp_path / "in")
    seen = []

    def again(*_: object) -> None:
        with pytest.raises(StoreError, match="another openwork"):
            stream(source, tmp_path / "out", tokens())
        seen.append(1)

    stream(source, tmp_path / "out", tokens(), progress=again)
    assert len(seen) == 3


def test_neither_the_source_nor_anything_else_is_written_over(tmp_path):
    source = saved(networks.llama(), tmp_path / "in")
    before = files(source)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for out in (source, source / "inside", tmp_path / "full", tmp_path / "file"):
        with pytest.raises(StoreError, match=r"choose another"):
            stream(source, out, tokens())
    assert files(source) == before
    assert (tmp_path / "full" / "mine.txt").read_text() == "mine"


def changed(folder: Path, change) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), FormatError, "lacks model.layers.1.mlp.up_proj.weight"),
        (
            lambda t: t.update({"odd.weight": torch.ones(2)}),
            FormatError,
            "holds odd.weight, which LlamaForCausalLM does not",
        ),
        (lambda t: t.update({"model.norm.weight": torch.ones(3)}), FormatError, r"has shape \(3,\)"),
        (
            lambda t: t["model.layers.2.mlp.up_proj.weight"][3].fill_(math.nan),
            ModelError,
            "16 of 512 weights of .*not finite",
        ),
        (lambda t: t.clear(), FormatError, "hold no tensor"),
    ],
    ids=["missing", "extra", "shape", "nan", "empty"],
)
def test_a_folder_that_does_not_fit_is_refused_and_nothing_written(change, error, words, tmp_path):
    source = saved(networks.llama(), tmp_path / "in")
    changed(source, change)
    with pytest.raises(error, match=words):
        stream(source, tmp_path / "out", tokens())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def _no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _no_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _cut(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 1000)


def _config(**values: object):
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


def _index(name: str):
    def change(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "other.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))

    return change


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (_no_config, FormatError, "no config.json"),
        (_no_weights, FormatError, "only pickled weights"),
        (_cut, FormatError, "damaged"),
        (_config(architectures=["NoSuchModel"]), ModelError, "no model 'NoSuchModel'"),
        (_config(architectures=["os.system"]), ModelError, "no model 'os.system'"),
        (_config(model_type="none"), FormatError, "no config that transformers knows"),
        (_config(hidden_size=24), FormatError, "has shape"),
        (_index("../x.safetensors"), FormatError, "no .safetensors file of the folder"),
        (_index("x.safetensors"), FormatError, "missing"),
        (_index("other.safetensors"), FormatError, "does not"),
    ],
)
def test_a_hostile_folder_gets_one_sentence(change, error, words, tmp_path):
    source = saved(networks.llama(), tmp_path / "in")
    change(source)
    with pytest.raises(error, match=words) as found:
        stream(source, tmp_path / "out", tokens())
    assert "\n" not in str(found.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"pattern": "2:4", "select": "model.layers.0"}, None, ""),
        ({"pattern": "3:5"}, PatternError, "layer 'model.layers.0.self_attn.q_proj' has 16 inputs"),
        ({"calibration": None}, DataError, "needs calibration"),
        ({"calibration": [torch.tensor([[99]])]}, DataError, "refuses calibration batch 0"),
        ({"hidden": "cloud"}, RecipeError, "hidden='cloud'"),
        ({"select": "nothing"}, ModelError, "'nothing'"),
        ({"architecture": "LlamaModel"}, FormatError, "holds lm_head.weight"),
    ],
)
def test_settings_are_checked_before_anything_is_written(settings, error, words, tmp_path):
    source = saved(networks.llama(), tmp_path / "in")
    settings = {"calibration": tokens(), **settings}
    if error is None:
        assert stream(source, tmp_path / "out", settings.pop("calibration"), **settings).density == 0.5
        return
    with pytest.raises(error, match=words):
        stream(source, tmp_path / "out", settings.pop("calibration"), **settings)
    assert not (tmp_path / "out").exists()


def test_a_file_without_the_prefix_of_the_body_is_understood(tmp_path):
    source = saved(networks.gpt2(), tmp_path / "in")
    changed(source, lambda t: [t.update({key.removeprefix("transformer."): t.pop(key)}) for key in list(t)])
    whole = loaded(networks.gpt2(), source)
    sparsify(whole, tokens())
    stream(source, tmp_path / "out", tokens())
    assert_same(loaded(networks.gpt2(), tmp_path / "out"), whole)
