"""The search for an order of channels in which groups of neighbours share their important columns.

For one class of channels with saliencies A (channels, columns) of each layer that makes them, a group P of g channels
gives the units s[P, c] = |sum of A[o, c] over o in P|. J is the sum of the K best units of every layer. A swap of two
channels changes two groups, so with the threshold t of a layer held still its gain is
sum over the two groups of (s' - t)+ - (s - t)+. Since J = min over t of K t + sum (s - t)+, this is never below the
gain of J: it ranks all swaps of a channel at once, and only the best are evaluated exactly. With a smaller group at the
end, whose units compete by their mean, it is an estimate.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from openwork.core.rng import generator as named_generator
from openwork.core.select import top, top_rows
from openwork.errors import MethodError

CHUNK = 1 << 17
"""Numbers that are worked on at a time: what a core's cache holds."""
TRIED = 8
"""Swaps of one channel that are evaluated exactly, best first."""
PARTITIONS = 200_000
"""Most partitions that an exact search goes through."""
LEAST = 1e-9
"""Least gain of a swap, as a share of J: rounding is below it."""
SMALL = 1 << 20
"""Classes whose sweep takes at most so many steps are searched from several starts."""
STARTS = 3, 12
"""Further starts, at random, of such classes, and of those of up to 16 channels."""


@dataclass(frozen=True)
class Rows:
    """What the search needs to know of the rows of one weight.

    Attributes:
        name: of the weight.
        saliency: (channels, columns) on the CPU, floating point; negative numbers only where units take the absolute
            value of their sum (first order).
        group: channels of a group; the last one is smaller where it does not divide them.
        kept: units that stay, of the layer, or of each group if `balanced`.
        balanced: every group keeps the same number.
    """

    name: str
    saliency: Tensor
    group: int
    kept: int
    balanced: bool = False

    @property
    def groups(self) -> int:
        """Number of groups."""
        return -(-len(self.saliency) // self.group)

    def sizes(self) -> Tensor:
        """Return the number of channels of each group, int64 (groups,)."""
        sizes = torch.full((self.groups,), self.group)
        sizes[-1] = len(self.saliency) - self.group * (self.groups - 1)
        return sizes

    def units(self, order: Tensor) -> Tensor:
        """Return the unit sums (groups, columns) with channel `order[i]` at place i."""
        return torch.stack([self.saliency[members.sort().values].sum(0) for members in torch.split(order, self.group)])

    def mask(self, units: Tensor) -> Tensor:
        """Return which units `KernelGroup` keeps, bool (groups, columns)."""
        values = self._scaled(units.abs())
        return top_rows(values, self.kept) if self.balanced else top(values, self.kept)

    def measure(self, units: Tensor) -> tuple[float, Tensor]:
        """Return J of unit sums, and for each group the sum from which on a unit is kept, (groups, 1)."""
        values, (groups, columns) = units.abs(), units.shape
        width = columns if self.balanced else groups * columns
        if self.kept in (0, width):
            return (float(values.sum(dtype=torch.float64)) if self.kept else 0.0), values.new_full(
                (groups, 1), -1.0 if self.kept else math.inf
            )
        sizes = self.sizes()
        if self.balanced:
            ranked = np.partition(values.numpy(), width - self.kept, axis=1)[:, width - self.kept :]
            return float(ranked.sum(dtype=np.float64)), torch.from_numpy(ranked[:, :1].copy())
        if int(sizes[-1]) == self.group:
            ranked = np.partition(values.numpy().reshape(-1), width - self.kept)[width - self.kept :]
            return float(ranked.sum(dtype=np.float64)), values.new_full((groups, 1), float(ranked[0]))
        scaled = self._scaled(values).numpy()
        edge = np.partition(scaled.reshape(-1), width - self.kept)[width - self.kept]
        kept = scaled >= edge
        if kept.sum() > self.kept:  # ties
            kept = self.mask(units).numpy()
        edges = float(edge) * (sizes / self.group).to(values.dtype)
        return float(values.numpy()[kept].sum(dtype=np.float64)), edges.unsqueeze(1)

    def bound(self, units: Tensor) -> float:
        """Return the saliency of as many best single entries as the kept units have: no grouping keeps more."""
        count = int((self.mask(units) * self.sizes().unsqueeze(1)).sum())
        entries = self.saliency.abs().reshape(-1)
        return float(entries.topk(count).values.sum(dtype=torch.float64))

    def _scaled(self, values: Tensor) -> Tensor:
        return values * (self.group / self.sizes().to(values.dtype)).unsqueeze(1)


@dataclass
class Found:
    """The outcome for one class.

    Attributes:
        order: channel at each place, int64.
        trace: J of the best start, and after every swap that was made.
        tried: channels whose swaps were looked at.
    """

    order: Tensor
    trace: list[float]
    tried: int = 0


class _State:
    """One layer under a changing order: unit sums, thresholds, and each channel's group without it.

    In numpy, whose loops are of one thread: these are too short to share.
    """

    def __init__(self, rows: Rows, order: Tensor) -> None:
        self.rows, self.saliency = rows, rows.saliency.numpy()
        self.is_uneven = rows.groups > 1 and not rows.balanced and int(rows.sizes()[-1]) != rows.group
        self.is_signed = bool((self.saliency < 0).any())
        self.group_of = np.empty(len(order), dtype=np.int64)
        self.group_of[order.numpy()] = np.arange(len(order)) // rows.group
        self.units = rows.units(order).numpy()
        self.rest = self.units[self.group_of] - self.saliency
        self._measure()

    def gains(self, channel: int) -> NDArray[Any]:
        """Return, for every channel, what swapping it with `channel` gains at most (with a smaller group: about)."""
        mine = self.group_of[channel]
        joins, leaves = self.saliency[channel], self.rest[channel]
        found = np.empty(len(self.saliency))
        step = max(1, CHUNK // max(1, self.saliency.shape[1]))
        for start in range(0, len(found), step):
            part = slice(start, start + step)
            theirs = self._above(self.rest[part] + joins, self.edge[self.group_of[part]])
            found[part] = theirs + self._above(self.saliency[part] + leaves, self.edge[mine])
        found -= self.above[self.group_of] + self.above[mine]
        found[self.group_of == mine] = 0.0
        return found

    def after(self, one: int, other: int) -> tuple[float, NDArray[Any] | None]:
        """Return J after swapping two channels, and the sums of their two groups."""
        pair = self.group_of[[one, other]]
        if pair[0] == pair[1]:
            return self.value, None
        old = self.units[pair]
        new = np.stack([self._sum(pair[0], one, other), self._sum(pair[1], other, one)])
        self.units[pair] = new
        value = self.rows.measure(torch.from_numpy(self.units))[0]
        self.units[pair] = old
        return value, new

    def swap(self, one: int, other: int, sums: NDArray[Any] | None) -> None:
        """Swap two channels; `sums` are those that `after` gave."""
        if sums is None:
            return
        pair = self.group_of[[one, other]]
        self.group_of[[one, other]] = pair[::-1]
        self.units[pair] = sums
        for group in pair:
            members = np.flatnonzero(self.group_of == group)
            self.rest[members] = self.units[group] - self.saliency[members]
        self._measure()

    def _sum(self, group: int, leaves: int, joins: int) -> NDArray[Any]:
        """Return a group's sums with one channel for another; in channel order, so that a set has one sum."""
        members = np.flatnonzero(self.group_of == group)
        members[members == leaves] = joins
        return self.saliency[np.sort(members)].sum(axis=0)  # type: ignore[no-any-return]

    def _measure(self) -> None:
        self.value, edge = self.rows.measure(torch.from_numpy(self.units))
        self.edge = edge.numpy()
        self.above = self._above(self.units.copy(), self.edge)

    def _above(self, units: NDArray[Any], edge: NDArray[Any]) -> NDArray[Any]:
        """Return how much the units of each row exceed its threshold in sum; overwrites `units`."""
        if self.is_signed:
            np.abs(units, out=units)
        units -= edge
        if self.is_uneven:  # a kept unit takes the place of a whole group's, whatever its own threshold is
            units = np.where(units > 0, units + (edge - self.edge[0]), 0)
        else:
            np.maximum(units, 0, out=units)
        return units.sum(axis=1)  # type: ignore[no-any-return]


def search(
    layers: Sequence[Rows], how: str, *, seed: int = 0, trials: int | None = None, deadline: float = math.inf
) -> Found:
    """Return an order of the channels that all `layers` make, with J at least that of the order they are in.

    Args:
        layers: of one class, all with the same number of channels.
        how: "greedy+swap", "sort" (by norm, unless that is worse), "identity" or "exact".
        seed: of the order in which channels are looked at, and of further starts for small classes.
        trials: channels without gain in a row after which the search stops; None looks at all, so that it ends where no
            swap gains.
        deadline: reading of `time.monotonic` at which to stop.

    Raises:
        MethodError: for an unknown word, or if an exact search would take too long.
    """
    channels = len(layers[0].saliency)
    identity = torch.arange(channels)
    if how == "identity" or all(layer.group in (1, channels) for layer in layers):
        return Found(identity, [value(layers, identity)])
    if how == "exact":
        return _exact(layers)
    starts = [identity, by_norm(layers)]
    if how == "sort":
        return _best([Found(start, [value(layers, start)]) for start in starts])
    if how != "greedy+swap":
        raise MethodError(f"search={how!r}: use 'greedy+swap', 'sort', 'identity' or 'exact'")
    starts.append(greedy(layers))
    draw = named_generator(seed, "rearrange", channels, *(layer.name for layer in layers))
    limit = channels if trials is None else trials
    if channels * channels * sum(layer.saliency.shape[1] for layer in layers) <= SMALL:
        starts += [torch.randperm(channels, generator=draw) for _ in range(STARTS[channels <= 16])]
        return _best([climb(layers, start, draw, limit, deadline) for start in starts])
    values = [value(layers, start) for start in starts]
    return climb(layers, starts[int(np.argmax(values))], draw, limit, deadline)


def by_norm(layers: Sequence[Rows]) -> Tensor:
    """Return the channels by falling norm: their saliency summed over all layers."""
    return _norms(layers).argsort(descending=True, stable=True)


def greedy(layers: Sequence[Rows]) -> Tensor:
    """Return the order of greedy balanced clustering.

    Each group starts from the channel of largest norm that is left and takes, one at a time, the channel with the most
    saliency in the group's best columns, as many as a group keeps on average.
    """
    columns = torch.cat([layer.saliency.abs() for layer in layers], dim=1)
    group, fit, total = max(layer.group for layer in layers), _norms(layers), torch.zeros(columns.shape[1])
    norms, order, taken = fit, torch.empty(len(columns), dtype=torch.int64), torch.zeros(len(columns), dtype=torch.bool)
    for place in range(len(order)):
        if place % group == 0:
            fit, total = norms, torch.zeros_like(columns[0])
        one = int(fit.masked_fill(taken, -1.0).argmax())
        order[place], taken[one] = one, True
        total += columns[one]
        fit = columns @ _best_columns(layers, total)
    return order


def climb(layers: Sequence[Rows], start: Tensor, draw: torch.Generator, trials: int, deadline: float = math.inf) -> Found:
    """Swap channels of different groups as long as that raises J.

    Channels whose groups have just changed are looked at first, then all others. The end is reached when no channel has
    a swap that gains, or after `trials` channels in a row without one.
    """
    order = start.clone()
    states = [_State(rows, order) for rows in layers]
    found = Found(order, [sum(state.value for state in states)])
    fresh, stale = np.ones(len(order), dtype=bool), np.zeros(len(order), dtype=bool)
    while stale.sum() < min(trials, len(order)):
        waiting = fresh if fresh.any() else ~stale
        for channel in torch.randperm(len(order), generator=draw).tolist():
            if not waiting[channel]:
                continue
            if time.monotonic() > deadline:
                return found
            found.tried += 1
            other = _step(states, order, channel, found)
            fresh[channel], stale[channel] = False, True
            if other is not None:
                stale[:] = False
                for state in states:
                    fresh |= np.isin(state.group_of, state.group_of[[channel, other]])
            elif stale.sum() >= trials:
                break
    return found


def _step(states: Sequence[_State], order: Tensor, channel: int, found: Found) -> int | None:
    """Make the best swap of a channel if it gains; return the channel that it was swapped with."""
    gains = np.sum([state.gains(channel) for state in states], axis=0)
    now = found.trace[-1]
    is_bound = not any(state.is_uneven for state in states)
    best = np.argpartition(gains, -TRIED)[-TRIED:] if len(gains) > TRIED else np.arange(len(gains))
    for other in best[np.argsort(-gains[best], kind="stable")].tolist():
        if is_bound and gains[other] <= LEAST * now:
            return None
        after = [state.after(channel, other) for state in states]
        value = sum(one for one, _ in after)
        if value > now + LEAST * now:
            for state, (_, sums) in zip(states, after, strict=True):
                state.swap(channel, other, sums)
            places = [int((order == one).nonzero()) for one in (channel, other)]
            order[places] = order[places[::-1]]
            found.trace.append(value)
            return int(other)
    return None


def _exact(layers: Sequence[Rows]) -> Found:
    channels, sizes = len(layers[0].saliency), {layer.group for layer in layers}
    if len(sizes) > 1:
        raise MethodError(f"search='exact' needs one group size for all layers of a class, not {sorted(sizes)}")
    group = sizes.pop()
    count = partitions(channels, group)
    if count > PARTITIONS:
        raise MethodError(f"search='exact' would go through {count:,} partitions of {channels} channels; use 'greedy+swap'")
    orders = (torch.tensor(order) for order in orderings(list(range(channels)), group))
    return _best([Found(order, [value(layers, order)]) for order in orders])


def partitions(channels: int, group: int) -> int:
    """Return how many ways there are to put channels into groups, a smaller one last where they do not divide."""
    whole, left = divmod(channels, group)
    same: int = math.factorial(group) ** whole * math.factorial(left) * math.factorial(whole)
    return math.factorial(channels) // same


def orderings(channels: list[int], group: int) -> Iterator[list[int]]:
    """Yield one order of the channels for every such partition; the first for those in the given order."""
    left = len(channels) % group
    if left:
        for last in itertools.combinations(reversed(channels), left):
            rest = [one for one in channels if one not in last]
            for order in orderings(rest, group):
                yield [*order, *sorted(last)]
    elif not channels:
        yield []
    else:
        first, others = channels[0], channels[1:]
        for mates in itertools.combinations(others, group - 1):
            rest = [one for one in others if one not in mates]
            for order in orderings(rest, group):
                yield [first, *mates, *order]


def _best_columns(layers: Sequence[Rows], total: Tensor) -> Tensor:
    """Return 1 for the columns of a group's sums that would stay if each group kept as many, else 0."""
    found = []
    for layer, part in zip(layers, torch.split(total, [layer.saliency.shape[1] for layer in layers]), strict=True):
        count = min(len(part), round(layer.kept / (1 if layer.balanced else layer.groups)))
        found.append(top(part, count).to(total.dtype))
    return torch.cat(found)


def _norms(layers: Sequence[Rows]) -> Tensor:
    return torch.stack([layer.saliency.abs().sum(1) for layer in layers]).sum(0)


def value(layers: Sequence[Rows], order: Tensor) -> float:
    """Return J of an order, summed over the layers."""
    return sum(layer.measure(layer.units(order))[0] for layer in layers)


def _best(found: list[Found]) -> Found:
    """Return the highest J, the first of equals."""
    return max(found, key=lambda one: one.trace[-1])
