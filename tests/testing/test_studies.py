"""The suite of studies must accept a sound study and find what is broken in another."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import Field

from openwork.core.rng import generator
from openwork.lab.claims import Claim
from openwork.lab.spec import Arm, Config
from openwork.lab.study import Outcome, Study
from openwork.testing import check_study


class Settings(Config):
    steps: int = Field(3, description="how many numbers to add")


class Bare(Config):
    steps: int = 3


def arms(cfg):
    return [Arm("sum"), Arm("double", {"factor": 2})]


def run(cfg, arm, seed, work):
    work.progress(0.5)
    draw = torch.rand(cfg.steps, generator=generator(seed, "study")).sum().item()
    (work.folder / "kept.txt").write_text("kept")
    return Outcome({"accuracy": arm.settings.get("factor", 1) * draw})


def claims(cfg):
    return [Claim("twice is more", "accuracy", {"double": 1, "sum": -1})]


SOUND = Study(
    name="toy",
    config=Settings,
    presets={"smoke": {"steps": 2}, "laptop": {}, "paper": {"steps": 100}},
    arms=arms,
    run=run,
    claims=claims,
)


def outcome(metrics):
    return lambda cfg, arm, seed, work: Outcome(metrics(seed))


def left_over(cfg, arm, seed, work):
    assert not list(work.scratch.iterdir())  # each run starts in a folder of its own
    (work.scratch / "checkpoint").write_text("state")
    return run(cfg, arm, seed, work)


def off_scale(cfg, arm, seed, work):
    work.progress(50.0)
    return run(cfg, arm, seed, work)


BROKEN = {
    "no preset 'paper'": {"presets": {"smoke": {}, "laptop": {}}},
    "unknown key 'lenght'": {"presets": {**SOUND.presets, "laptop": {"lenght": 3}}},
    "fields without a description: steps": {"config": Bare},
    "there are no arms": {"arms": lambda cfg: []},
    "two arms have one name": {"arms": lambda cfg: [Arm("sum"), Arm("sum"), Arm("double")]},
    "no plain JSON values": {"arms": lambda cfg: [Arm("sum", {"rule": run}), Arm("double")]},
    "do not survive JSON": {"arms": lambda cfg: [Arm("sum", {"sides": (1, 2)}), Arm("double")]},
    "names arms that do not exist: triple": {
        "claims": lambda cfg: [Claim("thrice is more", "accuracy", {"triple": 1, "sum": -1})]
    },
    "is about 'loss', which arm 'double' does not measure": {
        "claims": lambda cfg: [Claim("twice is more", "loss", {"double": 1, "sum": -1})]
    },
    "makes no claim": {"claims": lambda cfg: []},
    "no arm measures loss": {"columns": {"accuracy": "accuracy", "loss": "loss"}},
    "accuracy is nan": {"run": outcome(lambda seed: {"accuracy": float("nan")})},
    "there are no metrics": {"run": outcome(lambda seed: {})},
    "other metrics than with another seed": {"run": outcome(lambda seed: {"accuracy": 1.0, f"more{seed}": 1.0})},
    "depends on more than configuration, arm and seed": {"run": outcome(lambda seed: {"accuracy": torch.rand(1).item()})},
    "accuracy is .* then": {"run": outcome(lambda seed: {"accuracy": random.random()})},
    "it depends on more": {"run": outcome(lambda seed: {"accuracy": float(np.random.rand())})},
    "progress is not a share": {"run": off_scale},
    "holds what JSON cannot": {"run": lambda cfg, arm, seed, work: Outcome({"accuracy": 1.0}, details={"m": {1}})},
}


def test_a_sound_study_passes(tmp_path):
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    check_study(SOUND, tmp_path)
    check_study(replace(SOUND, run=left_over), tmp_path / "again")
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (random.getstate(), np.random.get_state()[1].tolist())


@pytest.mark.parametrize("message", BROKEN)
def test_sabotage_is_found(message, tmp_path):
    with pytest.raises(AssertionError, match=message):
        check_study(replace(SOUND, **BROKEN[message]), tmp_path)
