"""LeNet-300-100 and LeNet-5, the two networks of LeCun, Bottou, Bengio, Haffner (1998) that pruning papers start from.

`lenet5` is the paper's with rectifiers and max pooling (6 and 16 maps, 61,706 parameters on 28x28); `lenet5-caffe` is
the one of Caffe's examples, which "LeNet-5" names in the pruning literature (20 and 50 maps, 431,080 parameters).
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from openwork.models.common import image_shape
from openwork.models.mlp import MLP

NAMES = ("lenet-300-100", "lenet5", "lenet5-caffe")
FORM = r"lenet-300-100|lenet5|lenet5-caffe"

KERNEL = 5


class LeNet5(nn.Module):
    """Two 5x5 convolutions with pooling, then linear layers: (batch, channels, height, width) -> (batch, classes)."""

    def __init__(
        self, shape: tuple[int, int, int], maps: tuple[int, int], hidden: tuple[int, ...], classes: int, enlarge: bool
    ) -> None:
        super().__init__()
        channels, *sides = shape
        first = [_padding(side, enlarge) for side in sides]
        sides = [_halved(side, pad) for side, pad in zip(sides, first, strict=True)]
        second = [_padding(side) for side in sides]
        sides = [_halved(side, pad) for side, pad in zip(sides, second, strict=True)]
        self.conv1 = nn.Conv2d(channels, maps[0], KERNEL, padding=(first[0], first[1]))
        self.conv2 = nn.Conv2d(maps[0], maps[1], KERNEL, padding=(second[0], second[1]))
        self.relu = nn.ReLU()
        self.pool = nn.MaxPool2d(2)
        self.classifier = MLP(maps[1] * math.prod(sides), hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of a batch."""
        x = self.pool(self.relu(self.conv1(x)))
        x = self.pool(self.relu(self.conv2(x)))
        logits: Tensor = self.classifier(x)
        return logits


def build(name: str, input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """Return the network of that name with Glorot's first values and zero biases, as in the lottery-ticket papers."""
    model: nn.Module
    if name == "lenet-300-100":
        model = MLP(math.prod(input_shape), (300, 100), classes)
    elif name == "lenet5":
        model = LeNet5(image_shape(name, input_shape), (6, 16), (120, 84), classes, enlarge=True)
    else:
        model = LeNet5(image_shape(name, input_shape), (20, 50), (500,), classes, enlarge=False)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.xavier_normal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


def _padding(side: int, enlarge: bool = False) -> int:
    # The kernel must leave one pooling window; the paper enlarges 28 pixels to 32.
    return KERNEL // 2 if side - (KERNEL - 1) < 2 or (enlarge and side < 32) else 0


def _halved(side: int, pad: int) -> int:
    return (side + 2 * pad - (KERNEL - 1)) // 2
