"""Wide residual networks (Zagoruyko, Komodakis, BMVC 2016): `wrn-28-10` has depth 28 and 10 times the width."""

from __future__ import annotations

from torch import Tensor, nn

from openwork.errors import ModelError
from openwork.models.common import check_rate, image_shape, initialise

NAMES = ("wrn-16-2", "wrn-16-4", "wrn-22-2", "wrn-28-10", "wrn-40-2")
FORM = r"wrn-[1-9][0-9]*-[1-9][0-9]*"


class PreActivation(nn.Module):
    """Norm, rectifier, 3x3 convolution, twice, around which the input is added; dropout between the convolutions."""

    def __init__(self, before: int, width: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(before)
        self.conv1 = nn.Conv2d(before, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.relu = nn.ReLU()
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.shortcut = None
        if before != width or stride != 1:
            self.shortcut = nn.Conv2d(before, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's maps; a shortcut that changes the shape starts from the activated input."""
        active = self.relu(self.bn1(x))
        y = self.relu(self.bn2(self.conv1(active)))
        y = self.conv2(self.dropout(y))
        out: Tensor = y + (x if self.shortcut is None else self.shortcut(active))
        return out


class WideResNet(nn.Module):
    """Three groups of blocks, (depth - 4) / 6 in each, of 16, 32 and 64 times `widen` channels: images -> classes."""

    def __init__(self, depth: int, widen: int, channels: int, classes: int, dropout: float) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        blocks, before = [], 16
        for i in range(3):
            for j in range((depth - 4) // 6):
                blocks.append(PreActivation(before, (16 << i) * widen, 2 if i and not j else 1, dropout))
                before = (16 << i) * widen
        self.blocks = nn.Sequential(*blocks)
        self.bn = nn.BatchNorm2d(before)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(before, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of a batch (batch, channels, height, width)."""
        x = self.relu(self.bn(self.blocks(self.conv1(x))))
        logits: Tensor = self.fc(x.mean(dim=(2, 3)))
        return logits


def build(name: str, input_shape: tuple[int, ...], classes: int, *, dropout: float = 0.0) -> nn.Module:
    """Return the network that `name` spells; the paper drops 0.3 between the convolutions where it drops at all."""
    check_rate(name, dropout=dropout)
    channels, _, _ = image_shape(name, input_shape)
    depth, widen = (int(part) for part in name.split("-")[1:])
    if depth % 6 != 4 or depth < 10:
        raise ModelError(f"there is no {name}: the depth must be 6n+4 (10, 16, 22, 28, 34, 40, ...)")
    return initialise(WideResNet(depth, widen, channels, classes, dropout))
