"""From the parts of a data set to a source: held-out validation examples, a limit on training examples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from openwork.core.rng import generator
from openwork.data import checks, splits
from openwork.data.arrays import Arrays, Pair
from openwork.errors import DataError


@dataclass(frozen=True)
class Options:
    """How to load a set; see `loading.load`."""

    train: int | None = None
    validation: float = 0.1
    augment: str = "none"
    seed: int = 0


def divide(labels: Tensor, name: str, options: Options, hold_out: bool) -> tuple[Tensor, Tensor]:
    """Return the positions to train on and to validate on, ascending.

    The validation examples are drawn first, so that they are the same for every limit on the training examples.

    Args:
        labels: (n, ...) of the training part.
        name: goes into the draw.
        options: sizes and seed.
        hold_out: whether the part must give up validation examples.

    Raises:
        DataError: if there are fewer examples than asked for.
    """
    size = labels.shape[0]
    count = splits.count_of(options.validation, size) if hold_out else 0
    held = splits.stratified(labels, count, generator(options.seed, "validation", name), reserve=1 if count else 0)
    kept = splits.complement(held, size)
    limit = options.train
    if limit is None:
        return kept, held
    if isinstance(limit, bool) or not isinstance(limit, int) or not 1 <= limit <= kept.numel():
        raise DataError(f"train is {limit!r}; {name!r} has {kept.numel():,} training examples, so give 1 to that many")
    return kept[splits.stratified(labels[kept], limit, generator(options.seed, "train", name))], held


def arrays(
    name: str, parts: Mapping[str, Pair], *, classes: int, unit: float | None, options: Options, key: str | None = None
) -> Arrays:
    """Return the source of these parts, "train" and "test" and perhaps "validation".

    Args:
        name: what to report the data as.
        parts: inputs and int64 labels.
        classes: how many classes.
        unit: see `Arrays`.
        options: see `Options`.
        key: the name that goes into the draws, where it is not `name`.

    Raises:
        DataError: if there are fewer examples than asked for, or the augmentation does not suit.
    """
    x, y = parts["train"]
    kept, held = divide(y, key or name, options, hold_out="validation" not in parts)
    train = (x, y) if kept.numel() == len(x) else (x[kept], y[kept])
    validation = parts.get("validation", (x[held], y[held]))
    return Arrays(
        name,
        {"train": train, "validation": validation, "test": parts["test"]},
        classes=classes,
        unit=unit,
        augmentation=options.augment,
    )


def own(name: str, parts: Mapping[str, Any], options: Options, classes: int | None = None) -> Arrays:
    """Return the source of the user's own arrays: pairs (x, y) of NumPy arrays or tensors.

    Inputs of uint8 are divided by 255 and standardised; floating ones are taken as they are, as float32; other
    whole numbers are tokens.

    Args:
        name: what to report the data as.
        parts: "train", "test" and perhaps "validation".
        options: see `Options`.
        classes: how many classes; None for the largest training label plus 1.

    Raises:
        DataError: if a part is empty or malformed, holds NaN, or does not agree with the training part.
    """
    pairs = {part: checks.pair(pair, checks.where(part, name)) for part, pair in parts.items()}
    x, y = pairs["train"]
    classes = checks.classes(y, checks.where("train", name)) if classes is None else classes
    for part, pair in pairs.items():
        place = checks.where(part, name)
        if not len(pair[0]):
            raise DataError(f"{place} have no examples")
        checks.range_of(pair[1], classes, place)
        checks.agreement(pair[0], tuple(x.shape[1:]), place, x.dtype)
    unit = 255.0 if x.dtype == torch.uint8 else None
    return arrays(name, pairs, classes=classes, unit=unit, options=options)
