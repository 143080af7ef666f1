"""The walk through a folder: one block's weights in memory at a time, each finished block a shard of the new folder."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openwork.errors import DataError, ModelError, OpenworkError, RecipeError, StoreError
from openwork.oneshot import chain
from openwork.oneshot.blocks import Stack, find_stack, shares_weights
from openwork.oneshot.collect import Collector, distinct
from openwork.oneshot.feed import Batches, Calibration, Feed, Padding, feed_of
from openwork.oneshot.folder import copy_rest, open_folder, read_tensors
from openwork.oneshot.hidden import Files, Memory, States
from openwork.oneshot.layers import Layer, Select, choose, left_dense
from openwork.oneshot.prune import allocate, block_share, check_layer, check_weight, prune_layer
from openwork.oneshot.quiet import quiet
from openwork.oneshot.report import Streamed
from openwork.oneshot.settings import Settings
from openwork.oneshot.skeleton import Filler, build
from openwork.oneshot.statistics import Statistics
from openwork.oneshot.unfinished import Unfinished, digest_of

Progress = Callable[[int, int, str], object] | None


def stream_folder(
    folder: Path,
    out: Path,
    calibration: Calibration,
    settings: Settings,
    *,
    select: Select,
    exclude: str | Iterable[str],
    hidden: str,
    architecture: str | None,
    progress: Progress,
) -> Streamed:
    """Prune a folder into a new one; see `openwork.oneshot.api.stream`."""
    if hidden not in ("memory", "disk"):
        raise RecipeError(f"hidden={hidden!r}: use 'memory' or 'disk'")
    out = _checked(folder, out)
    source = open_folder(folder)
    model = build(source, architecture)
    stack = find_stack(model)
    if stack is None or shares_weights(model, stack):
        why = "has no list of blocks" if stack is None else "shares weights between blocks"
        raise ModelError(f"{type(model).__name__} {why}, so it cannot be streamed: load it and use sparsify")
    layers = choose(model, select, exclude, stack.name)
    for layer in layers:
        check_layer(layer, settings)
    feed = None if calibration is None else feed_of(calibration)
    if feed is None and settings.needs_data:
        what = settings.method if settings.method != "magnitude" else "allocation='owl'"
        raise DataError(f"{what} needs calibration data: give batches that the model takes")
    filler = Filler(model, source)
    for layer in distinct(layers):
        key = filler.key(layer.parameter)
        check_weight(layer, source.read([key])[key])
    batches = feed.batches if isinstance(feed, Batches) else None
    digest = digest_of(source, settings, [layer.name for layer in layers], type(model).__name__, batches)
    with Unfinished(out, digest).open() as work, quiet(model):
        resumed = work.done
        sweeps = 2 if settings.allocation == "owl" and not work.counts else 1
        _Walk(filler, stack, layers, settings, feed).run(work, hidden, _counter(progress, sweeps * len(stack.blocks)))
        rows = tuple(work.rows[layer.parameter] for layer in distinct(layers))
        copy_rest(source.folder, work.folder / "out")
        work.finish(len(stack.blocks) + 1)
    return Streamed(out, rows, left_dense(model, (row.name for row in rows)), resumed)


class _Walk:
    """The stages of one run: the way in, outlier shares, blocks, and what lies behind them."""

    def __init__(self, filler: Filler, stack: Stack, layers: list[Layer], settings: Settings, feed: Feed | None) -> None:
        self.filler, self.stack, self.layers, self.settings, self.feed = filler, stack, layers, settings, feed
        self.model, self.padding = filler.model, Padding()
        count = len(stack.blocks)
        self.inside = [[layer for layer in layers if stack.place(layer.name) == i] for i in range(count)]
        self.outside = [layer for layer in layers if stack.place(layer.name) is None]
        places = {key: stack.place(name) for key, name in filler.keys.items()}
        self.block_keys = [[key for key, place in places.items() if place == i] for i in range(count)]
        self.outer_keys = [key for key in filler.source.files if places.get(key) is None]
        self.passes: list[chain.Pass] = []
        self.gram = settings.gram_dtype if settings.needs_gram else None

    def run(self, work: Unfinished, hidden: str, tell: Callable[[str], None]) -> None:
        """Go through all stages; blocks that an earlier run finished are not done again."""
        owl = self.settings.allocation == "owl" and not work.counts
        before: dict[str, Statistics] = {}
        states: States = Memory()
        if self.feed is not None:
            states, before = self._enter(self._states(work, hidden, "sweep" if owl else "walk"))
        if not work.counts:
            work.counts = self._allocated(self._shares(states, before, tell) if owl else None)
            work.save()
        first = [layer for layer in self.outside if layer.parameter in before]
        if first:
            with self._outer():
                self._prune_outside(first, before, work, "before")
        if self.feed is not None and (first or owl):
            states, _ = self._enter(self._states(work, hidden, "walk"))
        after = [layer for layer in self.outside if layer not in first]
        if isinstance(states, Files) and work.done:
            found = Files(states.folder, work.done)
            states = found if found.has(len(self.passes)) else states
        for index, (name, _) in enumerate(self.stack.blocks):
            self._block(index, states, work, onward=bool(after) or index + 1 < len(self.stack.blocks))
            tell(name)
        with self._outer():
            self._behind(after, states, work)
            shard = work.shard(1, len(self.stack.blocks) + 1)
            self.filler.fill(self.outer_keys)
            work.write(shard, self.filler.values(self.outer_keys))
        work.save()

    def _states(self, work: Unfinished, hidden: str, name: str) -> States:
        return Memory() if hidden == "memory" else Files(work.folder / "hidden" / name, -1)

    @contextlib.contextmanager
    def _outer(self) -> Iterator[None]:
        """Hold everything outside the blocks."""
        self.filler.fill(self.outer_keys)
        try:
            yield
        finally:
            self.filler.empty(self.outer_keys)

    def _enter(self, states: States) -> tuple[States, dict[str, Statistics]]:
        """Record how the blocks are called and what enters them, and the statistics of the layers before them.

        The first block runs as it is; the others give its output again, so that the calls of all are seen.
        """
        assert self.feed is not None
        block = self.stack.blocks[0][1]
        real = block.forward
        found: list[Any] = [None]

        def first(*args: Any, **kwargs: Any) -> Any:
            found[0] = real(*args, **kwargs)
            return found[0]

        def again(*_: Any, **__: Any) -> Any:
            return found[0]

        def entry(number: int, x: Tensor) -> None:
            states.put(number, [x.detach().clone()])

        idle = {index: again if index else first for index in range(len(self.stack.blocks))}
        with self._outer():
            self.filler.fill(self.block_keys[0])
            rest = Collector(self.outside, self.padding, self.gram)
            stop = not self.outside and isinstance(self.feed, Batches)  # nothing behind the blocks is wanted
            recorder = chain.Recorder(self.stack, self.padding, entry=entry, stop=stop)
            with recorder.recording(self.model), rest.watching(lambda: recorder.place), chain.replaced(self.stack, idle):
                self.feed(self.model)
            self.filler.empty(self.block_keys[0])
            rest.require(self.outside)
        odd = [key for key, places in rest.calls.items() if len(places) > 1 or "inside" in places]
        if recorder.broken or odd:
            why = recorder.broken or f"{odd[0]!r} is used on both sides of the blocks"
            raise ModelError(
                f"the blocks {self.stack.name!r} of {type(self.model).__name__} are no chain ({why}): use sparsify"
            )
        self.passes = recorder.passes
        states.turn()
        return states, {key: sums for key, sums in rest.sums.items() if rest.calls[key] == {"before"}}

    def _shares(self, states: States, before: dict[str, Statistics], tell: Callable[[str], None]) -> dict[str, float]:
        """Return OWL's outlier shares of the dense network: one walk through all blocks."""
        shares: dict[str, float] = {}
        multiple = self.settings.outliers
        for index, (name, _) in enumerate(self.stack.blocks):
            self.filler.fill(self.block_keys[index])
            layers = self.inside[index]
            collector = Collector(layers, self.padding, None)
            with collector.watching():
                self._through(index, states, keep=True)
            collector.require(layers)
            if layers:
                parts = [(layer, layer.weight, collector.sums[layer.parameter]) for layer in distinct(layers)]
                shares |= {layer.parameter: block_share(parts, multiple) for layer in layers[:1]}
                shares |= {layer.parameter: shares[layers[0].parameter] for layer in layers}
            self.filler.empty(self.block_keys[index])
            states.turn()
            tell(name)
        if self.outside:
            with self._outer():
                sums = {**self._sums_behind(self.outside, states, None), **before}
                for layer in distinct(self.outside):
                    shares[layer.parameter] = block_share([(layer, layer.weight, sums[layer.parameter])], multiple)
        return shares

    def _allocated(self, shares: dict[str, float] | None) -> dict[str, int]:
        layers = distinct(self.layers)
        keys = {layer.parameter: self.filler.key(layer.parameter) for layer in layers}

        def weights() -> Iterator[tuple[str, Tensor]]:
            for name, key in keys.items():
                yield name, self.filler.source.read([key])[key]

        sizes = {layer.parameter: layer.weight.numel() for layer in layers}
        return allocate(self.settings, sizes, shares=shares, weights=weights)

    def _block(self, index: int, states: States, work: Unfinished, *, onward: bool) -> None:
        """Prune block `index`, write its shard and run it again, or run what an earlier run wrote."""
        keys, layers = self.block_keys[index], self.inside[index]
        shard = work.shard(index + 2, len(self.stack.blocks) + 1)
        onward = onward and self.feed is not None
        if index < work.done:
            if onward and not (isinstance(states, Files) and states.generation > index):
                self.filler.fill(keys, read_tensors(shard))
                self._through(index, states, keep=True)
                self.filler.empty(keys)
                states.turn()
            return
        self.filler.fill(keys)
        sums: dict[str, Statistics] = {}
        if self.feed is not None and layers:
            collector = Collector(layers, self.padding, self.gram)
            with collector.watching():
                self._through(index, states, keep=False)
            collector.require(layers)
            sums = collector.sums
            _trim()
        masks = {}
        for layer in distinct(layers):
            count = work.counts[layer.parameter]
            own = sums.pop(layer.parameter, None)
            pruned, mask, row = prune_layer(layer, layer.weight, own, count, self.settings)
            layer.weight.copy_(pruned)
            masks[layer.parameter], work.rows[layer.parameter] = mask, row
            del own, pruned
            _trim()
        if onward:
            self._through(index, states, keep=True)
        work.write(shard, self.filler.values(keys))
        work.keep_masks(f"{index:05d}", masks)
        work.done = index + 1
        work.save()
        self.filler.empty(keys)
        if onward:
            states.turn()
        _trim()

    def _through(self, index: int, states: States, *, keep: bool) -> None:
        """Run all passes through block `index`; `keep` puts what comes out into the states."""
        name, block = self.stack.blocks[index]
        for number, one in enumerate(self.passes):
            self.padding.masks = one.masks
            following = one.calls[index + 1] if index + 1 < len(one.calls) else None
            try:
                state = chain.run(block, one.calls[index], states.get(number), keep=following)
            except OpenworkError:
                raise
            except Exception as error:
                what = f"{type(error).__name__}: {error}".splitlines()[0][:200]
                raise ModelError(
                    f"the block {name!r} cannot be run by itself ({what}): load the model and use sparsify"
                ) from error
            if keep:
                states.put(number, state)

    def _behind(self, after: list[Layer], states: States, work: Unfinished) -> None:
        """Prune the layers behind the blocks on what the pruned blocks make."""
        if after:
            sums = {} if self.feed is None else self._sums_behind(after, states, self.gram)
            self._prune_outside(after, sums, work, "behind")

    def _sums_behind(self, layers: list[Layer], states: States, gram: torch.dtype | None) -> dict[str, Statistics]:
        assert self.feed is not None
        collector = Collector(layers, self.padding, gram)
        handle = self.padding.watch(self.model)
        try:
            with collector.watching(), chain.replaced(self.stack, chain.standing_in(self.stack, self.passes, states.get)):
                self.feed(self.model)
        finally:
            handle.remove()
        collector.require(layers)
        return collector.sums

    def _prune_outside(self, layers: list[Layer], sums: dict[str, Statistics], work: Unfinished, stage: str) -> None:
        masks = {}
        for layer in distinct(layers):
            name, count = layer.parameter, work.counts[layer.parameter]
            pruned, masks[name], work.rows[name] = prune_layer(layer, layer.weight, sums.get(name), count, self.settings)
            self.filler.overrides[self.filler.key(name)] = pruned
        work.keep_masks(stage, masks)


def _checked(folder: Path, out: Path) -> Path:
    """Return `out` resolved, unless writing there could touch the source or something else."""
    target, own = out.expanduser().resolve(), folder.expanduser().resolve()
    if target == own or own in target.parents:
        raise StoreError(f"out={str(out)!r} lies in the source folder: choose another, the source is never written to")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise StoreError(f"{str(out)!r} exists and is not an empty folder: choose another out, nothing was written")
    return target


def _trim() -> None:
    """Give freed memory back to the system where the C library would keep it (glibc)."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _counter(progress: Progress, total: int) -> Callable[[str], None]:
    steps = itertools.count(1)

    def tell(name: str) -> None:
        if progress is not None:
            progress(next(steps), total, name)

    return tell
