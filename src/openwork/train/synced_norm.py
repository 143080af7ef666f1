"""Batch normalisation over the whole batch, of which each data-parallel process holds a part.

torch.nn.SyncBatchNorm does this on GPUs only, and by other modules than the model's own. Here the model's layers stay
what they are; for as long as the context lasts their forward passes add up sums over all processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from openwork.errors import ModelError
from openwork.sparsifier.peers import Peers


class Synced:
    """Tells whether the layers take the others' sums too; inside `paused` they do not."""

    def __init__(self) -> None:
        self.on = True

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let this process compute by itself: with its own part of the batch only."""
        self.on = False
        try:
            yield
        finally:
            self.on = True


@contextmanager
def synced_norm(model: nn.Module, peers: Peers) -> Iterator[Synced]:
    """Normalise over the batches of all processes in every batch-norm layer that is in train mode.

    Outputs, gradients and running statistics are those of one process with the whole batch, up to rounding, however
    unequal the parts. Two sums a layer travel in the forward pass and two in the backward pass. Layers of classes with a
    forward pass of their own are left alone.
    """
    switch = Synced()
    layers = [] if peers.alone else [m for m in model.modules() if isinstance(m, _BatchNorm) and _is_plain(m)]
    for layer in layers:
        # An instance's own forward hides its class's; it is taken away again, and no key of the model changes.
        layer.__dict__["forward"] = partial(_forward, layer, peers, switch)
    try:
        yield switch
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


def _is_plain(layer: _BatchNorm) -> bool:
    return type(layer).forward is _BatchNorm.forward and "forward" not in layer.__dict__


def _forward(layer: _BatchNorm, peers: Peers, switch: Synced, x: Tensor) -> Tensor:
    if not (layer.training and switch.on):
        return _BatchNorm.forward(layer, x)
    layer._check_input_dim(x)  # type: ignore[no-untyped-call]
    dims = [dim for dim in range(x.dim()) if dim != 1]
    shape = [1, -1] + [1] * (x.dim() - 2)
    wide = x if x.dtype == torch.float64 else x.float()
    count = wide.new_tensor([x.numel() // max(1, x.shape[1])])
    total = _sum(torch.cat([wide.sum(dims), count]), peers)
    n = total[-1].detach()
    if n < 2:
        raise ModelError("batch normalisation needs more than one value a channel in training; use a larger batch")
    mean = total[:-1] / n
    centred = wide - mean.view(shape)
    variance = _sum(centred.square().sum(dims), peers) / n
    _remember(layer, mean.detach(), variance.detach() * n / (n - 1))
    y: Tensor = centred * (variance + layer.eps).rsqrt().view(shape)
    if layer.weight is not None:
        y = y * layer.weight.view(shape)
    if layer.bias is not None:
        y = y + layer.bias.view(shape)
    return y.to(x.dtype)


@torch.no_grad()
def _remember(layer: _BatchNorm, mean: Tensor, variance: Tensor) -> None:
    """Move the running statistics as the layer itself does."""
    if not layer.track_running_stats or layer.running_mean is None or layer.running_var is None:
        return
    share = layer.momentum
    if layer.num_batches_tracked is not None:
        layer.num_batches_tracked.add_(1)
        if share is None:
            share = 1.0 / float(layer.num_batches_tracked)
    layer.running_mean.lerp_(mean.to(layer.running_mean), share or 0.0)
    layer.running_var.lerp_(variance.to(layer.running_var), share or 0.0)


def _sum(own: Tensor, peers: Peers) -> Tensor:
    total: Tensor = _Sum.apply(own, peers)  # type: ignore[no-untyped-call]
    return total


class _Sum(torch.autograd.Function):
    """The sum over processes, whose gradient is the sum of the gradients."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, peers: Peers) -> Tensor:
        ctx.peers = peers
        total = own.clone()
        peers.add_([total])
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.clone()
        ctx.peers.add_([total])
        return total, None
