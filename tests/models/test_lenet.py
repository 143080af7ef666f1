from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from openwork import models
from tests.models.helpers import CIFAR, MNIST, count, images, multiply_adds, on_meta


@pytest.mark.parametrize(
    ("ref", "shape", "parameters"),
    [
        ("lenet-300-100", MNIST, 266_610),
        ("lenet5", MNIST, 61_706),
        ("lenet5", (1, 32, 32), 61_706),
        ("lenet5", CIFAR, 62_006),
        ("lenet5-caffe", MNIST, 431_080),
    ],
)
def test_published_parameter_counts(ref: str, shape: tuple[int, ...], parameters: int) -> None:
    assert count(on_meta(ref, shape, 10)) == parameters


def test_multiply_adds_of_caffes_network() -> None:
    convolutions = 24 * 24 * 20 * 25 + 8 * 8 * 50 * 20 * 25
    assert multiply_adds(on_meta("lenet5-caffe", MNIST, 10), MNIST) == convolutions + 800 * 500 + 500 * 10


@given(st.sampled_from(["lenet5", "lenet5-caffe"]), images)
@settings(deadline=None, max_examples=25)
def test_images_of_any_size(ref: str, shape: tuple[int, int, int]) -> None:
    model = models.build(ref, input_shape=shape, classes=3, seed=0).eval()
    assert model(torch.zeros(2, *shape)).shape == (2, 3)


def test_first_values_are_glorots() -> None:
    weights = [p for p in models.build("lenet-300-100", input_shape=MNIST, classes=10, seed=0).parameters() if p.ndim == 2]
    for weight in weights:
        assert weight.std().item() == pytest.approx(math.sqrt(2 / sum(weight.shape)), rel=0.06)
