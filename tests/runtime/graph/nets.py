"""Small networks with one feature each, random networks, and how near an island's output must be."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from openwork.core.rng import generator


def thinned(model: nn.Module, density: float = 0.3, seed: int = 0) -> nn.Module:
    """Give the convolutions zeros and the norms statistics; return the model in eval mode."""
    draw = generator(seed, "thin")
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data *= torch.rand(module.weight.shape, generator=draw) < density
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.3, 0.3, generator=draw)
            module.running_var.uniform_(0.5, 2.0, generator=draw)
            module.weight.data.uniform_(0.5, 1.5, generator=draw)
            module.bias.data.uniform_(-0.3, 0.3, generator=draw)
    return model.eval()


def close(found: Tensor, model: nn.Module, *inputs: Tensor) -> bool:
    """Tell whether an output is as near to the float64 one as float32 sums of a few layers can be."""
    wide = model.double()
    with torch.no_grad():
        expected = wide(*(x.double() for x in inputs))
    model.float()
    found = found.detach()
    error = float((found.double() - expected).abs().max()) if found.numel() else 0.0
    return found.shape == expected.shape and error <= 2e-5 * max(1.0, float(expected.abs().max()) if found.numel() else 0.0)


class Residual(nn.Module):
    def __init__(self, width: int = 12, stride: int = 1) -> None:
        super().__init__()
        self.one = nn.Conv2d(width, 2 * width, 3, stride, 1, bias=False)
        self.norm = nn.BatchNorm2d(2 * width)
        self.two = nn.Conv2d(2 * width, 2 * width, 3, 1, 1)
        self.down = nn.Conv2d(width, 2 * width, 1, stride)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.two(self.relu(self.norm(self.one(x))))
        y += self.down(x)
        return self.relu(y)


class Squeeze(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, 2, 1)
        self.deep = nn.Conv2d(16, 16, 5, 1, 2, groups=16)
        self.down, self.up = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.last = nn.Conv2d(16, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.deep(F.silu(self.first(x))))
        scale = torch.sigmoid(self.up(F.silu(self.down(F.adaptive_avg_pool2d(x, 1)))))
        return self.last(x * scale).mean((2, 3))


class Broken(nn.Module):
    """A known stretch, an operator that is not known, another stretch that reads both."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.relu(self.one(x))
        rolled = torch.roll(x, 1, dims=3)
        y = self.two(rolled) + x
        return self.three(y), y


class Branching(nn.Module):
    """Cannot be traced as a whole; its parts can."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1))
        self.other = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Hardswish())

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return self.other(y) if y.sum() < 1e9 else y


class InPlace(nn.Module):
    """What is read after a change in place is the changed tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.relu = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        z = self.relu(y)
        return self.two(z) + y


class Plain(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Fussy(nn.Module):
    """A part without convolutions that looks at its input, which no tracer can follow."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if bool((x > 0).any()) else x


class Headed(nn.Module):
    """Convolutions, a part that cannot be traced, and a head of linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.fussy = Fussy()
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.second(self.fussy(F.relu(self.first(x))))).mean((2, 3)))
