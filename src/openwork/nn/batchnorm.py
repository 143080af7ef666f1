"""Batch normalisation after surgery: statistics measured anew for weights that were merged or pruned."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from openwork.errors import DataError


@contextmanager
def kept_modes(model: nn.Module) -> Iterator[None]:
    """Give every module of `model` its train or eval mode back at the end, each its own."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def recalibrate_norm(model: nn.Module, batches: Iterable[Any], momentum: float | None = None, share: float = 1.0) -> int:
    """Measure the running statistics of all batch-norm layers again; no weight changes.

    Only the batch-norm layers run in train mode, everything else (dropout) in eval mode. By default every example
    counts the same, so a first layer's running mean is the mean over the data; its running variance is the mean of
    the unbiased variances of the batches. Batches of a single example have no variance and are left out.

    Args:
        model: any module; its layers' modes and momenta are restored.
        batches: tensors, or tuples whose first item is the model's input (examples on the first axis).
        momentum: None for the average over all examples, else the weight of a new batch in a moving average.
        share: the share of the batches to use, from the first on, rounded up.

    Returns:
        How many layers were measured.

    Raises:
        DataError: if there are layers to measure but no batch of two or more examples.
    """
    if not 0 < share <= 1:
        raise DataError(f"share is the part of the batches to use, above 0 and at most 1, got {share}")
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not layers:
        return 0
    momenta = [layer.momentum for layer in layers]
    seen = 0
    with kept_modes(model), torch.no_grad():
        model.eval()
        for layer in layers:
            layer.train()
        try:
            for x in _inputs(model, batches, share):
                seen += x.shape[0]
                for layer in layers:
                    if seen == x.shape[0]:
                        layer.reset_running_stats()
                    layer.momentum = x.shape[0] / seen if momentum is None else momentum
                model(x)
        finally:
            for layer, before in zip(layers, momenta, strict=True):
                layer.momentum = before
    if seen == 0:
        raise DataError("batch-norm statistics need at least one batch of two or more examples, got none")
    return len(layers)


def _inputs(model: nn.Module, batches: Iterable[Any], share: float) -> Iterator[Tensor]:
    if share < 1:
        sized: Sequence[Any] | Any = batches if isinstance(batches, Sized) else list(batches)
        batches = itertools.islice(sized, math.ceil(share * len(sized)))
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    for batch in batches:
        x = batch[0] if isinstance(batch, (tuple, list)) else batch
        if x.shape[0] > 1:
            yield x.to(device)
