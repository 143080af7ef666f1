"""`cnn`: a small convolutional network for laptop studies, about 20,000 to 30,000 parameters on images of any size."""

from __future__ import annotations

import math

from torch import Tensor, nn

from openwork.models.common import check_positive, image_shape, initialise

NAMES = ("cnn",)
FORM = r"cnn"


class CNN(nn.Module):
    """Three 3x3 convolutions with batch norm, pooling between them, one linear layer: images -> (batch, classes).

    The pools follow the size: the last map has 4 to 7 pixels a side, whatever the image.
    """

    def __init__(self, shape: tuple[int, int, int], widths: tuple[int, int, int], classes: int) -> None:
        super().__init__()
        channels, *sides = shape
        self.conv1 = nn.Conv2d(channels, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.conv2 = nn.Conv2d(widths[0], widths[1], 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(widths[1])
        self.conv3 = nn.Conv2d(widths[1], widths[2], 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(widths[2])
        self.relu = nn.ReLU()
        first = [2 if side >= 16 else 1 for side in sides]
        middle = [side // k // 2 for side, k in zip(sides, first, strict=True)]
        last = [side // 4 for side in middle]
        self.pool1 = nn.MaxPool2d((first[0], first[1]))
        self.pool2 = nn.MaxPool2d(2)
        self.pool3 = nn.AvgPool2d((last[0], last[1]))
        pixels = math.prod(side // k for side, k in zip(middle, last, strict=True))
        self.fc = nn.Linear(widths[2] * pixels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of a batch."""
        x = self.pool1(self.relu(self.bn1(self.conv1(x))))
        x = self.pool2(self.relu(self.bn2(self.conv2(x))))
        x = self.pool3(self.relu(self.bn3(self.conv3(x))))
        logits: Tensor = self.fc(x.flatten(1))
        return logits


def build(name: str, input_shape: tuple[int, ...], classes: int, *, multiplier: float = 1.0) -> nn.Module:
    """Return the network with 16, 32 and 32 channels times `multiplier`."""
    check_positive(name, multiplier=multiplier)
    narrow, wide = (max(1, round(n * multiplier)) for n in (16, 32))
    return initialise(CNN(image_shape(name, input_shape), (narrow, wide, wide), classes))
