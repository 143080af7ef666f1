"""Training inside a trial: legs that survive a kill, and what they cost in FLOPs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from openwork.core.cost import Cost, count
from openwork.core.masks import Masks
from openwork.core.rng import derive, generator
from openwork.data.source import Source
from openwork.sparsifier import Leg, Probe, Procedure, Sparsifier
from openwork.sparsifier.parameters import maskable
from openwork.train.evaluate import evaluate
from openwork.train.loop import fit
from openwork.train.settings import Settings

SCORING_BATCHES = 16
RECALIBRATION_BATCHES = 64
VALIDATION_EXAMPLES = 2048


class Trainer:
    """Trains one model of one seed on one data set and counts what that costs.

    Args:
        source: where the examples come from (see `openwork.data`).
        settings: how to train.
        seed: seed of batch order, noise and augmentation.
        scratch: where checkpoints go; legs found there are continued, finished ones are not trained again.
        total_steps: steps that the progress is measured by.
        progress: called with the share that is done.

    Attributes:
        flops: training FLOPs so far, forward passes for scoring included.
        steps: optimizer steps so far.
        batch: examples a step.
        curve: [step, loss] over all legs.
    """

    def __init__(
        self, source: Source, settings: Settings, seed: int, *, scratch: Path, total_steps: float, progress: Any = None
    ) -> None:
        self.source, self.settings, self.seed = source, settings, seed
        self.scratch, self.total, self.progress = scratch, max(1.0, total_steps), progress
        self.flops, self.steps = 0.0, 0
        self.curve: list[list[float]] = []
        first, _ = next(iter(source.train_batches(seed, 0, settings.batch_size)))
        self.batch = len(first)  # a user's own loader keeps its own batch size
        self._cost: Cost | None = None
        self._held_out: list[tuple[Tensor, Tensor]] = []

    def cost(self, model: nn.Module) -> Cost:
        """Return the cost of one example; every model of a trial has the same shapes."""
        if self._cost is None:
            self._cost = count(model, self.example())
        return self._cost

    def example(self) -> Tensor:
        """Return one input of the test data, with a batch dimension of 1."""
        x, _ = next(iter(self.source.batches("test", 1)))
        return x[:1].to(self.settings.device)

    def train(
        self,
        model: nn.Module,
        sparsifier: Sparsifier | None,
        leg: Leg,
        observe: Callable[[int], None] | None = None,
    ) -> nn.Module:
        """Train `model` in place for one leg and return it; the signature that procedures call.

        `observe` is called after each step with the number of the leg's steps done, as `fit` does; not again for steps
        that a checkpoint holds.
        """
        cost = self.cost(model.to(self.settings.device))
        done = self.steps

        def tell(step: int, _loss: float) -> None:
            if self.progress is not None:
                self.progress(min(1.0, (done + step + 1) / self.total))

        history = fit(
            model,
            self.source,
            replace(self.settings, steps=leg.steps) if leg.steps else self.settings,
            steps=leg.steps,
            seed=self.seed,
            schedule=leg.schedule,
            weight_decay=leg.weight_decay,
            stream=leg.stream,
            sparsifier=sparsifier,
            checkpoint=self.scratch / leg.name,
            on_step=tell,
            observe=observe,
        )
        self.flops += self.batch * leg_flops(cost, sparsifier, leg.steps)
        self.curve += [[self.steps + step, loss] for step, loss in history.losses]
        self.steps += leg.steps
        return model

    def probe(self) -> Probe:
        """Return what a procedure may ask about the data; the forward passes are counted.

        Samples keep the asking cheap beside the training: batch norm is recalibrated on 64 training batches, candidates
        are scored on 16, and accuracy is that of at most 2,048 validation examples, always the same ones.
        """
        return Probe(
            batches=lambda: self._sample(RECALIBRATION_BATCHES),
            accuracy=lambda model: self._score(model, self._validation())[0],
            loss=lambda model: self._score(model, self._sample(SCORING_BATCHES))[1],
        )

    def run(self, model: nn.Module, method: Sparsifier | Procedure | None, steps: int) -> tuple[nn.Module, Masks]:
        """Train `model` by a method and return it with its masks (all ones for dense)."""
        if isinstance(method, Sparsifier) or method is None:
            self.train(model, method, Leg("train", steps))
            masks = Masks.ones(dict(maskable(model))) if method is None else method.masks
        else:
            model = method.run(model, self.train, self.probe())
            masks = method.masks
        return model, masks

    def _sample(self, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Return training batches in an order of their own, the same at every call."""
        order = derive(self.seed, "probe")
        return islice(self.source.train_batches(order, 0, self.settings.batch_size), count)

    def _validation(self) -> list[tuple[Tensor, Tensor]]:
        """Return a sample of the validation data, drawn once: data may lie sorted by class."""
        if not self._held_out:
            parts = list(self.source.batches("validation"))
            x, y = (torch.cat(part) for part in zip(*parts, strict=True))
            drawn = torch.randperm(len(x), generator=generator(self.seed, "probe"))[:VALIDATION_EXAMPLES]
            self._held_out = list(zip(torch.split(x[drawn], 512), torch.split(y[drawn], 512), strict=True))
        return self._held_out

    def _score(self, model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[float, float]:
        scores = evaluate(model, batches, self.settings.device)
        params = dict(model.named_parameters())
        alive = Masks.of({name: params[name] for name in self.cost(model).parameters if name in params})
        self.flops += scores.n * self.cost(model).flops(alive)
        return scores.accuracy, scores.nll


def leg_flops(cost: Cost, sparsifier: Sparsifier | None, steps: int) -> float:
    """Return the training FLOPs of `steps` steps for one example.

    A step costs three forward passes at the density of that step; where the method needs the gradient of masked weights
    too, the third is dense (Evci et al. 2020, appendix H).
    """
    dense = cost.by_parameter()
    fixed = float(cost.flops() - sum(dense.values()))
    if sparsifier is None:
        return 3.0 * steps * cost.flops()
    sizes = [mask.numel() for mask in sparsifier.masks.values()]
    names = list(sparsifier.masks)
    rest = sum(flops for name, flops in dense.items() if name not in sparsifier.masks)
    masked = sum(dense.get(name, 0) for name in names)
    total = 0.0
    ends = [step for step, _ in sparsifier.history[1:]] + [steps]
    for (start, kept), end in zip(sparsifier.history, ends, strict=True):
        shares = [k / max(1, size) for k, size in zip(kept, sizes, strict=True)]
        sparse = sum(dense.get(name, 0) * share for name, share in zip(names, shares, strict=True))
        total += 3.0 * (end - start) * (fixed + rest + sparse)
        total += (masked - sparse) * sum(map(sparsifier.needs_dense_gradient, range(start, end)))
    return total


def layer_table(masks: Masks) -> dict[str, dict[str, Any]]:
    """Return kept, total and shape of every masked parameter."""
    return {
        name: {"kept": int(mask.sum()), "total": mask.numel(), "shape": list(mask.shape)} for name, mask in masks.items()
    }
