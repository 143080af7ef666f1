"""`openwork sparsify` on tiny models made from configs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from openwork.cli import _sparsify, _sparsify_page
from openwork.cli.sparsify import sparsify
from openwork.core.patterns import NM
from openwork.errors import OpenworkError, RecipeError, StoreError
from openwork.models import pretrained
from openwork.oneshot import api
from openwork.oneshot.report import Streamed
from openwork.train import language
from tests.models.pretrained import tiny
from tests.models.pretrained.test_llama2c import checkpoint

pytest.importorskip("transformers")

app = typer.Typer(pretty_exceptions_enable=False)
app.command()(sparsify)


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "text.txt").write_text(tiny.text(600))
    (tmp_path / "held.txt").write_text(tiny.text(200, seed=9))


def call(*words: str) -> Any:
    """Run the command; an openwork error is raised as it is."""
    result = CliRunner().invoke(app, [*words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


BASE = ("m", "--text", "text.txt", "--samples", "8", "--length", "12", "-o", "out")


def report(folder: str = "out") -> dict[str, Any]:
    return json.loads(Path(folder, "report.json").read_text())


def leftovers() -> list[str]:
    return sorted(path.name for path in Path().iterdir() if path.name.startswith("."))


@pytest.mark.parametrize(
    ("kind", "method"), [("llama", "sparsegpt"), ("gpt2", "magnitude"), ("bert", "wanda"), ("encoder", "sparsegpt")]
)
def test_each_kind_of_model_from_start_to_end(kind, method):
    tiny.save(Path("m"), kind)
    found = call(*BASE, "--method", method, "--eval-samples", "4", "-q")
    made = report()
    score = {"llama": "perplexity", "gpt2": "perplexity", "bert": "pseudo-perplexity", "encoder": "cosine"}[kind]
    assert f"{method}, unstructured: 50" in found.stdout
    assert score in found.stdout
    assert made["density"] == pytest.approx(0.5, abs=0.01)
    assert made["text"]["calibration_blocks"] == 8
    opened = pretrained.load("out")
    assert opened.kind == made["model"]["kind"]
    if kind == "encoder":
        assert made["before"]["cosine"] == pytest.approx(1.0)
        assert made["after"]["cosine"] < 0.9999
    else:
        assert made["before"][score] != made["after"][score]
    Streamed(Path("out"), (), (), 0).masks().check(opened.model)
    assert made["layers"][0]["name"] in Path("out", "report.html").read_text()
    assert leftovers() == []


def test_the_scores_are_those_of_the_models_in_the_folders():
    tiny.save(Path("m"), "llama")
    call(*BASE, "--eval-text", "held.txt", "--eval-samples", "5", "--json")
    from openwork.data import corpus

    made = report()
    for folder, when in (("m", "before"), ("out", "after")):
        found = pretrained.load(folder)
        held = corpus.first("held.txt", corpus.encoder(found.tokenizer), length=12, count=5, prefix=[2])
        assert made[when]["perplexity"] == pytest.approx(language.causal(found.model, held).perplexity, rel=1e-9)
    assert made["text"]["held_out_from"] == "eval-text"


def test_a_pattern_and_excluded_layers():
    tiny.save(Path("m"), "llama")
    call(*BASE, "--pattern", "2:4", "--exclude", "*down_proj", "--exclude", "model.layers.1", "-q")
    model, dense = pretrained.load("out").model, pretrained.load("m").model
    pruned = {row["name"] for row in report()["layers"]}
    assert pruned == {
        f"model.layers.0.{name}.weight" for name in
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj")
    }  # fmt: skip
    for name, param in model.named_parameters():
        if name in pruned:
            NM(2, 4).check(param != 0)
        else:
            assert torch.equal(param, dense.get_parameter(name))


def test_streamed_from_file_to_file_is_the_same_as_in_memory():
    tiny.save(Path("m"), "llama", max_shard_size="4KB")
    call(*BASE, "--eval-samples", "0", "-q")
    call(*BASE[:-1], "streamed", "--stream", "-q")
    one, two = pretrained.load("out").model, pretrained.load("streamed").model
    for name, param in one.named_parameters():
        assert torch.equal(param, two.get_parameter(name)), name
    assert report("streamed")["before"] is None
    call(*BASE[:-1], "scored", "--stream", "--eval-text", "held.txt", "-q")
    assert report("scored")["after"]["perplexity"] > 0
    assert leftovers() == []


def test_a_llama2c_checkpoint_in_memory_and_streamed():
    checkpoint(Path("m"))
    Path("abc.txt").write_text("ab. cab bac. " * 40)
    words = ("m", "--text", "abc.txt", "--samples", "4", "--method", "sparsegpt", "-q")
    call(*words, "-o", "out", "--eval-samples", "2")
    call(*words, "-o", "streamed", "--stream")
    assert report()["text"]["length"] == 16
    one, two = pretrained.load("out").model, pretrained.load("streamed")
    assert two.tokenizer("ab")["input_ids"] == [1, 3, 4, 5]
    if report()["text"]["calibration_blocks"] == report("streamed")["text"]["calibration_blocks"]:
        assert set(dict(one.named_parameters())) == set(dict(two.model.named_parameters()))


def test_nothing_is_written_over_and_a_finished_run_is_found_again():
    tiny.save(Path("m"), "llama")
    Path("out").mkdir()
    Path("out", "mine").write_text("x")
    with pytest.raises(StoreError, match="not empty"):
        call(*BASE, "-q")
    assert [path.name for path in Path("out").iterdir()] == ["mine"]
    Path("out", "mine").unlink()
    call(*BASE, "-q")
    stamp = Path("out", "report.json").stat().st_mtime_ns
    with pytest.raises(StoreError, match="not empty"):
        call(*BASE, "-q")
    assert "perplexity" in call(*BASE, "-q", "--resume").stdout
    with pytest.raises(StoreError, match="not empty"):
        call(*BASE, "-q", "--resume", "--density", "0.4")
    assert Path("out", "report.json").stat().st_mtime_ns == stamp


@pytest.mark.parametrize("lora", [(), ("--lora",)])
def test_a_stopped_run_goes_on_where_it_was_and_ends_the_same(lora, monkeypatch):
    tiny.save(Path("m"), "llama")
    words = (*BASE, "--finetune-steps", "4", *lora, "-q")
    call(*words[:-1], "-q", "-o", "whole")
    original = _sparsify.writing.fill

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(_sparsify.writing, "fill", stop)
    stopped = call(*words)
    assert stopped.exit_code == 130
    assert "--resume goes on" in stopped.stdout
    assert not Path("out").exists()
    monkeypatch.setattr(_sparsify.writing, "fill", original)
    with pytest.raises(StoreError, match="add --resume to go on"):
        call(*words)
    with pytest.raises(StoreError, match=r"other settings \(--seed\)"):
        call(*words, "--resume", "--seed", "1")

    text = Path("text.txt").read_text()
    Path("text.txt").write_text(text + "\nthe moon\n" * 50)
    with pytest.raises(StoreError, match="the text or the model has changed"):
        call(*words, "--resume")
    Path("text.txt").write_text(text)

    def never(*_: object, **__: object) -> None:
        raise AssertionError("this stage had finished")

    monkeypatch.setattr(api, "sparsify", never)
    call(*words, "--resume")
    one, two = pretrained.load("out").model, pretrained.load("whole").model
    assert all(torch.equal(param, two.get_parameter(name)) for name, param in one.named_parameters())
    assert report()["finetuned"]["lora"] == bool(lora)
    assert report()["after"] == report("whole")["after"]
    Streamed(Path("out"), (), (), 0).masks().check(one)
    assert leftovers() == []


def test_two_commands_into_one_folder_do_not_meet():
    fcntl = pytest.importorskip("fcntl")
    tiny.save(Path("m"), "llama")
    work = Path(".out.openwork-run")
    work.mkdir()
    recipe = _sparsify.Recipe(model="m", text=("text.txt",), samples=8, length=12)
    (work / "recipe.json").write_text(json.dumps(recipe.plain()))
    with (work / ".lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        with pytest.raises(StoreError, match=r"another openwork .* is at work"):
            call(*BASE, "--resume")
    assert (work / "recipe.json").is_file()
    call(*BASE, "--resume", "-q")
    assert leftovers() == []


def test_json_is_all_that_stdout_holds():
    tiny.save(Path("m"), "llama")
    found = CliRunner().invoke(app, [*BASE, "--json"])
    assert json.loads(found.stdout) == report()


def test_the_onnx_file_is_checked_and_reported():
    pytest.importorskip("onnxruntime")
    tiny.save(Path("m"), "encoder")
    call(*BASE, "--onnx", "-q")
    made = report()
    assert made["onnx"]["error"] <= 1e-5
    assert made["bytes"]["onnx"] == Path("out", "model.onnx").stat().st_size


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--method", "best"), "magnitude, wanda, sparsegpt"), (("--pattern", "3:2:1"), "unknown pattern"),
        (("--pattern", "2:4", "--density", "0.3"), "2:4 keeps 0.5"), (("--density", "1.5"), "density=1.5"),
        (("--samples", "0"), "--samples 0"), (("--length", "1"), "--length 1"), (("--length", "999"), "more than the 32"),
        (("--lora",), "give --finetune-steps"), (("--stream", "--onnx"), "--stream holds one block"),
        (("--stream", "--dtype", "float32"), "--stream keeps"),
        (("--kind", "t5"), "--kind 't5'"), (("--dtype", "int8"), "--dtype 'int8'"), (("--rate", "-1"), "--rate -1.0"),
        (("--text", "none.txt"), "there is no file"), (("--eval-text", "text.txt"), "both --text and --eval-text"),
        (("--eval-text", "copy.txt", "--samples", "80"), "also in the text to calibrate on"),
        (("--exclude", "none.*"), "none.*"), (("--allocation", "best"), "allocation='best'"),
        (("--eval-text", "binary.txt"), "binary"), (("--pattern", "7:9"), "multiple of 9"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_one_sentence_and_leaves_nothing(words, message):
    tiny.save(Path("m"), "llama")
    Path("copy.txt").write_text(Path("text.txt").read_text())
    Path("binary.txt").write_bytes(b"\x00\x01")
    with pytest.raises(OpenworkError) as caught:
        call(*BASE, "-q", *words)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not Path("out").exists()
    assert leftovers() == []


def test_text_is_asked_for_where_it_is_needed():
    tiny.save(Path("m"), "llama")
    with pytest.raises(RecipeError, match="--method wanda needs text"):
        call("m", "-o", "out")
    with pytest.raises(RecipeError, match="--finetune-steps needs text"):
        call("m", "-o", "out", "--method", "magnitude", "--finetune-steps", "3")
    call("m", "-o", "out", "--method", "magnitude", "-q")
    assert report()["before"] is None
    for place, words in (("scored", ()), ("streamed", ("--stream",))):
        call("m", "-o", place, "--method", "magnitude", "-q", "--eval-text", "held.txt", *words)
        assert report(place)["after"]["perplexity"] != report(place)["before"]["perplexity"]
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        Path("m", name).unlink(missing_ok=True)
    with pytest.raises(OpenworkError, match="has no tokenizer"):
        call(*BASE[:-1], "out2")


def test_a_tokenizer_of_another_vocabulary_is_found_out():
    tiny.save(Path("m"), "llama", model=tiny.build("llama", vocab_size=9))
    with pytest.raises(OpenworkError, match="do not belong together"):
        call(*BASE)


def test_hostile_names_are_shown_harmless():
    name = "<script>alert(1)</script>\u202e{{7*7}}"[:40].replace("/", "_")
    tiny.save(Path(name), "llama")
    Path("\x1b[31mred.txt").write_text(tiny.text(300))
    found = call(name, "--text", "\x1b[31mred.txt", "--length", "12", "-o", "out", "-q")
    page = Path("out", "report.html").read_text()
    assert "<script" not in page
    assert "\u202e" not in page
    assert "\x1b" not in found.stdout
    assert _sparsify_page.page(report()) == page


def test_the_help_has_examples():
    text = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200", "NO_COLOR": "1"}).stdout
    assert text.count("openwork sparsify ") >= 4
    assert "--resume" in text
