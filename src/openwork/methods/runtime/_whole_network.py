"""The rearrangement of a whole network: saliencies of its layers, an order for each class of channels, moving them."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from openwork.core.patterns import KernelGroup, Pattern, parse
from openwork.errors import MaskError, MethodError, ModelError, PatternError
from openwork.methods.runtime import _rearrange
from openwork.methods.runtime._rearrange import Rows
from openwork.runtime.timing import limited_threads
from openwork.sparsifier.parameters import Choice, maskable, unwrap
from openwork.sparsifier.permute import ChannelClass, Moves, channel_classes, inverse, permute
from openwork.sparsifier.tracing import call_arguments, quietly

Criterion = Literal["magnitude", "squared", "taylor"]

DRIFT = 1e-3
"""Most that outputs may differ, against the largest of them: what rounding in another order does is far below."""


@dataclass(frozen=True)
class ByOperator(Pattern):
    """Kernel groups of one kind for 1x1 convolutions and linear layers, of another for larger kernels."""

    pointwise: KernelGroup
    spatial: KernelGroup

    def of(self, shape: torch.Size) -> KernelGroup:
        """Return the pattern of a weight of `shape`."""
        return self.spatial if math.prod(shape[2:]) > 1 else self.pointwise

    def tiles(self, score: Tensor) -> Tensor:
        """Return the unit scores that the weight's pattern gives."""
        return self.of(score.shape).tiles(score)

    def untile(self, units: Tensor, shape: torch.Size) -> Tensor:
        """Return the mask that the weight's pattern gives."""
        return self.of(shape).untile(units, shape)

    def sizes(self, shape: torch.Size) -> Tensor:
        """Return how many weights each unit has."""
        return self.of(shape).sizes(shape)

    def width(self, shape: torch.Size) -> int:
        """Return how many units compete with one another in a weight of `shape`."""
        return self.tiles(torch.empty(shape, device="meta")).shape[1]

    @property
    def balanced(self) -> bool:  # type: ignore[override]
        """Tell whether every group of some operator keeps its own number."""
        return self.pointwise.balanced or self.spatial.balanced


@dataclass(frozen=True)
class Gain:
    """What a rearrangement does for one weight; saliencies are sums of the criterion.

    Attributes:
        name: of the weight.
        classes: the classes of channels that its rows belong to.
        group: channels of a group.
        units: number of units.
        kept: units that stay.
        total: saliency of all single entries.
        before: saliency of the kept units with the channels as they were.
        after: the same after the rearrangement.
        bound: saliency of as many best single entries, which no grouping exceeds.
        reason: why the rows stayed where they are; empty if they could move.
    """

    name: str
    classes: tuple[str, ...]
    group: int
    units: int
    kept: int
    total: float
    before: float
    after: float
    bound: float
    reason: str = ""


@dataclass(frozen=True)
class Report:
    """What a rearrangement did.

    Attributes:
        kept_before: kept share of the saliency of all weights together, with the channels as they were.
        kept_after: the same after the rearrangement.
        bound: the share that as many best single entries have.
        layers: weight by weight.
        orders: class -> the channel that came to each place, int64; classes that did not move are left out.
        moves: where the entries of every tensor came from.
        traces: class -> J of its best start and after every swap.
        drift: largest difference of the outputs on the example against the largest output; None without an example.
    """

    kept_before: float
    kept_after: float
    bound: float
    layers: tuple[Gain, ...]
    orders: Mapping[str, Tensor] = field(default_factory=dict)
    moves: Moves = field(default_factory=dict)
    traces: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    drift: float | None = None


def rearrange(
    model: nn.Module,
    pattern: KernelGroup | ByOperator | str,
    density: float | Mapping[str, float],
    *,
    example: Any = None,
    criterion: Criterion = "magnitude",
    search: str = "greedy+swap",
    budget_s: float | None = None,
    trials: int | None = None,
    seed: int = 0,
    parameters: Choice = None,
    exclude: Iterable[str] = (),
    depthwise: bool = False,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    copies: Sequence[nn.Module] = (),
    grads: Mapping[str, Tensor] | None = None,
) -> Report:
    """Move the channels of `model`, in place, so that kernel groups keep more saliency; its function does not change.

    Args:
        model: any module whose forward torch.fx can trace; where it cannot, the channels stay, with the reason.
        pattern: the kernel groups to come, or their word ("group8").
        density: kept share of the units of every weight, or of each by name.
        example: what the model is called with. With it the outputs before and after are held against each other.
        criterion: "magnitude" sum |w|, "squared" sum w^2, or "taylor" |sum w dL/dw|.
        search: "greedy+swap", "sort" (by norm), "identity" (measure only), or "exact" for tiny layers.
        budget_s: seconds to search; None searches to the end. With it the result depends on the machine's speed.
        trials: channels without gain after which the search of a class stops; None looks at all.
        seed: of the order in which channels are looked at.
        parameters: which weights will be pruned (see `openwork.sparsifier.parameters.maskable`).
        exclude: names or globs of weights that will not.
        depthwise: depthwise convolutions will be pruned too.
        optimizer: one or several whose state moves along.
        copies: models with the same names that move along (moving averages).
        grads: gradients by name for "taylor"; None takes those of the parameters.

    Returns:
        what was gained, weight by weight, and what moved.

    Raises:
        MethodError: for an unknown word, a missing gradient, or an exact search that would take too long.
        PatternError: if the pattern is not one of kernel groups.
        ModelError: if the example does not fit, or the outputs differ afterwards (the channels are then moved back).
        MaskError: if there is no weight to prune, or a saliency is not finite.
    """
    model, pattern = unwrap(model), _by_operator(pattern)
    leave = [exclude] if isinstance(exclude, str) else list(exclude)
    params = maskable(model, parameters, leave if depthwise else [*leave, *depthwise_weights(model)])
    shares = density if isinstance(density, Mapping) else dict.fromkeys(params, density)
    if missing := [name for name in params if name not in shares]:
        raise MethodError(f"density names no share for {', '.join(missing)}; give one for every weight, or exclude it")
    gradients = {name: param.grad for name, param in params.items()} if grads is None else grads
    classes = channel_classes(model, example)
    deadline = math.inf if budget_s is None else time.monotonic() + budget_s
    with limited_threads(1):  # many short operations: sharing them costs more than it saves
        rows = {
            id(param): _rows(name, param.detach(), gradients.get(name), pattern.of(param.shape), shares[name], criterion)
            for name, param in params.items()
        }
        users = _users(model, classes, rows)
        found = _search(users, search, seed, trials, deadline)
        orders = {cls: one.order for cls, one in found.items() if not torch.equal(one.order, torch.arange(cls.size))}
        gains = _gains(rows, users, orders)
        if _is_loss(gains, users):
            orders = {cls: order for cls, order in orders.items() if not _is_split(cls, users[cls])}
            gains = _gains(rows, users, orders)
    moves, drift = _move(model, orders, example, optimizer, copies)
    total = sum(gain.total for gain in gains) or 1.0
    return Report(
        kept_before=sum(gain.before for gain in gains) / total,
        kept_after=sum(gain.after for gain in gains) / total,
        bound=sum(gain.bound for gain in gains) / total,
        layers=tuple(gains),
        orders={cls.name: order for cls, order in orders.items()},
        moves=moves,
        traces={cls.name: tuple(one.trace) for cls, one in found.items()},
        drift=drift,
    )


def depthwise_weights(model: nn.Module) -> list[str]:
    """Return the names of the weights of depthwise convolutions."""
    convolutions = nn.Conv1d | nn.Conv2d | nn.Conv3d
    layers = {f"{name}.weight".removeprefix("."): module for name, module in model.named_modules()}
    names = {name for name, m in layers.items() if isinstance(m, convolutions) and 1 < m.groups == m.in_channels}
    return [name for name, _ in model.named_parameters() if name in names]


def scores(weight: Tensor, grad: Tensor | None, criterion: Criterion, pattern: Pattern) -> Tensor:
    """Return scores of the weight's shape whose sum over a unit ranks the unit as the criterion does."""
    score = _entries(weight.detach(), grad, criterion, "")
    return pattern.untile(pattern.tiles(score).abs(), weight.shape) if criterion == "taylor" else score


def _by_operator(pattern: KernelGroup | ByOperator | str) -> ByOperator:
    made = parse(pattern) if isinstance(pattern, str) else pattern
    if isinstance(made, KernelGroup):
        return ByOperator(made, made)
    if not isinstance(made, ByOperator):
        raise PatternError(f"channels are rearranged for kernel groups, not for {pattern}; use KernelGroup(8) or 'group8'")
    return made


def _entries(weight: Tensor, grad: Tensor | None, criterion: str, name: str) -> Tensor:
    if criterion == "magnitude":
        return weight.abs()
    if criterion == "squared":
        return weight.square()
    if criterion != "taylor":
        raise MethodError(f"criterion={criterion!r}: use 'magnitude', 'squared' or 'taylor'")
    if grad is None:
        raise MethodError(f"criterion='taylor' needs the gradient of {name!r}; call loss.backward() first, or pass grads")
    return weight * grad.detach()


def _rows(name: str, weight: Tensor, grad: Tensor | None, pattern: KernelGroup, density: float, criterion: str) -> Rows:
    """Return the saliencies of a weight as (channels, columns of the pattern)."""
    entries = _entries(weight, grad, criterion, name).cpu()
    wide = entries if entries.dtype in (torch.float32, torch.float64) else entries.float()
    if not bool(wide.isfinite().all()):
        raise MaskError(f"the saliencies of {name!r} are not finite; its weights or gradients hold NaN or infinity")
    tiles = pattern.tiles(wide)
    count = min(tiles.shape[1], max(1, pattern.quota(density, tiles.shape[1])))
    flat = wide.reshape(wide.shape[0], wide.shape[1], -1)
    columns = flat.sum(dim=2) if pattern.unit == "kernel" else flat.flatten(1)
    return Rows(name, columns.contiguous(), pattern.out, count, pattern.balanced)


# ---- classes and the rows that they move ------------------------------------------------------------------------------

Uses = list[tuple[Rows, int]]
"""Weights whose rows a class moves, with the first of these rows."""


def _users(model: nn.Module, classes: Sequence[ChannelClass], rows: Mapping[int, Rows]) -> dict[ChannelClass, Uses]:
    """Return, for every class, the weights to be pruned whose rows it moves; tied weights once."""
    found: dict[ChannelClass, Uses] = {}
    for cls in classes:
        uses = {}
        for share in (*cls.producers, *cls.tied):
            weight = getattr(model.get_submodule(share.layer), "weight", None) if share.dim is None else None
            if id(weight) in rows:
                uses[id(weight), share.offset] = rows[id(weight)], share.offset
        found[cls] = list(uses.values())
    return found


def _is_split(cls: ChannelClass, uses: Uses) -> bool:
    """Tell whether a class moves only a part of some weight's rows, so that classes depend on one another."""
    return any(len(rows.saliency) != cls.size for rows, _ in uses)


def _search(
    users: Mapping[ChannelClass, Uses], how: str, seed: int, trials: int | None, deadline: float
) -> dict[ChannelClass, _rearrange.Found]:
    """Search class after class; each may use its share, by size, of the time that is left."""
    movable = {cls: _parts(cls, uses) for cls, uses in users.items() if not cls.fixed}
    movable = {cls: parts for cls, parts in movable.items() if parts}
    costs = {cls: cls.size**2 * sum(part.saliency.shape[1] for part in parts) for cls, parts in movable.items()}
    left, found = sum(costs.values()), {}
    for cls, parts in movable.items():
        now = time.monotonic()
        until = deadline if deadline == math.inf else now + max(0.0, deadline - now) * costs[cls] / max(1, left)
        found[cls] = _rearrange.search(parts, how, seed=seed, trials=trials, deadline=until)
        left -= costs[cls]
    return found


def _parts(cls: ChannelClass, uses: Uses) -> list[Rows]:
    """Return what a class is searched for: whole weights, and blocks of rows that begin with a group."""
    parts = []
    for rows, offset in uses:
        channels = len(rows.saliency)
        if offset == 0 and channels == cls.size:
            parts.append(rows)
        elif offset % rows.group == 0:
            part = rows.saliency[offset : offset + cls.size]
            kept = rows.kept if rows.balanced else round(rows.kept * cls.size / channels)
            parts.append(Rows(rows.name, part, rows.group, kept, rows.balanced))
    return parts


def _gains(
    rows: Mapping[int, Rows], users: Mapping[ChannelClass, Uses], orders: Mapping[ChannelClass, Tensor]
) -> list[Gain]:
    """Measure every weight with its channels as they were and in their new order."""
    gains = []
    for one in rows.values():
        owners = [(cls, offset) for cls, uses in users.items() for used, offset in uses if used is one]
        before, order = torch.arange(len(one.saliency)), torch.arange(len(one.saliency))
        for cls, offset in owners:
            if cls in orders:
                order[offset : offset + cls.size] = offset + orders[cls]
        old, new = one.units(before), one.units(order)
        gains.append(Gain(
            name=one.name, classes=tuple(cls.name for cls, _ in owners), group=one.group, units=old.numel(),
            kept=one.kept * (one.groups if one.balanced else 1),
            total=float(one.saliency.abs().sum(dtype=torch.float64)), before=one.measure(old)[0],
            after=one.measure(new)[0], bound=max(one.bound(old), one.bound(new)),
            reason="; ".join(dict.fromkeys(cls.reason for cls, _ in owners if cls.fixed)),
        ))  # fmt: skip
    return gains


def _is_loss(gains: Sequence[Gain], users: Mapping[ChannelClass, Uses]) -> bool:
    """Tell whether the weights of classes that share a weight keep less than before."""
    names = {rows.name for cls, uses in users.items() if _is_split(cls, uses) for rows, _ in uses}
    return sum(gain.after - gain.before for gain in gains if gain.name in names) < 0


def _move(
    model: nn.Module,
    orders: Mapping[ChannelClass, Tensor],
    example: Any,
    optimizer: Optimizer | Sequence[Optimizer] | None,
    copies: Sequence[nn.Module],
) -> tuple[Moves, float | None]:
    """Move the channels, back again if the outputs on the example change."""
    before = None if example is None else _outputs(model, example)
    moves: Moves = {}
    for cls, order in orders.items():
        for name, dims in permute(model, cls, order, optimizer, copies=copies).items():
            known = moves.setdefault(name, {})
            for dim, index in dims.items():
                known[dim] = known[dim][index] if dim in known else index
    if before is None:
        return moves, None
    after = _outputs(model, example)
    scale = max((float(one.abs().max()) for one in before if one.numel()), default=0.0)
    gaps = [float((one - other).abs().max()) for one, other in zip(before, after, strict=True) if one.numel()]
    drift = max(gaps, default=0.0) / (scale or 1.0)
    if not drift <= DRIFT:
        for cls, order in reversed([*orders.items()]):
            permute(model, cls, inverse(order), optimizer, copies=copies)
        raise ModelError(
            f"the outputs of {type(model).__name__} on the example differ by {drift:.2g} of the largest after its channels "
            "moved, so its forward uses their places unseen; they were moved back: leave it as it is"
        )
    return moves, drift


def _outputs(model: nn.Module, example: Any) -> list[Tensor]:
    args, kwargs = call_arguments(example)
    with quietly(model):
        return [one.double() for one in pytree.tree_leaves(model(*args, **kwargs)) if isinstance(one, Tensor)]
