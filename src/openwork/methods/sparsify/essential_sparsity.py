"""Essential sparsity: how much of a pre-trained network can be pruned in one shot before its quality drops.

Jaiswal, Liu, Chen, Wang. "The Emergence of Essential Sparsity in Large Pre-trained Models: The Weights that Matter".
NeurIPS 2023.
Claim: pruned once by magnitude, without rounds of pruning and retraining, a pre-trained transformer keeps its quality up to
a sharp dropping point, in N:M patterns too; pre-training makes weights sparse abruptly, and more so with more data.
Equations: theta_p the pre-trained weights, m_s the mask of the largest (1 - s) N of |theta_p| over the matrices of the
blocks; P(s) the quality with theta_p * m_s, (A) as it is or (B) fine-tuned with m_s fixed. The paper does not define the
dropping point. Ours: the first s with P(s) = P(0) - delta, and c of the least squares line a + b1 s + b2 max(s - c, 0) on
the points down to half of P(0) - floor, which counts only where it beats a + b s^p by Akaike's criterion.
Departures: the exact number round(s N) is pruned; layer-wise rounding keeps the total exact; modules are found in any
model that repeats a block; N:M keeps N of M, where the released code prunes N of M; sparsity of checkpoints is measured
free of scale too, as a fixed threshold moves with every rescaling of the weights.
Cost: a forward pass over the evaluation data a grid point, and a fine-tuning a point in (B).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from openwork.cards import Card
from openwork.core import allocation
from openwork.core.masks import Masks
from openwork.core.patterns import NM, parse
from openwork.core.rng import generator
from openwork.core.select import count_of, top
from openwork.errors import MaskError, MethodError, PatternError
from openwork.methods.sparsify import _sparsity_measures
from openwork.methods.sparsify._curve_fits import MARGIN, Hinge, Power
from openwork.methods.sparsify._essential_curve import Curve, Interval, as_examples, check_grid, from_points
from openwork.methods.sparsify._sparsity_measures import Abruptness, Measure, abruptness, gini, hoyer
from openwork.sparsifier.parameters import maskable

__all__ = [
    "CARD", "GRID", "MARGIN", "PROTOCOLS", "Abruptness", "Curve", "Hinge", "Interval", "Power", "Similarity", "abruptness",
    "as_examples", "essential_sparsity", "from_points", "gini", "grid_of", "hoyer", "mask_similarity", "one_shot",
    "points_of", "sparsity_track", "str_scope", "transformer_linears",
]  # fmt: skip

CARD = Card(
    name="essential-sparsity",
    title="The Emergence of Essential Sparsity in Large Pre-trained Models: The Weights that Matter",
    authors=("Ajay Jaiswal", "Shiwei Liu", "Tianlong Chen", "Zhangyang Wang"),
    year=2023,
    venue="NeurIPS",
    link="https://arxiv.org/abs/2306.03805",
    wing="sparsify",
    claim="One-shot magnitude pruning of a pre-trained transformer costs nothing up to a sharp dropping point.",
    entry="essential_sparsity",
    departures=(
        "The dropping point is defined by two numbers, and only where a broken line explains the curve better than a "
        "smooth one.",
        "Exactly round(s N) weights are pruned, layer-wise too.",
        "Any model that repeats a block; the number of layers is not written into the code.",
        "N:M keeps N of M; the released code prunes N of M.",
        "Sparsity of checkpoints is measured free of scale beside the fixed threshold.",
    ),
)

GRID = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
PROTOCOLS = ("prune, evaluate", "prune, fine-tune, evaluate")
SCOPES = ("global", "layer", "random", "erk")

Parameters = Mapping[str, nn.Parameter]
Select = Callable[[nn.Module], Parameters]
Scope = str | NM
Evaluate = Callable[[nn.Module], Any]
Finetune = Callable[[nn.Module, Masks], nn.Module | None]


def transformer_linears(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the weight matrices of the repeated blocks, by name in model order.

    A block is a child of a ModuleList or Sequential whose children are all of one class and more than a bare layer.
    Embeddings, pooler, head, norms, biases and whatever else lies outside the blocks is left out; nothing depends on the
    number of blocks, on names or on the library that the model is from.

    Raises:
        MaskError: if the model repeats no block.
    """
    inside = tuple(f"{name}." for name in _blocks(model))
    frozen = [n for n, param in model.named_parameters() if param.is_floating_point() and not param.requires_grad]
    found: dict[str, nn.Parameter] = {}
    if inside:
        for name in frozen:
            model.get_parameter(name).requires_grad_(True)
        try:
            found = {name: param for name, param in maskable(model).items() if name.startswith(inside)}
        finally:
            for name in frozen:
                model.get_parameter(name).requires_grad_(False)
    if not found:
        raise MaskError(
            f"{type(model).__name__} repeats no block (a ModuleList or Sequential of modules of one class): say which "
            "weights with select, a function from the model to its parameters by name"
        )
    return found


def one_shot(
    model: nn.Module,
    sparsity: float | None,
    scope: Scope = "global",
    *,
    select: Select = transformer_linears,
    seed: int = 0,
) -> Masks:
    """Return the masks that prune a model once; the model itself is left as it is.

    Masks of one scope (and seed) are nested: what a sparsity prunes, a higher one prunes too. That holds exactly for
    all but "erk", where rounding may differ by a weight a layer.

    Args:
        model: any module.
        sparsity: s, the share that is pruned: exactly round(s N) of the N chosen weights. None for an N:M scope is
            1 - N/M.
        scope: "global" keeps the largest |w| over all matrices together; "layer" the same share of every matrix;
            "random" the same share at random; "erk" ERK shares at random; NM(n, m) or "n:m" n of every m consecutive
            weights along the input dimension. At sparsity k/m below 1 - n/m an N:M scope keeps m - k of every m.
        select: which weights.
        seed: of random masks.

    Raises:
        MethodError: if the scope is unknown, or the sparsity out of range or not one that the pattern has.
        PatternError: if m does not divide the input dimension of a matrix, which is named.
        MaskError: if a weight is not finite, or nothing is chosen.
    """
    params = dict(select(model))
    if not params:
        raise MaskError("select chose no weights")
    pattern = _pattern(scope)
    if pattern is not None:
        return _nm(model, params, pattern, _nm_sparsity(sparsity, pattern))
    if sparsity is None or isinstance(sparsity, bool) or not 0.0 <= sparsity <= 1.0:
        raise MethodError(f"sparsity={sparsity!r} is not in [0, 1]; it is the share of weights that is pruned")
    sizes = {name: param.numel() for name, param in params.items()}
    kept = sum(sizes.values()) - count_of(sparsity, sum(sizes.values()))
    if scope == "global":
        scores = {name: param.detach().abs() for name, param in params.items()}
        return Masks(_on_devices(allocation.top_globally(_cpu(scores), kept / max(1, sum(sizes.values()))), params))
    counts = _equal_shares(sizes, sparsity)
    if scope == "layer":
        return Masks({name: top(param.detach().abs(), counts[name]) for name, param in params.items()})
    if scope == "erk":
        shapes = {name: param.shape for name, param in params.items()}
        counts = {n: round(d * sizes[n]) for n, d in allocation.erk(shapes, kept / sum(sizes.values())).items()}
    return Masks(_on_devices({
        name: top(torch.rand(param.shape, generator=generator(seed, "one-shot", name), dtype=torch.float64), counts[name])
        for name, param in params.items()
    }, params))  # fmt: skip


def essential_sparsity(
    model_factory: Callable[[], nn.Module],
    evaluate: Evaluate,
    grid: Iterable[float] | None = None,
    scope: Scope = "global",
    *,
    finetune: Finetune | None = None,
    floor: float = 0.0,
    select: Select = transformer_linears,
    seed: int = 0,
    known: Mapping[float, Any] | None = None,
    done: Callable[[float, Any], None] | None = None,
) -> Curve:
    """Measure the curve of quality against one-shot sparsity, every point from untouched weights.

    Args:
        model_factory: returns the pre-trained model, with the same weights at every call.
        evaluate: model -> its quality, higher is better: a number, or one an example (the same examples at every call),
            from which intervals are made.
        grid: sparsities from 0 on; None is 0, 0.1, ..., 0.9, or all that an N:M scope has.
        scope: as in `one_shot`.
        finetune: (model, masks) -> the model, trained with the masks held; None evaluates as it is pruned.
        floor: quality of a guess.
        select: which weights, as in `one_shot`.
        seed: of random masks.
        known: what `evaluate` gave before, by sparsity: these points are not measured again.
        done: called with sparsity and what `evaluate` gave, after each point.

    Returns:
        the curve, labelled with scope and protocol.

    Raises:
        MethodError: if the grid does not ascend from 0, the factory gives other weights at a later call, or a quality is
            not finite.
        MaskError: if a fine-tuned model is not zero where it is masked.
    """
    points = points_of(grid, scope)
    found = {float(s): value for s, value in (known or {}).items() if float(s) in points}
    untouched = ""
    for s in points:
        if s in found:
            continue
        model = model_factory()
        untouched = _unchanged(model, select, untouched)
        masks = one_shot(model, s, scope, select=select, seed=seed)
        masks.apply(model)
        if finetune is not None:
            trained = finetune(model, masks)
            model = model if trained is None else trained
            masks.check(model)
        found[s] = as_examples(evaluate(model), s)
        if done is not None:
            done(s, found[s])
    return from_points(found, floor, str_scope(scope), PROTOCOLS[finetune is not None])


def grid_of(scope: Scope) -> tuple[float, ...]:
    """Return the default grid: 0, 0.1, ..., 0.9, or 0, 1/m, ..., 1 - n/m for an N:M scope."""
    pattern = _pattern(scope)
    return GRID if pattern is None else tuple(k / pattern.m for k in range(pattern.m - pattern.n + 1))


def points_of(grid: Iterable[float] | None, scope: Scope) -> tuple[float, ...]:
    """Return the points of a grid, the scope's own if it is None.

    Raises:
        MethodError: if the grid does not ascend from 0, the scope is unknown, or it has no such sparsity.
    """
    points = check_grid(grid_of(scope) if grid is None else tuple(map(float, grid)))
    pattern = _pattern(scope)
    for s in points if pattern is not None else ():
        _nm_sparsity(s, pattern)
    return points


def str_scope(scope: Scope) -> str:
    """Return a scope as a word: "global" or "2:4"."""
    pattern = _pattern(scope)
    return str(scope) if pattern is None else f"{pattern.n}:{pattern.m}"


def sparsity_track(
    checkpoints: Mapping[Any, nn.Module | Mapping[str, Tensor]],
    measures: Mapping[str, Measure] | None = None,
    *,
    select: Select = transformer_linears,
) -> list[dict[str, Any]]:
    """Return how sparse the weights of every checkpoint are: a row a checkpoint with its key as `checkpoint`.

    Args:
        checkpoints: key (a step, say) -> a model, or weights by name.
        measures: name -> function of the weights by name. By default `near_zero`, the share of |w| < 0.01, which any
            rescaling moves; and free of scale, `small`, the share of |w| < 0.1 sd of the matrix, and `hoyer` and `gini`,
            means over the matrices weighted by size.
        select: which weights of a model.

    Raises:
        MethodError: if there is nothing to measure, or a checkpoint has other weights than the first.
    """
    chosen = _sparsity_measures.measures() if measures is None else measures
    return _sparsity_measures.sparsity_track(checkpoints, chosen, select)


@dataclass(frozen=True)
class Similarity:
    """How alike two masks are.

    Attributes:
        jaccard: kept in both / kept in either.
        cosine: kept in both / sqrt(kept in one * kept in the other).
        chance_jaccard: the same for independent masks of these densities, d / (2 - d) for two of density d.
        chance_cosine: likewise, d for two of density d.
    """

    jaccard: float
    cosine: float
    chance_jaccard: float
    chance_cosine: float


def mask_similarity(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Similarity:
    """Return how alike two masks over the same weights are, next to what independent masks would give.

    Raises:
        MaskError: if they do not cover the same weights.
    """
    if set(a) != set(b) or any(a[name].shape != b[name].shape for name in a):
        raise MaskError("the two masks do not cover the same weights; compare masks of one model and one choice of weights")
    total = sum(mask.numel() for mask in a.values())
    one, two = (sum(int(mask.sum()) for mask in masks.values()) for masks in (a, b))
    both = sum(int((a[name] & b[name].to(a[name].device)).sum()) for name in a)
    expected = one * two / max(1, total)
    return Similarity(
        _ratio(both, one + two - both), _ratio(both, math.sqrt(one * two)),
        _ratio(expected, one + two - expected), _ratio(expected, math.sqrt(one * two)),
    )  # fmt: skip


def _blocks(model: nn.Module) -> list[str]:
    """Return the names of all blocks: children, of one class and with children of their own, of a list of modules."""
    found = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential) or (isinstance(module, nn.Sequential) and len(module) < 2):
            continue
        children = [child for _, child in module.named_children()]
        if children and len({type(child) for child in children}) == 1 and any(True for _ in children[0].children()):
            found += [f"{name}.{local}" if name else local for local, _ in module.named_children()]
    return found


def _equal_shares(sizes: Mapping[str, int], sparsity: float) -> dict[str, int]:
    """Return kept counts that prune the same share of every matrix and round(s N) in all.

    Webster's apportionment of what is pruned: every matrix loses round(t n) for one t near s, ties in model order. With
    rising s no count of pruned weights ever falls, as it can by largest remainder, so that masks are nested.
    """
    pruned = {name: count_of(sparsity, size) for name, size in sizes.items()}
    over = sum(pruned.values()) - count_of(sparsity, sum(sizes.values()))
    order = {name: place for place, name in enumerate(sizes)}

    def turn(name: str, extra: float) -> tuple[float, int]:
        """Return when a matrix loses its next weight (.5) or lost its last one (-.5), as s rises."""
        return (pruned[name] + extra) / sizes[name], order[name]

    for _ in range(abs(over)):
        if over > 0:
            pruned[max((n for n in sizes if pruned[n]), key=lambda n: turn(n, -0.5))] -= 1
        else:
            pruned[min((n for n in sizes if pruned[n] < sizes[n]), key=lambda n: turn(n, 0.5))] += 1
    return {name: size - pruned[name] for name, size in sizes.items()}


def _pattern(scope: Scope) -> NM | None:
    if isinstance(scope, NM):
        return scope
    if isinstance(scope, str) and ":" in scope:
        try:
            found = parse(scope)
        except PatternError as error:
            raise MethodError(f"scope={scope!r}: {error}") from error
        assert isinstance(found, NM)
        return found
    if scope not in SCOPES:
        raise MethodError(f"scope={scope!r} is unknown; use one of {', '.join(SCOPES)}, or N:M such as 2:4")
    return None


def _nm_sparsity(sparsity: float | None, pattern: NM | None) -> float:
    """Return the sparsity of an N:M pattern; check that it is one of 0, 1/m, ..., 1 - n/m."""
    assert pattern is not None
    most = 1.0 - pattern.n / pattern.m
    if sparsity is None:
        return most
    steps = round(sparsity * pattern.m) if 0.0 <= sparsity <= 1.0 else -1
    if not 0 <= steps <= pattern.m - pattern.n or abs(steps / pattern.m - sparsity) > 1e-9:
        raise MethodError(
            f"sparsity={sparsity!r}: {pattern.n}:{pattern.m} keeps {pattern.n} or more of every {pattern.m}, so it prunes "
            f"multiples of 1/{pattern.m} up to {most:g}"
        )
    return sparsity


def _nm(model: nn.Module, params: Parameters, pattern: NM, sparsity: float) -> Masks:
    masks = {}
    for name, param in params.items():
        laid = replace(pattern, dim=_input_dimension(model, name, param))
        try:
            masks[name] = laid.select(param.detach().abs(), 1.0 - sparsity)
        except PatternError as error:
            raise PatternError(f"{name}: {error}") from error
    return Masks(masks)


def _input_dimension(model: nn.Module, name: str, param: Tensor) -> int:
    """Return the dimension along which a weight's inputs lie: 1, but 0 for transformers' Conv1D and the last for stacks."""
    owner = model.get_submodule(name.rpartition(".")[0])
    if any(cls.__name__ == "Conv1D" for cls in type(owner).__mro__):
        return 0
    convolution = isinstance(owner, nn.modules.conv._ConvNd)
    return 1 if convolution or param.dim() < 3 else param.dim() - 1


def _unchanged(model: nn.Module, select: Select, before: str) -> str:
    """Return a digest of the chosen weights; raise a MethodError if it differs from the one before."""
    digest = hashlib.sha256()
    for name, param in select(model).items():
        raw = param.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(name.encode() + raw.numpy().tobytes())
    found = digest.hexdigest()
    if before and found != before:
        raise MethodError(
            "model_factory gave other weights than at its first call; return a fresh copy of the pre-trained model each time"
        )
    return found


def _cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.cpu() for name, tensor in tensors.items()}


def _on_devices(masks: Mapping[str, Tensor], params: Parameters) -> dict[str, Tensor]:
    return {name: mask.to(params[name].device) for name, mask in masks.items()}


def _ratio(part: float, whole: float) -> float:
    """Return part / whole, 1 for two empty masks: they are the same."""
    return part / whole if whole else 1.0
