"""The comparison: methods by name, under one budget, on one model and one data set."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

from torch import nn

from openwork import data, models, registry, saving
from openwork.core import patterns
from openwork.data.source import Source
from openwork.errors import MethodError, OpenworkError
from openwork.lab.claims import Claim
from openwork.lab.recipe import DENSE, Recipe, read_method
from openwork.lab.spec import Arm
from openwork.lab.study import Outcome, Study, Work
from openwork.lab.training import Trainer, layer_table
from openwork.sparsifier import Procedure, Sparsifier
from openwork.sparsifier.parameters import maskable
from openwork.train.evaluate import evaluate
from openwork.train.settings import Settings

MODEL_FILE = "model.safetensors"


def arms(recipe: Recipe) -> list[Arm]:
    """Return an arm a method and density, dense once, and an iso-budget arm beside each that needs more steps."""
    found = []
    steps = total_steps(recipe, load_source(recipe))
    for text in recipe.methods:
        name, options = read_method(text)
        if name == DENSE:
            found.append(Arm(DENSE, {"method": DENSE}, DENSE))
            continue
        for density in _densities(recipe):
            settings = {"method": registry.card(name).name, "density": density, "options": options, "steps": steps}
            needs = steps_of(make(recipe, settings), steps)
            note = f"takes {needs / steps:.2f} times the steps" if needs > steps * 1.0001 else ""
            found.append(Arm(f"{text.strip()}@{density:g}", settings, name, density, note))
            fitted = _fitting(recipe, settings, steps) if note and recipe.iso else None
            if fitted is not None:
                note = "the same within the common budget"
                within = {**settings, "steps": fitted}
                found.append(Arm(f"{text.strip()} iso@{density:g}", within, f"{name} iso", density, note))
    return found


def run(recipe: Recipe, arm: Arm, seed: int, work: Work) -> Outcome:
    """Train one arm with one seed and measure it; leaves the model as a compressed safetensors file."""
    source = load_source(recipe)
    steps = total_steps(recipe, source)
    model = build_model(recipe, source, seed).to(recipe.device)
    method = make(recipe, {**arm.settings, "seed": seed}, model)
    trainer = Trainer(
        source,
        training_settings(recipe, steps),
        seed,
        scratch=work.scratch,
        total_steps=steps_of(method, steps),
        progress=work.progress,
    )
    cost = trainer.cost(model)
    model, masks = trainer.run(model, method, steps)
    scores = evaluate(model, source.batches("test"), recipe.device)
    saved = saving.save(model, work.folder / MODEL_FILE)
    total = sum(param.numel() for param in model.parameters())
    off = masks.total() - masks.nnz()
    budget = 3.0 * steps * trainer.batch * cost.flops()
    return Outcome(
        metrics={
            "accuracy": scores.accuracy,
            "nll": scores.nll,
            "ece": scores.ece,
            "density": masks.density(),
            "kept": (total - off) / total,
            "inference_flops": cost.flops(_weights_only(masks, cost.parameters)) / max(1, cost.flops()),
            "training_flops": trainer.flops / max(1.0, budget),
            "bytes": saved.ratio,
            "steps": steps_of(method, steps) / steps,
        },
        curves={"loss": trainer.curve},
        layers=layer_table(masks),
        details={"parameters": total, "flops": cost.flops(), "dense_bytes": saved.dense_bytes, "data": source.name},
    )


def claims(recipe: Recipe) -> list[Claim]:
    """A comparison claims nothing: its table shows paired differences to dense with their intervals."""
    return []


def preflight(recipe: Recipe, planned: Sequence[Arm]) -> None:
    """Try data, model and every arm's method once, so that what is wrong is said before anything is trained.

    Raises:
        OpenworkError: the first thing that is wrong, in one sentence.
    """
    source = load_source(recipe)
    steps = total_steps(recipe, source)
    training_settings(recipe, steps)
    model = build_model(recipe, source, 0)
    x, y = next(iter(source.train_batches(0, 0, recipe.batch_size)))
    models.preflight(model, x, y, classes=source.classes)
    for arm in planned:
        method = make(recipe, {**arm.settings, "seed": 0}, model)
        if isinstance(method, Sparsifier):
            try:
                method.attach(deepcopy(model)).detach()
            except OpenworkError as error:
                raise type(error)(f"{arm.name}: {error}") from error


def make(recipe: Recipe, settings: Any, model: nn.Module | None = None) -> Sparsifier | Procedure | None:
    """Return the method of an arm, ready to run: None for dense.

    Raises:
        MethodError: if the method refuses an option.
    """
    if settings["method"] == DENSE:
        return None
    name, options = settings["method"], dict(settings.get("options", {}))
    entry = registry.load(name)
    given = {
        "density": settings["density"],
        "total_steps": settings["steps"],
        "pattern": recipe.pattern,
        "exclude": tuple(recipe.exclude) + tuple(_indivisible(recipe, model)),
        "seed": settings.get("seed", 0),
    }
    accepted = _accepted(entry)
    try:
        made = entry(**{**{k: v for k, v in given.items() if k in accepted}, **options})
    except TypeError as error:
        raise MethodError(
            f"{name} refuses its options {options!r}: {error}; it takes {', '.join(sorted(accepted))}"
        ) from error
    if not isinstance(made, Sparsifier | Procedure):
        raise MethodError(f"{name} is neither a Sparsifier nor a Procedure, so it cannot be compared by training")
    return made


def load_source(recipe: Recipe) -> Source:
    """Return the data of a recipe."""
    return data.load(recipe.data, train=recipe.train, augment=recipe.augment)


def build_model(recipe: Recipe, source: Source, seed: int) -> nn.Module:
    """Return the model of a recipe with the weights of a seed."""
    return models.build(
        recipe.model, input_shape=source.input_shape, classes=source.classes, seed=seed, options=recipe.options
    )


def total_steps(recipe: Recipe, source: Source) -> int:
    """Return the optimizer steps that every arm may take."""
    if recipe.epochs is None:
        return recipe.steps
    return max(1, round(recipe.epochs * source.steps_per_epoch(recipe.batch_size)))


def training_settings(recipe: Recipe, steps: int) -> Settings:
    """Return how to train, for the training loop."""
    return Settings(
        steps=steps,
        batch_size=recipe.batch_size,
        lr=recipe.lr,
        optimizer=recipe.optimizer,
        momentum=recipe.momentum,
        nesterov=recipe.momentum > 0,
        weight_decay=recipe.weight_decay,
        schedule=recipe.schedule,
        warmup=recipe.warmup,
        label_smoothing=recipe.label_smoothing,
        clip=recipe.clip,
        device=recipe.device,
    )


def steps_of(method: Sparsifier | Procedure | None, steps: int) -> float:
    """Return how many optimizer steps a method takes when the common budget is `steps`."""
    return float(method.steps) if isinstance(method, Procedure) and not isinstance(method, Sparsifier) else float(steps)


def _densities(recipe: Recipe) -> tuple[float, ...]:
    pattern = patterns.parse(recipe.pattern)
    return (pattern.n / pattern.m,) if isinstance(pattern, patterns.NM) else recipe.density


def _fitting(recipe: Recipe, settings: dict[str, Any], budget: int) -> int | None:
    """Return the largest `steps` with which the method stays within the budget, None if it cannot.

    What a method needs grows with them; with too few it refuses.
    """

    def need(steps: int) -> float:
        try:
            return steps_of(make(recipe, {**settings, "steps": steps}), steps)
        except MethodError:
            return 0.0

    low, high = 0, budget
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if need(middle) <= budget else (low, middle - 1)
    return low if low and need(low) > 0 else None


def _indivisible(recipe: Recipe, model: nn.Module | None) -> list[str]:
    """Return the parameters that the pattern does not divide: a comparison leaves them dense."""
    pattern = patterns.parse(recipe.pattern)
    if model is None or isinstance(pattern, patterns.Unstructured):
        return []
    return [name for name, param in maskable(model, exclude=recipe.exclude).items() if not pattern.divides(param.shape)]


def _accepted(entry: Any) -> set[str]:
    """Return the names that a method's constructor takes, those of every Sparsifier included where it passes them on."""
    names = set(inspect.signature(entry).parameters)
    if "options" in names:
        names = (names - {"options"}) | (set(inspect.signature(Sparsifier).parameters))
    return names


def _weights_only(masks: Any, known: Any) -> dict[str, Any]:
    return {name: mask for name, mask in masks.items() if name in known}


STUDY = Study(
    name="compare",
    config=Recipe,
    presets={"smoke": {"steps": 40, "seeds": 2}, "laptop": {}, "paper": {"data": "fashion-mnist", "model": "resnet20"}},
    arms=arms,
    run=run,
    claims=claims,
)
