from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from openwork.core.allocation import erk, uniform
from openwork.core.cost import count
from tests.core.test_cost import random_mask


class Block(nn.Module):
    """Two 3x3 convolutions around a projection shortcut where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return (self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())) + self.shortcut(x)).relu()


class ResNet(nn.Module):
    """The CIFAR residual net of 6n + 2 layers and width w (He et al. 2016), with projection shortcuts."""

    def __init__(self, depth: int, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        widths = [width] + [width * 2**stage for stage in range(3) for _ in range((depth - 2) // 6)]
        self.blocks = nn.Sequential(*[Block(a, b, 1 if a == b else 2) for a, b in itertools.pairwise(widths)])
        self.fc = nn.Linear(4 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(self.bn1(self.conv1(x)).relu()).mean((2, 3)))


class TestResNet:
    """Known numbers: shares of the FLOPs that random pruning leaves at density 0.05 on 32 x 32 images."""

    @pytest.mark.parametrize(
        ("depth", "width", "size", "share", "full"),
        [
            (20, 16, 270_896, 0.0866, False),
            (20, 8, 67_992, 0.0905, False),
            (20, 32, 1_081_440, 0.0862, True),
            (32, 16, 464_432, 0.0889, True),
        ],
    )
    def test_erk(self, depth: int, width: int, size: int, share: float, full: bool) -> None:
        """`full`: whether the last layer's share exceeds one, so that it becomes dense."""
        model = ResNet(depth, width).to("meta")
        cost = count(model, torch.ones(1, 3, 32, 32, device="meta"))
        shapes = {name: shape for name, shape in cost.shapes.items() if len(shape) > 1}
        per_weight = {name: flops // cost.parameters[name] for name, flops in cost.by_parameter().items()}
        assert sum(map(math.prod, shapes.values())) == size
        free = [sum(shape) for name, shape in shapes.items() if name != "fc.weight" or not full]
        epsilon = (0.05 * size - full * math.prod(shapes["fc.weight"])) / sum(free)
        ideal = sum(per_weight[name] * min(epsilon * sum(shapes[name]), math.prod(shapes[name])) for name in shapes)
        assert ideal / cost.flops() == pytest.approx(share, abs=5e-5)

        densities = erk(shapes, 0.05)
        masks = {name: random_mask(shapes[name], densities[name], 0, name) for name in shapes}
        assert cost.flops(masks) == sum(per_weight[name] * int(masks[name].sum()) for name in shapes)
        assert abs(cost.flops(masks) - ideal) < sum(per_weight[name] for name in shapes)  # a weight a layer
        assert cost.kept(masks) == round(0.05 * size) + sum(p.numel() for p in model.parameters()) - size

    def test_uniform_density_is_the_share_of_the_flops(self) -> None:
        cost = count(ResNet(20, 16), torch.ones(2, 3, 32, 32))
        shapes = {name: shape for name, shape in cost.shapes.items() if len(shape) > 1}

        def flops(density: float) -> int:
            shares = uniform(shapes, density)
            return cost.flops({name: random_mask(shapes[name], shares[name], 0, name) for name in shapes})

        assert flops(1 / 16) * 16 == cost.flops()  # every layer's size is a multiple of 16
        assert flops(0.05) / cost.flops() == pytest.approx(0.05, abs=2e-5)  # rounding to whole weights

    def test_dense_flops_in_closed_form(self) -> None:
        stages = [(32, 432 + 6 * 2304), (16, 4608 + 512 + 5 * 9216), (8, 18432 + 2048 + 5 * 36864)]
        closed = sum(2 * side * side * weights for side, weights in stages) + 2 * 640
        assert count(ResNet(20, 16), torch.ones(3, 3, 32, 32)).flops() == 3 * closed

    def test_meta_device_gives_the_same_cost(self) -> None:
        shape = (2, 3, 16, 16)
        real, meta = ResNet(8, 8), ResNet(8, 8).to("meta")
        assert count(meta, torch.ones(shape, device="meta")) == count(real, torch.ones(shape))
