"""A study whose trials end in every way that a trial can: well, raising, diverging, killed, hanging, out of memory."""

from __future__ import annotations

import os
import signal
import time
from typing import ClassVar

import torch
from pydantic import Field

from openwork import atomic
from openwork.core.rng import generator
from openwork.lab.claims import Claim
from openwork.lab.spec import Arm, Config
from openwork.lab.study import Outcome, Study, Work
from openwork.testing import faults
from openwork.testing.reliability import _work
from openwork.train.loop import fit
from openwork.train.settings import Settings

NAME = "openwork.testing.reliability._trials:STUDY"
TRAINING = ("train rigl", "train granet", "train gmp")
MEGABYTES = 8


class Trials(Config):
    """Which arms there are; the first word of an arm says how it ends."""

    plan: ClassVar[frozenset[str]] = frozenset({"seeds", "ways"})

    ways: tuple[str, ...] = Field(("ok",), description="arms, named by how they end")
    seconds: float = Field(0.0, description="how long a good trial takes at least")


def arms(config: Trials) -> list[Arm]:
    """Return an arm a way."""
    return [Arm(way, {"way": way}, way.partition(" ")[0]) for way in config.ways]


def run(config: Trials, arm: Arm, seed: int, work: Work) -> Outcome:
    """End as the arm's name says; what fails leaves a mark, by which a second attempt is known and ends well."""
    way, _, rest = str(arm.settings["way"]).partition(" ")
    mark = work.folder / "mark"
    if mark.exists() or way in ("ok", "train", "write"):
        return _good(config, way, rest, seed, work)
    atomic.write_bytes(mark, b"here")
    if way == "raises":
        raise ValueError("a plain bug")
    if way == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if way == "memory":
        with faults.worker_oom(32 * 2**20):
            torch.ones(2**28)
    time.sleep(3600)
    return Outcome({})


def _good(config: Trials, way: str, rest: str, seed: int, work: Work) -> Outcome:
    if way == "train":
        return _trained(rest, seed)
    if way == "write":
        atomic.write_bytes(work.folder / "large.bin", bytes(MEGABYTES * 2**20))
    for tick in range(10):
        time.sleep(config.seconds / 10)
        work.progress(tick / 10)
    draw = generator(seed, "reliability", "trial", way, rest)
    return Outcome({"accuracy": float(torch.rand((), generator=draw))})


def _trained(method: str, seed: int) -> Outcome:
    model, held = _work.net(seed), _work.build(method, 0.3, 20)
    history = fit(model, _work.Clusters(), Settings(steps=20, batch_size=8, lr=0.05), seed=seed, sparsifier=held)
    size = sum(float(param.detach().double().square().sum()) for param in model.parameters())
    return Outcome({"accuracy": size, "loss": history.losses[-1][1], "kept": float(held.masks.nnz())})


STUDY = Study(
    name=NAME,
    config=Trials,
    presets={"smoke": {"seeds": 1}, "laptop": {"seeds": 3}, "paper": {"seeds": 5}},
    arms=arms,
    run=run,
    claims=lambda _config: [Claim("one trial is better than nothing", "accuracy", {"ok": 1.0})],
)
