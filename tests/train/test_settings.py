from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from openwork.errors import RecipeError
from openwork.train.settings import Settings


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("steps", 0, "at least 1"),
        ("steps", 2.0, "a whole number"),
        ("steps", True, "a whole number"),
        ("batch_size", -4, "at least 1"),
        ("lr", 0, "above 0"),
        ("lr", float("nan"), "above 0"),
        ("lr", float("inf"), "above 0"),
        ("lr", "0.1", "above 0"),
        ("momentum", 1.0, "below 1"),
        ("momentum", -0.1, "at least 0"),
        ("nesterov", 1, "true or false"),
        ("weight_decay", -1e-4, "at least 0"),
        ("warmup", 1, "below 1"),
        ("label_smoothing", 1.5, "below 1"),
        ("clip", 0.0, "above 0"),
        ("clip", False, "above 0"),
        ("schedule", "exponential", "constant, cosine, linear, step"),
        ("optimizer", "lbfgs", "sgd"),
        ("optimizer", "SGD", "sgd"),
        ("device", "abacus", "torch device"),
        ("device", None, "torch device"),
    ],
)
def test_senseless_settings_are_refused(field: str, value: Any, allowed: str) -> None:
    with pytest.raises(RecipeError) as refused:
        Settings(**{"steps": 10, field: value})
    assert repr(field) in str(refused.value)
    assert repr(value) in str(refused.value)
    assert allowed in str(refused.value)


def test_settings_are_frozen_and_equal_by_value() -> None:
    settings = Settings(10, lr=1, clip=2, device="cuda:3")
    assert settings == Settings(10, lr=1.0, clip=2.0, device="cuda:3")
    assert [type(settings.lr), type(settings.clip)] == [float, float]
    assert torch.device(settings.device) == torch.device("cuda", 3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.lr = 2.0  # type: ignore[misc]
