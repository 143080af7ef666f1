"""Random pruning: a random mask at initialisation with well chosen layer-wise ratios, never changed.

Liu, Chen, Chen, Shen, Mocanu, Wang, Pechenizkiy. "The Unreasonable Effectiveness of Random Pruning: Return of the Most
Naive Baseline for Sparse Training". ICLR 2022.
Claim: a random mask fixed at initialisation matches the dense network when the network is wide and deep enough and the
layer-wise ratios are right, and is better out of distribution, in calibration and under attack.
Equations: densities d_l with sum(d_l N_l) = d N by uniform, uniform+, ER, ERK, ERK+, SNIP or GraSP ratios (section 3);
SNIP shares from |w dL/dw|, GraSP shares from w (Hg), both of one pass at initialisation, positions drawn anew.
Departures: exact counts by sampling without replacement instead of Bernoulli draws; uniform+ keeps the total exact
(`uniform_plus_reference` gives the released code's densities).
Cost: one random draw a weight before training, nothing after it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from openwork.cards import Card
from openwork.core import allocation, criteria
from openwork.core.allocation import Allocation, Shapes
from openwork.core.criteria import Context
from openwork.core.masks import Masks
from openwork.core.rng import generator
from openwork.core.schedules import Every
from openwork.core.select import top
from openwork.errors import MethodError
from openwork.sparsifier import peers
from openwork.sparsifier.parameters import Choice, maskable, unwrap
from openwork.sparsifier.sparsifier import Params, Sparsifier

CARD = Card(
    name="random-pruning",
    title="The Unreasonable Effectiveness of Random Pruning: Return of the Most Naive Baseline for Sparse Training",
    authors=(
        "Shiwei Liu", "Tianlong Chen", "Xiaohan Chen", "Li Shen", "Decebal Constantin Mocanu", "Zhangyang Wang",
        "Mykola Pechenizkiy",
    ),
    year=2022,
    venue="ICLR",
    link="https://arxiv.org/abs/2202.02643",
    wing="sparsify",
    claim="A random mask with good layer-wise ratios matches the dense network as it grows wider and deeper.",
    entry="RandomPruning",
    aliases=("random", "static"),
    departures=("Exact counts instead of Bernoulli draws.", "uniform+ keeps the total exact."),
)  # fmt: skip

Loss = Callable[[Tensor, Tensor], Tensor]


class RandomPruning(Sparsifier):
    """A random mask at initialisation, held to the end (Liu et al. 2022, section 3).

    Args:
        density: kept share of the masked weights.
        ratios: layer-wise ratios: "uniform", "uniform+", "er", "erk", "erk+", a mapping from parameter name to density,
            scores by parameter name whose global top-k gives the ratios (`snip_scores`, `grasp_scores`), or a function
            (shapes, density) -> densities.
        init: "dense" leaves the initial weights as they are; "scaled" draws them anew with
            std = sqrt(2 / (fan_in * density of the layer)), so that a sparse layer starts at a dense layer's scale.
        options: `pattern`, `parameters`, `exclude`, `seed` of every Sparsifier.

    Raises:
        MethodError: if `init` is unknown.
    """

    def __init__(
        self,
        density: float,
        *,
        ratios: str | Mapping[str, Any] | Allocation = "erk",
        init: Literal["dense", "scaled"] = "dense",
        **options: Any,
    ) -> None:
        if init not in ("dense", "scaled"):
            raise MethodError(f"init={init!r}: use 'dense' or 'scaled'")
        super().__init__(density, allocate=_ratios(ratios), **options)
        self.init = init
        self.every = Every(1, stop=0)

    def initial(self, params: Params) -> Masks:
        """Draw the masks, and the weights anew if asked to."""
        masks = self.random_masks(params)
        if self.init == "scaled":
            for name, share in masks.densities().items():
                _redraw(params[name], share, self.generator)
        return masks


def snip_scores(
    model: nn.Module,
    batch: tuple[Tensor, Tensor],
    *,
    loss: Loss = F.cross_entropy,
    redraw: bool = True,
    seed: int = 0,
    parameters: Choice = None,
    group: Any = "auto",
) -> dict[str, Tensor]:
    """Return |w dL/dw| of one batch for every maskable parameter (Lee et al. 2019), on a copy of the model.

    In data-parallel training every process gives its own part of the batch and all get the scores of the whole: the
    gradients are averaged, each part counting by its examples, before the product is taken.

    Args:
        model: any module; not changed.
        batch: inputs and targets.
        loss: (output, target) -> scalar.
        redraw: draw the copy's weights anew, Xavier-normal, as the released code does.
        seed: seed of that draw.
        parameters: which parameters (see `openwork.sparsifier.parameters.maskable`).
        group: the processes that share the batch, all of which call this: those of the model's DistributedDataParallel
            wrapper or else of torch.distributed's default group ("auto"), a process group, or None for this one alone.
    """
    sharing = peers.around(model) if isinstance(group, str) else peers.of(group)
    copy = deepcopy(unwrap(model)).train()
    params = maskable(copy, parameters)
    sharing.copy_first_([tensor.detach() for tensor in (*copy.parameters(), *copy.buffers())])
    if redraw:
        for name, param in params.items():
            _xavier_normal(param, generator(seed, "snip", name))
    x, y = batch
    grads = torch.autograd.grad(loss(copy(x), y), list(params.values()))
    sharing.mean_(grads, len(x))
    return {
        name: criteria.snip(param, Context(name=name, grad=grad))
        for (name, param), grad in zip(params.items(), grads, strict=True)
    }


def grasp_scores(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    loss: Loss = F.cross_entropy,
    temperature: float = 200.0,
    parameters: Choice = None,
    group: Any = "auto",
) -> dict[str, Tensor]:
    """Return w (Hg) for every maskable parameter (Wang et al. 2020, Eq. 8), on a copy with the model's own weights.

    H and g are of the mean loss over the batches, with logits divided by `temperature`. The highest scores stay, so
    the paper's -w (Hg), whose largest are pruned, has the opposite sign. In data-parallel training the mean is over the
    batches of all processes.

    Args:
        model: any module; not changed.
        batches: (inputs, targets); the reference takes 25 examples a class in two halves.
        loss: (output, target) -> scalar.
        temperature: divisor of the logits (T).
        parameters: which parameters (see `openwork.sparsifier.parameters.maskable`).
        group: the processes that share the batches, as for `snip_scores`.
    """
    sharing = peers.around(model) if isinstance(group, str) else peers.of(group)
    copy = deepcopy(unwrap(model)).train()
    params = maskable(copy, parameters)
    sharing.copy_first_([tensor.detach() for tensor in (*copy.parameters(), *copy.buffers())])
    weights = list(params.values())
    batches = list(batches)
    fixed = [torch.zeros_like(weight) for weight in weights]
    for x, y in batches:
        for total, grad in zip(fixed, torch.autograd.grad(loss(copy(x) / temperature, y), weights), strict=True):
            total += grad / len(batches)
    sharing.mean_(fixed, len(batches))
    products = [torch.zeros_like(weight) for weight in weights]
    for x, y in batches:
        grads = torch.autograd.grad(loss(copy(x) / temperature, y), weights, create_graph=True)
        inner = torch.stack([(g * f).sum() for g, f in zip(grads, fixed, strict=True)]).sum()
        for total, product in zip(products, torch.autograd.grad(inner, weights), strict=True):
            total += product / len(batches)
    sharing.mean_(products, len(batches))
    return {
        name: criteria.grasp(param, Context(name=name, statistic=product))
        for (name, param), product in zip(params.items(), products, strict=True)
    }


def shuffle_within_layers(masks: Mapping[str, Tensor], seed: int = 0) -> Masks:
    """Return masks with the same number kept in every layer, at random positions (the position test)."""
    return Masks({
        name: top(torch.rand(mask.shape, generator=generator(seed, "shuffle", name), dtype=torch.float64), int(mask.sum()))
        for name, mask in masks.items()
    })  # fmt: skip


def uniform_plus_reference(shapes: Shapes, density: float) -> dict[str, float]:
    """Return uniform+ as the released CIFAR code computes it: not exact in total.

    Below density .2 the last layer gets .2 and the rest (d N - N_first - .2 N_last) / N, sparser than asked; from .2 on
    only the first layer becomes dense, denser than asked.
    """
    names, sizes = list(shapes), [math.prod(shape) for shape in shapes.values()]
    densities = dict.fromkeys(names, density)
    if density < 0.2:
        rest = (density * sum(sizes) - sizes[0] - 0.2 * sizes[-1]) / sum(sizes)
        densities = dict.fromkeys(names, rest) | {names[-1]: 0.2}
    return densities | {names[0]: 1.0}


def _ratios(ratios: str | Mapping[str, Any] | Allocation) -> str | Mapping[str, float] | Allocation:
    if not isinstance(ratios, Mapping) or not all(isinstance(value, Tensor) for value in ratios.values()):
        return ratios
    scores = dict(ratios)

    def allocate(shapes: Shapes, density: float) -> dict[str, float]:
        missing = [name for name in shapes if name not in scores]
        if missing:
            raise MethodError(f"the ratio scores lack {', '.join(missing)}; compute them for the same parameters")
        return allocation.from_scores({name: scores[name] for name in shapes}, density)

    return allocate


def _fan_in(shape: torch.Size) -> int:
    return math.prod(shape[1:])


def _redraw(param: nn.Parameter, share: float, source: torch.Generator) -> None:
    std = math.sqrt(2.0 / max(1.0, _fan_in(param.shape) * share))
    draw = torch.randn(param.shape, generator=source, dtype=torch.float64) * std
    with torch.no_grad():
        param.copy_(draw)


def _xavier_normal(param: nn.Parameter, source: torch.Generator) -> None:
    field = math.prod(param.shape[2:])
    std = math.sqrt(2.0 / ((param.shape[0] + param.shape[1]) * field))
    with torch.no_grad():
        param.copy_(torch.randn(param.shape, generator=source, dtype=torch.float64) * std)


def dead_lines(masks: Mapping[str, Tensor]) -> dict[str, tuple[int, int]]:
    """Return for every layer how many output rows and how many input columns keep no weight at all."""
    return {
        name: (
            int((~mask.flatten(1).any(dim=1)).sum()),
            int((~mask.transpose(0, 1).flatten(1).any(dim=1)).sum()),
        )
        for name, mask in masks.items()
    }
