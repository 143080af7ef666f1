from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from openwork.errors import DivergedError
from openwork.train import divergence
from tests.train.toys import Toy, assert_same, net, weights

X = Toy().x


def test_the_input_comes_first() -> None:
    x = X.clone()
    x[3, 4] = math.nan
    model = net()
    model[0].weight.data[0, 0] = math.nan  # type: ignore[index]
    error = divergence.report(model, x, 7, math.nan)
    assert "at step 7" in str(error)
    assert "the loss is nan" in str(error)
    assert "tensor is the input batch;" in str(error)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_then_the_first_parameter(bad: float) -> None:
    model = net()
    model[4].weight.data[0, 0] = bad  # type: ignore[index]
    model[4].bias.data[0] = bad  # type: ignore[index]
    assert "tensor is parameter '4.weight';" in str(divergence.report(model, X, 0, bad))
    with pytest.raises(DivergedError, match=r"within 3 steps: parameter '4.weight'"):
        divergence.check_parameters(model, 3)


def test_then_the_first_activation_in_the_order_of_execution() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.late = nn.Linear(12, 12)
            self.early = nn.Linear(12, 12)

        def forward(self, x: Tensor) -> Tensor:
            return self.late(self.early(x))  # type: ignore[no-any-return]

    model = Backwards()
    with torch.no_grad():
        model.early.weight.fill_(3e38)
    report = divergence.report(model, X.abs(), 0, math.inf)
    assert "tensor is the output of 'early';" in str(report)


def test_an_activation_of_the_model_itself_and_the_loss_itself() -> None:
    class Log(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.log()

    assert "the output of the model;" in str(divergence.report(Log(), -X.abs(), 0, math.nan))
    assert "tensor is the loss itself;" in str(divergence.report(net(), X, 0, math.inf))


def test_asking_changes_nothing() -> None:
    model = net()
    before = weights(model)
    divergence.report(model, X, 0, math.nan)
    assert_same(before, weights(model))
    assert not any(module._forward_hooks for module in model.modules())
    assert all(param.grad is None for param in model.parameters())


def test_large_but_finite_numbers_and_integers_are_no_divergence() -> None:
    model = nn.Linear(2, 2).half()
    with torch.no_grad():
        model.weight.fill_(65504)
    divergence.check_parameters(model, 1)
    huge = nn.Linear(2, 2).double()
    with torch.no_grad():
        huge.weight.fill_(1.7e308)
    divergence.check_parameters(huge, 1)
    assert "the loss itself" in str(divergence.report(nn.Embedding(3, 2), torch.tensor([0, 1]), 0, math.nan))


def test_gradients_are_named() -> None:
    model = net()
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    model[1].bias.grad[2] = math.nan  # type: ignore[index]
    error = divergence.report_gradient(model, 4)
    assert str(error).startswith("training diverged at step 4: the loss is finite but gradient of '1.bias' is not")
