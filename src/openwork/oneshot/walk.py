"""The walk through a model in memory: collect, prune, go on with what the pruned weights make."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from openwork.core.masks import Masks
from openwork.errors import DataError, ModelError
from openwork.oneshot import chain
from openwork.oneshot.blocks import Stack, find_stack, shares_weights
from openwork.oneshot.collect import Collector, distinct, first_names
from openwork.oneshot.feed import Calibration, Feed, Padding, feed_of
from openwork.oneshot.layers import Layer, Select, choose, left_dense
from openwork.oneshot.prune import allocate, block_share, check_layer, check_weight, prune_layer
from openwork.oneshot.quiet import quiet
from openwork.oneshot.report import LayerReport, Result
from openwork.oneshot.settings import Settings
from openwork.oneshot.statistics import Statistics
from openwork.sparsifier.parameters import unwrap

Progress = Callable[[int, int, str], object] | None


def prune_model(
    model: nn.Module,
    calibration: Calibration,
    settings: Settings,
    *,
    select: Select,
    exclude: str | Iterable[str],
    progress: Progress,
) -> Result:
    """Prune `model` in place; see `openwork.oneshot.api.sparsify`."""
    if not isinstance(model, nn.Module):
        raise ModelError(f"a {type(model).__name__} is no model: give a torch.nn.Module")
    model = unwrap(model)
    stack = find_stack(model)
    layers = choose(model, select, exclude, stack.name if stack else None)
    for layer in layers:
        check_layer(layer, settings)
        if layer.weight.is_meta:
            raise ModelError(f"{layer.parameter!r} is a meta tensor without values: load the model, or use stream")
        check_weight(layer, layer.weight)
    feed = None
    if calibration is not None:
        feed = feed_of(calibration)
    elif settings.needs_data:
        what = settings.method if settings.method != "magnitude" else "allocation='owl'"
        raise DataError(f"{what} needs calibration data: give batches that the model takes")
    work = Work(settings, layers, progress)
    if settings.allocation not in ("owl",):
        work.counts = work.allocated()
    try:
        with quiet(model):
            walk = "none" if feed is None else _walk(model, stack, feed, work)
            if feed is None:
                work.prune(layers, {})
    except BaseException:
        work.restore()
        raise
    return Result(Masks(work.masks), work.report(), walk, left_dense(model, work.masks))


@dataclass
class Work:
    """What has been done so far, and how to undo it.

    Attributes:
        settings: the settings.
        layers: all layers to prune, in model order.
        progress: called after each stage.
        counts: parameter name -> weights that stay.
    """

    settings: Settings
    layers: list[Layer]
    progress: Progress
    counts: dict[str, int] = field(default_factory=dict)
    masks: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, LayerReport] = field(default_factory=dict)
    before: list[tuple[nn.Parameter, Tensor]] = field(default_factory=list)

    def allocated(self, shares: Mapping[str, float] | None = None) -> dict[str, int]:
        """Return the counts by the settings' allocation."""
        layers = distinct(self.layers)
        sizes = {layer.parameter: layer.weight.numel() for layer in layers}
        return allocate(
            self.settings, sizes, shares=shares, weights=lambda: ((layer.parameter, layer.weight) for layer in layers)
        )

    @torch.no_grad()
    def prune(self, layers: Iterable[Layer], sums: Mapping[str, Statistics]) -> None:
        """Prune `layers`, each weight once, and remember what they were."""
        names = first_names(self.layers)
        for layer in distinct(layers):
            name = names[id(layer.weight)]
            if name in self.masks:
                continue
            pruned, mask, row = prune_layer(layer, layer.weight, sums.get(name), self.counts[name], self.settings)
            self.masks[name], self.rows[name] = mask, row
            if self.counts[name] < layer.weight.numel():
                self.before.append((layer.weight, layer.weight.detach().clone()))
                layer.weight.copy_(pruned)

    @torch.no_grad()
    def restore(self) -> None:
        """Put every weight back."""
        for weight, value in self.before:
            weight.copy_(value)

    def report(self) -> tuple[LayerReport, ...]:
        """Return the rows in the order of the model."""
        self.masks = {layer.parameter: self.masks[layer.parameter] for layer in distinct(self.layers)}
        return tuple(self.rows[name] for name in self.masks)

    def tell(self, done: int, total: int, name: str) -> None:
        """Report progress."""
        if self.progress is not None:
            self.progress(done, total, name)

    @property
    def gram(self) -> torch.dtype | None:
        """The dtype of Gram matrices, None where there are none."""
        return self.settings.gram_dtype if self.settings.needs_gram else None


def _walk(model: nn.Module, stack: Stack | None, feed: Feed, work: Work) -> str:
    if stack is not None and not shares_weights(model, stack) and _by_blocks(model, stack, feed, work):
        return "blocks"
    padding = Padding()
    collector = Collector(work.layers, padding, work.gram)
    handle = padding.watch(model)
    try:
        with collector.watching():
            feed(model)
    finally:
        handle.remove()
    collector.require(work.layers)
    if not work.counts:
        parts = {layer.parameter: (layer, layer.weight, collector.sums[layer.parameter]) for layer in distinct(work.layers)}
        work.counts = work.allocated({name: block_share([part], work.settings.outliers) for name, part in parts.items()})
    work.prune(work.layers, collector.sums)
    work.tell(1, 1, type(model).__name__)
    return "dense"


def _by_blocks(model: nn.Module, stack: Stack, feed: Feed, work: Work) -> bool:
    """Prune block by block; return False, with nothing changed, if the blocks are no chain."""
    padding = Padding()
    inside = [[layer for layer in work.layers if stack.place(layer.name) == i] for i in range(len(stack.blocks))]
    outside = [layer for layer in work.layers if stack.place(layer.name) is None]
    light = Collector([layer for block in inside for layer in block], padding, None)
    rest = Collector(outside, padding, work.gram)
    recorder = chain.Recorder(stack, padding)
    with recorder.recording(model), light.watching(), rest.watching(lambda: recorder.place):
        feed(model)
    if recorder.broken or any(len(places) > 1 or "inside" in places for places in rest.calls.values()):
        return False
    if not chain.reproduces(stack, recorder.passes[0]):
        return False
    light.require(light.layers)
    rest.require(outside)
    if not work.counts:
        work.counts = work.allocated(_shares(stack, inside, outside, light, rest, work.settings.outliers))
    before = [layer for layer in outside if rest.calls[layer.parameter] == {"before"}] if outside else []
    after = [layer for layer in outside if layer not in before]
    total = len(inside) + bool(before) + bool(after)
    passes = recorder.passes
    if before:
        work.prune(before, rest.sums)
        work.tell(1, total, before[-1].name)
        recorder = chain.Recorder(stack, padding)
        with recorder.recording(model):
            feed(model)
        passes = recorder.passes
    states: list[chain.State] = [[] for _ in passes]
    for index, (name, block) in enumerate(stack.blocks):
        last = index == len(stack.blocks) - 1
        collector = Collector(inside[index], padding, work.gram)
        if inside[index]:
            with collector.watching():
                through(block, index, passes, states, padding)
            work.prune(inside[index], collector.sums)
        if not last or after:
            states = through(block, index, passes, states, padding)
        for one in passes:
            one.calls[index].leaves = []
        work.tell(index + 1 + bool(before), total, name)
    if after:
        collector = Collector(after, padding, work.gram)
        handle = padding.watch(model)
        try:
            with collector.watching(), chain.replaced(stack, chain.standing_in(stack, passes, states.__getitem__)):
                feed(model)
        finally:
            handle.remove()
        work.prune(after, collector.sums)
        work.tell(total, total, after[-1].name)
    return True


def through(
    block: nn.Module, index: int, passes: list[chain.Pass], states: list[chain.State], padding: Padding
) -> list[chain.State]:
    """Run all passes through block `index` and return what they come out as."""
    found = []
    for one, state in zip(passes, states, strict=True):
        padding.masks = one.masks
        following = one.calls[index + 1] if index + 1 < len(one.calls) else None
        found.append(chain.run(block, one.calls[index], state, keep=following))
    return found


def _shares(
    stack: Stack, inside: list[list[Layer]], outside: list[Layer], light: Collector, rest: Collector, multiple: float
) -> dict[str, float]:
    """Return OWL's outlier shares: of the block for the layers in it, of the layer for the others."""
    shares: dict[str, float] = {}
    for layers in inside:
        if layers:
            share = block_share([(layer, layer.weight, light.sums[layer.parameter]) for layer in distinct(layers)], multiple)
            shares |= {layer.parameter: share for layer in layers}
    for layer in distinct(outside):
        shares[layer.parameter] = block_share([(layer, layer.weight, rest.sums[layer.parameter])], multiple)
    return shares
