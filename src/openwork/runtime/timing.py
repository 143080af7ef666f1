"""Timing that compares fairly: every candidate in turn, many rounds, the median of each."""

from __future__ import annotations

import contextlib
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from openwork.errors import ModelError

REPEATS = 15
SAMPLE_SECONDS = 5e-4
LEAST_ROUNDS = 5


def interleave(
    calls: Mapping[str, Callable[[], object]], *, repeats: int = REPEATS, seconds: float | None = None,
    sample: float = SAMPLE_SECONDS, settled: bool = False,
) -> dict[str, float]:  # fmt: skip
    """Return the median seconds of one call of each, measured in interleaved rounds.

    A round times each candidate once and starts with another one each time, so that a machine that slows down slows
    all of them. Calls shorter than a sample are timed in groups.

    Args:
        calls: functions without arguments, by name.
        repeats: rounds.
        seconds: what all rounds together may take; fewer rounds are made to keep to it, but at least 5.
        sample: seconds that the calls of a group take together, about.
        settled: call once before each group, untimed, so that a candidate finds in the caches what it left there itself,
            as it does where it runs again and again, and not what the others left.
    """
    counts, estimate = {}, 0.0
    for name, call in calls.items():
        call()
        once = timed(call)
        counts[name] = max(1, round(sample / max(once, 1e-7)))
        estimate += once * (counts[name] + settled)
    if seconds is not None:
        repeats = min(repeats, max(LEAST_ROUNDS, int(seconds / max(estimate, 1e-9))))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    order = itertools.cycle(calls)
    for _ in range(max(1, repeats)):
        for name in itertools.islice(order, len(calls)):
            if settled:
                calls[name]()
            samples[name].append(timed(calls[name], counts[name]))
        next(order, None)
    return {name: statistics.median(times) for name, times in samples.items()}


def timed(call: Callable[[], object], count: int = 1) -> float:
    """Return the mean seconds of `count` calls in a row."""
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) / count


def measure(models: Mapping[str, nn.Module], example: Any, *, repeats: int = REPEATS) -> dict[str, float]:
    """Return the median seconds of a forward pass of each model on the same example, in interleaved rounds.

    The models are run in eval mode without gradients and are left in the mode they were in.

    Args:
        models: by name.
        example: a tensor, a tuple or list of arguments, or a mapping of keywords; on the models' device.
        repeats: rounds.

    Raises:
        ModelError: if a model refuses the example, by name.
    """
    modes = {name: [(module, module.training) for module in model.modules()] for name, model in models.items()}
    try:
        for model in models.values():
            model.eval()
        with torch.no_grad():  # not inference_mode: a model may keep a tensor and be trained later
            for name, model in models.items():
                try:
                    run(model, example)
                except Exception as error:
                    raise refusal(name, error) from error
            return interleave({name: _forward(model, example) for name, model in models.items()}, repeats=repeats)
    finally:
        for module, training in itertools.chain.from_iterable(modes.values()):
            module.training = training


def run(model: nn.Module, example: Any) -> Any:
    """Return the output of `model` for an example: a tensor, a tuple or list of arguments, or a mapping of keywords."""
    if isinstance(example, Tensor):
        return model(example)
    if isinstance(example, Mapping):
        return model(**example)
    if isinstance(example, (tuple, list)):
        return model(*example)
    raise ModelError(
        f"the example is a {type(example).__name__}: give a tensor, a tuple of arguments or a mapping of keywords"
    )


def refusal(name: str, error: Exception) -> ModelError:
    """Return the error that says which model refused the example, and why."""
    if isinstance(error, ModelError):
        return error
    text = " ".join(str(error).split())
    return ModelError(f"{name} refuses the example ({type(error).__name__}: {text[:300]}): give inputs as it takes them")


@contextlib.contextmanager
def limited_threads(count: int | None) -> Iterator[int]:
    """Set torch's number of threads for a block, None leaves it; yield the number in force."""
    before = torch.get_num_threads()
    if count is not None:
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ModelError(f"threads is {count!r}: give a whole number of at least 1, or None to leave it as it is")
        torch.set_num_threads(count)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def _forward(model: nn.Module, example: Any) -> Callable[[], object]:
    kinds = {tensor.device.type for tensor in itertools.chain(model.parameters(), model.buffers())}
    waits = [getattr(torch, kind).synchronize for kind in sorted(kinds & {"cuda", "mps", "xpu"})]

    def forward() -> object:
        output = run(model, example)
        for wait in waits:  # such a device works on after the call returns
            wait()
        return output

    return forward
