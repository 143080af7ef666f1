"""What comes out of a model: its logits, their agreement with the labels, and a check before training starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

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


def rows(output: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return logits as (n, classes) and labels as (n,), one row a prediction, for cross-entropy and accuracy.

    Args:
        output: logits (batch, classes); (batch, ..., classes) as language models give them; or (batch, classes, ...).
        y: labels (batch,) or (batch, ...). Where both readings fit, the classes are last.

    Raises:
        ModelError: if the shapes agree in neither way.
    """
    if output.ndim >= 2 and y.shape == output.shape[:-1]:
        return output.flatten(0, -2), y.flatten()
    if output.ndim >= 3 and y.shape == (output.shape[0], *output.shape[2:]):
        return output.movedim(1, -1).flatten(0, -2), y.flatten()
    fitting = [(*y.shape, "classes")] if y.ndim else []
    if y.ndim > 1:
        fitting.append((y.shape[0], "classes", *y.shape[1:]))
    raise ModelError(
        f"the model's output has shape {_written(output.shape)}, the labels {_written(y.shape)}: "
        f"expected an output of {' or '.join(map(_written, fitting)) or 'more than one example'}"
    )


def preflight(model: nn.Module, x: Tensor, y: Tensor, *, classes: int | None = None) -> None:
    """Run one batch through the model and check that training on it makes sense; leaves no trace in the model.

    The forward pass is in evaluation mode, without gradients, with the global generator put back afterwards.

    Args:
        model: the model, on the batch's device.
        x: one batch of inputs.
        y: its labels, whole numbers.
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
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise ModelError(f"the labels are {_kind(y)}: they must be whole numbers, the classes from 0")
    flat, labels = rows(output, y)
    outputs = flat.shape[1]
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
    if parameter is not None and parameter.dtype != x.dtype:
        tokens = isinstance(next((m for m in model.modules() if not list(m.children())), None), nn.Embedding)
        if tokens and x.is_floating_point():
            words.append("int64 token numbers")
        elif not tokens:
            words.append(f"type {_kind(parameter)}")
    if parameter is not None and parameter.device != x.device:
        words.append(f"device {parameter.device} (the batch is on {x.device})")
    return f", where it expects {' and '.join(words)}" if words else ""


def _kind(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _written(shape: Sequence[int | str]) -> str:
    return f"({', '.join(map(str, shape))})"
