"""Fine-tuning a sparsified language model or encoder with its mask held: a plain loop that stops and goes on anywhere.

Which blocks a step sees is a function of the seed and the step, so the whole state is model, optimizer, masks and step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from openwork.core.rng import generator
from openwork.core.schedules import cosine
from openwork.errors import DivergedError, RecipeError
from openwork.models.outputs import logits
from openwork.nn.batchnorm import kept_modes
from openwork.sparsifier.sparsifier import Sparsifier
from openwork.train import checkpoints, language, outputs, state

Loss = Callable[[nn.Module, Tensor, Tensor, int], Tensor]
"""(model, blocks, their places in the text, step) -> loss."""


def tune(
    model: nn.Module,
    blocks: Tensor,
    loss: Loss,
    *,
    steps: int,
    sparsifier: Sparsifier | None = None,
    rate: float = 1e-4,
    batch: int = 8,
    seed: int = 0,
    keep: Path | None = None,
    every: int = 50,
    progress: Callable[[int, int], object] | None = None,
) -> float:
    """Train the parameters of `model` that require gradients for `steps` steps of AdamW; return the mean last losses.

    The rate falls as a cosine to a tenth; gradients are clipped to norm 1. The modules stay in eval mode, without
    dropout: the distance from the dense model is what is repaired.

    Args:
        model: changed in place.
        blocks: (n, length) token numbers; each step draws `batch` of them.
        loss: see `causal_loss`, `masked_loss`, `matching_loss`.
        steps: optimizer steps in all, those of an earlier run included.
        sparsifier: holds the masks (`openwork.Fixed(masks)`); not attached yet. None trains without.
        rate: learning rate of the first step.
        batch: blocks a step.
        seed: of the draws.
        keep: folder of checkpoints; a run that was stopped goes on from the newest one.
        every: steps between checkpoints.
        progress: called as progress(done, steps).

    Raises:
        RecipeError: for settings out of range, or a model with nothing to train.
        DivergedError: if the loss is not finite.
        StoreError, FormatError: if checkpoints are of another model, or damaged.
    """
    if steps < 1 or batch < 1 or not (math.isfinite(rate) and rate > 0):
        raise RecipeError(f"{steps} steps of {batch} blocks at rate {rate!r} make no sense: all three must be above 0")
    params = [param for param in model.parameters() if param.requires_grad]
    if not params:
        raise RecipeError("no parameter of the model requires a gradient, so there is nothing to fine-tune")
    optimizer = torch.optim.AdamW(params, lr=rate, weight_decay=0.0)
    if sparsifier is not None:
        sparsifier.attach(model, optimizer)
    start = _restored(model, optimizer, sparsifier, keep)
    place, fall = outputs.device_of(model), cosine(rate, 0.1 * rate, steps=steps)
    last: list[float] = []
    with kept_modes(model):
        model.eval()
        for step in range(start, steps):
            chosen = torch.randint(len(blocks), (min(batch, len(blocks)),), generator=generator(seed, "tuning", step))
            optimizer.param_groups[0]["lr"] = fall(step)
            value = loss(model, blocks[chosen].to(place), chosen, step)
            last = [*last[-9:], value.item()]
            if not math.isfinite(last[-1]):
                raise DivergedError(f"fine-tuning diverged at step {step}: the loss is {last[-1]}; lower the rate")
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(value)
            if sparsifier is not None:
                sparsifier.mask_gradients()
            torch.nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step()
            if keep is not None and (step + 1) % every == 0:
                checkpoints.write(keep, state.capture(model, optimizer, sparsifier, step + 1))
            if progress is not None:
                progress(step + 1, steps)
    if sparsifier is not None:
        sparsifier.finalize()
    optimizer.zero_grad(set_to_none=True)
    return sum(last) / len(last) if last else math.nan


def causal_loss(model: nn.Module, blocks: Tensor, chosen: Tensor, step: int) -> Tensor:
    """Return the mean negative log-likelihood of the next token."""
    output = logits(model(blocks))
    return nn.functional.cross_entropy(output[:, :-1].flatten(0, 1).float(), blocks[:, 1:].flatten())


def masked_loss(mask: int, special: Iterable[int] = (), rate: float = 0.15, seed: int = 0) -> Loss:
    """Return the loss of hidden tokens; which are hidden changes from step to step (see `language.hide`)."""
    known = tuple(special)

    def loss(model: nn.Module, blocks: Tensor, chosen: Tensor, step: int) -> Tensor:
        hidden = language.hide(blocks.cpu(), special=known, rate=rate, seed=seed, step=step + 1).to(blocks.device)
        output = logits(model(blocks.masked_fill(hidden, mask)))
        return nn.functional.cross_entropy(output[hidden].float(), blocks[hidden])

    return loss


def matching_loss(vectors: Tensor, pool: language.Pool) -> Loss:
    """Return the loss 1 - cosine between an encoder's vectors and `vectors` (n, width), those of the dense model."""

    def loss(model: nn.Module, blocks: Tensor, chosen: Tensor, step: int) -> Tensor:
        found = pool(language.states(model, blocks), None)
        return (1.0 - nn.functional.cosine_similarity(found, vectors[chosen].to(found.device), dim=-1)).mean()

    return loss


def _restored(model: nn.Module, optimizer: torch.optim.Optimizer, sparsifier: Sparsifier | None, keep: Path | None) -> int:
    """Put the newest checkpoint back, where there is one, and return its step."""
    if keep is None:
        return 0
    found, _ = checkpoints.newest(keep)
    if found is None:
        return 0
    state.restore(found, model, optimizer, sparsifier)
    return found.step
