"""A training process that is killed again and again ends where the one that was left alone ends."""

from __future__ import annotations

import multiprocessing
import random
import signal
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch

from openwork.methods.sparsify.rigl import RigL
from openwork.train import checkpoints
from openwork.train.loop import fit
from openwork.train.settings import Settings
from tests.train.toys import Toy, assert_same, net, weights

STEPS = 150
KILLS = 8


def train(checkpoint: Path | None, result: Path) -> None:
    """Train in a child process and leave the final weights in `result`."""
    torch.set_num_threads(1)
    model = net()
    settings = Settings(steps=STEPS, batch_size=8, lr=0.01, optimizer="adamw", clip=1.0)
    rigl = RigL(0.3, total_steps=STEPS, every=5, stop=0.95)
    fit(model, Toy(), settings, seed=0, sparsifier=rigl, checkpoint=checkpoint, every_seconds=0)
    safetensors.torch.save_file(weights(model), result)


@pytest.mark.skipif(sys.platform == "win32", reason="no fork server, no SIGKILL")
def test_killed_at_random_moments(tmp_path: Path) -> None:
    # One server imports torch (and what the first optimizer imports); each child is forked from it and starts at once.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "torch._dynamo"])
    whole, folder, result = tmp_path / "whole", tmp_path / "run", tmp_path / "result"
    child = context.Process(target=train, args=(None, whole))
    child.start()
    child.join()
    assert child.exitcode == 0
    choose = random.Random(0)
    reached = []
    while True:
        child = context.Process(target=train, args=(folder, result))
        child.start()
        if len(reached) < KILLS:
            goal = max([0, *reached]) + choose.randrange(3, 12)
            while child.is_alive() and newest(folder) < goal:
                time.sleep(0.001)
            time.sleep(choose.random() * 0.01)
            child.kill()
        child.join()
        if child.exitcode == 0:
            break
        assert child.exitcode == -signal.SIGKILL
        found, notes = checkpoints.newest(folder)
        assert notes == [], "no kill damages a checkpoint"
        assert found is not None
        assert found.step >= goal
        reached.append(found.step)
    assert len(reached) == KILLS
    assert reached == sorted(reached)
    assert reached[-1] < STEPS
    assert_same(safetensors.torch.load_file(whole), safetensors.torch.load_file(result))
    assert [path.name for path in sorted(folder.iterdir())] == ["run.json", f"step-{STEPS - 1:06d}", f"step-{STEPS:06d}"]


def newest(folder: Path) -> int:
    """Return the last step that has a checkpoint."""
    return max((int(path.name.removeprefix("step-")) for path in folder.glob("step-*")), default=0)
