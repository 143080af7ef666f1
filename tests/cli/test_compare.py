"""`openwork compare` from end to end, in a process of its own as a user runs it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from openwork import saving
from openwork.cli.compare import run
from openwork.errors import OpenworkError
from openwork.lab.recipe import Recipe
from tests.cli import users

ROOT = Path(__file__).parents[2]
HERE = {"data": "tests.cli.users:arrays", "model": "tests.cli.users:model", "methods": "dense,rigl", "density": 0.2}


def openwork(*words: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    return subprocess.run(
        [sys.executable, "-m", "openwork", *words],
        cwd=cwd, env={**os.environ, "PYTHONPATH": paths, "COLUMNS": "200", **env}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip


def test_a_users_model_and_data_from_start_to_third_call(tmp_path):
    words = ["compare", "--data", "tests.cli.users:loaders", "--model", f"{ROOT}/tests/cli/users.py:model",
             "--methods", "dense,random,granet(initial=1.0)", "--density", "0.2", "--seeds", "2", "--steps", "30",
             "--out", "here"]  # fmt: skip
    first = openwork(*words, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    folder = tmp_path / "here"
    found = json.loads((folder / "results.json").read_text())
    assert [row["arm"] for row in found["rows"]] == ["dense", "random@0.2", "granet(initial=1.0)@0.2"]
    assert all(trial["status"] == "ok" for trial in found["trials"])
    total = 12 * 24 + 24 * 3
    for trial in found["trials"]:
        kept = sum(layer["kept"] for layer in trial["layers"].values())
        assert kept == (total if trial["arm"] == "dense" else round(0.2 * total))
    assert set(found["latency"]) == {row["arm"] for row in found["rows"]}
    for row in found["rows"]:
        assert row["arm"] in first.stdout
    assert "<script" not in (folder / "report.html").read_text().lower()
    models = sorted(path.name for path in (folder / "models").iterdir())
    assert models == ["dense.safetensors", "granet-initial=1.0-@0.2.safetensors", "random@0.2.safetensors"]
    network = saving.load(folder / "models" / models[2], users.model())
    assert sum(int((param != 0).sum()) for param in network.parameters() if param.dim() == 2) == round(0.2 * total)

    stamps = {path: path.stat().st_mtime_ns for path in folder.glob("trials/*/result.json")}
    again = openwork("compare", str(folder / "recipe.yaml"), cwd=tmp_path)  # the recipe says the same as the flags
    assert again.returncode == 0, again.stderr
    assert "6 of them finished before" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in folder.glob("trials/*/result.json")} == stamps
    assert json.loads((folder / "results.json").read_text())["trials"] == found["trials"]


def test_a_diverging_arm_is_one_sentence_and_costs_no_other(tmp_path):
    done = openwork(
        "compare", "--data", "tests.cli.users:arrays", "--model", "tests.cli.users:diverging", "--methods", "dense",
        "--seeds", "1", "--steps", "20", "--out", "here", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 2
    assert "diverged at step 8" in done.stderr
    assert "Traceback" not in done.stderr
    assert json.loads((tmp_path / "here" / "results.json").read_text())["trials"][0]["status"] == "diverged"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": "fashion-mist"}, ["fashion-mist", "fashion-mnist"]),
        ({"data": "tests.cli.users:nothing"}, ["no function 'nothing'", "arrays"]),
        ({"data": "no/such/file.py:f"}, ["no file"]),
        ({"data": "tests.cli.users:empty"}, ["no labels"]),
        ({"data": "tests.cli.users:float_labels"}, ["float32", "whole numbers"]),
        ({"data": "tests.cli.users:negative_labels"}, ["label -1"]),
        ({"data": "tests.cli.users:integer_inputs"}, ["int64"]),
        ({"model": "resnett20"}, ["resnett20", "resnet20"]),
        ({"model": "tests.cli.users:wrong_shape"}, ["(32, 12)", "float32"]),
        ({"model": "tests.cli.users:too_few_outputs"}, ["2 outputs", "3 classes"]),
        ({"model": "tests.cli.users:no_model"}, ["int"]),
        ({"model": "tests.cli.users:raises"}, ["no such layer"]),
        ({"methods": "rigl(drop=3)"}, ["drop=3"]),
        ({"methods": "rigl(colour=1)"}, ["colour", "drop"]),
        ({"optimizer": "lbfgs"}, ["lbfgs"]),
        ({"schedule": "wavy"}, ["wavy", "cosine"]),
        ({"pattern": "3:2"}, ["3:2"]),
        ({"exclude": "nothing.*"}, ["nothing.*"]),
        ({"device": "tpu9"}, ["tpu9"]),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence_before_anything_is_trained(changes, words, tmp_path):
    with pytest.raises(OpenworkError) as caught:
        run(Recipe.read({**HERE, "batch_size": 32, "steps": 5, "out": str(tmp_path / "run"), **changes}), quiet=True)
    for word in words:
        assert word in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert not list(tmp_path.glob("run/trials/*/result.json"))


def test_an_unwritable_folder_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("mine")
    done = openwork("compare", "--out", "file/run", cwd=tmp_path)
    assert done.returncode == 2
    assert "--out" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("words", [["--help"], ["list"], ["show", "soups"], ["compare", "--help"], ["data", "list"]])
def test_commands_that_need_no_torch_do_not_import_it(words, tmp_path):
    code = f"import sys; sys.argv = ['openwork', *{words!r}]\nfrom openwork.cli import main\n"
    code += "try: main()\nexcept SystemExit: pass\n"
    code += "assert 'torch' not in sys.modules, 'torch was imported'"
    paths = os.pathsep.join([str(ROOT / "src")])
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, cwd=tmp_path,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_every_flag_is_a_key_and_every_key_a_flag(tmp_path):
    help_text = openwork("compare", "--help", cwd=tmp_path).stdout
    for name in Recipe.model_fields:
        assert f"--{name.replace('_', '-')}" in help_text


def test_ctrl_c_says_how_to_go_on_and_keeps_what_is_finished(tmp_path):
    words = ["compare", "--model", "mlp-16", "--methods", "dense", "--seeds", "60", "--steps", "30", "--out", "run", "-q"]
    process = subprocess.Popen(
        [sys.executable, "-m", "openwork", *words], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("run/trials/*/result.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate()
    assert process.returncode == 130
    assert "the same command goes on from here" in said
    assert "Traceback" not in said
    assert list(tmp_path.glob("run/trials/*/result.json"))
