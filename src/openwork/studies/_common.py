"""What studies share: data, model and settings of a configuration, and one method trained on them and measured."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pydantic import Field
from torch import nn

from openwork import data, models, registry
from openwork.core.masks import Masks
from openwork.data.source import Source
from openwork.errors import MethodError
from openwork.lab.spec import Config
from openwork.lab.study import Work
from openwork.lab.training import Trainer
from openwork.sparsifier import Procedure, Sparsifier
from openwork.train.evaluate import Scores, evaluate
from openwork.train.settings import Settings

DENSE = "dense"


class Training(Config):
    """Data and training of a study; every arm has the same."""

    data: str = Field("digits", description="data set by name")
    train: int | None = Field(None, ge=1, description="use only so many training images; none for all")
    epochs: float = Field(4.0, gt=0, description="training length of every arm, in epochs")
    batch_size: int = Field(128, ge=1, description="examples a step")
    lr: float = Field(0.1, gt=0, description="base learning rate of SGD with Nesterov's momentum .9")
    weight_decay: float = Field(5e-4, ge=0, description="weight decay")
    schedule: str = Field("cosine", description="learning rate over training: constant, cosine, linear or step")
    warmup: float = Field(0.05, ge=0, lt=1, description="share of training over which the rate first rises")
    augment: str = Field("none", description="training images: none, shift, flip-shift or rotate")
    device: str = Field("cpu", description="where to train: cpu, cuda, cuda:0")
    seeds: int = Field(3, ge=1, le=1000, description="seeds an arm; claims need at least 3")

    def identity(self) -> dict[str, Any]:
        """Return the digest of the data."""
        return {"data": data.digest(self.data, train=self.train)}


@dataclass
class Trained:
    """One method's result.

    Attributes:
        model: the trained model, zero where it is masked.
        masks: what is kept.
        scores: on the test data.
        trainer: what trained it; knows FLOPs, steps and the loss curve.
        dense_flops: training FLOPs of a dense run of the common length.
    """

    model: nn.Module
    masks: Masks
    scores: Scores
    trainer: Trainer
    dense_flops: float

    def metrics(self) -> dict[str, float]:
        """Return what every study reports of an arm: fractions, and ratios against dense."""
        cost = self.trainer.cost(self.model)
        weights = {name: mask for name, mask in self.masks.items() if name in cost.parameters}
        return {
            "accuracy": self.scores.accuracy,
            "nll": self.scores.nll,
            "ece": self.scores.ece,
            "density": self.masks.density(),
            "smallest_layer": min(self.masks.densities().values()),
            "inference_flops": cost.flops(weights) / max(1, cost.flops()),
            "training_flops": self.trainer.flops / max(1.0, self.dense_flops),
        }


def load_source(cfg: Training) -> Source:
    """Return the data of a configuration."""
    return data.load(cfg.data, train=cfg.train, augment=cfg.augment)


def build_model(source: Source, ref: str, seed: int, options: Mapping[str, Any] | None = None) -> nn.Module:
    """Return a model for the data with the weights of a seed."""
    return models.build(ref, input_shape=source.input_shape, classes=source.classes, seed=seed, options=options)


def total_steps(cfg: Training, source: Source) -> int:
    """Return the optimizer steps that every arm may take."""
    return max(1, round(cfg.epochs * source.steps_per_epoch(cfg.batch_size)))


def settings(cfg: Training, steps: int) -> Settings:
    """Return how to train."""
    return Settings(
        steps=steps,
        batch_size=cfg.batch_size,
        lr=cfg.lr,
        weight_decay=cfg.weight_decay,
        schedule=cfg.schedule,
        warmup=cfg.warmup,
        device=cfg.device,
    )


def make_method(name: str, density: float, steps: int, seed: int, **options: Any) -> Sparsifier | Procedure | None:
    """Return a method by name with those of density, total_steps and seed that it takes; None for dense."""
    if name == DENSE:
        return None
    made: Sparsifier | Procedure = construct(registry.load(name), density, steps, seed, **options)
    return made


def make_sparsifier(
    name: str, density: float, steps: int, seed: int, *, mixin: type[Sparsifier] | None = None, **options: Any
) -> Sparsifier:
    """Return a Sparsifier by name, with a class mixed in that may watch it.

    The mixed class keeps the method's name, on which its random draws depend.

    Raises:
        MethodError: if the method is a procedure.
    """
    entry = registry.load(name)
    if not issubclass(entry, Sparsifier):
        raise MethodError(f"{name!r} is a procedure of several legs and no Sparsifier; use make_method")
    if mixin is not None:
        entry = type(entry.__name__, (mixin, entry), {})
    made: Sparsifier = construct(entry, density, steps, seed, **options)
    return made


def construct(entry: Any, density: float, steps: int, seed: int, **options: Any) -> Any:
    """Return an object of a method's class with those of density, total_steps and seed that it takes."""
    known = set(inspect.signature(entry).parameters)
    known |= set(inspect.signature(Sparsifier).parameters) if "options" in known else set()
    given = {"density": density, "total_steps": steps, "seed": seed}
    return entry(**{k: v for k, v in given.items() if k in known}, **options)


def new_trainer(cfg: Training, source: Source, seed: int, work: Work, total: float) -> Trainer:
    """Return what trains `total` steps in all and reports its progress to `work`."""
    steps = total_steps(cfg, source)
    return Trainer(
        source, settings(cfg, steps), seed, scratch=work.scratch, total_steps=total, progress=work.progress
    )  # fmt: skip


def train(
    cfg: Training, source: Source, model: nn.Module, method: Sparsifier | Procedure | None, seed: int, work: Work
) -> Trained:
    """Train a model by a method (None for dense) for the common number of steps and score it on the test data."""
    steps = total_steps(cfg, source)
    total = method.steps if isinstance(method, Procedure) and not isinstance(method, Sparsifier) else steps
    trainer = new_trainer(cfg, source, seed, work, total)
    dense = 3.0 * steps * cfg.batch_size * trainer.cost(model.to(cfg.device)).flops()
    model, masks = trainer.run(model, method, steps)
    return Trained(model, masks, evaluate(model, source.batches("test"), cfg.device), trainer, dense)


def share_of(work: Work, name: str, index: int, count: int) -> Work:
    """Return the `index`-th of `count` equal parts of a trial's work, with checkpoints of its own."""
    return replace(
        work, scratch=work.scratch / name, progress=lambda share: work.progress((index + share) / count)
    )  # fmt: skip
