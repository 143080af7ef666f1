"""EfficientNets (Tan, Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks", ICML 2019).

`efficientnet-b0` is table 1; `b1` to `b7` are its released scalings in width and depth. The options `multiplier` and
`depth` scale further, or anew where they are given. Images keep the size they come in; on small ones the first strides
become 1, as in `mobilenet`. Norms have torch's own settings. Stochastic depth and dropout, .2 in the paper's B0, are off.
"""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional as F

from openwork.models.common import check_positive, check_rate, divisible, image_shape, initialise, kept_strides
from openwork.models.mobilenet import MobileNet

NAMES = ("efficientnet-b0", "efficientnet-b1")
FORM = r"efficientnet-b[0-7]"

B0 = (
    (1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3), (6, 112, 3, 1, 5), (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)  # fmt: skip
"""Expansion, output channels, repeats, first stride and depthwise kernel of each row of blocks."""
SCALES = ((1.0, 1.0), (1.0, 1.1), (1.1, 1.2), (1.2, 1.4), (1.4, 1.8), (1.6, 2.2), (1.8, 2.6), (2.0, 3.1))
"""Width and depth of b0, b1, ..., b7 against b0."""
SQUEEZE = 4
"""A block's input channels over the channels that its squeeze keeps."""


class EfficientNet(MobileNet):
    """Feature layers, mean over the map, dropout and one linear layer: images -> (batch, classes)."""


class SqueezeExcitation(nn.Module):
    """Scales each channel by a gate in (0, 1) that all channels' means decide (Hu, Shen, Sun, CVPR 2018)."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, squeezed, 1)
        self.act = nn.SiLU()
        self.expand = nn.Conv2d(squeezed, channels, 1)
        self.gate = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        """Return the scaled maps."""
        y: Tensor = self.gate(self.expand(self.act(self.reduce(x.mean(dim=(2, 3), keepdim=True)))))
        return x * y


class StochasticDepth(nn.Module):
    """Drops whole examples at a rate while training and scales the others up (Huang et al., ECCV 2016)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """Return the maps, of some examples zero."""
        return x * F.dropout(x.new_ones(x.shape[0], 1, 1, 1), self.rate, self.training)


class MBConv(nn.Module):
    """1x1 expansion, depthwise, squeeze and excitation, linear 1x1 projection; the input is added where it fits."""

    def __init__(self, before: int, after: int, stride: int, expansion: int, kernel: int, drop: float) -> None:
        super().__init__()
        inner = before * expansion
        self.layers = nn.Sequential(
            *(_unit(before, inner, 1) if expansion > 1 else []),
            *_unit(inner, inner, kernel, stride, groups=inner),
            SqueezeExcitation(inner, max(1, before // SQUEEZE)),
            nn.Conv2d(inner, after, 1, bias=False),
            nn.BatchNorm2d(after),
        )
        self.residual = stride == 1 and before == after
        self.drop = StochasticDepth(drop) if drop and self.residual else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's maps."""
        y: Tensor = self.drop(self.layers(x))
        return x + y if self.residual else y


def build(
    name: str,
    input_shape: tuple[int, ...],
    classes: int,
    *,
    multiplier: float | None = None,
    depth: float | None = None,
    dropout: float = 0.0,
    drop_path: float = 0.0,
) -> nn.Module:
    """Return the network.

    Channels are those of b0 times `multiplier` in multiples of 8, repeats those of b0 times `depth`, rounded up; None
    is the scale that the name stands for. `dropout` comes before the readout; the rate of stochastic depth rises from 0
    in the first block in equal steps that would reach `drop_path` after the last.
    """
    width, length = SCALES[int(name[-1])]
    width, length = width if multiplier is None else multiplier, length if depth is None else depth
    check_positive(name, multiplier=width, depth=length)
    check_rate(name, dropout=dropout, drop_path=drop_path)
    channels, *sides = image_shape(name, input_shape)
    strides = kept_strides([2, *(row[3] for row in B0)], min(sides))
    before = divisible(32 * width)
    stem, blocks = _unit(channels, before, 3, strides[0]), list[nn.Module]()
    count = sum(math.ceil(length * row[2]) for row in B0)
    for (expansion, plain, repeats, _, kernel), first in zip(B0, strides[1:], strict=True):
        after = divisible(plain * width)
        for i in range(math.ceil(length * repeats)):
            drop = drop_path * len(blocks) / count
            blocks.append(MBConv(before, after, 1 if i else first, expansion, kernel, drop))
            before = after
    last = divisible(1280 * width)
    features = nn.Sequential(*stem, *blocks, *_unit(before, last, 1))
    return initialise(EfficientNet(features, last, classes, dropout))


def _unit(before: int, after: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(before, after, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(after), nn.SiLU()]
