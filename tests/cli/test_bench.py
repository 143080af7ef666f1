"""`openwork bench` with a model so small that it takes seconds; the command line itself where it matters."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from openwork import saving
from openwork.bench import networks, runner
from openwork.cli.bench import bench
from openwork.errors import OpenworkError, TrialError
from openwork.models import build
from tests.bench import fixtures
from tests.cli.test_compare import ROOT, openwork


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = build("mlp-16", input_shape=(12,), classes=3, seed=0)
    networks.prune(model, 0.25, "unstructured", "all")
    saving.save(model, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def test_a_saved_model_beside_its_peers_and_a_second_call_measures_nothing(saved, tmp_path, capsys, monkeypatch):
    path = tmp_path / "bench.json"
    first = openwork(
        "bench", str(saved), "--threads", "1", "--peers", "openwork,eager,litert", "--seconds", "0.005", "--json", str(path),
        cwd=tmp_path,
    )  # fmt: skip
    assert first.returncode == 0, first.stderr
    (row,) = json.loads(path.read_text())["measured"].values()
    assert {name: arm["status"] for name, arm in row["arms"].items()} == {
        "openwork": "ok", "eager": "ok", "litert": "unavailable",
    }  # fmt: skip
    assert row["cell"]["input"] == [1, 12]
    for name in ("eager", "openwork"):
        assert f"{row['arms'][name]['ratio']:.2f}" in first.stdout
    assert "litert (unavailable): the conversion to LiteRT takes networks on images only" in first.stdout

    before = path.stat().st_mtime_ns
    monkeypatch.setenv("COLUMNS", "200")
    bench(str(saved), threads="1", peers="openwork,eager,litert", seconds=0.005, json_file=str(path))
    assert path.stat().st_mtime_ns == before
    assert capsys.readouterr().out in first.stdout  # the first call may say that the machine is busy


def test_the_page_is_written_from_results(tmp_path):
    runner.write(tmp_path / "performance.json", fixtures.bench())
    bench("page", rewrite=True, out=str(tmp_path))
    assert (tmp_path / "performance.md").read_text().startswith("# Performance")
    script = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "performance.py"), "--rewrite", "--out", str(tmp_path / "nothing")],
        capture_output=True, text=True, check=False, env={"PYTHONPATH": str(ROOT / "src"), "PATH": ""},
    )  # fmt: skip
    assert script.returncode == 2
    assert "measure first" in script.stderr
    assert "Traceback" not in script.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"model": "mobilenet-v1"}, "--input is missing"),
        ({"model": "mobilenet-v1", "input_shape": "3by3"}, "1x3x224x224"),
        ({"model": "mobilenet-v1", "input_shape": "1x3x32x32", "threads": "0"}, "at least 1"),
        ({"model": "mobilenet-v1", "input_shape": "1x3x32x32", "peers": "tensorrt"}, "onnxruntime"),
        ({"model": "mobilenet-v1", "input_shape": "1x3x32x32", "pattern": "2:4"}, "--density"),
        ({"model": "mobilenet-v1", "input_shape": "1x3x32x32", "settings": ["multiplier"]}, "--set"),
        ({"model": "nowhere.safetensors"}, "nowhere.safetensors"),
    ],
)
def test_what_is_wrong_is_one_sentence(words, said):
    with pytest.raises(OpenworkError, match=said) as caught:
        bench(**words)
    assert len(str(caught.value).splitlines()) == 1


def test_a_model_that_does_not_exist_is_one_sentence():
    with pytest.raises(TrialError, match="there is no model 'mobilenet-v9'"):
        bench("mobilenet-v9", input_shape="1x3x32x32", threads="1", peers="eager")


def test_help_has_examples_and_needs_no_torch(tmp_path):
    code = "import sys; sys.argv = ['openwork', 'bench', '--help']\nfrom openwork.cli import main\n"
    code += "try: main()\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path,
                          env={"PYTHONPATH": str(ROOT / "src"), "PATH": ""})  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "openwork bench model.safetensors --input 1x3x224x224" in done.stdout
