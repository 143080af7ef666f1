from __future__ import annotations

import pytest
import torch
from torch import nn

from openwork.errors import RecipeError
from openwork.train import optimizers


def test_every_stepping_optimizer_of_torch_has_its_name() -> None:
    expected = {
        "adadelta", "adafactor", "adagrad", "adam", "adamax", "adamw", "asgd", "muon", "nadam", "radam", "rmsprop",
        "rprop", "sgd",
    }  # fmt: skip
    assert expected <= set(optimizers.names())
    assert not {"optimizer", "lbfgs", "sparseadam"} & set(optimizers.names())
    assert optimizers.names() == sorted(optimizers.names())


@pytest.mark.parametrize("name", optimizers.names())
def test_each_can_be_built_and_lowers_a_loss(name: str) -> None:
    weight = nn.Parameter(torch.full((3, 2), 2.0))
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    optimizer = optimizers.build(name, [weight, frozen], lr=0.05, momentum=0.5, nesterov=True, weight_decay=0.01)
    assert type(optimizer).__name__.lower() == name
    assert [param for group in optimizer.param_groups for param in group["params"]] == [weight]
    before = weight.square().sum().item()
    for _ in range(5):
        optimizer.zero_grad()
        weight.square().sum().backward()
        optimizer.step()
    assert weight.square().sum().item() < before


def test_options_reach_the_optimizers_that_take_them() -> None:
    weight = [nn.Parameter(torch.ones(2, 2))]
    given = {"lr": 0.3, "momentum": 0.7, "nesterov": True, "weight_decay": 0.02}
    for name, taken in {
        "sgd": {"lr", "momentum", "nesterov", "weight_decay"},
        "rmsprop": {"lr", "momentum", "weight_decay"},
        "adamw": {"lr", "weight_decay"},
        "rprop": {"lr"},
    }.items():
        defaults = optimizers.build(name, weight, **given).defaults  # type: ignore[arg-type]
        assert {key: defaults[key] for key in taken} == {key: given[key] for key in taken}
        assert not (given.keys() - taken) & {key for key in defaults if defaults[key] == given.get(key)}


def test_nesterov_without_momentum_is_plain_descent() -> None:
    optimizer = optimizers.build("sgd", [nn.Parameter(torch.ones(2))], lr=0.1, momentum=0.0, nesterov=True)
    assert optimizer.defaults["nesterov"] is False


def test_refusals_say_why() -> None:
    with pytest.raises(RecipeError, match=r"no stepping optimizer 'lbfgs' in torch.optim; there are: .*sgd"):
        optimizers.build("lbfgs", [nn.Parameter(torch.ones(2))], lr=0.1)
    with pytest.raises(RecipeError, match=r"'muon' refuses .* 2D"):
        optimizers.build("muon", [nn.Parameter(torch.ones(2))], lr=0.1)
    with pytest.raises(RecipeError, match="empty parameter list"):
        optimizers.build("sgd", [nn.Parameter(torch.ones(2), requires_grad=False)], lr=0.1)
