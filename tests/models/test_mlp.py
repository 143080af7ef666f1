from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from openwork import models
from tests.models.helpers import count, images, on_meta


@given(st.lists(st.integers(1, 30), min_size=1, max_size=4), st.one_of(images, st.tuples(st.integers(1, 99))))
@settings(deadline=None, max_examples=25)
def test_parameters_in_closed_form_and_output_shape(hidden: list[int], shape: tuple[int, ...]) -> None:
    model = models.build("mlp-" + "-".join(map(str, hidden)), input_shape=shape, classes=7, seed=0)
    widths = [math.prod(shape), *hidden, 7]
    assert count(model) == sum((before + 1) * after for before, after in itertools.pairwise(widths))
    assert model(torch.zeros(3, *shape)).shape == (3, 7)


def test_it_computes_what_it_says() -> None:
    model = models.build("mlp-6-5", input_shape=(2, 3, 4), classes=3, seed=0)
    x = torch.randn(4, 2, 3, 4, generator=torch.Generator().manual_seed(0))
    (w1, b1), (w2, b2), (w3, b3) = zip(*[iter(model.parameters())] * 2, strict=True)
    expected = ((x.reshape(4, 24) @ w1.T + b1).clamp(min=0) @ w2.T + b2).clamp(min=0) @ w3.T + b3
    torch.testing.assert_close(model(x), expected)


def test_dropout_acts_in_training_only() -> None:
    model = models.build("mlp-50", input_shape=(9,), classes=3, seed=0, options={"dropout": 0.5})
    x = torch.ones(2, 9)
    with torch.random.fork_rng(devices=[]):
        assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_lenet_300_100_is_the_mlp_of_that_shape() -> None:
    assert count(on_meta("mlp-300-100", (1, 28, 28), 10)) == 266_610


@pytest.mark.parametrize("layer", [0, 1])
def test_hidden_layers_start_with_hes_deviation(layer: int) -> None:
    model = models.build("mlp-400-500", input_shape=(300,), classes=3, seed=0)
    weight = [p for p in model.parameters() if p.ndim == 2][layer]
    assert weight.std().item() == pytest.approx(math.sqrt(2 / weight.shape[1]), rel=0.02)
