"""A user's own models and data, good and bad, as `module:function` and as a file."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


def pairs(count: int, seed: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(count, 12, generator=torch.Generator().manual_seed(seed))
    return x, x[:, :3].argmax(1)


def loaders():
    train = DataLoader(TensorDataset(*pairs(320, 0)), batch_size=32, shuffle=True)
    return train, DataLoader(TensorDataset(*pairs(100, 1)), batch_size=50)


def arrays():
    return pairs(320, 0), pairs(100, 1)


def model() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 3))


def wrong_shape() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(13, 24), nn.ReLU(), nn.Linear(24, 3))


def too_few_outputs() -> nn.Module:
    return nn.Linear(12, 2)


def no_model() -> int:
    return 3


def raises() -> nn.Module:
    raise RuntimeError("no such layer")


class Diverging(nn.Module):
    """Gives NaN from the ninth training batch on."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.calls = nn.Linear(12, 3), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += self.training
        out = self.layer(x)
        return out * float("nan") if self.calls > 8 else out


def diverging() -> nn.Module:
    return Diverging()


def empty():
    x, y = pairs(320, 0)
    return (x[:0], y[:0]), (x, y)


def float_labels():
    x, y = pairs(320, 0)
    return (x, y.float()), (x, y)


def negative_labels():
    x, y = pairs(320, 0)
    return (x, y - 1), (x, y)


def integer_inputs():
    x, y = pairs(320, 0)
    return (x.long(), y), (x.long(), y)
