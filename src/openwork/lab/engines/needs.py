"""What a trial asks of the machine that runs it: threads, memory, a GPU; so that trials are not packed too tightly.

The estimate is meant to be safe rather than close: it counts what the model, its optimizer, a checkpoint, the
activations of a batch and the data take, each from the objects themselves.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from openwork.errors import OpenworkError
from openwork.lab.spec import Trial

if TYPE_CHECKING:
    from torch import Tensor, nn

    from openwork.data.source import Source

PROCESS = 640 << 20  # bytes: an interpreter that has imported torch and openwork, with its heap
UNKNOWN = 1 << 30  # bytes for a trial whose model or data cannot be told from its settings
_EVALUATED = 512  # examples that are evaluated at a time
_RANKING = 14.0  # bytes a byte of weight: masks, and what methods need for a moment to rank all weights or average models
_MODEL_NAMES = ("model", "network")


@dataclass(frozen=True)
class Needs:
    """Resources of one trial.

    Attributes:
        cpus: threads.
        memory: bytes.
        gpus: 1 if the trial trains on one, else 0.
    """

    cpus: int
    memory: int
    gpus: int = 0


def reader() -> Callable[[Trial], Needs]:
    """Return a function that tells what a trial needs; trials that differ in the seed only are looked at once."""
    known: dict[str, int] = {}

    def needs(trial: Trial) -> Needs:
        values = {**trial.content, **trial.arm.settings, "options": trial.content.get("options")}  # not the method's
        key = json.dumps([trial.study, trial.content, trial.arm.settings], sort_keys=True, default=str)
        if key not in known:
            known[key] = _memory(values)
        device = str(values.get("device") or "cpu")
        return Needs(int(trial.identity.get("threads", 1)), known[key], int(device.startswith("cuda")))

    return needs


def estimate(model: nn.Module, source: Source, *, batch_size: int, optimizer: str = "sgd", momentum: float = 0.9) -> int:
    """Return the bytes that a process needs to train `model` on `source`.

    Weights, gradients and optimizer state once; weights and state twice more while a checkpoint is written; masks, scores
    and their order where weights are ranked (measured: 4 to 14 times the weights over the methods here); what autograd
    keeps of a batch, with the gradients that flow back, or what an evaluation of 512 examples holds, whichever is more;
    the data twice, since they are read before they are laid out.

    Args:
        model: the model, on the CPU; left as it is.
        source: the data.
        batch_size: examples a step.
        optimizer: its name in `torch.optim`, lower case.
        momentum: of the optimizers that have one.
    """
    weights = sum(param.numel() * param.element_size() for param in model.parameters())
    slots = _slots(optimizer, momentum)
    kept, largest = _activations(model, source)
    moving = max(2.0 * kept * batch_size, 3.0 * largest * max(_EVALUATED, batch_size))
    return int(PROCESS + weights * (2 + slots + 2 * (1 + slots) + _RANKING) + moving + 2 * _data(source))


def _memory(values: Mapping[str, Any]) -> int:
    """Return the estimate for a trial by the words that recipes and studies share, `UNKNOWN` where that fails."""
    from openwork import data, models

    name = next((values[word] for word in _MODEL_NAMES if isinstance(values.get(word), str)), None)
    if name is None or not isinstance(values.get("data"), str):
        return UNKNOWN
    options = values.get("options") if "model" in values else None
    wider = {"width": values["width"]} if isinstance(values.get("width"), int) else None
    try:
        source = data.load(values["data"], train=values.get("train"))
        model = models.build(name, input_shape=source.input_shape, classes=source.classes, seed=0, options=options or wider)
        return estimate(
            model, source, batch_size=int(values.get("batch_size") or 128),
            optimizer=str(values.get("optimizer") or "sgd"), momentum=float(values.get("momentum") or 0.9),
        )  # fmt: skip
    except (OpenworkError, RuntimeError, TypeError, ValueError):
        return UNKNOWN


def _slots(optimizer: str, momentum: float) -> float:
    """Return the bytes of state that an optimizer keeps a byte of weight, measured on a small matrix."""
    import torch

    from openwork.train import optimizers

    weight = torch.nn.Parameter(torch.zeros(64, 64))
    weight.grad = torch.zeros_like(weight)
    made = optimizers.build(optimizer, [weight], lr=0.1, momentum=momentum)
    made.step()
    state = [value for value in made.state[weight].values() if isinstance(value, torch.Tensor)]
    return sum(value.numel() * value.element_size() for value in state) / (weight.numel() * weight.element_size())


def _activations(model: nn.Module, source: Source) -> tuple[float, float]:
    """Return the bytes an example that autograd keeps of a training pass, and those of the largest tensor among them."""
    import torch

    own = {param.untyped_storage().data_ptr() for param in [*model.parameters(), *model.buffers()]}
    seen: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            seen[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    x, _ = next(iter(source.train_batches(0, 0, 2)))
    training, state = model.training, {name: value.clone() for name, value in model.named_buffers()}
    with torch.random.fork_rng(devices=[]), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.train()(x)
    model.train(training)
    with torch.no_grad():
        for name, value in model.named_buffers():  # batch norm counted the batch
            value.copy_(state[name])
    sizes = [tensor.untyped_storage().nbytes() / len(x) for tensor in seen.values()] or [float(x[0].numel() * 4)]
    return sum(sizes), max(sizes)


def _data(source: Source) -> float:
    """Return the bytes of the data in memory."""
    from openwork.data.arrays import Arrays

    if isinstance(source, Arrays):
        return float(sum(part.numel() * part.element_size() for pair in source.parts.values() for part in pair))
    example = 4.0
    for size in source.input_shape:
        example *= size
    return 1.5 * example * source.train_size
