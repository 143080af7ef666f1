from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from openwork.models.common import divisible, initialise


@given(st.floats(0.1, 3000))
def test_divisible_by_search(channels: float) -> None:
    multiples = range(8, 3100, 8)
    nearest = min(multiples, key=lambda n: (abs(n - channels), -n))
    allowed = [n for n in multiples if n >= 0.9 * channels]
    assert divisible(channels) == (nearest if nearest in allowed else min(allowed))


@pytest.mark.parametrize(("channels", "expected"), [(1, 8), (11, 16), (12, 16), (17, 16), (24, 24), (33.6, 32), (35, 32)])
def test_divisible_by_hand(channels: float, expected: int) -> None:
    assert divisible(channels) == expected


def test_first_values_of_rectifier_networks() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(32, 200, 3), nn.Conv2d(200, 200, 3, groups=200), nn.BatchNorm2d(4), nn.Linear(90, 300)
        )
        nn.init.zeros_(model[2].weight)
        initialise(model)
    for layer, variance in [(model[0], 2 / (32 * 9)), (model[1], 2 / 9), (model[3], 1 / 90)]:
        assert layer.weight.std().item() == pytest.approx(math.sqrt(variance), rel=0.05)
    assert torch.equal(model[2].weight, torch.ones(4))
    assert all(not layer.bias.any() for layer in model)
