"""R2, R3, R4: what is killed, repeated or run in another order ends with the same bits."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from openwork import registry
from openwork.core.rng import derive
from openwork.lab import study as studies
from openwork.lab import sweep
from openwork.lab.study import Work
from openwork.testing.reliability import _children, _trials, _work
from openwork.testing.reliability._rows import Measured, Part, Parts, Scale, complaints, none_wrong, total
from openwork.train.loop import fit
from openwork.train.settings import Settings

STEPS = 24
OPTIMIZERS = ("sgd", "adamw", "rmsprop")


def train(method: str, optimizer: str, checkpoint: str | None, kill: int | None) -> dict[str, Any]:
    """Train to the end and return a digest of every tensor; with `kill`, end by SIGKILL after that step instead."""
    model, held = _work.net(), _work.build(method, 0.4, STEPS)
    settings = Settings(steps=STEPS, batch_size=8, lr=0.01, optimizer=optimizer, clip=1.0)

    def on_step(step: int, _loss: float) -> None:
        if step == kill:
            os.kill(os.getpid(), signal.SIGKILL)

    place = None if checkpoint is None else Path(checkpoint)
    history = fit(
        model, _work.Clusters(), settings, seed=0, sparsifier=held, checkpoint=place, every_seconds=0, on_step=on_step
    )
    return {
        "weights": _work.digest(model.state_dict()),
        "masks": _work.digest(held.masks),
        "losses": [list(one) for one in history.losses],
    }


def killed_runs(method: str, optimizer: str, kills: int) -> Part:
    """Compare an uninterrupted run with those that are killed at a random step and continued in a new process."""
    whole, wrong = _children.call(train, method, optimizer, None, None).value, []
    draw = random.Random(derive(0, "reliability", "kill", method, optimizer))
    for _ in range(kills):
        step = draw.randrange(1, STEPS - 1)
        with _children.folder() as folder:
            ended = _children.call(train, method, optimizer, str(folder), step)
            if ended.code != -signal.SIGKILL:
                wrong.append(f"the kill at step {step} ended with status {ended.code}")
                continue
            again = _children.call(train, method, optimizer, str(folder), None).value
        wrong += [f"{what} differ after a kill at step {step}" for what in whole if again[what] != whole[what]]
    return {"cases": kills, "wrong": wrong}


def _resumes(scale: Scale) -> Parts:
    if scale == "short":
        return {"granet, adamw": partial(killed_runs, "granet", "adamw", 2)}
    return {
        f"{method}, {optimizer}": partial(killed_runs, method, optimizer, 4)
        for method in _work.sparsifiers()
        for optimizer in OPTIMIZERS
    }


def _judge_resumes(found: Mapping[str, Part]) -> Measured:
    bad, cases = sum(len(part["wrong"]) for part in found.values()), total(found, "cases")
    value = f"{100 * (1 - min(bad, cases) / max(1, cases)):.4g} % of {cases} killed runs bit-equal ({len(found)} arms)"
    return Measured(value, bad == 0 and cases > 0, complaints(found))


def trial_of(name: str, preset: str, arm: str, noise: int) -> dict[str, Any]:
    """Run one arm of a study, with torch's, NumPy's and Python's global generators seeded by `noise`."""
    import numpy as np

    torch.manual_seed(noise)
    np.random.seed(noise)
    random.seed(noise)
    found = studies.find(name)
    config = found.preset(preset)
    chosen = next(one for one in found.arms(config) if one.name == arm)
    with _children.folder() as folder:
        (folder / "scratch").mkdir()
        return found.run(config, chosen, 0, Work(folder, folder / "scratch")).metrics


def repeated(name: str, most: int | None) -> Part:
    """Run every arm of a study's smoke preset (or `most` of them) twice, in processes of their own, and compare."""
    found = studies.find(name)
    arms = [arm.name for arm in found.arms(found.preset("smoke"))][:most]
    wrong = []
    for arm in arms:
        one, two = (_children.call(trial_of, name, "smoke", arm, noise).value for noise in (1, 2))
        odd = [metric for metric in one if one[metric] != two.get(metric)]
        wrong += [f"{arm}: {metric} is {one[metric]}, then {two.get(metric)}" for metric in odd]
    return {"cases": len(arms), "wrong": wrong}


def _repeats(scale: Scale) -> Parts:
    if scale == "short":
        return {"granet": partial(repeated, "granet", 1)}
    return {name: partial(repeated, name, None) for name in registry.study_names()}


def _judge_repeats(found: Mapping[str, Part]) -> Measured:
    bad = none_wrong(found, f"arms of {len(found)} studies differ between two fresh processes")
    return Measured(bad.value, bad.passed, bad.detail)


def orders(workers: tuple[int, ...], seeds: int) -> Part:
    """Run one sweep with several numbers of workers, each in another order of trials, and compare every metric.

    0 workers stand for the trials run one after the other in this process, without a sweep.
    """
    results = []
    for count in workers:
        if not count:
            results.append(_alone(seeds))
            continue
        with _children.folder() as folder:
            made = sweep.plan(_trials.STUDY, _trials.STUDY.preset("smoke", ways=_trials.TRAINING, seeds=seeds), folder)
            random.Random(derive(0, "reliability", "order", count)).shuffle(made.trials)
            sweep.run(made, workers=count, timeout=None, done=lambda _trial, _result: None)
            results.append({f"{r['arm']}, seed {r['seed']}": r["metrics"] for r in made.results.values()})
    wrong = [
        f"{trial} differs with {count} workers"
        for count, found in zip(workers[1:], results[1:], strict=True)
        for trial, metrics in results[0].items()
        if found.get(trial) != metrics or not metrics
    ]
    return {"cases": len(results[0]) * (len(workers) - 1), "wrong": wrong}


def _alone(seeds: int) -> dict[str, dict[str, float]]:
    config, found = _trials.STUDY.preset("smoke", ways=_trials.TRAINING, seeds=seeds), {}
    for arm in _trials.STUDY.arms(config):
        for seed in range(seeds):
            with _children.folder() as folder:
                (folder / "scratch").mkdir()
                outcome = _trials.STUDY.run(config, arm, seed, Work(folder, folder / "scratch"))
            found[f"{arm.name}, seed {seed}"] = outcome.metrics
    return found


def _orders(scale: Scale) -> Parts:
    chosen = ((1, 4, 2, 0), 5) if scale == "long" else ((0, 4), 1)
    return {"sweep": partial(orders, *chosen)}


def _judge_orders(found: Mapping[str, Part]) -> Measured:
    return none_wrong(found, "trials differ between one and four at a time, in shuffled orders")


RESUMES = _resumes, _judge_resumes
REPEATS = _repeats, _judge_repeats
ORDERS = _orders, _judge_orders
