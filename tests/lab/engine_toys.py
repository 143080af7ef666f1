"""A study whose trials compute something in the last digits, and can end the worker that runs them."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import ClassVar

import torch
from pydantic import Field

from openwork.core.rng import generator
from openwork.lab.spec import Arm, Config
from openwork.lab.study import Outcome, Study, Work

NAME = "tests.lab.engine_toys:STUDY"


class EngineConfig(Config):
    """How long a trial takes, and which of them end their worker how often."""

    plan: ClassVar[frozenset[str]] = frozenset({"seeds", "marks", "kills", "seconds"})

    marks: str = Field("", description="a folder where trials say that they run")
    kills: dict[str, int] = Field({}, description="arm-seed -> how often the trial ends the worker that started it")
    seconds: float = Field(0.0, description="how long a trial waits")
    steps: int = Field(30, description="steps of gradient descent")


def run(config: EngineConfig, arm: Arm, seed: int, work: Work) -> Outcome:
    name = f"{arm.name}-{seed}"
    before = _mark(config, name) if config.marks else 0
    work.progress(0.5)
    if before < config.kills.get(name, 0):
        os.kill(_parent(os.getppid()), signal.SIGKILL)  # the nursery's own parent: the worker
        time.sleep(60)
    time.sleep(config.seconds)
    draw = generator(seed, "engines", arm.name)
    weight = torch.randn(64, 48, generator=draw).requires_grad_()
    x, y = torch.randn(256, 64, generator=draw), torch.randn(256, 48, generator=draw)
    curve = []
    for step in range(config.steps):
        loss = (torch.tanh(x @ weight) - y).square().mean()
        (slope,) = torch.autograd.grad(loss, weight)
        weight = (weight - 5.0 * slope).detach().requires_grad_()
        curve.append([float(step), loss.item()])
    (work.folder / "deep").mkdir(exist_ok=True)
    (work.folder / "deep" / "weights.bin").write_bytes(weight.detach().numpy().tobytes())
    return Outcome({"accuracy": curve[-1][1], "threads": float(torch.get_num_threads())}, curves={"loss": curve})


def _mark(config: EngineConfig, name: str) -> int:
    """Leave a file that holds the process id, and return how many the trial left before."""
    before = len(list(Path(config.marks).glob(f"{name}.*")))
    (Path(config.marks) / f"{name}.{before}").write_text(str(os.getpid()))
    return before


def _parent(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("PPid:")))


STUDY = Study(
    name=NAME,
    config=EngineConfig,
    presets={"smoke": {"seeds": 4}},
    arms=lambda _config: [Arm("one", {"way": 1}), Arm("two", {"way": 2})],
    run=run,
    claims=lambda _config: [],
)
