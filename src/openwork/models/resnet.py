"""Residual networks (He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", CVPR 2016).

`resnet20` and every other depth 6n+2 are the paper's CIFAR networks (section 4.2); `resnet18`, `34`, `50`, `101` and
`152` are its ImageNet networks (table 1), `resnet50` among them although 50 is 6*8+2. Shortcuts that change the shape
are 1x1 convolutions (option B). Parameters are named as in torchvision.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from openwork.errors import ModelError
from openwork.models.common import check_positive, image_shape, initialise

NAMES = (
    "resnet8", "resnet14", "resnet18", "resnet20", "resnet32", "resnet34", "resnet44", "resnet50", "resnet56",
    "resnet110",
)  # fmt: skip
FORM = r"resnet[1-9][0-9]*"

IMAGENET = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
SMALL = 64
"""Images of up to this many pixels a side get a stem of one 3x3 convolution instead of the 7x7 with pooling."""


class Basic(nn.Module):
    """Two 3x3 convolutions around which the input is added."""

    expansion = 1

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.downsample = _shortcut(before, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's maps."""
        y = self.relu(self.bn1(self.conv1(x)))
        out: Tensor = self.relu(self.bn2(self.conv2(y)) + self.downsample(x))
        return out


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions around which the input is added; the 3x3 one strides."""

    expansion = 4

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.relu = nn.ReLU()
        self.downsample = _shortcut(before, 4 * width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's maps."""
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        out: Tensor = self.relu(self.bn3(self.conv3(y)) + self.downsample(x))
        return out


class ResNet(nn.Module):
    """A stem, stages `layer1`, `layer2`, ... that double the width and halve the side, mean, one linear layer.

    Args:
        block: the kind of block.
        counts: blocks in each stage.
        width: channels of the stem and of the first stage's 3x3 convolutions.
        channels: of the images.
        classes: of the output (batch, classes).
        large: a 7x7 stem of stride 2 with a pool, for large images; otherwise 3x3 and stride 1.
    """

    def __init__(
        self,
        block: type[Basic | Bottleneck],
        counts: Sequence[int],
        width: int,
        channels: int,
        classes: int,
        large: bool,
    ) -> None:
        super().__init__()
        kernel, stride = (7, 2) if large else (3, 1)
        self.conv1 = nn.Conv2d(channels, width, kernel, stride, padding=kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, 2, padding=1) if large else nn.Identity()
        self.stages = tuple(f"layer{i}" for i in range(1, len(counts) + 1))
        before = width
        for i, (name, count) in enumerate(zip(self.stages, counts, strict=True)):
            blocks = []
            for j in range(count):
                blocks.append(block(before, width << i, stride=2 if i and not j else 1))
                before = block.expansion * (width << i)
            self.add_module(name, nn.Sequential(*blocks))
        self.fc = nn.Linear(before, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of a batch (batch, channels, height, width)."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for name in self.stages:
            x = getattr(self, name)(x)
        logits: Tensor = self.fc(x.mean(dim=(2, 3)))
        return logits


def build(name: str, input_shape: tuple[int, ...], classes: int, *, width: int | None = None) -> nn.Module:
    """Return the network; `width` is that of the first stage: 16 for the CIFAR depths, 64 for the ImageNet ones."""
    check_positive(name, width=width)
    channels, *sides = image_shape(name, input_shape)
    depth = int(name.removeprefix("resnet"))
    block: type[Basic | Bottleneck] = Basic
    counts: tuple[int, ...]
    if depth in IMAGENET:
        block = Bottleneck if depth >= 50 else Basic
        counts, usual, large = IMAGENET[depth], 64, min(sides) > SMALL
    elif depth % 6 == 2 and depth >= 8:
        counts, usual, large = (depth // 6,) * 3, 16, False
    else:
        raise ModelError(f"there is no {name}: its depth must be 6n+2 (8, 14, 20, ...) or one of {sorted(IMAGENET)}")
    return initialise(ResNet(block, counts, width or usual, channels, classes, large))


def _shortcut(before: int, after: int, stride: int) -> nn.Sequential:
    if before == after and stride == 1:
        return nn.Sequential()
    return nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))
