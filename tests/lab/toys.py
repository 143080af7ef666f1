"""A study that costs nothing, and can be told to go wrong in every way a trial can."""

from __future__ import annotations

import os
import signal
import time
from typing import ClassVar

from pydantic import Field

from openwork.core.rng import generator
from openwork.errors import DivergedError, StoreError
from openwork.lab.claims import Claim
from openwork.lab.spec import Arm, Config
from openwork.lab.study import Outcome, Study, Work

NAME = "tests.lab.toys:STUDY"


class ToyConfig(Config):
    """Which arms there are and how each ends."""

    plan: ClassVar[frozenset[str]] = frozenset({"seeds", "ways"})

    ways: tuple[str, ...] = Field(("dense", "good"), description="how each arm ends")
    scale: float = Field(1.0, description="a setting that trials depend on")


def arms(config: ToyConfig) -> list[Arm]:
    return [Arm(way, {"way": way.removesuffix("-again")}, way) for way in config.ways]


def run(config: ToyConfig, arm: Arm, seed: int, work: Work) -> Outcome:
    way = arm.settings["way"]
    work.progress(0.5)
    if way == "fails":
        raise ValueError("a plain bug")
    if way == "diverges":
        raise DivergedError("loss is nan at step 3")
    if way == "full":
        raise StoreError("no space left")
    if way == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if way == "exits":
        os._exit(3)
    if way == "hangs":
        time.sleep(600)
    if way == "once" and not (work.scratch / "mark").exists():
        (work.scratch / "mark").write_text("here")
        os.kill(os.getpid(), signal.SIGKILL)
    noise = float(generator(seed, "toy", way).initial_seed() % 1000) / 1e5
    return Outcome({"accuracy": config.scale * (0.9 if way == "dense" else 0.8) + noise, "kept": 0.5})


STUDY = Study(
    name=NAME,
    config=ToyConfig,
    presets={"smoke": {"seeds": 2}, "laptop": {"seeds": 3}, "paper": {"seeds": 5}},
    arms=arms,
    run=run,
    claims=lambda _config: [Claim("good is worse than dense", "accuracy", {"dense": 1.0, "good": -1.0})],
)
