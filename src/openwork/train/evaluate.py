"""Scores of a classifier on data: accuracy, likelihood and calibration, without a trace left in the model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from openwork.core import metrics
from openwork.errors import DataError, DivergedError
from openwork.models.outputs import logits
from openwork.nn.batchnorm import kept_modes
from openwork.train import outputs

Batches = Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Scores:
    """How a classifier did.

    Attributes:
        accuracy: share of targets predicted, 0 to 1.
        nll: mean negative log-likelihood in nats.
        ece: expected calibration error in 15 bins, 0 to 1.
        n: how many targets were scored.
    """

    accuracy: float
    nll: float
    ece: float
    n: int


def evaluate(model: nn.Module, batches: Batches, device: str | None = None) -> Scores:
    """Return the scores of `model` on `batches`, in eval mode; each module's own mode is restored.

    Args:
        model: gives logits (see `openwork.models.outputs`) with classes on the last axis.
        batches: (inputs, class numbers); targets equal to `metrics.IGNORED` are left out.
        device: where to compute, the model is moved there; None for where it is.

    Raises:
        DataError: if there are no targets, or they do not fit the logits.
        DivergedError: if the model's outputs are not finite.
    """
    loss = 0.0
    confidences, verdicts = [], []
    with kept_modes(model):
        for output, y in _outputs(model, batches, device):
            scores, targets = metrics.scored(output, y)
            logs = scores.double().log_softmax(-1)
            loss -= float(logs.gather(-1, targets[:, None]).sum())
            if not math.isfinite(loss):
                raise DivergedError("the model returns logits that are not finite, so there is nothing to score")
            confidence, predicted = logs.max(-1)
            confidences.append(confidence.exp())
            verdicts.append(predicted == targets)
    if not verdicts:
        raise DataError("there is no batch to evaluate on")
    correct = torch.cat(verdicts)
    n = correct.numel()
    return Scores(int(correct.sum()) / n, loss / n, metrics.ece(torch.cat(confidences), correct), n)


def predictions(model: nn.Module, batches: Batches, device: str | None = None) -> tuple[Tensor, Tensor]:
    """Return the logits (n, ..., classes) and targets (n, ...) over all of `batches`, on the CPU, in eval mode.

    Raises:
        DataError: if there are no batches.
    """
    with kept_modes(model):
        found = [(output.cpu(), y.cpu()) for output, y in _outputs(model, batches, device)]
    if not found:
        raise DataError("there is no batch to predict on")
    # Concatenated here, outside inference mode, these are ordinary tensors that autograd accepts.
    return torch.cat([output for output, _ in found]), torch.cat([y for _, y in found])


def _outputs(model: nn.Module, batches: Batches, device: str | None) -> Iterator[tuple[Tensor, Tensor]]:
    place = outputs.device_of(model) if device is None else torch.device(device)
    model.to(place)
    model.eval()
    for x, y in batches:
        with torch.inference_mode():
            found = logits(model(x.to(place)))
        yield found, y.to(place)
