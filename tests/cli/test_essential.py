"""`openwork essential` on tiny models of transformers: curves, resume, fine-tuning, and everything that is refused."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from openwork import atomic
from openwork.cli import _essential
from openwork.cli.essential import essential
from openwork.errors import DataError, FormatError, MethodError, ModelError, OpenworkError, RecipeError, StoreError

pytest.importorskip("transformers")
from tests.models.pretrained import tiny

app = typer.Typer()
app.command()(essential)
app.command("other")(lambda: None)  # with two commands typer keeps their names


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of each kind and a text."""
    found = tmp_path_factory.mktemp("models")
    for kind in ("llama", "gpt2", "bert", "encoder"):
        tiny.save(found / kind, kind)
    (found / "corpus.txt").write_text(tiny.text(1200))
    return found


def run(*words: object) -> str:
    """Run the command; return what it printed, or raise its openwork error."""
    done = CliRunner().invoke(app, ["essential", *map(str, words)], catch_exceptions=True)
    if isinstance(done.exception, OpenworkError):
        raise done.exception
    assert done.exit_code == 0, (done.output, done.exception)
    return done.output


def curve(out: Path, index: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "curves.json").read_text())["curves"][index]
    return found


def test_a_causal_model_gets_a_curve_a_plot_and_a_page(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    said = run(place / "llama", "--text", place / "corpus.txt", "--scope", "global,layer,2:4", "--blocks", 6, "--length", 16,
               "--draws", 20, "-q", "-o", out)  # fmt: skip
    assert {p.name for p in out.iterdir()} == {"essential.json", "curves.json", "curves.svg", "report.html", ".lock"}
    assert "next-token accuracy" in said
    assert str(out / "report.html") in said
    one, two, three = (curve(out, i) for i in range(3))
    assert [c["scope"] for c in (one, two, three)] == ["global", "layer", "2:4"]
    assert one["sparsity"] == [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
    assert three["sparsity"] == [0.0, 0.25, 0.5]
    assert one["quality"][0] == two["quality"][0] == three["quality"][0]
    assert one["protocol"] == "prune, evaluate"
    assert one["reason"] in said.replace("\n", " ")
    page = (out / "report.html").read_text()
    assert "<script" not in page
    assert not re.findall(r"(?:src|href)=\"(?!#|data:)", page)
    assert page.count("<svg") == 2
    assert one["reason"] in page
    assert (out / "curves.svg").read_text().startswith("<svg")
    command = re.search(r"<code>(openwork essential .*?)</code>", page)
    assert command is not None
    words = shlex.split(command[1].replace("&#39;", "'").replace("&#34;", '"'))
    before = (out / "curves.json").read_bytes()
    run(*words[2:], "-q")
    assert (out / "curves.json").read_bytes() == before


def test_the_dense_point_is_the_model_itself(place: Path, tmp_path: Path) -> None:
    from openwork.data import corpus
    from openwork.models import pretrained
    from openwork.train import language

    run(place / "llama", "--text", place / "corpus.txt", "--grid", "0,0.5", "--blocks", 6, "--length", 16, "--draws", 20,
        "-q", "-o", tmp_path / "out")  # fmt: skip
    found = pretrained.load(place / "llama")
    held = corpus.blocks(place / "corpus.txt", corpus.encoder(found.tokenizer), length=16, samples=1, held_out=6,
                         prefix=[2]).held_out  # fmt: skip
    assert curve(tmp_path / "out")["quality"][0] == pytest.approx(language.causal(found.model, held).accuracy)


def test_a_stopped_run_goes_on_and_ends_as_the_uninterrupted_one(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (place / "gpt2", "--text", place / "corpus.txt", "--scope", "layer,random", "--blocks", 6, "--length", 16,
             "--draws", 20, "-q", "-o")  # fmt: skip
    run(*words, tmp_path / "whole")
    measured: list[float] = []
    whole = _essential.method.as_examples

    def counted(value: object, s: float) -> object:
        measured.append(s)
        if len(measured) == 8:
            raise KeyboardInterrupt
        return whole(value, s)

    monkeypatch.setattr(_essential.method, "as_examples", counted)
    done = CliRunner().invoke(app, ["essential", *map(str, words), str(tmp_path / "out")])
    assert done.exit_code == 130
    assert "goes on from here" in done.output
    assert not (tmp_path / "out" / "report.html").exists()
    measured.clear()
    monkeypatch.setattr(_essential.method, "as_examples", lambda value, s: (measured.append(s), whole(value, s))[1])
    run(*words, tmp_path / "out")
    assert len(measured) == 20 - 7
    for i in range(2):
        assert curve(tmp_path / "out", i) == curve(tmp_path / "whole", i)
    measured.clear()
    run(*words, tmp_path / "out")
    assert not measured
    run(*words, tmp_path / "out", "--grid", "0,0.5,0.55")
    assert measured == [0.55, 0.55]  # a new grid measures what is new, in both scopes


def test_a_masked_model_and_an_encoder(place: Path, tmp_path: Path) -> None:
    words = ("--text", place / "corpus.txt", "--grid", "0,0.3,0.6,0.9", "--blocks", 8, "--length", 16, "--draws", 20, "-q")
    said = run(place / "bert", *words, "-o", tmp_path / "masked")
    assert "hidden-token accuracy" in said
    said = run(place / "encoder", *words, "-o", tmp_path / "encoder")
    assert "mean reciprocal rank" in said
    found = curve(tmp_path / "encoder")
    assert found["floor"] == pytest.approx(sum(1 / k for k in range(1, 9)) / 8)
    assert all(0.0 < y <= 1.0 for y in found["quality"])
    likely = run(place / "bert", *words, "--quality", "likelihood", "-o", tmp_path / "likely")
    assert "likelihood" in likely
    assert all(0.0 < y < 1.0 for y in curve(tmp_path / "likely")["quality"])


@pytest.mark.parametrize("kind", ["llama", "bert", "encoder"])
def test_fine_tuning_after_pruning_is_the_other_protocol(kind: str, place: Path, tmp_path: Path) -> None:
    words = (
        place / kind,
        "--text",
        place / "corpus.txt",
        "--grid",
        "0,0.5",
        "--blocks",
        6,
        "--length",
        16,
        "--draws",
        20,
        "-q",
    )
    run(*words, "--finetune", 6, "--rate", "0.01", "-o", tmp_path / "tuned")
    run(*words, "-o", tmp_path / "plain")
    tuned, plain = curve(tmp_path / "tuned"), curve(tmp_path / "plain")
    assert tuned["protocol"] == "prune, fine-tune, evaluate"
    if kind == "llama":
        assert tuned["quality"][1] > plain["quality"][1]
    assert "mask held" in (tmp_path / "tuned" / "report.html").read_text()


@pytest.mark.parametrize(("kind", "matrices"), [("llama", 14), ("gpt2", 8), ("bert", 12), ("encoder", 12)])
def test_the_matrices_of_the_blocks_and_no_others_may_go(kind: str, matrices: int) -> None:
    found = _essential.method.transformer_linears(tiny.build(kind))
    assert len(found) == matrices
    assert not [name for name in found if re.search("emb|head|norm|ln_|pooler|bias|cls|wte|wpe", name.lower())]
    masks = _essential.method.one_shot(tiny.build(kind), None, "2:4")
    for name, mask in masks.items():
        lines = mask.t() if kind == "gpt2" else mask  # GPT-2 holds (inputs, outputs)
        assert (lines.reshape(lines.shape[0], -1, 4).sum(-1) == 2).all(), name


def test_chosen_weights(place: Path, tmp_path: Path) -> None:
    words = (
        place / "llama",
        "--text",
        place / "corpus.txt",
        "--grid",
        "0,0.5",
        "--blocks",
        6,
        "--length",
        16,
        "--draws",
        20,
        "-q",
    )
    run(*words, "--weights", "*.mlp.*", "-o", tmp_path / "out")
    facts = json.loads((tmp_path / "out" / "curves.json").read_text())["facts"]
    assert facts["weights that may go"].startswith(f"{2 * 3 * 16 * 24:,} of ")
    with pytest.raises(ModelError, match="matches none of"):
        run(*words, "--weights", "no.such", "-o", tmp_path / "other")


def test_settings_that_make_no_sense_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    words = ("no-such-model", "--text", "no-such-text", "-q", "-o", tmp_path / "out")
    cases: list[tuple[list[str], type[OpenworkError], str]] = [
        (["--grid", "0.1,0.2"], MethodError, "must start at 0"),
        (["--grid", "a,b"], RecipeError, "give numbers"),
        (["--grid", "0,0.5,0.5"], MethodError, "must ascend"),
        (["--scope", "globally"], MethodError, "unknown"),
        (["--scope", ","], RecipeError, "names no scope"),
        (["--scope", "layer,layer"], RecipeError, "every scope once"),
        (["--scope", "2:4", "--grid", "0,0.3"], MethodError, "multiples of 1/4"),
        (["--quality", "beauty"], RecipeError, "accuracy"),
        (["--finetune", "-1"], RecipeError, "at least 0"),
        (["--draws", "3"], RecipeError, "at least 20"),
        (["--rate", "0"], RecipeError, "above 0"),
        (["--length", "2"], RecipeError, "at least 4"),
    ]
    for flags, kind, text in cases:
        with pytest.raises(kind, match=text):
            run(*words, *flags)
    with pytest.raises(ModelError, match="no-such-model"):
        run(*words)
    assert not (tmp_path / "out").exists()


def test_text_and_model_that_do_not_serve(place: Path, tmp_path: Path) -> None:
    words = ("-q", "-o", tmp_path / "out", "--length", 16)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("the cat")
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)) * 20)
    for name, text in (("empty", "is empty"), ("short", "tokens"), ("binary", "UTF-8|binary"), ("none", "no file")):
        with pytest.raises(DataError, match=text):
            run(place / "llama", "--text", tmp_path / f"{name}.txt", *words)
    with pytest.raises(DataError, match="takes"):
        run(place / "llama", "--text", place / "corpus.txt", "-q", "-o", tmp_path / "out", "--length", 4000)
    with pytest.raises(ModelError, match="retrieval"):
        run(place / "encoder", "--text", place / "corpus.txt", *words, "--quality", "accuracy")
    with pytest.raises(ModelError, match="accuracy or likelihood"):
        run(place / "llama", "--text", place / "corpus.txt", *words, "--quality", "retrieval")
    assert not (tmp_path / "out").exists()


def test_nothing_is_written_over(place: Path, tmp_path: Path) -> None:
    words = ("--text", place / "corpus.txt", "--grid", "0,0.5", "--blocks", 6, "--length", 16, "--draws", 20, "-q", "-o")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(StoreError, match=r"holds 'thesis\.txt'"):
        run(place / "llama", *words, tmp_path / "full")
    assert (tmp_path / "full" / "thesis.txt").read_text() == "mine"
    run(place / "llama", *words, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    for other in ((place / "gpt2", *words), (place / "llama", *words)):
        flags = () if other[0] != place / "llama" else ("--seed", "1")
        with pytest.raises(StoreError, match="other settings"):
            run(*other, tmp_path / "out", *flags)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    for damage in ("{", "[]", '{"format": 1, "identity": {}, "points": {"global": {"x": [1]}}}'):
        (tmp_path / "out" / "essential.json").write_text(damage)
        with pytest.raises(FormatError, match="is damaged"):
            run(place / "llama", *words, tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot write"):
        run(place / "llama", *words, tmp_path / "file")


def test_a_second_command_in_one_folder_is_refused(place: Path, tmp_path: Path) -> None:
    with atomic.alone(tmp_path / "out"), pytest.raises(StoreError, match="another openwork"):
        run(place / "llama", "--text", place / "corpus.txt", "--length", 16, "-q", "-o", tmp_path / "out")


def test_hostile_names_are_shown_and_do_no_harm(place: Path, tmp_path: Path) -> None:
    evil = tmp_path / "<script>alert(1)</script> \u202e{{7*7}}.txt"
    evil.parent.mkdir(parents=True, exist_ok=True)
    evil.write_text(tiny.text(1200))
    run(
        place / "llama",
        "--text",
        evil,
        "--grid",
        "0,0.5",
        "--blocks",
        6,
        "--length",
        16,
        "--draws",
        20,
        "-q",
        "-o",
        tmp_path / "out",
    )
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<script" not in page
    assert "\u202e" not in page
    assert "{{7*7}}" in page


def test_help_has_examples_and_imports_no_torch() -> None:
    import subprocess
    import sys

    code = (
        "import sys, typer; from typer.testing import CliRunner; from openwork.cli.essential import essential;"
        "app = typer.Typer(); app.command()(essential); done = CliRunner().invoke(app, ['--help']);"
        "assert 'openwork essential path/to/model' in done.output, done.output; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"COLUMNS": "160", "PYTHONPATH": ":".join(sys.path)})
