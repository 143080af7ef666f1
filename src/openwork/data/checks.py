"""What is checked in data that come from outside; each complaint is one sentence."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from openwork.core.metrics import IGNORED
from openwork.data.splits import tensor
from openwork.errors import DataError

PARTS = {"train": "training", "validation": "validation", "test": "test"}


def where(part: str, name: str) -> str:
    """Return how a complaint names a part, a plural: "the training data of 'mine.py:load'"."""
    return f"the {PARTS[part]} data of {name!r}"


def pair(item: Any, place: str, count: int | None = None) -> tuple[Tensor, Tensor]:
    """Return a checked pair (x, y): x uint8, int64 or finite float32, y int64, of one length.

    Args:
        item: what should be a pair of arrays or tensors.
        place: what a complaint names.
        count: how many classes; None to take any label from 0 on.

    Raises:
        DataError: if `item` is no pair, or x or y are not what they should be.
    """
    if not isinstance(item, tuple | list) or len(item) != 2:
        length = f" of {len(item)}" if isinstance(item, tuple | list | dict) else ""
        raise DataError(f"{place} give a {type(item).__name__}{length}; expected a pair (x, y) of inputs and labels")
    x, y = _inputs(item[0], place), _labels(item[1], place)
    if x.shape[0] != y.shape[0]:
        raise DataError(f"{place} have {x.shape[0]:,} inputs and {y.shape[0]:,} labels; expected one label an input")
    if count is not None:
        range_of(y, count, place)
    elif y.numel():
        classes(y, place)
    return x, y


def ready(x: Tensor) -> Tensor:
    """Return inputs as a model takes them: uint8 as float32 in [0, 1], others as they are."""
    return x.float().div_(255) if x.dtype == torch.uint8 else x


def classes(y: Tensor, place: str) -> int:
    """Return the largest label plus 1.

    Raises:
        DataError: if a label is negative, or there is none.
    """
    counted = _counted(y)
    if not counted.numel():
        raise DataError(f"{place} have no labels")
    range_of(y, int(counted.max()) + 1, place)
    return int(counted.max()) + 1


def range_of(y: Tensor, count: int, place: str) -> None:
    """Raise a DataError unless all labels lie in 0 .. count - 1."""
    counted = _counted(y)
    wrong = counted[(counted < 0) | (counted >= count)]
    if wrong.numel() and int(wrong[0]) < 0:
        raise DataError(f"{place} have a label {int(wrong[0])}; expected classes from 0 on")
    if wrong.numel():
        raise DataError(
            f"{place} have a label {int(wrong[0])}; expected 0..{count - 1}, the classes of the training data (return "
            "a dict with 'classes' if there are more)"
        )


def agreement(x: Tensor, shape: tuple[int, ...], place: str, dtype: torch.dtype) -> None:
    """Raise a DataError unless examples have this shape and type."""
    if tuple(x.shape[1:]) != shape or x.dtype != dtype:
        raise DataError(
            f"{place} have examples of shape {tuple(x.shape[1:])} and type {kind(x)}; the training data have {shape} "
            f"and {str(dtype).removeprefix('torch.')}"
        )


def kind(x: Tensor) -> str:
    """Return the name of a tensor's type."""
    return str(x.dtype).removeprefix("torch.")


def _counted(y: Tensor) -> Tensor:
    """Return the labels that count: in sequences, padding does not."""
    return y if y.dim() == 1 else y[y != IGNORED]


def _inputs(value: Any, place: str) -> Tensor:
    x = _tensor(value, place, "inputs")
    if x.is_complex():
        raise DataError(f"{place} have inputs of type {kind(x)}; expected real numbers")
    if x.is_floating_point() or x.dtype == torch.bool:
        x = x.float()
        finite = x.isfinite()
        if not finite.all():
            first = int((~finite).flatten(1).any(1).nonzero()[0] if x.dim() > 1 else (~finite).nonzero()[0])
            raise DataError(f"{place} have NaN or infinity in the inputs, first in example {first}: clean them")
        return x
    return x if x.dtype == torch.uint8 else x.long()


def _labels(value: Any, place: str) -> Tensor:
    y = _tensor(value, place, "labels")
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise DataError(f"{place} have labels of type {kind(y)}; expected whole numbers, the classes from 0 on")
    return y.long()


def _tensor(value: Any, place: str, what: str) -> Tensor:
    if not isinstance(value, Tensor):
        try:
            array = np.asarray(value)
        except Exception as error:
            raise DataError(f"{place} have {what} that are no array: {error}") from error
        if array.ndim == 0:
            raise DataError(f"{place} have {what} without an axis for the examples")
        if array.dtype.kind not in "fiubc":
            raise DataError(f"{place} have {what} of type {array.dtype} ({type(value).__name__}); expected numbers")
        wide = {"f": "=f8", "c": "=c16"}.get(array.dtype.kind, "=i8")
        keep = array.dtype.isnative and array.dtype in (np.uint8, np.int64, np.float32, np.float64, np.bool_)
        value = tensor(array if keep else array.astype(wide))
    if value.dim() == 0:
        raise DataError(f"{place} have {what} without an axis for the examples")
    return torch.as_tensor(value).detach()
