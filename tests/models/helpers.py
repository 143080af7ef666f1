"""What the model tests share: counts without memory, and shapes of images."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from openwork.models import catalog

IMAGENET = (3, 224, 224)
CIFAR = (3, 32, 32)
MNIST = (1, 28, 28)

images = st.tuples(st.integers(1, 4), st.integers(8, 40), st.integers(8, 40))

SMALL: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "mlp-20-10": ((1, 8, 8), {}),
    "lenet-300-100": ((1, 8, 8), {}),
    "lenet5": ((1, 12, 12), {}),
    "lenet5-caffe": ((1, 12, 12), {}),
    "cnn": ((3, 16, 16), {"multiplier": 0.5}),
    "resnet8": ((3, 8, 8), {"width": 4}),
    "resnet18": ((3, 8, 8), {"width": 4}),
    "resnet50": ((3, 8, 8), {"width": 4}),
    "wrn-10-2": ((3, 8, 8), {"dropout": 0.3}),
    "mobilenet-v1": ((3, 8, 8), {"multiplier": 0.25}),
    "mobilenet-v2": ((3, 8, 8), {"multiplier": 0.25, "dropout": 0.2}),
    "efficientnet-b0": ((3, 8, 8), {"multiplier": 0.25, "depth": 0.5, "drop_path": 0.2}),
    "vit-tiny": ((3, 8, 8), {"width": 24, "depth": 2}),
    "gpt-small": ((12,), {"width": 16, "depth": 2}),
}
"""A small model of every family with the shape of its examples and its options; all have 5 classes."""


def on_meta(ref: str, shape: tuple[int, ...], classes: int, **options: Any) -> nn.Module:
    """Build a reference model of any size without memory."""
    family = catalog.find(ref)
    assert family is not None
    with torch.device("meta"):
        model: nn.Module = importlib.import_module(f"openwork.models.{family.module}").build(ref, shape, classes, **options)
    return model


def count(model: nn.Module) -> int:
    """Count the parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def multiply_adds(model: nn.Module, shape: tuple[int, ...]) -> int:
    """Count the multiply-adds of convolutions and matrix products for one example."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.empty(1, *shape, device="meta"))
    return counter.get_total_flops() // 2


def example(shape: tuple[int, ...], batch: int, classes: int = 5) -> torch.Tensor:
    """Draw a batch: token numbers for flat shapes, normal images otherwise."""
    generator = torch.Generator().manual_seed(batch)
    if len(shape) == 1:
        return torch.randint(0, classes, (batch, *shape), generator=generator)
    return torch.randn(batch, *shape, generator=generator)
