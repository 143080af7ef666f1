"""Blocks as a chain: recording how a model calls its blocks, and calling them again one at a time.

A call is recorded as the leaves of its arguments. Leaves that are outputs of the block before become links, the others
(masks, position embeddings) stay as they were. A chain can then be run again block by block, with other weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from openwork.oneshot.blocks import Stack
from openwork.oneshot.feed import Enough, Padding

State = list[Any]


@dataclass
class Call:
    """One call of one block: argument leaves, their structure, and leaf -> output leaf of the block before."""

    leaves: list[Any]
    spec: TreeSpec
    links: dict[int, int]


@dataclass
class Pass:
    """One pass through the chain.

    Attributes:
        calls: one a block.
        masks: the attention masks of the pass.
        output: structure of a block's output.
    """

    calls: list[Call] = field(default_factory=list)
    masks: dict[str, Tensor] = field(default_factory=dict)
    output: TreeSpec | None = None
    last: State = field(default_factory=list)


class Recorder:
    """Records passes through the blocks of a stack while the model runs.

    Args:
        stack: the blocks.
        padding: knows the masks of the call of the model that is running.
        entry: given the number of each pass and the hidden state that enters the chain, which is then a link to output 0
            of the state before the first block; None keeps it with the call.
        stop: whether to leave the model at the last block (`feed.Enough`).

    Attributes:
        passes: what was recorded.
        broken: why the blocks are no chain, "" as long as they are.
        place: "before", "inside" or "after" the blocks in the call of the model that is running.
    """

    def __init__(
        self,
        stack: Stack,
        padding: Padding,
        *,
        entry: Callable[[int, Tensor], None] | None = None,
        stop: bool = False,
    ) -> None:
        self.stack, self.padding, self.entry, self.stop = stack, padding, entry, stop
        self.passes: list[Pass] = []
        self.broken = ""
        self.place = "before"
        self._outputs: list[tuple[Any, int]] = []

    @contextlib.contextmanager
    def recording(self, model: nn.Module) -> Iterator[Recorder]:
        """Record inside the block."""
        handles = [model.register_forward_pre_hook(self._begin), self.padding.watch(model)]
        for index, (_, block) in enumerate(self.stack.blocks):
            handles.append(block.register_forward_pre_hook(self._enter(index), with_kwargs=True))
            handles.append(block.register_forward_hook(self._leave(index)))
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()
        if not self.broken and not all(len(one.calls) == len(self.stack.blocks) for one in self.passes):
            self.broken = "a pass ended before the last block"
        if not self.broken and not self.passes:
            self.broken = "the blocks were never called"

    def _begin(self, *_: Any) -> None:
        self.place = "before"

    def _enter(self, index: int) -> Callable[..., None]:
        def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.place = "inside"
            if self.broken:
                return
            if index == 0:
                self.passes.append(Pass(masks=dict(self.padding.masks)))
            if not self.passes or len(self.passes[-1].calls) != index:
                self.broken = f"block {index} is not called once, in its turn"
                return
            leaves, spec = tree_flatten((args, kwargs))
            self.passes[-1].calls.append(self._call(index, leaves, spec))

        return hook

    def _call(self, index: int, leaves: list[Any], spec: TreeSpec) -> Call:
        links: dict[int, int] = {}
        if index == 0 and (first := _stream(leaves)) is not None:
            if self.entry is None:
                leaves[first] = leaves[first].clone()
            else:
                self.entry(len(self.passes) - 1, leaves[first])
                links[first] = 0
        for place, leaf in enumerate(leaves if index else []):
            for out, (value, version) in enumerate(self._outputs):
                if isinstance(leaf, Tensor) and isinstance(value, Tensor) and _same(leaf, value):
                    if value._version != version:
                        self.broken = f"the output of block {index - 1} is changed before block {index}"
                    links[place] = out
                    break
        if index and not links:
            self.broken = f"block {index} does not take what block {index - 1} made"
        return Call([None if place in links else leaf for place, leaf in enumerate(leaves)], spec, links)

    def _leave(self, index: int) -> Callable[..., None]:
        def hook(block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            last = index == len(self.stack.blocks) - 1
            self.place = "after" if last else "inside"
            if self.broken:
                return
            leaves, spec = tree_flatten(output)
            self._outputs = [] if last else [(leaf, leaf._version if isinstance(leaf, Tensor) else 0) for leaf in leaves]
            self.passes[-1].output = spec
            if last and len(self.passes) == 1:
                self.passes[-1].last = leaves
            if last and self.stop:
                raise Enough

        return hook


def run(block: nn.Module, call: Call, state: State, *, keep: Call | None) -> State:
    """Call `block` again as in `call`, on the outputs `state` of the block before; return its output leaves.

    Args:
        block: the block.
        call: its recorded call.
        state: output leaves of the block before it; for the first block anything.
        keep: the call of the next block, whose links say which leaves are wanted; None keeps all.
    """
    leaves = list(call.leaves)
    for place, out in call.links.items():
        leaves[place] = state[out].clone()  # blocks may work in place
    if not call.links and (entry := _stream(leaves)) is not None:
        leaves[entry] = leaves[entry].clone()
    args, kwargs = tree_unflatten(leaves, call.spec)
    found, _ = tree_flatten(block(*args, **kwargs))
    wanted = set(range(len(found))) if keep is None else set(keep.links.values())
    return [leaf.detach() if isinstance(leaf, Tensor) and place in wanted else None for place, leaf in enumerate(found)]


def reproduces(stack: Stack, one: Pass) -> bool:
    """Tell whether running the blocks of a recorded pass one by one ends where the model itself ended."""
    state: State = []
    try:
        for index, (_, block) in enumerate(stack.blocks):
            state = run(block, one.calls[index], state, keep=None)
    except Exception:  # a block that leans on anything beside its arguments may fail in any way
        return False
    pairs = [(a, b) for a, b in zip(state, one.last, strict=False) if isinstance(a, Tensor) and isinstance(b, Tensor)]
    return bool(pairs) and len(state) == len(one.last) and all(_close(a, b) for a, b in pairs)


@contextlib.contextmanager
def replaced(stack: Stack, forwards: dict[int, Callable[..., Any]]) -> Iterator[None]:
    """Give blocks, by index, another forward inside the block."""
    before = {index: stack.blocks[index][1].__dict__.get("forward") for index in forwards}
    try:
        for index, forward in forwards.items():
            stack.blocks[index][1].__dict__["forward"] = forward
        yield
    finally:
        for index, own in before.items():
            if own is None:
                del stack.blocks[index][1].__dict__["forward"]
            else:
                stack.blocks[index][1].__dict__["forward"] = own


def standing_in(stack: Stack, passes: list[Pass], states: Callable[[int], State]) -> dict[int, Callable[..., Any]]:
    """Return forwards for all blocks that compute nothing and give the chain's end, pass by pass, as their output."""
    turn = -1

    def first(*_: Any, **__: Any) -> Any:
        nonlocal turn
        turn += 1
        return end()

    def end(*_: Any, **__: Any) -> Any:
        spec = passes[turn].output
        assert spec is not None
        leaves = states(turn)
        return tree_unflatten([*leaves, *[None] * (spec.num_leaves - len(leaves))], spec)

    return {index: end if index else first for index in range(len(stack.blocks))}


def _stream(leaves: list[Any]) -> int | None:
    """Return the place of the first floating tensor: the hidden state that runs through the chain."""
    return next((i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.is_floating_point()), None)


def _same(one: Tensor, two: Tensor) -> bool:
    if one is two:
        return True
    alike = one.shape == two.shape and one.stride() == two.stride() and one.dtype is two.dtype and one.device == two.device
    return alike and one.numel() > 0 and one.data_ptr() == two.data_ptr()


def _close(one: Tensor, two: Tensor) -> bool:
    return one.shape == two.shape and torch.allclose(one.double(), two.double(), rtol=1e-4, atol=1e-5, equal_nan=True)
