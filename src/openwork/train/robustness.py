"""Accuracy under attack: the gradient-sign step and projected gradient descent in the L-infinity ball."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from openwork.core import metrics
from openwork.core.rng import generator
from openwork.errors import DataError
from openwork.models.outputs import logits
from openwork.nn.batchnorm import kept_modes
from openwork.train import outputs

Batches = Iterable[tuple[Tensor, Tensor]]
Range = tuple[float, float] | None


def fgsm_accuracy(model: nn.Module, batches: Batches, eps: float, clamp: Range = (0.0, 1.0)) -> float:
    """Return the accuracy after x + eps sign(dL/dx).

    Goodfellow, Shlens, Szegedy, "Explaining and Harnessing Adversarial Examples", ICLR 2015, Sec. 4.

    Args:
        model: gives logits; runs in eval mode, its gradients and modes stay as they were.
        batches: (floating inputs, class numbers).
        eps: largest change of an input value, in the units of the inputs.
        clamp: the range of valid inputs; None where there is none, as for standardised ones.

    Raises:
        DataError: if there are no batches or eps is negative.
    """
    return pgd_accuracy(model, batches, eps, step_size=eps, steps=1, start="clean", clamp=clamp)


def pgd_accuracy(
    model: nn.Module,
    batches: Batches,
    eps: float,
    *,
    steps: int = 10,
    step_size: float | None = None,
    start: str = "random",
    clamp: Range = (0.0, 1.0),
    seed: int = 0,
) -> float:
    """Return the accuracy after `steps` gradient-sign steps, each projected into the eps ball and into `clamp`.

    Madry, Makelov, Schmidt, Tsipras, Vladu, "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR
    2018, Sec. 2.1.

    Args:
        model: gives logits; runs in eval mode, its gradients and modes stay as they were.
        batches: (floating inputs, class numbers).
        eps: radius of the ball, in the units of the inputs.
        steps: gradient steps.
        step_size: length of one step; None for 2.5 eps / steps, which can reach the ball's rim from anywhere in it.
        start: "random" for a uniform point of the ball, "clean" for the input itself.
        clamp: the range of valid inputs; None where there is none.
        seed: seed of the random start.

    Raises:
        DataError: if there are no batches, eps is negative, steps is below 1, or `start` is another word.
    """
    if eps < 0 or steps < 1 or start not in ("random", "clean"):
        raise DataError(
            f"an attack needs eps >= 0, steps >= 1 and a start 'random' or 'clean', got {eps}, {steps}, {start!r}"
        )
    size = 2.5 * eps / steps if step_size is None else step_size
    device = outputs.device_of(model)
    right = total = 0
    with kept_modes(model):
        model.eval()
        for index, (x, y) in enumerate(batches):
            x, y = x.to(device), y.to(device)
            attacked = x
            if start == "random":
                noise = torch.rand(x.shape, generator=generator(seed, "pgd", index), dtype=x.dtype)
                attacked = _inside(x + (2 * noise.to(device) - 1) * eps, x, eps, clamp)
            for _ in range(steps):
                attacked = _inside(attacked + size * _uphill(model, attacked, y).sign(), x, eps, clamp)
            with torch.no_grad():
                scores, targets = metrics.scored(logits(model(attacked)), y)
            right += int((scores.argmax(-1) == targets).sum())
            total += targets.numel()
    if total == 0:
        raise DataError("there is no batch to attack")
    return right / total


def _uphill(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    x = x.detach().requires_grad_(True)
    with torch.enable_grad():
        loss = outputs.cross_entropy(logits(model(x)), y)
        # Only the input's gradient is asked for: the parameters' gradients stay as they were.
        return torch.autograd.grad(loss, x)[0]


def _inside(attacked: Tensor, x: Tensor, eps: float, clamp: Range) -> Tensor:
    attacked = torch.minimum(torch.maximum(attacked, x - eps), x + eps)
    return attacked if clamp is None else attacked.clamp(*clamp)
