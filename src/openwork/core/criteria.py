"""How a weight is valued: functions (weight, context) -> score of the same shape; a higher score stays.

The same functions choose what to drop (among the kept) and what to grow (among the rest).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from openwork.errors import MaskError


@dataclass(frozen=True)
class Context:
    """What a criterion may look at beside the weight.

    Attributes:
        name: the parameter's name.
        step: optimizer steps taken so far.
        grad: dense gradient of the loss, the weight's shape, or None.
        statistic: a statistic that the method keeps for this parameter (a mean squared gradient, say), or None.
        generator: where random scores come from.
    """

    name: str = ""
    step: int = 0
    grad: Tensor | None = None
    statistic: Tensor | None = None
    generator: torch.Generator | None = None


Criterion = Callable[[Tensor, Context], Tensor]


def magnitude(weight: Tensor, context: Context) -> Tensor:
    """Return |w|."""
    return weight.detach().abs()


def gradient(weight: Tensor, context: Context) -> Tensor:
    """Return |dL/dw| (RigL's growth, Evci et al. 2020).

    Raises:
        MaskError: if there is no gradient.
    """
    return _grad(context).abs()


def random(weight: Tensor, context: Context) -> Tensor:
    """Return uniform numbers from the context's generator, drawn on the CPU so that every device sees the same."""
    return torch.rand(weight.shape, generator=context.generator, dtype=torch.float64).to(weight.device)


def snip(weight: Tensor, context: Context) -> Tensor:
    """Return |w dL/dw|, the connection sensitivity of SNIP (Lee et al. 2019, Eq. 6, unnormalised)."""
    return (weight.detach() * _grad(context)).abs()


def synflow(weight: Tensor, context: Context) -> Tensor:
    """Return w dR/dw, SynFlow's synaptic saliency (Tanaka et al. 2020, Eq. 1).

    The context's gradient is that of R = sum of the outputs of the network with all weights made positive, for an
    input of ones; with those weights the score is not negative.
    """
    return weight.detach() * _grad(context)


def grasp(weight: Tensor, context: Context) -> Tensor:
    """Return w (Hg), the gradient flow that is kept with the weight (Wang et al. 2020, Eq. 8).

    The paper scores -w (Hg) and prunes the largest; here, as everywhere, the highest score stays. The context's
    statistic is the Hessian-gradient product Hg.
    """
    if context.statistic is None:
        raise MaskError(f"grasp needs the Hessian-gradient product of {context.name!r} as its statistic")
    return weight.detach() * context.statistic


def fisher(weight: Tensor, context: Context) -> Tensor:
    """Return w^2 F / 2 with F the diagonal of the empirical Fisher information, a mean of squared gradients.

    The loss that removing the weight costs to second order (LeCun et al. 1990; Theis et al. 2018, Eq. 7). The
    context's statistic is F.
    """
    if context.statistic is None:
        raise MaskError(f"fisher needs the mean squared gradient of {context.name!r} as its statistic")
    return 0.5 * weight.detach().square() * context.statistic


def _grad(context: Context) -> Tensor:
    if context.grad is None:
        raise MaskError(f"{context.name!r} has no gradient at step {context.step}; call loss.backward() before the step")
    return context.grad.detach()
