"""A source that holds its examples in memory: images as bytes where they came as bytes, made floats batch by batch."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from openwork.core.rng import generator
from openwork.data import augment, batching, corruptions
from openwork.data.source import Batches, Split
from openwork.errors import DataError

Pair = tuple[Tensor, Tensor]


class Arrays:
    """Data in memory; a `Source`.

    With a `unit` the inputs are divided by it and standardised: for images (n, c, h, w) channel by channel, else as a
    whole, by mean and standard deviation of the training examples. Without one they are given out as they are.
    """

    def __init__(
        self,
        name: str,
        parts: Mapping[str, Pair],
        *,
        classes: int,
        unit: float | None = None,
        augmentation: str = "none",
    ) -> None:
        """Keep the parts, which are not copied.

        Args:
            name: what to report the data as.
            parts: "train", "validation" (may be empty) and "test": inputs (n, ...) and labels (n, ...) int64.
            classes: how many classes.
            unit: the value of the inputs that stands for 1, None for inputs that need no scaling.
            augmentation: one of `augment.KINDS`, for training batches.

        Raises:
            DataError: if the augmentation is unknown or the inputs are no images, or there is nothing to train on.
        """
        self.name = name
        self.classes = classes
        self.parts = dict(parts)
        x = self.parts["train"][0]
        if not len(x):
            raise DataError(f"{name!r} has no training examples")
        self.input_shape = tuple(x.shape[1:])
        self.train_size = len(x)
        self.unit = unit
        self._augment = augment.chosen(augmentation, self.input_shape)
        self.mean, self.std = (torch.zeros(1), torch.ones(1)) if unit is None else moments(x, unit)
        self._factor = 1 / ((unit or 1.0) * self.std)
        self._offset = -self.mean / self.std

    def steps_per_epoch(self, batch_size: int) -> int:
        """Return how many batches an epoch has: an incomplete last one is dropped, but there is at least one."""
        return batching.steps(self.train_size, batch_size)

    def train_batches(self, seed: int, epoch: int, batch_size: int) -> Batches:
        """Yield the batches of an epoch, shuffled and augmented: a pure function of the arguments."""
        x, y = self.parts["train"]
        for index, places in enumerate(batching.shuffled(self.train_size, seed, epoch, batch_size)):
            batch = x.index_select(0, places)  # several times faster than x[places]
            if self._augment is not None:
                batch = self._augment(batch, generator(seed, "augment", epoch, index))
            yield self._standardised(batch), y[places]

    def batches(self, split: Split, batch_size: int = 512) -> Batches:
        """Yield all examples of a split in a fixed order, without augmentation.

        Raises:
            DataError: if the split is unknown or empty.
        """
        x, y = part(self.parts, split, self.name)
        for places in batching.plain(len(x), batch_size):
            yield self._standardised(x[places]), y[places]

    def corrupted(self, kind: str, severity: int, seed: int = 0, batch_size: int = 512) -> Batches:
        """Yield the test examples with a corruption of `corruptions.KINDS`, standardised like the clean ones.

        The noise of a batch is a function of the arguments and of the batch's number.

        Raises:
            DataError: if the corruption is unknown, or the inputs are no images in [0, 1] (divided by the unit).
        """
        corruptions.check(kind, severity)
        x, y = self.parts["test"]
        if len(self.input_shape) != 3 or (self.unit is None and not x.is_floating_point()):
            raise DataError(f"{self.name!r} has examples of shape {self.input_shape} and no images to corrupt")
        for index, places in enumerate(batching.plain(len(x), batch_size)):
            images = x[places].float() / (self.unit or 1.0)
            noise = int(generator(seed, "corrupted", index).initial_seed())
            images = corruptions.corrupt(images, kind, severity, noise)
            yield (images - self.mean) / self.std, y[places]

    def _standardised(self, x: Tensor) -> Tensor:
        if self.unit is None:
            return x
        return x.to(torch.float32, copy=True).mul_(self._factor).add_(self._offset)


def part(parts: Mapping[str, Pair], split: str, name: str) -> Pair:
    """Return one of the parts.

    Raises:
        DataError: if there is no such split or it is empty.
    """
    if split not in parts:
        raise DataError(f"there is no split {split!r}; known: {', '.join(parts)}")
    if not len(parts[split][0]):
        raise DataError(f"{name!r} has no {split} examples: load it with another size of validation set")
    return parts[split]


def moments(x: Tensor, unit: float) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of x / unit, float32 and shaped to go with a batch; a deviation of 0 reads 1.

    Args:
        x: (n, c, h, w), taken channel by channel, or (n, ...), taken as a whole; uint8 (counted exactly) or floating.
        unit: what to divide by.
    """
    by_channel = x.dim() == 4
    pieces = x.unbind(1) if by_channel else (x,)
    found = [_exact(piece) if x.dtype == torch.uint8 else _rounded(piece) for piece in pieces]
    shape = (1, -1, 1, 1) if by_channel else (1,)
    mean, std = (torch.tensor(values, dtype=torch.float64).view(shape) / unit for values in zip(*found, strict=True))
    return mean.float(), torch.where(std > 0, std, 1.0).float()


def _exact(x: Tensor) -> tuple[float, float]:
    counts = torch.bincount(x.flatten(), minlength=256)
    values = torch.arange(256)
    n, total, squares = x.numel(), int((counts * values).sum()), int((counts * values**2).sum())
    return total / n, ((n * squares - total**2) / n**2) ** 0.5


def _rounded(x: Tensor) -> tuple[float, float]:
    return float(x.double().mean()), float(x.double().std(correction=0))
