from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import conv2d, relu

from openwork import models
from openwork.models.wrn import PreActivation
from tests.models.helpers import CIFAR, count, images, on_meta


@pytest.mark.parametrize(
    ("ref", "parameters"),
    [("wrn-28-10", 36_479_194), ("wrn-16-4", 2_748_890), ("wrn-40-2", 2_243_546), ("wrn-22-2", 1_079_642)],
)
def test_published_parameter_counts(ref: str, parameters: int) -> None:
    assert count(on_meta(ref, CIFAR, 10)) == parameters


@given(st.integers(1, 7), st.integers(1, 6))
@settings(deadline=None, max_examples=12)
def test_depth_counts_the_3x3_convolutions_with_shortcuts_and_readout(n: int, widen: int) -> None:
    model = on_meta(f"wrn-{6 * n + 4}-{widen}", CIFAR, 10)
    kernels = [m.kernel_size for m in model.modules() if isinstance(m, nn.Conv2d)]
    shortcuts = 3 if widen > 1 else 2  # the first group keeps its 16 channels at width 1
    assert kernels.count((3, 3)) == 6 * n + 1
    assert kernels.count((1, 1)) == shortcuts


@given(images)
@settings(deadline=None, max_examples=15)
def test_images_of_any_size(shape: tuple[int, int, int]) -> None:
    model = models.build("wrn-10-1", input_shape=shape, classes=3, seed=0).eval()
    assert model(torch.zeros(2, *shape)).shape == (2, 3)


@pytest.mark.parametrize(("before", "stride"), [(6, 1), (4, 1), (4, 2)])
def test_shortcuts_carry_the_input_past_a_silent_branch(before: int, stride: int) -> None:
    with torch.random.fork_rng(devices=[]):
        block = PreActivation(before, 6, stride, dropout=0.0).eval()
        x = torch.randn(2, before, 8, 8)
    nn.init.zeros_(block.conv2.weight)
    with torch.no_grad():
        out = block(x)
        if before == 6:
            assert torch.equal(out, x)
        else:
            active = relu(x / (1 + 1e-5) ** 0.5)
            torch.testing.assert_close(out, conv2d(active, block.shortcut.weight, stride=stride))


def test_dropout_sits_between_the_convolutions() -> None:
    model = models.build("wrn-10-1", input_shape=CIFAR, classes=3, seed=0, options={"dropout": 0.3})
    assert [m.p for m in model.modules() if isinstance(m, nn.Dropout)] == [0.3] * 3
    x = torch.zeros(2, 16, 8, 8) + 1
    block = next(m for m in model.modules() if isinstance(m, PreActivation))
    nn.init.zeros_(block.conv2.weight)
    with torch.random.fork_rng(devices=[]):
        assert torch.equal(block(x), x)  # what is dropped is inside the branch
