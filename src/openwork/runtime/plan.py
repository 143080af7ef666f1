"""`accelerate`: measure what pays, layer by layer and as a whole, prove it end to end; the rest stays dense."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from openwork.errors import ModelError
from openwork.runtime import chaining, modules, record, wrapping
from openwork.runtime.choose import Choice, Seen, capture, choose, glance, is_candidate, noise
from openwork.runtime.graph import graft
from openwork.runtime.graph.island import Island
from openwork.runtime.graph.ops import Way
from openwork.runtime.record import Record
from openwork.runtime.timing import REPEATS, limited_threads, measure, run, timed

__all__ = ["Choice", "Plan", "accelerate", "measure", "plan_of", "restore"]

MARGIN = 1.05
"""What replaces a layer, and the whole, must be this many times as fast."""
CHAINED = 1.02
"""And a chain this many times as fast as its layers, which have paid already."""
PASSING = 250.0
"""Milliseconds of a dense call up to which a record that was found is checked against the machine as it is now."""
DRIFT = 1e-2
"""Most that outputs may differ, against the largest of them. A last check only: layers are held to `bounds.bound`."""


@dataclass(frozen=True)
class Plan:
    """The choices layer by layer, and the milliseconds of the dense model and of the one returned.

    A plan holds for the input shape, the number of threads and the processor that it was measured with.

    Attributes:
        choices: one a layer that could be sparse.
        dense_ms, ms: of one call on the example.
        threads: torch's threads.
        processor: vector instructions in use.
        note: why the model stays dense, empty if it does not.
        record: the same as plain data, for `openwork.save`.
    """

    choices: tuple[Choice, ...]
    dense_ms: float
    ms: float
    threads: int
    processor: str
    note: str = ""
    record: Record = field(default_factory=lambda: Record("dense"))

    @property
    def gain(self) -> float:
        """How many times as fast as dense; 1 where the dense model was kept."""
        return self.dense_ms / self.ms

    @property
    def accelerated(self) -> bool:
        """Whether any layer was replaced."""
        return any(choice.chosen != "dense" for choice in self.choices)

    def __iter__(self) -> Iterator[Choice]:
        return iter(self.choices)

    def __len__(self) -> int:
        return len(self.choices)


def accelerate(
    model: nn.Module,
    example: Any,
    *,
    min_speedup: float = MARGIN,
    verbose: bool = True,
    repeats: int = REPEATS,
    threads: int | None = None,
) -> nn.Module:
    """Return a copy of `model` for inference that is as fast as its zeros allow on this machine, and never slower.

    Convolutional stretches of the forward that torch.fx can trace become native programs: batch norms folded, images
    kept channel by channel between layers, sparse products with bias, activation and residual fused, memory used again.
    Other linear, convolutional and recurrent layers are measured dense and in every format on the input that they have
    in the example, and replaced one by one. What does not pay by `min_speedup`, layer by layer and end to end, stays
    what it was; so does what is not known here. What was measured is kept in the cache folder, and found again for the
    same model, example, machine and number of threads, unless the machine was plainly busy then.

    The copy is in eval mode, without gradients, and may be called from several threads at once. It gives the same outputs
    up to rounding (`bounds.bound` for a layer) for finite inputs; zero weights are skipped, so infinity times zero makes
    no NaN. Batch size, image size and sequence length may differ from the example's. Its `state_dict` is the dense
    model's. Its attribute `plan` holds what was measured (`openwork_plan` if the model has a `plan` of its own).

    Args:
        model: any module on the CPU, also one wrapped by `torch.compile`. On another device it stays dense.
        example: a tensor, a tuple or list of arguments, or a mapping of keywords. Speed depends on its shape: give the
            batch size that you will run.
        min_speedup: how many times as fast as dense something must be to be used, at least 1.
        verbose: print the plan as a table.
        repeats: rounds of each measurement.
        threads: torch threads to measure with; None leaves the number as it is. It is put back afterwards.

    Raises:
        ModelError: if `model` is no module, cannot be copied, or refuses the example.
    """
    if not min_speedup >= 1.0:
        raise ModelError(f"min_speedup is {min_speedup!r}: give a number of at least 1")
    dense = _copied(model)
    with limited_threads(threads) as count, torch.no_grad():
        key = record.digest(dense, example, [count, min_speedup])
        known = record.find(key)
        known = None if known is not None and _from_a_busy_moment(dense, example, known) else known
        found = _rebuilt(dense, example, known) if known is not None else None
        fast, plan = found or _planned(dense, example, min_speedup, repeats, count)
        if found is None:
            record.keep(key, plan.record)
    return _finished(fast, plan, verbose)


def _from_a_busy_moment(dense: nn.Module, example: Any, known: Record) -> bool:
    """Tell whether the dense model takes less than half of what it took when a record was made: its choices are noise.

    A model that is too slow to be timed in passing is believed; a moment of noise weighs little there.
    """
    if known.dense_ms > PASSING:
        return False
    run(dense, example)
    return 1e3 * min(timed(lambda: run(dense, example)) for _ in range(3)) < 0.5 * known.dense_ms


def restore(model: nn.Module, saved: Any) -> nn.Module:
    """Return `model` accelerated as the record in a saved file says; measured anew where it holds for another machine.

    Args:
        model: the dense model, filled.
        saved: what `record.write` gave; from a file, so nothing of it is trusted but how to run what is there.

    Raises:
        ModelError: if it says too little to try the model: accelerate it yourself.
    """
    example = record.example_of(saved)
    known = record.read(saved)
    if known is not None and torch.get_num_threads() == known.threads:
        dense = _copied(model)
        with torch.no_grad():
            found = _rebuilt(dense, example, known)
        if found is not None:
            return _finished(*found, verbose=False)
    return accelerate(model, example, verbose=False)


def plan_of(model: nn.Module) -> Plan:
    """Return the plan of a model that `accelerate` returned.

    Raises:
        ModelError: if it is another module.
    """
    for name in ("openwork_plan", "plan"):
        plan = getattr(model, name, None)
        if isinstance(plan, Plan):
            return plan
    raise ModelError(f"this {type(model).__name__} has no plan; openwork.accelerate gives one")


def _finished(fast: nn.Module, plan: Plan, verbose: bool) -> nn.Module:
    setattr(fast, "openwork_plan" if hasattr(fast, "plan") else "plan", plan)
    if verbose:
        from openwork.runtime.show import show

        show(plan)
    return fast


def _copied(model: nn.Module) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise ModelError(f"a {type(model).__name__} cannot be accelerated: give a torch.nn.Module")
    try:
        twin: nn.Module = copy.deepcopy(getattr(model, "_orig_mod", model))
    except Exception as error:
        raise ModelError(f"{type(model).__name__} cannot be copied ({error}): make it survive copy.deepcopy") from error
    return twin.eval().requires_grad_(False)


@dataclass
class _Attempt:
    """A candidate for the whole: the module, the choices it stands for, and what it takes to make it again."""

    model: nn.Module
    choices: list[Choice]
    record: Record


def _planned(dense: nn.Module, example: Any, margin: float, repeats: int, count: int) -> tuple[nn.Module, Plan]:
    """Measure the layers, then the whole; return the module to use and its plan."""
    seen = capture(dense, example)
    layers = {name: layer for name, layer in dense.named_modules() if is_candidate(layer)}
    blank = Record("dense", threads=count, example=record.describe(example), tree=record.tree(example))
    race = _Race(layers, seen, margin, repeats)
    attempt = _graph(dense, example, race, blank) or _layers(dense, race, blank)
    kept, times, problem = _judged(dense, attempt, example, margin, repeats)
    if problem and attempt.record.mode == "graph":  # whole stretches do not pay; single layers still may
        attempt = _layers(dense, race, blank)
        kept, times, problem = _judged(dense, attempt, example, margin, repeats)
    choices = [_kept_dense(choice) for choice in attempt.choices] if problem else attempt.choices
    note = f"{problem}: the model stays dense" if problem else ""
    made = replace(
        blank if problem else attempt.record, dense_ms=1e3 * times["dense"], ms=1e3 * times["dense" if problem else "fast"],
        note=note, choices=[_row(choice) for choice in choices],
    )  # fmt: skip
    return kept, _plan(made)


def _row(choice: Choice) -> dict[str, Any]:
    """Return a choice as JSON gives it back."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(choice).items()}


def _plan(made: Record) -> Plan:
    choices = []
    for words in made.choices:
        shapes = {key: tuple(words[key]) for key in ("shape", "input_shape")}
        choices.append(Choice(**{**words, **shapes}))
    processor = torch.backends.cpu.get_cpu_capability()
    return Plan(tuple(choices), made.dense_ms, made.ms, made.threads, processor, made.note, made)


def _judged(
    dense: nn.Module, attempt: _Attempt, example: Any, margin: float, repeats: int
) -> tuple[nn.Module, dict[str, float], str]:
    """Time a candidate against dense; return what to use, the seconds of both, and why it stays dense if it does."""
    problem = _unpaid(dense, attempt) or _difference(dense, attempt.model, example)
    candidates = {"dense": dense} if problem else {"dense": dense, "fast": attempt.model}
    times = measure(candidates, example, repeats=repeats)
    if not problem and times["dense"] < margin * times["fast"]:
        problem = "the layers are faster one by one, the whole is not"
    return (dense if problem else attempt.model), times, problem


@dataclass
class _Race:
    """The race of the formats of every layer: run for a layer when it is asked for, and once."""

    layers: Mapping[str, nn.Module]
    seen: Mapping[nn.Module, Seen]
    margin: float
    repeats: int
    done: dict[str, tuple[Choice, nn.Module | None]] = field(default_factory=dict)

    def run(self, names: Iterable[str]) -> tuple[dict[str, Choice], dict[str, nn.Module]]:
        """Return the choice of each of these layers, and the packed layers that won, by name."""
        names = list(names)
        for name in names:
            if name not in self.done:
                layer = self.layers[name]
                self.done[name] = choose(name or "(model)", layer, self.seen.get(layer), self.repeats, self.margin)
        found = {name: self.done[name] for name in names}
        winners = {name: winner for name, (_, winner) in found.items() if winner is not None}
        return {name: choice for name, (choice, _) in found.items()}, winners

    def chained(self, model: nn.Module, winners: Mapping[str, nn.Module]) -> list[str]:
        """Run packed layers that follow one another as one, where that is faster; return the modules that hold them."""
        return chaining.put(model, {name: noise(name, self.seen[self.layers[name]]) for name in winners}, CHAINED)


def _layers(dense: nn.Module, race: _Race, blank: Record) -> _Attempt:
    """Race the formats of every layer."""
    choices, winners = race.run(race.layers)
    formats = {name: choice.chosen for name, choice in choices.items() if choice.chosen != "dense"}
    model = replaced(dense, winners)
    made = replace(blank, mode="layers" if formats else "dense", formats=formats, chains=race.chained(model, winners))
    return _Attempt(model, list(choices.values()), made)


def _graph(dense: nn.Module, example: Any, race: _Race, blank: Record) -> _Attempt | None:
    """Put islands where they can be; None where there is nothing for them. Formats race for the layers left over."""
    islands = graft.graft(graft.twin(dense), example)
    inside = {name for island in islands for name in island.layers}
    if not any(name in inside for name in race.layers):
        return None
    choices, winners = race.run(name for name in race.layers if name not in inside)
    model = replaced(dense, winners)
    model = graft.twin(dense) if model is dense else model
    chains = race.chained(model, winners)
    islands = graft.graft(model, example)
    sizes = graft.shapes(model, islands, example)
    ways = graft.tuned(sizes, blank.threads)
    for one in graft.profiles(sizes, blank.threads):
        if one.layer in race.layers:
            choices[one.layer] = _measured(one, race.layers[one.layer], race.seen)
    formats = {name: choice.chosen for name, choice in choices.items() if name not in inside and choice.chosen != "dense"}
    made = replace(blank, mode="graph", formats=formats, ways=_written(ways), chains=chains)
    return _Attempt(model, [choices[name] for name in race.layers if name in choices], made)


def _measured(one: Any, layer: nn.Module, seen: Mapping[nn.Module, Seen]) -> Choice:
    """Return the row of a layer inside an island: its dense time alone against that of the fused operation."""
    blank, dense_ms = glance(one.layer, layer, seen.get(layer))
    ms = {"dense": dense_ms, "fused": one.ms}
    chosen = "fused" if one.way is None else f"fused {one.way}"
    return replace(blank, ms=ms, chosen=chosen, gain=dense_ms / one.ms if one.ms else 1.0)


def replaced(dense: nn.Module, winners: Mapping[str, nn.Module]) -> nn.Module:
    """Return a twin of `dense` that shares its tensors, with the winners in the places of their layers."""
    if not winners:
        return dense
    if "" in winners:
        return winners[""]
    new = {dense.get_submodule(name): winner for name, winner in winners.items()}
    fast = graft.twin(dense)
    for name, layer in dense.named_modules(remove_duplicate=False):
        if layer in new:
            fast.set_submodule(name, new[layer])
    return fast


def _rebuilt(dense: nn.Module, example: Any, known: Record) -> tuple[nn.Module, Plan] | None:
    """Make the model again as a record says; None if the record does not fit it."""
    if known.mode == "dense":
        return dense, _plan(known)
    try:
        winners: dict[str, nn.Module] = {}
        for name, format in known.formats.items():
            layer = dense.get_submodule(name)
            if format in wrapping.PLACES and isinstance(layer, nn.Linear):
                winners[name] = wrapping.pack(layer, format)
                continue
            if modules.obstacle(layer) is not None:
                return None
            winners[name] = modules.pack(layer, format)
        fast = replaced(dense, winners)
        chaining.restore(fast, known.chains)
        if known.mode == "graph":
            fast = graft.twin(dense) if fast is dense else fast
            islands = graft.graft(fast, example)
            if not islands or not _set_ways(islands, known.ways):
                return None
        return None if _difference(dense, fast, example) else (fast, _plan(known))
    except (ModelError, AttributeError, KeyError, TypeError, ValueError):
        return None


def _written(ways: Mapping[Any, Way]) -> list[list[Any]]:
    return [[number, *spot, way.block, way.vectors, way.part] for (number, spot), way in ways.items()]


def _set_ways(islands: list[Island], rows: list[list[Any]]) -> bool:
    """Set the ways of a record; tell whether they make sense."""
    found: list[dict[Any, Way]] = [{} for _ in islands]
    for number, name, *rest in rows:
        if (
            not isinstance(name, str)
            or len(rest) != 7
            or not all(isinstance(one, int) and one >= 0 for one in (number, *rest))
        ):
            return False
        *spot, block, vectors, part = rest
        if (
            block not in (1, 2, 4, 8, 16)
            or not 0 < vectors <= 16
            or block * vectors > 64
            or part < 1
            or number >= len(islands)
        ):
            return False
        found[number][(name, *spot)] = Way(block, vectors, part)
    for island, ways in zip(islands, found, strict=True):
        island.set_ways(ways)
    return True


def _unpaid(dense: nn.Module, attempt: _Attempt) -> str:
    """Return why there is nothing to try, empty if there is."""
    tensors = itertools.chain(dense.parameters(), dense.buffers())
    away = next((tensor.device for tensor in tensors if tensor.device.type != "cpu"), None)
    if away is not None and attempt.record.mode == "dense":
        why = "no layer is faster in a format" if away.type == "cuda" else "there are no sparse formats yet"
        return f"the model is on {away}, where {why}"
    return "" if attempt.record.mode != "dense" else "no layer is faster in a sparse format"


def _difference(dense: nn.Module, fast: nn.Module, example: Any) -> str:
    """Return how the outputs differ beyond rounding, empty if they do not."""
    expected = [leaf for leaf in pytree.tree_leaves(run(dense, example)) if isinstance(leaf, Tensor)]
    try:
        found = [leaf for leaf in pytree.tree_leaves(run(fast, example)) if isinstance(leaf, Tensor)]
    except Exception as error:
        return f"the model does not run with packed layers ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    if [leaf.shape for leaf in expected] != [leaf.shape for leaf in found]:
        return "the outputs have other shapes with packed layers"
    pairs = zip(expected, found, strict=True)
    return "the outputs differ with packed layers" if any(_far(one, two) for one, two in pairs) else ""


def _far(expected: Tensor, found: Tensor) -> bool:
    if not expected.is_floating_point() or expected.numel() == 0 or not bool(expected.isfinite().all()):
        return False
    return not float((expected - found).abs().max()) <= DRIFT * float(expected.abs().max())


def _kept_dense(choice: Choice) -> Choice:
    if choice.chosen == "dense":
        return choice
    return replace(choice, chosen="dense", gain=1.0, note=f"{choice.chosen} is {choice.gain:.2f}x as fast alone")
