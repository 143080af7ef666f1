"""`accelerate`: measure every format on every layer, keep what pays, prove it end to end; the rest stays dense."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from openwork.errors import ModelError
from openwork.runtime.choose import Choice, capture, choose
from openwork.runtime.timing import REPEATS, limited_threads, measure, run

__all__ = ["Choice", "Plan", "accelerate", "measure"]

MARGIN = 1.02
"""The whole is kept only if it is this many times as fast as the dense model."""
DRIFT = 1e-2
"""Most that outputs may differ, against the largest of them. A last check only: layers are held to `bounds.bound`."""


@dataclass(frozen=True)
class Plan:
    """The choices layer by layer, and the milliseconds of the dense model and of the one returned.

    A plan holds for the input shape, the number of threads and the processor that it was measured with.
    """

    choices: tuple[Choice, ...]
    dense_ms: float
    ms: float
    threads: int
    processor: str
    note: str = ""

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
    verbose: bool = True,
    repeats: int = REPEATS,
    threads: int | None = None,
) -> nn.Module:
    """Return a copy of `model` for inference that is as fast as its zeros allow on this machine, and never slower.

    Each linear layer and each 2-d convolution without groups is measured dense and in every format, on the input shape
    it has in the example. A format takes a layer's place where it is at least 1.05 times as fast; the whole is kept
    only if it beats the dense model end to end. What is not replaced is the same kind of layer as before.

    The copy is in eval mode, without gradients. It gives the same outputs up to rounding (`bounds.bound` for a layer)
    for finite inputs; zero weights are skipped, so infinity times zero makes no NaN. Its `state_dict` is the dense
    model's. Its attribute `plan` holds what was measured (`openwork_plan` if the model has a `plan` of its own).

    Args:
        model: any module on the CPU, also one wrapped by `torch.compile`. On another device it stays dense.
        example: a tensor, a tuple or list of arguments, or a mapping of keywords. Speed depends on its shape: give the
            batch size that you will run.
        verbose: print the plan as a table.
        repeats: rounds of each measurement.
        threads: torch threads to measure with; None leaves the number as it is. It is put back afterwards.

    Raises:
        ModelError: if `model` is no module, cannot be copied, or refuses the example.
    """
    dense = _copied(model)
    with limited_threads(threads) as count, torch.no_grad():
        fast, plan = _planned(dense, example, repeats, count)
    setattr(fast, "openwork_plan" if hasattr(fast, "plan") else "plan", plan)
    if verbose:
        from openwork.runtime.show import show

        show(plan)
    return fast


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


def _copied(model: nn.Module) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise ModelError(f"a {type(model).__name__} cannot be accelerated: give a torch.nn.Module")
    try:
        twin: nn.Module = copy.deepcopy(getattr(model, "_orig_mod", model))
    except Exception as error:
        raise ModelError(f"{type(model).__name__} cannot be copied ({error}): make it survive copy.deepcopy") from error
    return twin.eval().requires_grad_(False)


def _planned(dense: nn.Module, example: Any, repeats: int, count: int) -> tuple[nn.Module, Plan]:
    """Measure the layers, then the whole; return the module to use and its plan."""
    seen = capture(dense, example)
    choices: list[Choice] = []
    winners: dict[nn.Module, nn.Module] = {}
    for name, layer in dense.named_modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            choice, winner = choose(name or "(model)", layer, seen.get(layer), repeats)
            choices.append(choice)
            if winner is not None:
                winners[layer] = winner
    fast = _replaced(dense, winners) if winners else dense
    problem = _unpaid(dense, winners) or _difference(dense, fast, example)
    candidates = {"dense": dense} if problem else {"dense": dense, "fast": fast}
    times = measure(candidates, example, repeats=repeats)
    if not problem and times["dense"] < MARGIN * times["fast"]:
        problem = "the layers are faster one by one, the whole is not"
    processor = torch.backends.cpu.get_cpu_capability()
    plan = Plan(tuple(choices), 1e3 * times["dense"], 1e3 * times.get("fast", times["dense"]), count, processor)
    if not problem:
        return fast, plan
    kept = tuple(_kept_dense(choice) for choice in choices)
    return dense, replace(plan, choices=kept, ms=plan.dense_ms, note=f"{problem}: the model stays dense")


def _unpaid(dense: nn.Module, winners: dict[nn.Module, nn.Module]) -> str:
    """Return why there is nothing to try, empty if there is."""
    tensors = itertools.chain(dense.parameters(), dense.buffers())
    away = next((tensor.device for tensor in tensors if tensor.device.type != "cpu"), None)
    if away is not None and not winners:
        return f"the model is on {away}, where there are no sparse formats yet"
    return "" if winners else "no layer is faster in a sparse format"


def _replaced(dense: nn.Module, winners: dict[nn.Module, nn.Module]) -> nn.Module:
    """Return a twin of `dense` that shares its tensors, with the winners in the places of their layers."""
    if dense in winners:
        return winners[dense]
    tensors = itertools.chain(dense.parameters(), dense.buffers())
    fast = copy.deepcopy(dense, {id(tensor): tensor for tensor in tensors})
    for name, layer in dense.named_modules(remove_duplicate=False):
        if layer in winners:
            fast.set_submodule(name, winners[layer])
    return fast


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
