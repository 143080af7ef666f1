from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from openwork.core.rng import generator
from openwork.errors import DataError
from openwork.train.robustness import fgsm_accuracy, pgd_accuracy
from tests.train.toys import net


def linear() -> tuple[nn.Linear, Tensor, Tensor]:
    """A linear two-class model and inputs in [0, 1], most of them on the right side."""
    draw = generator(3, "linear")
    model = nn.Linear(6, 2)
    nn.init.normal_(model.weight, generator=draw)
    nn.init.zeros_(model.bias)
    x = torch.rand(200, 6, generator=draw)
    y = model(x).detach().argmax(-1)
    y[:20] = 1 - y[:20]
    return model, x, y


def worst(model: nn.Linear, x: Tensor, y: Tensor, eps: float, clamp: bool) -> float:
    """Accuracy at the worst corner of the box, which for a linear model is known."""
    gap = (model.weight[1] - model.weight[0]).detach()
    towards = torch.where(y == 1, -1.0, 1.0)[:, None] * gap.sign()
    corner = x + eps * towards
    return float((model(corner.clamp(0, 1) if clamp else corner).argmax(-1) == y).double().mean())


@pytest.mark.parametrize("eps", [0.0, 0.03, 0.1, 0.3, 2.0])
@pytest.mark.parametrize("clamp", [True, False])
def test_a_linear_model_falls_to_the_corner_of_the_box(eps: float, clamp: bool) -> None:
    model, x, y = linear()
    batches = list(zip(x.split(64), y.split(64), strict=True))
    limits = (0.0, 1.0) if clamp else None
    expected = worst(model, x, y, eps, clamp)
    assert fgsm_accuracy(model, batches, eps, limits) == expected
    # 2.5 eps of travel reach that corner from anywhere in the box.
    assert pgd_accuracy(model, batches, eps, steps=5, clamp=limits) == expected
    assert pgd_accuracy(model, batches, eps, steps=5, clamp=limits, start="clean") == expected
    assert worst(model, x, y, 0.0, clamp) == 0.9


def test_unclamped_margin_is_the_l1_norm() -> None:
    model, x, y = linear()
    gap = (model.weight[1] - model.weight[0]).detach().double()
    margin = torch.where(y == 1, 1.0, -1.0) * (x.double() @ gap)
    assert fgsm_accuracy(model, [(x, y)], 0.1, None) == float((margin > 0.1 * gap.abs().sum()).double().mean())


def test_attacks_stay_in_the_ball_and_the_range() -> None:
    seen: list[Tensor] = []

    class Spy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))

        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.detach().clone())
            return self.inner(x)

    _, x, _ = linear()
    pgd_accuracy(Spy(), [(x, torch.zeros(200, dtype=torch.long))], 0.2, steps=4, step_size=0.15)
    assert len(seen) == 5
    for attacked in seen:
        assert float((attacked - x).abs().max()) <= 0.2 + 1e-6
        assert float(attacked.min()) >= 0
        assert float(attacked.max()) <= 1
    assert float((seen[0] - x).abs().mean()) > 0.05, "the start is random"


def test_more_steps_hurt_a_curved_model_more_and_nothing_is_left_behind() -> None:
    model = net()
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    modes = [module.training for module in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = torch.get_rng_state()
    draw = generator(0, "curved")
    x = torch.rand(300, 12, generator=draw)
    y = model.eval()(x).argmax(-1)
    model.train()
    clean = pgd_accuracy(model, [(x, y)], 0.0, steps=1)
    once = pgd_accuracy(model, [(x, y)], 0.05, steps=1, step_size=0.01, start="clean")
    often = pgd_accuracy(model, [(x, y)], 0.05, steps=20, step_size=0.01, start="clean")
    assert clean == 1.0
    assert often < once < 1.0
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert all(bool((param.grad == 1).all()) for param in model.parameters() if param.grad is not None)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_random_start_is_a_function_of_the_seed() -> None:
    model, x, y = linear()

    def attacked(seed: int) -> float:
        return pgd_accuracy(model, [(x, y)], 0.3, steps=1, step_size=0.0, seed=seed)

    assert attacked(0) == attacked(0)
    assert len({attacked(seed) for seed in range(5)}) > 1


def test_senseless_attacks_are_refused() -> None:
    model, x, y = linear()
    with pytest.raises(DataError, match="no batch"):
        fgsm_accuracy(model, [], 0.1)
    with pytest.raises(DataError, match="eps >= 0"):
        fgsm_accuracy(model, [(x, y)], -0.1)
    with pytest.raises(DataError, match="'warm'"):
        pgd_accuracy(model, [(x, y)], 0.1, start="warm")
