"""Spaces of sparse configurations of a given network: what random search draws from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from openwork.core.allocation import Allocation
from openwork.core.masks import Masks
from openwork.core.patterns import Pattern
from openwork.core.select import count_of
from openwork.errors import MaskError
from openwork.methods.sparsify.random_pruning import RandomPruning
from openwork.sparsifier.groups import Group, slices, survey
from openwork.sparsifier.parameters import Choice, maskable, unwrap
from openwork.sparsifier.physical import node_masks

Counts = dict[str, int]
"""Group -> channels that stay."""


class Space(Protocol):
    """Sparse configurations, one of which a draw returns."""

    def draw(self, source: torch.Generator) -> Masks:
        """Return a random configuration: masks that `openwork.sparsifier.Fixed` can hold."""
        ...


class WeightSpace:
    """Single weights, removed at random at given layer-wise densities (random pruning).

    Args:
        model: the over-parameterised network.
        density: kept share of the masked weights.
        allocation: how it is shared among layers, as `allocate` of every Sparsifier.
        pattern: which masks are legal.
        parameters: which parameters get a mask (see `openwork.sparsifier.parameters.maskable`).
        exclude: names or globs of parameters to leave dense.
    """

    def __init__(
        self,
        model: nn.Module,
        density: float,
        *,
        allocation: str | Mapping[str, float] | Allocation = "erk",
        pattern: str | Pattern = "unstructured",
        parameters: Choice = None,
        exclude: Iterable[str] = (),
    ) -> None:
        self._params = maskable(unwrap(model), parameters, exclude)
        self._pruning = RandomPruning(density, ratios=allocation, pattern=pattern)

    def draw(self, source: torch.Generator) -> Masks:
        """Return masks at random positions, the counts of every layer exact."""
        self._pruning.generator = source
        return self._pruning.random_masks(self._params)


class _Channels:
    """What the spaces of whole nodes share: the groups, and the weights that any numbers of channels leave."""

    def __init__(
        self, model: nn.Module, *, parameters: Choice = None, exclude: Iterable[str] = (), example: Any = None
    ) -> None:
        self._model = unwrap(model)
        params = maskable(self._model, parameters, exclude)
        names = {id(param): name for name, param in self._model.named_parameters()}
        found = survey(self._model, example)
        self.groups = _free(self._model, found.groups, names, set(params))
        if not self.groups:
            left = "; ".join(f"{name}: {why}" for name, why in list(found.left.items())[:3])
            raise MaskError(
                f"no nodes of {type(self._model).__name__} can be removed as a whole ({left or 'all are left dense'}); "
                "search single weights with space='weights'"
            )
        self._shapes = {name: param.shape for name, param in params.items()}
        self._ones = Masks.ones({name: param.detach().cpu() for name, param in params.items()})
        self.total = sum(math.prod(shape) for shape in self._shapes.values())
        self._cuts: dict[str, dict[int, tuple[str, int]]] = {}
        for cut in slices(self._model, self.groups):
            name = names.get(id(getattr(self._model.get_submodule(cut.layer), cut.attribute)))
            if name in self._shapes:
                self._cuts.setdefault(name, {})[cut.dim] = cut.group, cut.repeat

    def weights(self, counts: Counts) -> int:
        """Return how many of the masked weights stay when every group keeps `counts` channels."""
        total = 0
        for name, shape in self._shapes.items():
            dims = list(shape)
            for dim, (group, repeat) in self._cuts.get(name, {}).items():
                dims[dim] = counts[group] * repeat
            total += math.prod(dims)
        return total

    def solve(self, density: float, factors: Mapping[str, float]) -> Counts:
        """Return counts max(1, round(c * factor * size)) whose weight density is the nearest to `density`.

        Raises:
            MaskError: if one channel in every group is too many.
        """

        def counts(scale: float) -> Counts:
            return {g.name: max(1, count_of(min(1.0, scale * factors[g.name]), g.size)) for g in self.groups}

        low, high = 0.0, 1.0 / min(factors.values())
        goal, least = density * self.total, self.weights(counts(0.0))
        if goal < least * (1 - 1e-9):
            raise MaskError(
                f"density {density} cannot be reached by removing nodes: one node a layer and what cannot be removed "
                f"are {least} of {self.total} weights ({least / self.total:.4f}); raise the density, or search single "
                "weights with space='weights'"
            )
        for _ in range(64):  # the kept weights never fall as the scale grows; two neighbouring steps are left
            middle = 0.5 * (low + high)
            low, high = (low, middle) if self.weights(counts(middle)) >= goal else (middle, high)
        return min((counts(low), counts(high)), key=lambda each: abs(self.weights(each) - goal))

    def pick(self, counts: Counts, source: torch.Generator) -> dict[str, Tensor]:
        """Return, for every group, `counts` of its channels drawn without replacement: sorted int64 indices."""
        return {g.name: torch.randperm(g.size, generator=source)[: counts[g.name]].sort().values for g in self.groups}

    def masks(self, kept: Mapping[str, Tensor]) -> Masks:
        """Return the masks of kept channels: those of all weights, and of the biases and norms of the groups."""
        return Masks({**self._ones, **node_masks(self._model, kept, groups=self.groups)})

    def node_share(self, counts: Counts) -> float:
        """Return kept / all nodes."""
        return sum(counts.values()) / sum(group.size for group in self.groups)


class NodeSpace(_Channels):
    """Whole nodes (hidden units, feature maps), the same share of each layer, every set of them equally likely.

    Args:
        model: the over-parameterised network.
        density: kept share of the masked weights; the share of nodes is solved so that this is met most nearly.
        node_density: kept share k_l = round(share * n_l) of every layer's nodes, given instead of `density`; never below
            one node.
        parameters: which parameters count and may lose entries (see `openwork.sparsifier.parameters.maskable`).
        exclude: names or globs of parameters to leave dense; nodes that touch them stay.
        example: what the model is called with, where its forward needs shapes to be followed.

    Attributes:
        counts: group -> nodes that stay.
        density: kept share of the masked weights, exact.
        node_density: kept share of the nodes, exact.

    Raises:
        MaskError: if no or both densities are given, one is out of range, it cannot be reached, or no node can be
            removed.
        ModelError: if the forward cannot be traced.
    """

    def __init__(
        self,
        model: nn.Module,
        density: float | None = None,
        *,
        node_density: float | None = None,
        parameters: Choice = None,
        exclude: Iterable[str] = (),
        example: Any = None,
    ) -> None:
        super().__init__(model, parameters=parameters, exclude=exclude, example=example)
        share = check_densities(density, node_density)
        if density is None:
            self.counts = {g.name: max(1, count_of(share, g.size)) for g in self.groups}
        else:
            self.counts = self.solve(share, dict.fromkeys((g.name for g in self.groups), 1.0))
        self.density = self.weights(self.counts) / self.total
        self.node_density = self.node_share(self.counts)

    def kept(self, source: torch.Generator) -> dict[str, Tensor]:
        """Return the nodes of a draw: group -> sorted int64 indices, as `compact` takes them."""
        return self.pick(self.counts, source)

    def draw(self, source: torch.Generator) -> Masks:
        """Return the masks of a draw, biases and norms of the removed nodes included."""
        return self.masks(self.kept(source))


class WidthSpace(_Channels):
    """Whole nodes, each layer's share drawn at random under one common weight budget.

    A factor u_l, uniform in [narrowest, 1], is drawn for every layer; c in k_l = max(1, round(c u_l n_l)) is solved so
    that the weight density is the nearest to `density`; then k_l nodes are drawn.

    Args:
        model: the over-parameterised network.
        density: kept share of the masked weights.
        narrowest: the smallest factor, above 0.
        parameters: as for `NodeSpace`.
        exclude: as for `NodeSpace`.
        example: as for `NodeSpace`.

    Raises:
        MaskError: as for `NodeSpace`, or if `narrowest` is not in (0, 1].
    """

    def __init__(
        self,
        model: nn.Module,
        density: float,
        *,
        narrowest: float = 0.1,
        parameters: Choice = None,
        exclude: Iterable[str] = (),
        example: Any = None,
    ) -> None:
        super().__init__(model, parameters=parameters, exclude=exclude, example=example)
        if not 0.0 < narrowest <= 1.0:
            raise MaskError(f"narrowest={narrowest!r} is not in (0, 1]; it is the smallest width factor of a layer")
        self._wanted, self._narrowest = check_densities(density, None), narrowest

    def kept(self, source: torch.Generator) -> dict[str, Tensor]:
        """Return the nodes of a draw: group -> sorted int64 indices."""
        draws = torch.rand(len(self.groups), generator=source, dtype=torch.float64).tolist()
        factors = {
            group.name: self._narrowest + (1.0 - self._narrowest) * draw
            for group, draw in zip(self.groups, draws, strict=True)
        }
        return self.pick(self.solve(self._wanted, factors), source)

    def draw(self, source: torch.Generator) -> Masks:
        """Return the masks of a draw, biases and norms of the removed nodes included."""
        return self.masks(self.kept(source))


def check_densities(density: float | None, node_density: float | None) -> float:
    """Return the one density that is given.

    Raises:
        MaskError: if none or both are, or it is not in (0, 1].
    """
    given = [share for share in (density, node_density) if share is not None]
    if len(given) != 1:
        raise MaskError("give either density, the kept share of weights, or node_density, the kept share of nodes")
    if not 0.0 < given[0] <= 1.0:
        raise MaskError(f"density {given[0]!r} is not in (0, 1]; it is the share that is kept")
    return float(given[0])


def _free(model: nn.Module, groups: Sequence[Group], names: Mapping[int, str], masked: set[str]) -> list[Group]:
    """Return the groups that touch no weight matrix outside `masked`; biases and norms go with their nodes."""
    free = []
    for group in groups:
        cut = [getattr(model.get_submodule(one.layer), one.attribute) for one in slices(model, [group])]
        if all(names[id(tensor)] in masked for tensor in cut if isinstance(tensor, nn.Parameter) and tensor.dim() > 1):
            free.append(group)
    return free
