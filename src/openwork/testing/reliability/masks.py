"""R5, R6, R7, R24: what a sparsifier promises of its masks, whatever trains them and whatever goes wrong in training."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Iterator, Mapping
from decimal import ROUND_HALF_UP, Decimal
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from openwork.core.patterns import NM, Pattern, Unstructured
from openwork.core.rng import derive, generator
from openwork.errors import DivergedError, MaskError, MethodError, PatternError
from openwork.sparsifier.sparsifier import Sparsifier
from openwork.testing import _stepping, faults
from openwork.testing._toys import Loop
from openwork.testing.reliability import _work
from openwork.testing.reliability._rows import Measured, Part, Parts, Scale, complaints, none_wrong, total
from openwork.train import optimizers
from openwork.train.loop import fit
from openwork.train.settings import Settings

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def counted(dtype: str, cases: int) -> Part:
    """Select from random scores of random shapes, half of them full of ties, at every kind of density; count."""
    kind, wrong = getattr(torch, dtype), []
    draw = random.Random(derive(0, "reliability", "density", dtype))
    for case in range(cases):
        shape = [draw.randint(1, 12) for _ in range(draw.randint(1, 4))]
        size = math.prod(shape)
        density = draw.choice([0.0, 1 / size, 0.01, 0.05, 0.1, 0.3, 0.5, 0.9, 0.99, 1.0, draw.random()])
        score = torch.randn(shape, generator=generator(case, "reliability", dtype), dtype=torch.float64)
        score = (score if case % 2 else score.round()).to(kind)
        kept = int(Unstructured().select(score, density).sum())
        # The product of floats is what a user asks for; its rounding is done in decimals, by other means than the code's.
        wanted = int(Decimal(repr(density * size)).quantize(Decimal(1), rounding=ROUND_HALF_UP))
        wrong += [] if kept == wanted else [f"{kept} of {size} are kept at {density}, not {wanted} (shape {shape})"]
        grouped = torch.randn(draw.randint(1, 6), 4 * draw.randint(1, 6), generator=generator(case, "nm")).to(kind)
        groups = NM(2, 4).select(grouped, 0.5).reshape(-1, 4).sum(1)
        wrong += [] if bool((groups == 2).all()) else [f"2:4 keeps {groups.tolist()} of groups of 4"]
    return {"cases": 2 * cases, "wrong": wrong}


def trained_density(method: str, densities: tuple[float, ...], steps: int) -> Part:
    """Train with a method to its end at each density, and count what it keeps."""
    wrong, cases, floors = [], 0, 0
    for density in densities:
        try:
            made = _work.build(method, density, steps)
        except MethodError:  # a method may refuse a density that its defaults make no sense for
            continue
        cases += 1
        try:
            masks = Loop(made).run(steps).sparsifier.masks
            kept, goal = masks.nnz(), int(density * masks.total() + 0.5)
            floors += kept != goal and kept == len(masks) > goal  # fewer than one weight a layer are asked for
            slack = 0 if isinstance(made.pattern, Unstructured) else sum(map(partial(_unit, made.pattern), masks.values()))
            good = kept in (goal, max(goal, len(masks))) or abs(kept - max(goal, slack)) <= slack
            wrong += [] if good else [f"density {density}: {kept} are kept, not {goal}"]
        except (AssertionError, MaskError, PatternError) as error:
            wrong.append(f"density {density}: {error}")
    return {"cases": cases, "wrong": wrong, "floors": floors}


def _unit(pattern: Pattern, mask: Tensor) -> int:
    """Return the weights of a layer's largest unit: with units of several weights a count is exact up to one unit."""
    pattern.check(mask)
    return int(pattern.sizes(mask.shape).max())


def _densities(scale: Scale) -> Parts:
    if scale == "short":
        parts: Parts = {str(one).removeprefix("torch."): partial(counted, str(one)[6:], 60) for one in DTYPES}
        return {**parts, "granet": partial(trained_density, "granet", (1 / 352, 0.1, 1.0), 12)}
    parts = {str(one).removeprefix("torch."): partial(counted, str(one)[6:], 3000) for one in DTYPES}
    several = (1 / 352, 0.01, 0.05, 0.1, 0.3, 0.5, 0.9, 0.99, 1.0)
    return {**parts, **{name: partial(trained_density, name, several, 40) for name in _work.sparsifiers()}}


def _judge_densities(found: Mapping[str, Part]) -> Measured:
    bad = none_wrong(found, f"selections keep another number ({len(found)} dtypes and methods)")
    floors = f"{total(found, 'floors')} times fewer than one weight a layer were asked for, and one a layer was kept"
    return Measured(bad.value, bad.passed, "; ".join(filter(None, (bad.detail, floors if total(found, "floors") else ""))))


def held(method: str, optimizer: str, steps: int) -> Part:
    """Step with random gradients under an optimizer; every masked weight must be zero after every step."""
    check = _stepping.CHECKS[f"optimizer {optimizer}"]
    try:
        check(partial(_make, method), 0.3, steps)
    except (AssertionError, MaskError) as error:
        return {"cases": steps, "wrong": [str(error)]}
    return {"cases": steps, "wrong": []}


def _make(method: str, *, density: float, total_steps: int) -> Sparsifier:
    return _work.build(method, density, total_steps)


def _steps(scale: Scale) -> Parts:
    methods, steps = (_work.sparsifiers(), 200) if scale == "long" else (["rigl"], 25)
    return {f"{m}, {o}": partial(held, m, o, steps) for m in methods for o in _stepping.SETTINGS}


def _judge_steps(found: Mapping[str, Part]) -> Measured:
    kinds = {name.partition(", ")[2].partition(",")[0] for name in found}
    bad = none_wrong(found, "steps")
    violations = sum(len(part["wrong"]) for part in found.values())
    value = f"{violations} violations in {total(found, 'cases'):,} steps of {len(kinds)} optimizers"
    return Measured(value, bad.passed, bad.detail)


def taken(name: str) -> Part:
    """Attach to an optimizer of torch.optim and step it twice."""
    part = held("rigl", next(one for one in _stepping.SETTINGS if one.partition(",")[0].lower() == name), 2)
    return {"cases": 1, "wrong": part["wrong"][:1], "refused": 0}


def refused(name: str) -> Part:
    """Attach to an optimizer that cannot hold masks: one clear error, and an untouched model."""
    try:
        _stepping.CHECKS[f"refuses {name}"](partial(_make, "rigl"), 0.3, 4)
    except AssertionError as error:
        return {"cases": 0, "wrong": [str(error)], "refused": 1}
    return {"cases": 0, "wrong": [], "refused": 1}


def _optimizers(_scale: Scale) -> Parts:
    parts: Parts = {name: partial(taken, name) for name in optimizers.names()}
    return {**parts, **{kind.__name__: partial(refused, kind.__name__) for kind in _stepping.REFUSED}}


def _judge_optimizers(found: Mapping[str, Part]) -> Measured:
    good = sum(part["cases"] for part in found.values() if not part["wrong"])
    clear = sum(part["refused"] for part in found.values() if not part["wrong"])
    bad = any(part["wrong"] for part in found.values())
    value = (
        f"{good} of {total(found, 'cases')} stepping optimizers; {clear} of {total(found, 'refused')} others refused clearly"
    )
    return Measured(value, not bad and total(found, "cases") > 0, complaints(found))


def injected(where: str, cases: int) -> Part:
    """Put NaN or an infinity somewhere in training at random steps, with and without clipping, under several methods."""
    wrong = []
    draw = random.Random(derive(0, "reliability", "nan", where))
    for case in range(cases):
        method, step = draw.choice(["rigl", "set", "granet", "gmp"]), draw.randrange(1, 18)
        value, clip = draw.choice([math.nan, math.inf, -math.inf]), draw.choice([None, 1.0])
        told = _diverged(where, method, step, value, clip)
        wrong += [f"case {case}, {method}, step {step}, {value}, clip {clip}: {told}"] if told else []
    return {"cases": cases, "wrong": wrong}


def _diverged(where: str, method: str, step: int, value: float, clip: float | None) -> str:
    """Train with one bad number; return what is wrong with how it was told, empty if nothing is."""
    model, held = _work.net(), _work.build(method, 0.4, 24)
    name = "0.weight"
    losses: list[int] = []
    observed: list[bool] = []

    def on_step(now: int, _loss: float) -> None:
        losses.append(now)
        observed.append(all(mask.any() for mask in held.masks.values()) and _exact(held))

    settings = Settings(steps=24, batch_size=8, lr=0.05, clip=clip, schedule="constant")
    source: _work.Clusters = _work.Clusters()
    spoiling: Any = contextlib.nullcontext()
    if where == "input":
        source = _Spoilt(step, value)
    else:
        spoiling = faults.nan_at(
            step, where, model, name=name, value=value, sparsifier=held if where == "score" else None
        )  # fmt: skip
    words = {"input": "the input batch", "loss": "the output of the model"}.get(where, name)
    try:
        with spoiling:
            fit(model, source, settings, seed=0, sparsifier=held, on_step=on_step)
    except (DivergedError, MaskError) as error:
        late = len(losses) - step
        if not 0 <= late <= 1:
            return f"noticed {late} steps later"
        if words not in str(error):
            return f"the message does not name {words}: {error}"
        return "" if all(observed) else "a mask lost its count"
    return "" if _plain(method, clip) == _end(model, held) else "not noticed at all"


def _plain(method: str, clip: float | None) -> tuple[str, str]:
    """Return how the same training ends without a bad number: one that falls on a masked weight must change nothing."""
    model, held = _work.net(), _work.build(method, 0.4, 24)
    settings = Settings(steps=24, batch_size=8, lr=0.05, clip=clip, schedule="constant")
    fit(model, _work.Clusters(), settings, seed=0, sparsifier=held)
    return _end(model, held)


def _end(model: nn.Module, held: Sparsifier) -> tuple[str, str]:
    return _work.digest(model.state_dict()), _work.digest(held.masks)


class _Spoilt(_work.Clusters):
    """Clusters with one number that is not finite in the batch of a step."""

    def __init__(self, step: int, value: float) -> None:
        super().__init__()
        self.step, self.value = step, value

    def train_batches(self, seed: int, epoch: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of an epoch."""
        first = epoch * self.steps_per_epoch(batch_size)
        for step, (x, y) in enumerate(super().train_batches(seed, epoch, batch_size), first):
            if step == self.step:
                x = x.clone()
                x[0, 0] = self.value
            yield x, y


def _exact(held: Sparsifier) -> bool:
    return held.masks.nnz() == sum(held.history[-1][1])


def _injections(scale: Scale) -> Parts:
    return {where: partial(injected, where, 60 if scale == "long" else 4) for where in faults.PLACES}


def _judge_injections(found: Mapping[str, Part]) -> Measured:
    return none_wrong(found, "injected numbers go unnoticed, late or unnamed, or reach a mask")


DENSITIES = _densities, _judge_densities
ZEROS = _steps, _judge_steps
OPTIMIZERS = _optimizers, _judge_optimizers
DIVERGENCE = _injections, _judge_injections
