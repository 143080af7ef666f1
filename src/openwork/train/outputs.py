"""The loss of what a model returned, the same for images and for words, and where the model is."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from openwork.core.metrics import IGNORED
from openwork.errors import ModelError


def cross_entropy(scores: Tensor, targets: Tensor, smoothing: float = 0.0, of: float | None = None) -> Tensor:
    """Return the mean cross-entropy of logits (..., classes) against class numbers (...), in nats.

    Targets equal to `core.metrics.IGNORED` do not count. With `of` the sum is divided by it rather than by their number.

    Raises:
        ModelError: if the shapes disagree.
    """
    if scores.shape[:-1] != targets.shape:
        raise ModelError(
            f"the model returned logits of shape {tuple(scores.shape)} for targets of shape {tuple(targets.shape)}; "
            "expected the shape of the targets with the classes as a last axis"
        )
    flat = scores.reshape(-1, scores.shape[-1]) if scores.dim() != 2 else scores
    how = "mean" if of is None else "sum"
    loss = functional.cross_entropy(
        flat, targets.reshape(-1), ignore_index=IGNORED, label_smoothing=smoothing, reduction=how
    )
    return loss if of is None else loss / of


def device_of(model: nn.Module) -> torch.device:
    """Return where the model's first parameter lies, the CPU for a model without parameters."""
    return next((param.device for param in model.parameters()), torch.device("cpu"))
