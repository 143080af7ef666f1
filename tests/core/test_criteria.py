from __future__ import annotations

import pytest
import torch
from hypothesis import given

from openwork.core import criteria
from openwork.core.criteria import Context
from openwork.core.rng import generator
from openwork.errors import MaskError
from tests.strategies import quick, seeds, tensor

SHAPE = torch.Size([3, 4])


@given(seeds)
@quick
def test_formulas(seed):
    weight, grad, statistic = (tensor(SHAPE, seed + k) for k in range(3))
    context = Context(grad=grad, statistic=statistic)
    expected = {
        criteria.magnitude: weight.abs(),
        criteria.gradient: grad.abs(),
        criteria.snip: (weight * grad).abs(),
        criteria.synflow: weight * grad,
        criteria.grasp: weight * statistic,
        criteria.fisher: weight**2 * statistic / 2,
    }
    for criterion, value in expected.items():
        score = criterion(weight, context)
        assert torch.allclose(score, value, rtol=1e-12), criterion.__name__
        assert not score.requires_grad


def test_scores_do_not_track_gradients():
    weight = torch.nn.Parameter(tensor(SHAPE, 0))
    grad, statistic = tensor(SHAPE, 1), tensor(SHAPE, 2)
    for criterion in (criteria.magnitude, criteria.snip, criteria.synflow, criteria.grasp, criteria.fisher):
        assert not criterion(weight, Context(grad=grad, statistic=statistic)).requires_grad


def test_fisher_is_the_second_order_loss_of_removal():
    weight = torch.tensor([0.5, -2.0], dtype=torch.float64)
    curvature = torch.tensor([3.0, 0.25], dtype=torch.float64)

    def loss(w):
        return 0.5 * (curvature * (w - weight) ** 2).sum()

    removed = [loss(weight * torch.tensor(kept, dtype=torch.float64)).item() for kept in ([0, 1], [1, 0])]
    assert criteria.fisher(weight, Context(statistic=curvature)).tolist() == pytest.approx(removed)


def test_random_comes_from_the_generator_alone():
    weight = tensor(SHAPE, 0, torch.float16)
    one, two, other = (criteria.random(weight, Context(generator=generator(s, "r"))) for s in (0, 0, 1))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert one.dtype is torch.float64  # in half precision uniform numbers would tie


@pytest.mark.parametrize("criterion", [criteria.gradient, criteria.snip, criteria.synflow])
def test_a_missing_gradient_is_named(criterion):
    with pytest.raises(MaskError, match=r"'fc.weight' has no gradient at step 7"):
        criterion(torch.ones(2), Context(name="fc.weight", step=7))


@pytest.mark.parametrize("criterion", [criteria.grasp, criteria.fisher])
def test_a_missing_statistic_is_named(criterion):
    with pytest.raises(MaskError, match=r"'fc.weight'"):
        criterion(torch.ones(2), Context(name="fc.weight"))
