"""A separable network that trains in a second: an entry convolution and two pairs of depthwise and 1x1 convolutions."""

from __future__ import annotations

from torch import nn

from openwork.models.common import divisible, initialise


def net(input_shape: tuple[int, int, int], classes: int, multiplier: float = 1.0) -> nn.Module:
    """Return the network, its channels times `multiplier` in multiples of 4."""
    one, two, three = (divisible(multiplier * width, 4) for width in (32, 64, 128))
    depthwise = [nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False) for width in (one, two)]
    layers = [
        nn.Conv2d(input_shape[0], one, 3, 2, padding=1, bias=False), nn.BatchNorm2d(one), nn.ReLU(),
        depthwise[0], nn.BatchNorm2d(one), nn.ReLU(), nn.Conv2d(one, two, 1, bias=False), nn.BatchNorm2d(two), nn.ReLU(),
        depthwise[1], nn.BatchNorm2d(two), nn.ReLU(), nn.Conv2d(two, three, 1, bias=False), nn.BatchNorm2d(three), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(three, classes),
    ]  # fmt: skip
    return initialise(nn.Sequential(*layers))
