"""The training loop: explicit, exact to continue, with a Sparsifier or without."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from openwork.core.rng import derive
from openwork.errors import DataError, RecipeError
from openwork.models.outputs import logits
from openwork.sparsifier import peers
from openwork.train import ddp, divergence, optimizers, outputs, rates
from openwork.train.isolation import Stop, own_noise
from openwork.train.keeper import History, Keeper
from openwork.train.settings import Settings
from openwork.train.synced_norm import synced_norm

if TYPE_CHECKING:
    from openwork.sparsifier.sparsifier import Sparsifier


class Batches(Protocol):
    """The part of a data source that training needs."""

    @property
    def name(self) -> str:
        """Return what the data are called."""
        ...

    def steps_per_epoch(self, batch_size: int, /) -> int:
        """Return how many batches an epoch has."""
        ...

    def train_batches(self, seed: int, epoch: int, batch_size: int, /) -> Iterator[tuple[Tensor, Tensor]]:
        """Return the batches of an epoch, a pure function of the arguments."""
        ...


def fit(
    model: nn.Module,
    source: Batches,
    settings: Settings,
    *,
    seed: int,
    steps: int | None = None,
    schedule: rates.Rate | None = None,
    weight_decay: float | None = None,
    stream: int = 0,
    sparsifier: Sparsifier | None = None,
    checkpoint: Path | None = None,
    every_seconds: float = 30.0,
    on_step: Callable[[int, float], None] | None = None,
    observe: Callable[[int], None] | None = None,
    among: peers.Peers | None = None,
) -> History:
    """Train `model` in place, with a fresh optimizer, and return the history.

    The result is a function of the arguments: batch order and noise (dropout) are derived from `seed`, `stream` and
    the step, and torch's global generator is left as it was. A call that is killed and made again with fresh model
    and sparsifier continues from its checkpoint and ends bit for bit where the uninterrupted one would, on the same
    machine, torch, number of threads and number of processes.

    Where torch.distributed is set up, all processes of its default group make this call together and end with the same
    model: each computes on its own rows of every batch (see `openwork.train.ddp`), batch norm is over the whole batch,
    and all start from the first one's weights. The first one writes the checkpoints.

    Args:
        model: gives logits (see `openwork.models.outputs`) with classes on the last axis; left in train mode.
        source: where the batches come from.
        settings: how to train.
        seed: seed of everything random.
        steps: steps instead of the settings'; 0 trains nothing.
        schedule: multiple of the base rate at progress step / steps, instead of the settings' schedule and warm-up.
        weight_decay: instead of the settings'.
        stream: another number is another batch order and other noise under the same seed.
        sparsifier: attached here and finalized at the end, when the model is exactly zero where it is masked. Its
            penalty is added to the loss; gradients are masked before they are clipped.
        checkpoint: folder of this run's checkpoints; one is written every `every_seconds`, at the end, and when
            training is interrupted with Ctrl-C. Parameters that are not finite are never written.
        every_seconds: time between checkpoints; 0 writes one every step.
        on_step: called after each step with its number, from 0, and its loss.
        observe: called after each step with the number of steps done; may evaluate the model. After a resume it is
            called again for the steps that are done again. Every process makes both calls.
        among: the processes that train together; None is the default group of torch.distributed where it is set up,
            `sparsifier.peers.ALONE` this process alone although it is.

    Raises:
        DivergedError: within one step of the first non-finite number, naming it; the last checkpoint stays. Processes
            that train together all raise it, with the rank.
        RecipeError: if the optimizer refuses the model, or `steps` or `weight_decay` make no sense.
        DataError: if the source gives fewer batches than it says, or a batch has fewer examples than processes.
        ModelError: if the model's output is no logits for these targets, or processes do not hold the same weights.
        MaskError: if processes that train together do not hold the same masks.
        StoreError: if the checkpoint folder belongs to another run or cannot be written to; a disk that fills up later
            costs checkpoints, which the notes tell, and not the run.
        FormatError: if every checkpoint in the folder is damaged.
    """
    total, decay = _overrides(settings, steps, weight_decay)
    rate = schedule or rates.warmed(rates.RATES[settings.schedule], settings.warmup)
    device = torch.device(settings.device)
    model.to(device)
    optimizer = optimizers.build(
        settings.optimizer,
        model.parameters(),
        lr=settings.lr,
        momentum=settings.momentum,
        nesterov=settings.nesterov,
        weight_decay=decay,
    )
    run = {**asdict(settings), "steps": total, "weight_decay": decay, "seed": seed, "stream": stream}
    run |= {"rate": [rate(point / 16) for point in range(16)], "source": source.name}
    team = ddp.Team(model, peers.everyone() if among is None else among)
    team.begin({**run, "checkpoint": checkpoint is not None, "sparsifier": type(sparsifier).__name__})
    if sparsifier is not None:
        sparsifier.among(team.peers).attach(model, optimizer)
        run["density"] = sparsifier.density
    keeper = Keeper(checkpoint, every_seconds, run, model, optimizer, sparsifier, team)
    try:
        with own_noise(device) as reseed, Stop(checkpoint is not None) as stop, synced_norm(model, team.peers) as synced:
            keeper.resume()
            batches = _batches(source, derive(seed, "stream", stream), settings.batch_size, keeper.step)
            model.train()
            for step in range(keeper.step, total):
                keeper.consistent = False
                noise = team.noise(derive(seed, "noise", stream, step))
                reseed(noise)
                x, y, of = team.part(*next(batches))
                x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
                for group in optimizer.param_groups:
                    group["lr"] = settings.lr * rate(step / total)
                optimizer.zero_grad(set_to_none=True)
                loss = outputs.cross_entropy(logits(model(x)), y, settings.label_smoothing, of)
                if sparsifier is not None:
                    loss = loss + sparsifier.penalty()
                value = loss.item()
                news = team.meet(value, x, save=keeper.due(), stop=stop.asked)
                if news.failed is not None:
                    reseed(noise)
                    raise team.diverged(news.failed, synced, partial(divergence.report, model, x, step, value))
                loss.backward()  # type: ignore[no-untyped-call]
                team.average(sparsifier, step)
                if settings.clip is not None:
                    _clip(model, settings.clip, sparsifier, step)
                optimizer.step()
                keeper.done(step, news.loss)
                if on_step is not None:
                    on_step(step, news.loss)
                if observe is not None:
                    observe(step + 1)
                keeper.save_if_due(news.save)
                stop.check(news.stop)
            divergence.check_parameters(model, total)
            keeper.save()
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            keeper.save_at_stop()
        if sparsifier is not None:
            sparsifier.detach()
        raise
    optimizer.zero_grad(set_to_none=True)
    if sparsifier is not None:
        sparsifier.finalize()
    return keeper.history()


def _clip(model: nn.Module, largest: float, sparsifier: Sparsifier | None, step: int) -> None:
    if sparsifier is not None:
        sparsifier.mask_gradients()
    norm = nn.utils.clip_grad_norm_(model.parameters(), largest)
    if not math.isfinite(norm.item()):
        raise divergence.report_gradient(model, step)


def _batches(source: Batches, seed: int, batch_size: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the batches from step `start` on, without end: the position in the data is one number."""
    length = source.steps_per_epoch(batch_size)
    epoch, skip = divmod(start, length)
    while True:
        position = skip
        for batch in islice(source.train_batches(seed, epoch, batch_size), skip, length):
            position += 1
            yield batch
        if position < length:
            raise DataError(f"epoch {epoch} of {source.name!r} ended after {position} batches; it says it has {length}")
        epoch, skip = epoch + 1, 0


def _overrides(settings: Settings, steps: int | None, weight_decay: float | None) -> tuple[int, float]:
    total = settings.steps if steps is None else steps
    decay = settings.weight_decay if weight_decay is None else float(weight_decay)
    if isinstance(total, bool) or not isinstance(total, int) or total < 0:
        raise RecipeError(f"steps is {total!r}; it must be a whole number of at least 0")
    if not (math.isfinite(decay) and decay >= 0):
        raise RecipeError(f"weight_decay is {decay!r}; it must be a number of at least 0")
    return total, decay
