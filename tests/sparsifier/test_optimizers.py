from __future__ import annotations

import pytest
import torch
from torch import nn, optim

from openwork.errors import OptimizerError
from openwork.sparsifier.optimizers import check_optimizers, clear_state, fresh_values, overflowed
from openwork.testing._stepping import SETTINGS, build
from openwork.testing._toys import network


def test_every_stepping_optimizer_of_torch_is_known():
    kinds = {name for name, kind in vars(optim).items() if isinstance(kind, type) and issubclass(kind, optim.Optimizer)}
    assert {kind for kind, _ in SETTINGS.values()} == kinds - {"Optimizer", "LBFGS", "SparseAdam"}
    assert len(kinds) >= 15


@pytest.mark.parametrize("name", SETTINGS)
def test_fresh_values_are_those_of_a_weight_that_never_moved(name):
    kind, options = SETTINGS[name]
    model = network()
    for one in build(kind, options, model):
        for group in one.param_groups:
            for param in group["params"]:
                param.data.zero_()
                param.grad = torch.zeros_like(param)
        one.step()
        fresh = fresh_values(one)
        for param, state in one.state.items():
            for key, value in state.items():
                if isinstance(value, torch.Tensor) and value.shape == param.shape and bool(value.isfinite().all()):
                    assert torch.equal(value, torch.full_like(value, fresh.get(key, 0.0))), key


def test_fresh_values_of_the_exotic_ones():
    param = nn.Parameter(torch.zeros(2, 2))
    assert fresh_values(optim.Rprop([param], lr=0.02))["step_size"] == pytest.approx(0.02)
    assert fresh_values(optim.Adagrad([param], initial_accumulator_value=0.3))["sum"] == pytest.approx(0.3)


def test_an_optimizer_that_cannot_be_twinned_starts_at_zero():
    class Odd(optim.SGD):
        def __init__(self, params, needed):
            super().__init__(params, lr=0.1)

    assert fresh_values(Odd([nn.Parameter(torch.zeros(2, 2))], needed=1)) == {}


def test_clearing_touches_what_has_the_parameters_shape_only():
    param = nn.Parameter(torch.ones(2, 3))
    optimizer = optim.Adam([param], amsgrad=True)
    param.grad = torch.ones_like(param)
    optimizer.step()
    before = {key: value.clone() for key, value in optimizer.state[param].items()}
    where = torch.tensor([[True, False, False], [False, False, True]])
    clear_state(optimizer, param, where, {"exp_avg": 7.0})
    after = optimizer.state[param]
    assert torch.equal(after["step"], before["step"])
    assert after["exp_avg"][where].tolist() == [7.0, 7.0]
    for key in ("exp_avg_sq", "max_exp_avg_sq"):
        assert after[key][where].tolist() == [0.0, 0.0]
    for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        assert torch.equal(after[key][~where], before[key][~where])


def test_one_optimizer_of_several_may_hold_no_masked_parameter():
    weight, bias, other = (nn.Parameter(torch.zeros(2, 2)) for _ in range(3))
    check_optimizers([optim.SGD([bias]), optim.SGD([weight])], {"weight": weight})
    check_optimizers([], {"weight": weight})
    with pytest.raises(OptimizerError, match="holds none of the model's masked parameters"):
        check_optimizers([optim.SGD([bias]), optim.SGD([other])], {"weight": weight})


def test_what_is_no_optimizer_is_refused():
    param = nn.Parameter(torch.zeros(2, 2))
    schedule = optim.lr_scheduler.ConstantLR(optim.SGD([param], lr=0.1))
    with pytest.raises(OptimizerError, match=r"takes a torch.optim.Optimizer, not ConstantLR"):
        check_optimizers([schedule], {"weight": param})


def test_overflow_is_what_a_scaler_left():
    optimizer = optim.SGD([nn.Parameter(torch.zeros(2))])
    assert not overflowed(optimizer)
    optimizer.found_inf = torch.tensor(0.0)
    assert not overflowed(optimizer)
    optimizer.found_inf = torch.tensor(1.0)
    assert overflowed(optimizer)
