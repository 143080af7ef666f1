from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

from openwork import models
from tests.models.helpers import CIFAR, IMAGENET, MNIST, count, images, multiply_adds, on_meta

BODY = 16 * 9 + 32 * 16 * 9 + 32 * 32 * 9 + 2 * (16 + 32 + 32)
"""Parameters of the convolutions and norms with one input channel."""


@pytest.mark.parametrize(
    ("shape", "side"), [((1, 8, 8), 4), ((1, 16, 16), 4), (MNIST, 7), (CIFAR, 4), ((3, 63, 63), 5), (IMAGENET, 4)]
)
def test_parameters_in_closed_form(shape: tuple[int, int, int], side: int) -> None:
    expected = BODY + (shape[0] - 1) * 16 * 9 + (32 * side * side + 1) * 10
    assert count(on_meta("cnn", shape, 10)) == expected
    assert 19_000 < expected < 31_000


@pytest.mark.parametrize("sides", [(8, 8, 4, 4), (15, 15, 7, 7), (16, 8, 4, 4), (28, 14, 7, 7), (32, 16, 8, 4)])
def test_multiply_adds_follow_the_sides_of_the_maps(sides: tuple[int, int, int, int]) -> None:
    first, second, third, last = sides
    shape = (1, first, first)
    convolutions = first**2 * 16 * 9 + second**2 * 32 * 16 * 9 + third**2 * 32 * 32 * 9
    assert multiply_adds(on_meta("cnn", shape, 10), shape) == convolutions + last**2 * 32 * 10


@given(images)
@settings(deadline=None, max_examples=25)
def test_images_of_any_size_and_the_size_of_the_last_map(shape: tuple[int, int, int]) -> None:
    model = models.build("cnn", input_shape=shape, classes=3, seed=0).eval()
    assert model(torch.zeros(2, *shape)).shape == (2, 3)
    readout = next(m for m in model.modules() if isinstance(m, nn.Linear))
    assert readout.in_features // 32 in {a * b for a in range(4, 8) for b in range(4, 8)}


def test_multiplier_scales_the_channels() -> None:
    widths = [m.out_channels for m in on_meta("cnn", MNIST, 10, multiplier=2.5).modules() if isinstance(m, nn.Conv2d)]
    assert widths == [40, 80, 80]
    widths = [m.out_channels for m in on_meta("cnn", MNIST, 10, multiplier=0.01).modules() if isinstance(m, nn.Conv2d)]
    assert widths == [1, 1, 1]


def test_it_learns_the_digits() -> None:
    """The 1,797 digits of scikit-learn, every fifth held out; a linear model reaches 0.96 here."""
    digits = load_digits()
    x = torch.tensor(digits.images / 16, dtype=torch.float32)[:, None]
    y = torch.tensor(digits.target)
    held = torch.arange(len(y)) % 5 == 0
    model = models.build("cnn", input_shape=(1, 8, 8), classes=10, seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        for batch in torch.randperm(int((~held).sum()), generator=generator).split(64):
            optimizer.zero_grad()
            cross_entropy(model(x[~held][batch]), y[~held][batch]).backward()
            optimizer.step()
    with torch.no_grad():
        assert (model.eval()(x[held]).argmax(1) == y[held]).float().mean() > 0.975
