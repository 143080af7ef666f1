from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from openwork import models
from openwork.errors import ModelError
from tests.models.helpers import SMALL, example

T = torch.arange(6.0).view(2, 3)


@pytest.mark.parametrize(
    "output",
    [T, (T,), [T, None], (T, "more"), SimpleNamespace(logits=T), {"logits": T, "loss": 0}, ({"logits": T},)],
)
def test_logits_are_found(output: Any) -> None:
    assert models.logits(output) is T


@pytest.mark.parametrize("output", [None, (), [], 3, {"loss": T}, SimpleNamespace(logits=None), ("text", T)])
def test_outputs_without_logits_are_refused(output: Any) -> None:
    with pytest.raises(ModelError, match="without logits"):
        models.logits(output)


@pytest.mark.parametrize("ref", SMALL)
def test_preflight_passes_reference_models_and_leaves_no_trace(ref: str) -> None:
    shape, options = SMALL[ref]
    model = models.build(ref, input_shape=shape, classes=5, seed=0, options=options)
    next(iter(model.children())).eval()
    modes = [module.training for module in model.modules()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    before = torch.get_rng_state()
    y = torch.zeros((4, *shape) if len(shape) == 1 and ref.startswith("gpt") else 4, dtype=torch.int64)
    models.preflight(model, example(shape, 4), y, classes=5)
    assert torch.equal(torch.get_rng_state(), before)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


class Returns(nn.Module):
    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self, x: Tensor) -> Any:
        torch.rand(1)
        return self.output


def test_random_forward_passes_do_not_move_the_global_generator() -> None:
    before = torch.get_rng_state()
    models.preflight(Returns(torch.zeros(2, 3)), torch.zeros(2, 1), torch.zeros(2, dtype=torch.int64))
    assert torch.equal(torch.get_rng_state(), before)


Y = torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("output", "x", "y", "message"),
    [
        (T, torch.zeros(0, 3), Y[:0], r"the batch is empty: its shape is \(0, 3\)"),
        (T, torch.zeros(()), Y[:0], r"the batch is empty"),
        (None, torch.zeros(2, 1), Y, "returns a NoneType without logits"),
        (T.long(), torch.zeros(2, 1), Y, "output is int64: logits are floating-point"),
        (T, torch.zeros(2, 1), Y.float(), "labels are float32: they must be int64"),
        (T, torch.zeros(2, 1), Y.int(), "labels are int32"),
        (T, torch.zeros(2, 1), Y.bool(), "labels are bool"),
        (T, torch.zeros(2, 1), torch.tensor([0, 1, 2]), r"shape \(2, 3\) .* shape \(3\): .* \(3, classes\)$"),
        (T, torch.zeros(3, 1), Y, r"\(2, 3\) for 3 examples with labels of shape \(2\)"),
        (T, torch.zeros(2, 1), T.long(), r"\(2, 3\) for 2 examples with labels of shape \(2, 3\): .* \(2, 3, classes\)$"),
        (T.sum(), torch.zeros(2, 1), Y, r"output has shape \(\) for 2 examples"),
        (T[0], torch.zeros(1, 1), torch.tensor(1), r"output has shape \(3\) for 1 examples with labels of shape \(\)"),
        (
            torch.zeros(2, 5, 4),
            torch.zeros(2, 1),
            torch.zeros(2, 4, dtype=torch.int64),
            r"classes as a last axis, \(2, 4, classes\)",
        ),
        (T, torch.zeros(2, 1), torch.tensor([1, 3]), "labels run from 1 to 3, the model's 3 outputs stand for 0 to 2"),
        (T, torch.zeros(2, 1), torch.tensor([-1, 2]), "labels run from -1 to 2"),
    ],
)
def test_preflight_refuses(output: Any, x: Tensor, y: Tensor, message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        models.preflight(Returns(output), x, y)
    assert "\n" not in str(caught.value)


def test_preflight_passes_by_labels_that_do_not_count() -> None:
    models.preflight(Returns(torch.zeros(2, 2, 3)), torch.zeros(2, 1), torch.tensor([[-100, 2], [0, -100]]))
    models.preflight(Returns(T), torch.zeros(2, 1), torch.tensor([-100, -100]))
    with pytest.raises(ModelError, match="labels run from -99 to 0"):
        models.preflight(Returns(T), torch.zeros(2, 1), torch.tensor([0, -99]))


def test_preflight_knows_the_number_of_classes() -> None:
    models.preflight(Returns(T), torch.zeros(2, 1), Y, classes=2)
    with pytest.raises(ModelError, match="the model has 3 outputs, the data 4 classes"):
        models.preflight(Returns(T), torch.zeros(2, 1), Y, classes=4)


@pytest.mark.parametrize(
    ("ref", "x", "message"),
    [
        ("cnn", torch.zeros(2, 1, 16, 16), r"shape \(2, 1, 16, 16\) and type float32, where it expects "
                                           r"examples of shape \(3, 16, 16\): RuntimeError: "),
        ("cnn", torch.zeros(2, 3, 16, 16, dtype=torch.float64), r"type float64, where it expects type float32: "),
        ("cnn", torch.zeros(2, 3, 16, 16, dtype=torch.uint8), r"type uint8, where it expects type float32: "),
        ("mlp-20-10", torch.zeros(2, 7), r"where it expects examples of shape \(1, 8, 8\): "),
        ("gpt-small", torch.zeros(2, 12), r"type float32, where it expects int64 token numbers: "),
        ("gpt-small", torch.zeros(2, 13, dtype=torch.int64), r"where it expects examples of shape \(12\): "),
        ("gpt-small", torch.full((2, 12), 5), r"\(2, 12\) and type int64: IndexError"),
    ],
)  # fmt: skip
def test_preflight_says_what_was_expected(ref: str, x: Tensor, message: str) -> None:
    shape, options = SMALL[ref]
    model = models.build(ref, input_shape=shape, classes=5, seed=0, options=options)
    with pytest.raises(ModelError, match=message) as caught:
        models.preflight(model, x, Y)
    assert "\n" not in str(caught.value)
    assert all(module.training for module in model.modules())


def test_preflight_names_the_devices() -> None:
    with pytest.raises(ModelError, match=r"where it expects device meta \(the batch is on cpu\)"):
        models.preflight(nn.Linear(3, 2).to("meta"), torch.zeros(2, 3), Y)
