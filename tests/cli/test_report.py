"""`openwork report`: the report again, and every export, from the command line."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from openwork.cli import compare
from openwork.cli.report import report
from openwork.errors import FormatError, MissingExtra, OpenworkError, RecipeError, StoreError
from openwork.lab.recipe import Recipe
from tests.report.conftest import hostile, make

ROOT = Path(__file__).parents[2]


def call(*words: str) -> str:
    """Run the command in this process and return what it printed; an error of openwork is raised."""
    app = typer.Typer()
    app.command()(report)
    done = CliRunner().invoke(app, list(words), env={"COLUMNS": "300"})
    if isinstance(done.exception, OpenworkError):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture
def run_folder(tmp_path):
    """A folder with a results file only."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(make(kind="study", methods=("set", "rigl"), densities=(0.1,), seeds=2)))
    return folder


def files(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_real_run_gets_the_same_report_again(tmp_path):
    here = {"data": "tests.cli.users:arrays", "model": "tests.cli.users:model", "methods": "dense,magnitude", "density": 0.2}
    folder = tmp_path / "run"
    compare.run(
        Recipe.read({**here, "batch_size": 32, "steps": 8, "latency": False, "seeds": 1, "out": str(folder)}), quiet=True
    )
    before = files(folder)
    (folder / "report.html").unlink()
    said = call(str(folder))
    assert files(folder) == before
    assert b"Masks" in before[Path("report.html")]
    assert "magnitude" in said
    assert str(folder / "report.html") in said
    call(str(folder / "results.json"))  # its own report may be written again
    assert files(folder) == before


def test_without_export_the_table_is_printed_and_a_foreign_report_is_left_alone(run_folder):
    said = call(str(run_folder))
    assert "rigl" in said
    assert "rigl beats set" in said
    made = (run_folder / "report.html").read_bytes()
    (run_folder / "report.html").write_text("mine")
    with pytest.raises(StoreError, match="--force"):
        call(str(run_folder))
    assert (run_folder / "report.html").read_text() == "mine"
    call(str(run_folder), "--force")
    assert (run_folder / "report.html").read_bytes() == made
    with pytest.raises(StoreError, match="--force"):
        call(str(run_folder), "-o", str(run_folder / "report.html"))
    call(str(run_folder), "-o", str(run_folder / "other.html"))
    assert (run_folder / "other.html").read_bytes() == made


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("csv", ["claims.csv", "table.csv", "trials.csv"]),
        ("latex", ["table.tex"]),
        ("markdown", ["table.md"]),
    ],
)
def test_texts_go_to_the_runs_export_folder_once(kind, names, run_folder):
    said = call(str(run_folder), "--export", kind)
    folder = run_folder / "export"
    assert sorted(path.name for path in folder.iterdir()) == names
    assert all(str(folder / name) in said for name in names)
    before = files(run_folder)
    with pytest.raises(StoreError, match="--force"):
        call(str(run_folder), "--export", kind)
    assert files(run_folder) == before
    call(str(run_folder), "--export", kind, "--force")
    assert files(run_folder) == before


def test_a_file_a_folder_and_a_dash_are_understood(run_folder, tmp_path):
    call(str(run_folder), "--export", "csv", "-o", str(tmp_path / "a" / "my.csv"))
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["my-claims.csv", "my-table.csv", "my.csv"]
    call(str(run_folder), "--export", "csv", "-o", str(tmp_path / "b"))
    call(str(run_folder), "--export", "latex", "-o", str(tmp_path / "b"))
    call(str(run_folder), "--export", "latex", "-o", str(tmp_path / "b" / "other.tex"))
    assert (tmp_path / "b" / "other.tex").read_bytes() == (tmp_path / "b" / "table.tex").read_bytes()
    printed = call(str(run_folder), "--export", "csv", "-o", "-")
    rows = list(csv.DictReader(io.StringIO(printed)))
    assert [row["key"] for row in rows] == [
        trial["key"] for trial in json.loads((run_folder / "results.json").read_text())["trials"]
    ]
    assert call(str(run_folder), "--export", "latex", "-o", "-") == (tmp_path / "b" / "table.tex").read_text()
    assert call(str(run_folder), "--export", "markdown", "-o", "-").count("| rigl |") == 1


def test_another_results_file_keeps_its_exports_beside_it_under_its_name(tmp_path):
    (tmp_path / "granet.json").write_text(json.dumps(make(kind="study", seeds=2)))
    call(str(tmp_path / "granet.json"), "--export", "latex")
    call(str(tmp_path / "granet.json"))
    assert sorted(map(str, files(tmp_path))) == ["granet-export/table.tex", "granet.html", "granet.json"]


def test_mlflow_and_tensorboard_from_the_command_line(run_folder, tmp_path, monkeypatch):
    for name in ("mlflow", "tensorboard"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    store = str(tmp_path / "store")
    assert "7 runs made" in call(str(run_folder), "--export", "mlflow", "--uri", store, "--experiment", "one")
    assert "7 unchanged" in call(str(run_folder), "--export", "mlflow", "--uri", store, "--experiment", "one")
    assert "7 event files" in call(str(run_folder), "--export", "tensorboard")
    with pytest.raises(StoreError, match="--force"):
        call(str(run_folder), "--export", "tensorboard")
    assert list((run_folder / "export" / "tensorboard").rglob("*tfevents*"))


def test_a_missing_extra_is_named(run_folder, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name in ("mlflow", "tensorboard"):
        with pytest.raises(MissingExtra, match=rf"openwork\[{name}\]"):
            call(str(run_folder), "--export", name)


@pytest.mark.parametrize(
    ("words", "kind", "say"),
    [
        (["{run}", "--export", "csv", "--uri", "x"], RecipeError, "--export mlflow"),
        (["{run}", "--experiment", "x"], RecipeError, "--export mlflow"),
        (["{run}", "--export", "mlflow", "-o", "x"], RecipeError, "--uri"),
        (["{run}", "-o", "-"], RecipeError, "markdown"),
        (["{run}", "--export", "tensorboard", "-o", "-"], RecipeError, "folder"),
        (["{tmp}/nothing"], StoreError, "no run folder"),
        (["{tmp}/empty.json"], FormatError, "results"),
        (["{tmp}/foreign.json", "--export", "csv"], FormatError, "results file"),
        (["{tmp}/hollow.json", "--export", "csv"], StoreError, "nothing to export"),
        (["{run}", "--export", "csv", "-o", "{tmp}/empty.json/deeper"], StoreError, "cannot write"),
    ],
)
def test_what_is_wrong_is_one_sentence_and_writes_nothing(words, kind, say, run_folder, tmp_path):
    (tmp_path / "empty.json").write_text("")
    (tmp_path / "foreign.json").write_text('{"loss": [1, 2]}')
    (tmp_path / "hollow.json").write_text('{"format": 1, "name": "x", "rows": []}')
    before = files(tmp_path)
    with pytest.raises(kind, match=say) as caught:
        call(*(word.format(run=run_folder, tmp=tmp_path) for word in words))
    assert len(str(caught.value).splitlines()) == 1
    assert files(tmp_path) == before


@pytest.mark.parametrize("kind", ["csv", "latex", "markdown", "tensorboard", None])
def test_hostile_results_stay_in_their_folder(kind, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(hostile()))
    said = call(str(folder), *([] if kind is None else ["--export", kind]))
    assert "\x1b]" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_damaged_model_costs_its_picture_only(run_folder):
    (run_folder / "models").mkdir()
    (run_folder / "models" / "dense.safetensors").write_bytes(b"\xff" * 100)
    assert "no picture of dense" in call(str(run_folder))


def test_importing_the_command_does_not_import_torch():
    code = "import sys, openwork.cli.report; assert not {'torch', 'mlflow', 'tensorboard', 'matplotlib'} & set(sys.modules)"
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    assert subprocess.run([sys.executable, "-c", code], env=env, check=False).returncode == 0
