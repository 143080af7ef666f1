"""Hostile text, damaged models, impossible patterns before `openwork sparsify`: one sentence, nothing written over."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
import typer
from typer.testing import CliRunner

from openwork.cli.sparsify import sparsify
from openwork.errors import OpenworkError
from openwork.testing import faults
from tests.models.pretrained import tiny

pytest.importorskip("transformers")

app = typer.Typer(pretty_exceptions_enable=False)
app.command()(sparsify)

WEIGHTS = Path("m", "model.safetensors")
NAME = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    Path("text.txt").write_text(tiny.text(600))
    tiny.save(Path("m"), "llama")


def everything() -> dict[str, str]:
    """Return a digest of every file and the kind of everything else below here."""
    found = {}
    for path in sorted(Path().rglob("*")):
        plain = path.is_file() and not path.is_symlink()
        found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest() if plain else "other"
    return found


def refused(*words: str) -> str:
    """Run the command, which must end with one of openwork's errors in one printable sentence and change nothing."""
    before = everything()
    base = ("m", "-o", "out", "--samples", "8", "--length", "12", "-q")
    given = words if "--text" in words or "--method" in words else (*words, "--text", "text.txt")
    result = CliRunner().invoke(app, [*base, *given])
    assert isinstance(result.exception, OpenworkError), (result.exception, result.output)
    said = str(result.exception)
    assert said
    assert "\n" not in said
    assert said.isprintable(), ascii(said)
    assert len(said) < 700
    assert everything() == before
    return said


def write(data: bytes) -> None:
    Path("bad.txt").write_bytes(data)


def tensors() -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(WEIGHTS)


def rewrite(change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    state = tensors()
    change(state)
    safetensors.torch.save_file(state, WEIGHTS, metadata={"format": "pt"})


def reconfigure(**values: object) -> None:
    config = json.loads(Path("m", "config.json").read_text())
    Path("m", "config.json").write_text(json.dumps({**config, **values}))


TEXTS: dict[str, tuple[Callable[[], object], str]] = {
    "empty": (lambda: write(b""), "empty"),
    "blank": (lambda: write(b" \n\t\n" * 500), "bad.txt|text"),
    "nul": (lambda: write(b"the cat\0sat" * 200), "binary"),
    "controls": (lambda: write(bytes(range(1, 32)) * 200), "binary|control"),
    "not utf-8": (lambda: write(tiny.text(300).encode() + b"\xff\xfe\x80" * 50), "UTF-8"),
    "utf-16": (lambda: write(tiny.text(300).encode("utf-16")), "UTF-16|UTF-8|binary"),
    "a model": (lambda: write(WEIGHTS.read_bytes()), "bad.txt"),
    "gzip": (lambda: write(b"\x1f\x8b\x08\x00" + bytes(range(256)) * 9), "gzip|binary|UTF-8"),
    "too short": (lambda: write(b"the cat sat"), "tokens|blocks|text"),
    "missing": (lambda: None, "there is no file"),
    "a pipe": (lambda: os.mkfifo("bad.txt"), "neither a file nor a folder"),
    "a device": (lambda: Path("bad.txt").symlink_to("/dev/zero"), "neither a file nor a folder"),
    "a loop of links": (lambda: Path("bad.txt").symlink_to("bad.txt"), "bad.txt"),
    "a folder without text": (lambda: Path("bad.txt").mkdir(), "bad.txt|text"),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("case", TEXTS)
def test_a_hostile_text_is_refused(case: str) -> None:
    make, words = TEXTS[case]
    make()
    said = refused("--text", "bad.txt")
    assert any(word in said for word in words.split("|")), said


@pytest.mark.parametrize("kind", [kind for kind in faults.hostile_names() if kind not in ("nul", "long", "lone surrogate")])
def test_a_hostile_name_of_a_text_is_shown_harmless(kind: str) -> None:
    name = faults.hostile_names()[kind].replace("/", "-")
    Path(name).write_bytes(b"")
    said = refused("--text", name)
    assert "empty" in said


@pytest.mark.timeout(120)
def test_one_endless_line_is_read_in_pieces() -> None:
    """A line of 8 MB without an end: the blocks are taken from its beginning, whatever follows."""
    line = " ".join(tiny.WORDS) + " "
    with Path("line.txt").open("w") as stream:
        for _ in range(-(-(8 * 2**20) // (1000 * len(line)))):
            stream.write(line * 1000)
    words = ["m", "-o", "out", "--text", "line.txt", "--samples", "8", "--length", "12", "--eval-samples", "4", "-q"]
    result = CliRunner().invoke(app, words)
    assert result.exception is None, result.exception
    assert json.loads(Path("out", "report.json").read_text())


def cut() -> None:
    faults.truncate(WEIGHTS, keep=WEIGHTS.stat().st_size - 100)


def spoil(value: float) -> None:
    def change(state: dict[str, torch.Tensor]) -> None:
        state[NAME].view(-1)[5] = value

    rewrite(change)


def escape() -> None:
    WEIGHTS.rename("other.safetensors")
    Path("m", "model.safetensors.index.json").write_text(json.dumps({"weight_map": {NAME: "../other.safetensors"}}))


def shard() -> None:
    WEIGHTS.unlink()
    Path("m", "model.safetensors.index.json").write_text(json.dumps({"weight_map": {NAME: "model-1-of-2.safetensors"}}))


MODELS: dict[str, tuple[Callable[[], object], str]] = {
    "a tensor is missing": (lambda: rewrite(lambda state: state.pop(NAME)), NAME),
    "a tensor is left over": (lambda: rewrite(lambda state: state.update({"extra.weight": torch.ones(3)})), "extra.weight"),
    "a tensor has another shape": (lambda: rewrite(lambda state: state.update({NAME: torch.ones(16, 9)})), NAME),
    "NaN": (lambda: spoil(math.nan), NAME),
    "infinity": (lambda: spoil(math.inf), NAME),
    "cut": (cut, "safetensors"),
    "a flipped size": (lambda: faults.flip_bit(WEIGHTS, bit=20), "safetensors"),
    "a header that is none": (lambda: WEIGHTS.write_bytes((50).to_bytes(8, "little") + b"x" * 60), "safetensors"),
    "a pickle": (lambda: WEIGHTS.write_bytes(b"\x80\x02cposix\nsystem\n(X\x04\x00\x00\x00exittR."), "pickle"),
    "empty weights": (lambda: WEIGHTS.write_bytes(b""), "safetensors"),
    "only a pickle": (lambda: WEIGHTS.rename(Path("m", "pytorch_model.bin")), "pickle|safetensors"),
    "no weights": (WEIGHTS.unlink, "no weights"),
    "a shard outside": (escape, "no shard"),
    "a shard that is missing": (shard, "model-1-of-2.safetensors"),
    "no config": (lambda: Path("m", "config.json").unlink(), "config.json"),
    "a config that is no JSON": (lambda: Path("m", "config.json").write_text("{"), "config.json"),
    "a config that is a list": (lambda: Path("m", "config.json").write_text("[1]"), "config.json"),
    "another architecture": (lambda: reconfigure(model_type="no-such-model"), "no-such-model"),
    "another width": (lambda: reconfigure(hidden_size=32), "shape|16"),
    "no width": (lambda: reconfigure(hidden_size=0), "m"),
    "heads that do not divide": (lambda: reconfigure(num_attention_heads=3), "m"),
    "a width that no machine has": (lambda: reconfigure(hidden_size=2**40), "m"),
    "layers that are not there": (lambda: reconfigure(num_hidden_layers=100_000_000), "m"),
    "code of its own": (lambda: reconfigure(model_type="own", auto_map={"AutoConfig": "evil.Config"}), "m"),
    "an encoder-decoder": (lambda: reconfigure(model_type="t5", is_encoder_decoder=True), "m"),
    "a broken tokenizer": (lambda: Path("m", "tokenizer.json").write_text("{"), "tokenizer"),
}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("case", MODELS)
def test_a_damaged_model_is_refused(case: str) -> None:
    make, words = MODELS[case]
    make()
    said = refused()
    assert any(word in said for word in words.split("|")), said


@pytest.mark.parametrize("case", ["a tensor is missing", "NaN", "cut", "a tensor is left over"])
def test_a_damaged_model_is_refused_when_it_is_streamed(case: str) -> None:
    MODELS[case][0]()
    refused("--stream")


@pytest.mark.parametrize("pattern", ["7:9", "block5x1", "4:2", "0:4", "2:4:8", "block0x1", "channel7"])
def test_a_pattern_that_fits_no_layer_is_refused(pattern: str) -> None:
    assert "2:4" not in refused("--pattern", pattern) or pattern != "7:9"


def test_no_target_is_written_over() -> None:
    Path("full").mkdir()
    Path("full", "mine.txt").write_text("kept")
    Path("file").write_text("kept")
    Path("dangling").symlink_to("nowhere")
    for target in ("full", "file", "m", "m/config.json", "text.txt"):
        said = refused("-o", target)
        assert "written over" in said or "folder" in said, said


def test_a_target_that_cannot_be_made_is_told() -> None:
    Path("file").write_text("kept")
    for name in ("file/inside", "x" * 300):
        refused("-o", name)


@pytest.mark.timeout(120)
def test_a_full_disk_leaves_no_half_of_a_model(tmp_path: Path) -> None:
    with faults.full_disk(tmp_path / "disk", room=8192) as disk:
        words = ["m", "-o", str(disk / "out"), "--method", "magnitude", "-q"]
        result = CliRunner().invoke(app, words)
        assert isinstance(result.exception, OpenworkError), (result.exception, result.output)
        assert "\n" not in str(result.exception)
        assert not (disk / "out").exists()
