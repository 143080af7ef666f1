"""A sweep that is killed at random moments ends where an uninterrupted one does, and nothing is half-written."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from openwork import saving

ROOT = Path(__file__).parents[2]
KILLS = int(os.environ.get("OPENWORK_KILLS", "4"))  # the long form: OPENWORK_KILLS=50
WORDS = ["compare", "--model", "mlp-32", "--methods", "dense,granet,soups", "--density", "0.1", "--seeds", "1",
         "--steps", "60", "--no-latency", "--quiet", "--workers", "2"]  # fmt: skip


def start(out: Path) -> subprocess.Popen[bytes]:
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-m", "openwork", *WORDS, "--out", str(out)]
    with out.with_suffix(".log").open("wb") as log:
        return subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)


def metrics(out: Path) -> dict[str, object]:
    trials = json.loads((out / "results.json").read_text())["trials"]
    return {f"{t['arm']} {t['seed']}": (t["status"], t["metrics"], t["curves"], t["layers"]) for t in trials}


def unreadable(out: Path) -> list[str]:
    """Return the files under their final names that cannot be read."""
    bad = []
    for path in out.rglob("*"):
        if path.name.startswith(".openwork-") or not path.is_file():
            continue
        try:
            if path.suffix == ".json" and path.name != "progress.json":
                json.loads(path.read_text())
            elif path.name == "model.safetensors":
                saving.load_state(path)
        except Exception as error:
            bad.append(f"{path}: {error}")
    return bad


@pytest.mark.timeout(1800)
def test_a_killed_sweep_equals_an_uninterrupted_one(tmp_path):
    assert start(tmp_path / "whole").wait() == 0, (tmp_path / "whole.log").read_text()
    chance = random.Random(0)
    for _ in range(KILLS):
        process = start(tmp_path / "killed")
        time.sleep(chance.uniform(0.5, 12.0))
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert unreadable(tmp_path / "killed") == []
    assert start(tmp_path / "killed").wait() == 0, (tmp_path / "killed.log").read_text()
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")
    assert list((tmp_path / "killed").rglob(".openwork-*")) == []


def test_the_children_of_a_killed_sweep_end_with_it(tmp_path):
    process = start(tmp_path / "run")
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("run/trials/*/progress.json")) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    folder = str(tmp_path / "run")
    while running(folder) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert running(folder) == []


def running(folder: str) -> list[int]:
    """Return the processes whose command line names `folder`."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if folder.encode() in (place / "cmdline").read_bytes():
                found.append(int(place.name))
        except OSError:
            continue
    return found
