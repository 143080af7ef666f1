"""What comes out of a model: its logits, and a check against the data before training starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from openwork.core.metrics import IGNORED
from openwork.errors import ModelError


def logits(output: Any) -> Tensor:
    """Return the logits in a model's output.

    Args:
        output: a tensor; an object or mapping with `logits`; or a tuple or list whose first element is one of these.

    Raises:
        ModelError: if there are none.
    """
    if isinstance(output, Tensor):
        return output
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(found, Tensor):
        return found
    if isinstance(output, tuple | list) and output:
        return logits(output[0])
    raise ModelError(
        f"the model returns a {type(output).__name__} without logits: return a tensor, a tuple that starts with it, "
        "or an object with .logits"
    )


def preflight(model: nn.Module, x: Tensor, y: Tensor, *, classes: int | None = None) -> None:
    """Run one batch through the model and check that training on it makes sense; leaves no trace in the model.

    The forward pass is in evaluation mode, without gradients, with the global generator put back afterwards.

    Args:
        model: the model, on the batch's device.
        x: one batch of inputs.
        y: its labels, int64: (batch,), or (batch, tokens) for a language model; `core.metrics.IGNORED` marks those
            that do not count.
        classes: classes of the data, where known; the model must have at least as many outputs.

    Raises:
        ModelError: in one sentence, if the batch is empty, the forward pass fails, the output holds no logits or does
            not agree with `y` in shape, or labels lie outside the range of the outputs.
    """
    if not x.ndim or not x.shape[0]:
        raise ModelError(f"the batch is empty: its shape is {_written(x.shape)}")
    output = logits(_forward(model, x))
    if not output.is_floating_point():
        raise ModelError(f"the model's output is {_kind(output)}: logits are floating-point numbers")
    if y.dtype != torch.int64:
        raise ModelError(f"the labels are {_kind(y)}: they must be int64, the classes counted from 0")
    if not output.ndim or output.shape[:-1] != y.shape or y.shape[:1] != x.shape[:1]:
        raise ModelError(
            f"the model's output has shape {_written(output.shape)} for {x.shape[0]} examples with labels of shape "
            f"{_written(y.shape)}: expected the labels' shape with the classes as a last axis, "
            f"{_written([*y.shape, 'classes'])}"
        )
    outputs, labels = output.shape[-1], y[y != IGNORED]
    if classes is not None and outputs < classes:
        raise ModelError(f"the model has {outputs} outputs, the data {classes} classes")
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < outputs:
        raise ModelError(
            f"the labels run from {int(labels.min())} to {int(labels.max())}, "
            f"the model's {outputs} outputs stand for 0 to {outputs - 1}"
        )


def _forward(model: nn.Module, x: Tensor) -> Any:
    modes = [(module, module.training) for module in model.modules()]
    devices = [x.device] if x.device.type == "cuda" else []
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            return model.eval()(x)
    except Exception as error:
        text = " ".join(str(error).split()) or "no message"
        raise ModelError(
            f"the model fails on a batch of shape {_written(x.shape)} and type {_kind(x)}"
            f"{_expected(model, x)}: {type(error).__name__}: {text}"
        ) from error
    finally:
        for module, training in modes:
            module.training = training


def _expected(model: nn.Module, x: Tensor) -> str:
    """Say in a few words what the model expects, where that is known and differs from the batch."""
    words = []
    recipe = getattr(model, "openwork_recipe", None)
    if isinstance(recipe, dict) and tuple(recipe["input_shape"]) != tuple(x.shape[1:]):
        words.append(f"examples of shape {_written(recipe['input_shape'])}")
    parameter = next(model.parameters(), None)
    if parameter is None:
        return _listed(words)
    first = next(module for module in model.modules() if next(module.children(), None) is None)
    if not isinstance(first, nn.Embedding) and parameter.dtype != x.dtype:
        words.append(f"type {_kind(parameter)}")
    elif isinstance(first, nn.Embedding) and x.is_floating_point():
        words.append("int64 token numbers")
    if parameter.device != x.device:
        words.append(f"device {parameter.device} (the batch is on {x.device})")
    return _listed(words)


def _listed(words: list[str]) -> str:
    return f", where it expects {' and '.join(words)}" if words else ""


def _kind(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _written(shape: Sequence[int | str]) -> str:
    return f"({', '.join(map(str, shape))})"
