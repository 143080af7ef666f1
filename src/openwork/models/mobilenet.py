"""MobileNets of depthwise separable convolutions.

`mobilenet-v1`: Howard et al., "MobileNets", 2017, table 1. `mobilenet-v2`: Sandler, Howard, Zhu, Zhmoginov, Chen,
"MobileNetV2: Inverted Residuals and Linear Bottlenecks", CVPR 2018, table 2. Both shrink an image 32 times; on small
images the first strides become 1, so that the last map keeps at least 4 pixels a side where the image has them.
"""

from __future__ import annotations

from torch import Tensor, nn

from openwork.models.common import check_positive, check_rate, divisible, image_shape, initialise, kept_strides

NAMES = ("mobilenet-v1", "mobilenet-v2")
FORM = r"mobilenet-v[12]"

V1 = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *((512, 1),) * 5, (1024, 2), (1024, 1))
"""Output channels and stride of each separable convolution."""
V2 = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
"""Expansion, output channels, repeats and first stride of each row of blocks."""


class Inverted(nn.Module):
    """1x1 expansion, 3x3 depthwise and linear 1x1 projection; the input is added where the shape allows."""

    def __init__(self, before: int, after: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = before * expansion
        expand = _unit(before, inner, 1, act=nn.ReLU6) if expansion > 1 else []
        self.layers = nn.Sequential(
            *expand,
            *_unit(inner, inner, 3, stride, groups=inner, act=nn.ReLU6),
            nn.Conv2d(inner, after, 1, bias=False),
            nn.BatchNorm2d(after),
        )
        self.residual = stride == 1 and before == after

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's maps."""
        y: Tensor = self.layers(x)
        return x + y if self.residual else y


class MobileNet(nn.Module):
    """Feature layers, mean over the map, dropout and one linear layer: images -> (batch, classes)."""

    def __init__(self, features: nn.Sequential, width: int, classes: int, dropout: float) -> None:
        super().__init__()
        self.features = features
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.fc = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of a batch (batch, channels, height, width)."""
        logits: Tensor = self.fc(self.dropout(self.features(x).mean(dim=(2, 3))))
        return logits


def build(
    name: str, input_shape: tuple[int, ...], classes: int, *, multiplier: float = 1.0, dropout: float = 0.0
) -> nn.Module:
    """Return the network, its channels times `multiplier` in multiples of 8; `dropout` comes before the readout."""
    check_positive(name, multiplier=multiplier)
    check_rate(name, dropout=dropout)
    channels, *sides = image_shape(name, input_shape)
    layers, width = (_v1 if name == "mobilenet-v1" else _v2)(channels, min(sides), multiplier)
    return initialise(MobileNet(nn.Sequential(*layers), width, classes, dropout))


def _v1(channels: int, side: int, multiplier: float) -> tuple[list[nn.Module], int]:
    strides = kept_strides([2, *(stride for _, stride in V1)], side)
    before = divisible(32 * multiplier)
    layers = [*_unit(channels, before, 3, strides[0])]
    for (width, _), stride in zip(V1, strides[1:], strict=True):
        after = divisible(width * multiplier)
        layers += [*_unit(before, before, 3, stride, groups=before), *_unit(before, after, 1)]
        before = after
    return layers, before


def _v2(channels: int, side: int, multiplier: float) -> tuple[list[nn.Module], int]:
    strides = kept_strides([2, *(row[3] for row in V2)], side)
    before = divisible(32 * multiplier)
    layers = [*_unit(channels, before, 3, strides[0], act=nn.ReLU6)]
    for (expansion, width, repeats, _), first in zip(V2, strides[1:], strict=True):
        for i in range(repeats):
            after = divisible(width * multiplier)
            layers.append(Inverted(before, after, 1 if i else first, expansion))
            before = after
    last = divisible(1280 * max(1.0, multiplier))
    return [*layers, *_unit(before, last, 1, act=nn.ReLU6)], last


def _unit(
    before: int, after: int, kernel: int, stride: int = 1, groups: int = 1, act: type[nn.Module] = nn.ReLU
) -> list[nn.Module]:
    conv = nn.Conv2d(before, after, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(after), act()]
