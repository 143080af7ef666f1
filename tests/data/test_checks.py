from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from openwork.data import checks
from openwork.errors import DataError

X = np.zeros((3, 2), np.float32)
Y = np.arange(3)
PLACE = "the training data of 'mine'"


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (np.float64, torch.float32), (np.float16, torch.float32), (">f4", torch.float32), (np.bool_, torch.float32),
        (np.uint8, torch.uint8), (np.int32, torch.int64), (np.uint16, torch.int64), (">i2", torch.int64),
    ],
)  # fmt: skip
def test_inputs_of_numpy_types(given: Any, found: torch.dtype) -> None:
    values = np.array([[0, 1], [1, 0], [1, 1]])
    x, y = checks.pair((values.astype(given), Y), PLACE)
    assert x.dtype == found
    assert x.tolist() == values.tolist()
    assert y.dtype == torch.int64


@pytest.mark.parametrize("given", [torch.float64, torch.bfloat16, torch.bool, torch.uint8, torch.int16])
def test_inputs_of_torch_types(given: torch.dtype) -> None:
    values = torch.tensor([[0, 1], [1, 0], [1, 1]])
    x, _ = checks.pair([values.to(given), torch.arange(3, dtype=torch.uint8)], PLACE)
    expected = {torch.uint8: torch.uint8, torch.int16: torch.int64}
    assert x.dtype == expected.get(given, torch.float32)
    assert x.tolist() == values.tolist()


def test_a_gradient_is_left_behind() -> None:
    assert not checks.pair((torch.zeros(3, 2, requires_grad=True), Y), PLACE)[0].requires_grad


@pytest.mark.parametrize(
    ("item", "words"),
    [
        (X, "give a ndarray; expected a pair"),
        ((X, Y, Y), "give a tuple of 3; expected a pair"),
        ({"x": X, "y": Y}, "give a dict of 2; expected a pair"),
        ((X, Y[:2]), "3 inputs and 2 labels"),
        ((X, Y.astype(float)), "labels of type float64; expected whole numbers"),
        ((X, Y > 1), "labels of type bool"),
        ((X, Y - 1), "a label -1; expected classes from 0"),
        ((X, np.array(["a", "b", "c"])), "labels of type <U1"),
        ((np.array([None] * 3), Y), "inputs of type object"),
        ((X.astype(complex), Y), "inputs of type complex128"),
        ((X, np.int64(3)), "labels without an axis"),
        (([[1], [1, 2]], Y), "inputs that are no array"),
        ((np.where(np.eye(3, 2, -1) > 0, np.nan, X), Y), "NaN or infinity in the inputs, first in example 1"),
        ((torch.tensor([0.0, 0.0, float("inf")]), Y), "first in example 2"),
        ((np.full((3, 2), 1e300), Y), "NaN or infinity"),  # too large for float32
    ],
)
def test_what_is_wrong_is_told_in_one_sentence(item: Any, words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        checks.pair(item, PLACE)
    assert str(caught.value).startswith(PLACE)
    assert "\n" not in str(caught.value)


def test_labels_beyond_the_classes() -> None:
    assert checks.pair((X, Y), PLACE, 3)[1].tolist() == [0, 1, 2]
    with pytest.raises(DataError, match=r"a label 2; expected 0..1"):
        checks.pair((X, Y), PLACE, 2)


def test_padding_counts_in_sequences_only() -> None:
    y = torch.tensor([[1, -100], [4, 0], [-100, -100]])
    assert checks.classes(y, PLACE) == 5
    assert checks.pair((X, y), PLACE, 5)[1].tolist() == y.tolist()
    with pytest.raises(DataError, match="label -100"):
        checks.pair((X, y[:, 1]), PLACE)


def test_bytes_become_shares_of_one() -> None:
    x = torch.tensor([[0, 51, 255]], dtype=torch.uint8)
    assert torch.allclose(checks.ready(x), torch.tensor([[0.0, 0.2, 1.0]]))
    assert x.tolist() == [[0, 51, 255]]
    f = torch.rand(2)
    assert checks.ready(f) is f
