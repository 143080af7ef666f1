"""The walk of `flow` for permutations: concatenations, per-channel parameters of a forward's own, and the network's input.

A concatenation is a set cut into blocks, each a set of its own; where a set meets one that is cut, it is cut alike. For
removing channels (`groups`) concatenations end a group instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from openwork.sparsifier import operations
from openwork.sparsifier.flow import Sets, Walk, attribute
from openwork.sparsifier.operations import Flow, Value

_CONCATENATIONS = (torch.cat, torch.concat, torch.concatenate)


class Blocks(Sets):
    """Disjoint sets of channels, some of which are cut into blocks: ordered sets that are joined and blocked apart."""

    def __init__(self) -> None:
        super().__init__()
        self._cuts: dict[int, tuple[int, ...]] = {}

    def new(self, size: int) -> int:
        """Return a set of its own."""
        return self.of(("new", len(self._parents)), size)

    def concatenated(self, parts: Sequence[int]) -> int:
        """Return the set whose blocks are `parts`, in order."""
        one = self.new(sum(self.size(part) for part in parts))
        self._cuts[one] = tuple(parts)
        return one

    def leaves(self, one: int) -> list[int]:
        """Return the sets that a set is cut into, in order; a whole set is its own."""
        root = self.find(one)
        if root not in self._cuts:
            return [root]
        return [leaf for part in self._cuts[root] for leaf in self.leaves(part)]

    def block(self, one: int, why: str) -> None:
        """Keep every block of a set; the first reason stays."""
        for leaf in self.leaves(one):
            self.blocked.setdefault(leaf, why)

    def join(self, one: int, other: int, where: str) -> None:
        """Make two sets one, block by block; if their sizes differ, block both."""
        if self.size(one) == self.size(other):
            self._align(one, other)
            for mine, theirs in zip(self.leaves(one), self.leaves(other), strict=True):
                super().join(mine, theirs, where)
        else:
            super().join(one, other, where)

    def _align(self, one: int, other: int) -> None:
        """Cut both sets until their blocks have the same sizes."""
        while True:
            pairs = zip(self.leaves(one), self.leaves(other), strict=False)
            odd = next(((a, b) for a, b in pairs if self.size(a) != self.size(b)), None)
            if odd is None:
                return
            small, large = sorted(odd, key=self.size)
            self._cut(large, self.size(small))

    def _cut(self, leaf: int, at: int) -> None:
        size = self.size(leaf)
        self._cuts[leaf] = self.new(at), self.new(size - at)
        why = self.blocked.pop(leaf, None)
        if why is not None:
            self.block(leaf, why)


class BlockWalk(Walk):
    """Follows what a permutation of channels moves.

    Attributes:
        scales: (parameter or buffer that a forward uses by itself, its dimension) -> the set, and the entries per
            channel, along that dimension.
    """

    kind: ClassVar[type[Sets]] = Blocks
    sets: Blocks

    def __init__(self, model: nn.Module, example: Any = None) -> None:
        self.scales: dict[tuple[str, int], tuple[int, int]] = {}
        self._shapes: dict[fx.Node, tuple[int, ...]] = {}
        self._own: dict[fx.Node, tuple[str, Tensor]] = {}
        self._open: dict[int, tuple[str, set[fx.Node]]] = {}  # tensors by id -> uses that are not followed (yet)
        super().__init__(model, example)

    def parts(self, channels: int, repeat: int) -> Iterator[tuple[int, int]]:
        """Yield (set, first entry) of every block that entries of a layer, `repeat` for each channel, belong to."""
        offset = 0
        for leaf in self.sets.leaves(channels):
            yield leaf, offset
            offset += self.sets.size(leaf) * repeat

    def _follow(self, traced: Any) -> None:
        outer, self._shapes = self._shapes, traced.shapes
        super()._follow(traced)
        self._shapes = outer

    def _input(self, shape: tuple[int, ...] | None) -> Value:
        """Take vectors and maps as channels that stay: their order is the caller's."""
        if shape is None or len(shape) not in (2, 4, 5):
            return None  # (batch, channels, length) and (batch, tokens, channels) look the same
        axis = -1 if len(shape) == 2 else 1 - len(shape)
        channels = self.sets.new(shape[axis])
        self.sets.block(channels, "they are the input of the network")
        return Flow(channels, shape[axis], axis, len(shape))

    def _attribute(self, root: nn.Module, node: fx.Node) -> Value:
        """Remember a tensor that the forward uses itself, with the uses that must be found harmless."""
        thing = attribute(root, str(node.target))
        owner, _, local = str(node.target).rpartition(".")
        is_known = isinstance(thing, nn.Parameter) or local in root.get_submodule(owner)._buffers
        if not is_known or thing.numel() == 1:
            return super()._attribute(root, node)  # what no state dict holds cannot be moved
        why = f"the forward of {type(root).__name__} uses {node.target!r} by itself"
        self._open.setdefault(id(thing), (why, set()))[1].update(node.users)
        self._own[node] = f"{self._names[root]}.{node.target}".removeprefix("."), thing
        return None

    def _function(self, node: fx.Node, values: dict[fx.Node, Value]) -> Value:
        """Follow a function or method, concatenations and per-channel arithmetic included."""
        follow = self._concatenation if node.target in _CONCATENATIONS else self._arithmetic
        value = follow(node, values)
        return super()._function(node, values) if value is None else value

    def _concatenation(self, node: fx.Node, values: dict[fx.Node, Value]) -> Value:
        given = dict(zip(("tensors", "dim"), node.args, strict=False)) | dict(node.kwargs)
        tensors, dim = given.get("tensors"), given.get("dim", given.get("axis", 0))
        if not isinstance(tensors, tuple | list) or not isinstance(dim, int):
            return None
        nodes = [each for each in tensors if isinstance(each, fx.Node)]
        flows = [x for x in (values[each] for each in nodes) if isinstance(x, Flow)]
        if len(nodes) < len(tensors) or len({(x.axis, x.repeat) for x in flows}) != 1 or flows[0].repeat is None:
            return None
        first = flows[0]
        ndim = next((x.ndim for x in flows if x.ndim is not None), None)
        if ndim is None and dim >= 0:
            return None
        if (dim if ndim is None else dim % ndim - ndim) != first.axis:
            return self._stacked(node, flows) if len(flows) == len(nodes) else None
        parts = [self._part(each, values[each], first) for each in nodes]
        known = [part for part in parts if part is not None]
        if len(known) < len(parts):
            return None
        joined = self.sets.concatenated(known)
        return Flow(joined, self.sets.size(joined), first.axis, ndim, first.repeat)

    def _stacked(self, node: fx.Node, flows: list[Flow]) -> Value:
        """Follow tensors laid end to end along another axis, all with the same channels."""
        if len({x.size for x in flows}) != 1:
            return None
        for other in flows[1:]:
            self.sets.join(flows[0].channels, other.channels, f"the concatenation {node.name!r}")
        return flows[0]

    def _part(self, node: fx.Node, x: Value, like: Flow) -> int | None:
        """Return the set of one tensor in a concatenation; what is not followed stays where it is."""
        if isinstance(x, Flow):
            return x.channels
        shape = self._shapes.get(node, ())
        width, repeat = shape[like.axis] if len(shape) >= -like.axis else 0, like.repeat or 1
        if width == 0 or width % repeat:
            return None
        channels = self.sets.new(width // repeat)
        self.sets.block(channels, f"{node.name!r}, which is concatenated here, cannot be followed")
        return channels

    def _arithmetic(self, node: fx.Node, values: dict[fx.Node, Value]) -> Value:
        """Follow arithmetic of a tensor with channels and a parameter or buffer, which is tied to them."""
        known = operations.BINARY_METHODS if node.op == "call_method" else operations.BINARY
        own = [arg for arg in node.args if isinstance(arg, fx.Node) and arg in self._own]
        flows = [x for x in (values.get(arg) for arg in node.args if isinstance(arg, fx.Node)) if isinstance(x, Flow)]
        if node.target not in known or len(node.args) != 2 or len(own) != 1 or len(flows) != 1 or flows[0].repeat is None:
            return None
        x, (name, thing) = flows[0], self._own[own[0]]
        width = thing.shape[x.axis] if thing.dim() >= -x.axis else 1
        if width == x.size * flows[0].repeat and width > 1:
            self._tie(name, thing, x)
        elif width > 1:
            return None
        self._open[id(thing)][1].discard(node)
        return replace(x, ndim=None if x.ndim is None else max(x.ndim, thing.dim()))

    def _tie(self, name: str, thing: Tensor, x: Flow) -> None:
        dim = thing.dim() + x.axis
        key = ("rows", id(thing)) if dim == 0 else ("along", id(thing), dim)
        self.sets.join(x.channels, self.sets.of(key, x.size), name)
        before = self.scales.setdefault((name, dim), (x.channels, x.repeat or 1))
        if before[1] != x.repeat:
            for channels in (before[0], x.channels):
                self.sets.block(channels, f"{name!r} is used for several numbers of channels")

    def _close(self) -> None:
        """Block what a tensor that is used in some other way takes part in."""
        for key, (why, uses) in self._open.items():
            if uses:
                self._foreign.setdefault(key, why)
        foreign = {name: self._foreign[id(thing)] for name, thing in self._own.values() if id(thing) in self._foreign}
        for (name, _), (channels, _) in self.scales.items():
            if name in foreign:
                self.sets.block(channels, foreign[name])
        super()._close()
