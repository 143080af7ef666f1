"""Runs some arms of a study in this process and judges its claims, with a method left alone or broken on purpose."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from openwork.lab.claims import collect, judge
from openwork.lab.spec import Config
from openwork.lab.study import Study, Work


def verdicts(study: Study, config: Config, arms: Iterable[str], folder: Path, *, seeds: int = 4) -> dict[str, str]:
    """Return text -> verdict of the claims that the arms suffice for, corrected over these claims only."""
    torch.set_num_threads(1)
    known = {arm.name: arm for arm in study.arms(config)}
    trials = []
    for name in arms:
        for seed in range(seeds):
            place = folder / f"{len(trials)}"
            (place / "scratch").mkdir(parents=True)
            outcome = study.run(config, known[name], seed, Work(place, place / "scratch"))
            trials.append({"arm": name, "seed": seed, "status": "ok", "metrics": outcome.metrics})
    claims = [claim for claim in study.claims(config) if set(claim.contrast) <= set(arms)]
    return {verdict.text: verdict.verdict for verdict in judge(claims, collect(trials))}
