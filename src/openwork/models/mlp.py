"""Multilayer perceptrons: `mlp-300-100` has two hidden layers of 300 and 100 units."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from torch import Tensor, nn

from openwork.models.common import check_rate

NAMES = ("mlp-256", "mlp-300-100", "mlp-512-512")
FORM = r"mlp(-[1-9][0-9]*)+"


class MLP(nn.Module):
    """Linear layers with rectifiers between them, on flattened examples: (batch, ...) -> (batch, classes)."""

    def __init__(self, features: int, hidden: Sequence[int], classes: int, dropout: float = 0.0) -> None:
        super().__init__()
        widths = [features, *hidden]
        layers: list[nn.Module] = [nn.Flatten()]
        for before, after in itertools.pairwise(widths):
            layers += [nn.Linear(before, after), nn.ReLU()]
            if dropout:
                layers.append(nn.Dropout(dropout))
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of a batch."""
        logits: Tensor = self.head(self.layers(x))
        return logits


def build(name: str, input_shape: tuple[int, ...], classes: int, *, dropout: float = 0.0) -> nn.Module:
    """Return the perceptron that `name` spells, for examples of any shape; He's first values in the hidden layers."""
    check_rate(name, dropout=dropout)
    hidden = [int(width) for width in name.split("-")[1:]]
    model = MLP(math.prod(input_shape), hidden, classes, dropout)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            rectified = module is not model.head
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu" if rectified else "linear")
            nn.init.zeros_(module.bias)
    return model
