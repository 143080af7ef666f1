"""`check_study`: the conformance suite of a study. Run it in the tests of a study of your own."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from openwork.errors import RecipeError
from openwork.lab.spec import Arm, Config
from openwork.lab.study import Outcome, Study, Work
from openwork.testing._toys import require

PRESETS = ("smoke", "laptop", "paper")


def check_study(study: Study, folder: str | Path, *, seeds: Sequence[int] = (0, 1), preset: str = "smoke") -> None:
    """Check that a study keeps its contract, and run a preset of it twice in this process.

    Covered: presets valid, unknown keys refused, the configuration frozen; arms' names unique and settings plain; every
    claim's arms and metric exist; every column is measured; all metrics finite, and equal when the run is repeated in
    another folder with the global generators of torch, NumPy and Python seeded differently.

    Args:
        study: the study.
        folder: an empty folder for the trials.
        seeds: which seeds to run.
        preset: which preset to run.

    Raises:
        AssertionError: names the arm, the seed and what broke.
    """
    for name in PRESETS:
        require(name in study.presets, f"study {study.name!r} has no preset {name!r}")
    for name in study.presets:
        _check_config(study, name)
    config = study.preset(preset)
    arms = list(study.arms(config))
    metrics = {arm.name: _check_arm(study, config, arm, seeds, Path(folder) / f"arm{k}") for k, arm in enumerate(arms)}
    _check_claims(study, config, metrics)
    measured = set().union(*metrics.values())
    missing = sorted(set(study.columns) - measured)
    require(not missing, f"no arm measures {', '.join(missing)}, named in the study's columns")


def _check_config(study: Study, preset: str) -> None:
    case = f"study {study.name!r}, preset {preset!r}: "
    try:
        config = study.preset(preset)
    except RecipeError as error:
        raise AssertionError(f"{case}{error}") from error
    try:
        study.preset(preset, no_such_key=1)
    except RecipeError as error:
        require("no_such_key" in str(error), f"{case}the error does not name the unknown key: {error}")
    else:
        raise AssertionError(f"{case}an unknown key is not refused")
    require(bool(config.model_config.get("frozen")), f"{case}the configuration is not frozen")
    again = study.config.read(json.loads(json.dumps(config.model_dump(mode="json"))))
    require(again == config, f"{case}the configuration does not survive JSON")
    bare = [k for k, v in study.config.model_fields.items() if not v.description and k not in Config.model_fields]
    require(not bare, f"{case}fields without a description: {', '.join(bare)}")
    _check_names(list(study.arms(config)), case)
    known = {arm.name for arm in study.arms(config)}
    for claim in study.claims(config):
        odd = sorted(set(claim.contrast) - known)
        require(not odd, f"{case}claim {claim.text!r} names arms that do not exist: {', '.join(odd)}")


def _check_names(arms: list[Arm], case: str) -> None:
    names = [arm.name for arm in arms]
    require(bool(names), f"{case}there are no arms")
    require(len(set(names)) == len(names), f"{case}two arms have one name: {', '.join(sorted(names))}")
    for arm in arms:
        try:
            plain = json.loads(json.dumps(dict(arm.settings), allow_nan=False))
        except (TypeError, ValueError) as error:
            raise AssertionError(f"{case}the settings of arm {arm.name!r} are no plain JSON values: {error}") from error
        require(plain == dict(arm.settings), f"{case}the settings of arm {arm.name!r} do not survive JSON")


def _check_arm(study: Study, config: Config, arm: Arm, seeds: Sequence[int], folder: Path) -> set[str]:
    """Run an arm twice with every seed; return the names of its metrics."""
    names: set[str] = set()
    for seed in seeds:
        case = f"study {study.name!r}, arm {arm.name!r}, seed {seed}: "
        first, second = (_run(study, config, arm, seed, folder / f"seed{seed}-{k}", noise=k + 1) for k in range(2))
        for name, value in first.metrics.items():
            require(math.isfinite(float(value)), f"{case}{name} is {value}")
        require(bool(first.metrics), f"{case}there are no metrics")
        require(not names or set(first.metrics) == names, f"{case}other metrics than with another seed")
        names = set(first.metrics)
        for name in sorted(names | set(second.metrics)):
            one, two = first.metrics.get(name), second.metrics.get(name)
            require(one == two, f"{case}{name} is {one}, then {two}: it depends on more than configuration, arm and seed")
    return names


def _run(study: Study, config: Config, arm: Arm, seed: int, folder: Path, noise: int) -> Outcome:
    """Run one trial in a fresh folder, with the global generators seeded by `noise` and put back afterwards."""
    scratch = folder / "scratch"
    scratch.mkdir(parents=True)
    shares: list[float] = []
    states: tuple[Any, Any] = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        try:
            torch.manual_seed(noise)
            random.seed(noise)
            np.random.seed(noise)
            outcome = study.run(config, arm, seed, Work(folder, scratch, shares.append))
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
    case = f"study {study.name!r}, arm {arm.name!r}, seed {seed}: "
    require(all(0.0 <= share <= 1.0 for share in shares), f"{case}progress is not a share from 0 to 1: {shares}")
    try:
        json.dumps([outcome.metrics, outcome.curves, outcome.layers, outcome.details])
    except TypeError as error:
        raise AssertionError(f"{case}the outcome holds what JSON cannot: {error}") from error
    return outcome


def _check_claims(study: Study, config: Config, metrics: dict[str, set[str]]) -> None:
    claims = list(study.claims(config))
    require(bool(claims), f"study {study.name!r} makes no claim")
    for claim in claims:
        for arm in claim.contrast:
            require(
                claim.metric in metrics[arm],
                f"claim {claim.text!r} is about {claim.metric!r}, which arm {arm!r} does not measure",
            )
