"""A source over torch Datasets of the user's own: our order and batches, their examples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate

from openwork.core.rng import derive, generator
from openwork.data import augment, batching, checks
from openwork.data.noise import Noise
from openwork.data.prepare import Options, divide
from openwork.data.source import Batches, Split
from openwork.errors import DataError, OpenworkError


class Datasets:
    """Data in map-style Datasets; a `Source`.

    Examples are taken when they are needed, with the global generators seeded for each batch, so that a Dataset with
    random transforms still gives a pure function of seed and epoch. Its inputs are not standardised.
    """

    def __init__(
        self,
        name: str,
        parts: Mapping[str, Any],
        places: Mapping[str, Tensor],
        *,
        classes: int,
        input_shape: tuple[int, ...],
        augmentation: str = "none",
    ) -> None:
        """Keep the parts.

        Args:
            name: what to report the data as.
            parts: for each split an object with `len` and `[i]` that gives (x, y).
            places: for each split the positions that belong to it.
            classes: how many classes.
            input_shape: shape of one example.
            augmentation: one of `augment.KINDS`, for training batches.

        Raises:
            DataError: if the augmentation is unknown or the inputs are no images.
        """
        self.name = name
        self.parts = dict(parts)
        self.places = dict(places)
        self.classes = classes
        self.input_shape = input_shape
        self.train_size = self.places["train"].numel()
        self._augment = augment.chosen(augmentation, input_shape)

    def steps_per_epoch(self, batch_size: int) -> int:
        """Return how many batches an epoch has: an incomplete last one is dropped, but there is at least one."""
        return batching.steps(self.train_size, batch_size)

    def train_batches(self, seed: int, epoch: int, batch_size: int) -> Batches:
        """Yield the batches of an epoch, shuffled and augmented: a pure function of the arguments."""
        for index, chosen in enumerate(batching.shuffled(self.train_size, seed, epoch, batch_size)):
            x, y = self._take("train", self.places["train"][chosen], derive(seed, "example", epoch, index))
            if self._augment is not None:
                x = self._augment(x, generator(seed, "augment", epoch, index))
            yield checks.ready(x), y

    def batches(self, split: Split, batch_size: int = 512) -> Batches:
        """Yield all examples of a split in a fixed order and with fixed noise; transforms of a Dataset's own stay.

        Raises:
            DataError: if the split is unknown or empty, or an example is not what it should be.
        """
        if split not in self.places:
            raise DataError(f"there is no split {split!r}; known: {', '.join(self.places)}")
        places = self.places[split]
        if not places.numel():
            raise DataError(f"{self.name!r} has no {split} examples: load it with another size of validation set")
        for index, chosen in enumerate(batching.plain(places.numel(), batch_size)):
            x, y = self._take(split, places[chosen], derive(0, "example", split, index))
            yield checks.ready(x), y

    def corrupted(self, kind: str, severity: int, seed: int = 0, batch_size: int = 512) -> Batches:
        """Refuse: the scale of a Dataset's images is not known.

        Raises:
            DataError: always.
        """
        raise DataError(f"{self.name!r} cannot be corrupted: only named sets and arrays have images of known scale")

    def _take(self, split: str, places: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        place = checks.where(split, self.name)
        x, y = take(self.parts[split], places.tolist(), seed, place, self.classes)
        if tuple(x.shape[1:]) != self.input_shape:
            raise DataError(f"{place} have an example of shape {tuple(x.shape[1:])}; expected {self.input_shape}")
        return x, y


def take(dataset: Any, places: Iterable[int], seed: int, place: str, classes: int | None = None) -> tuple[Tensor, Tensor]:
    """Return the batch of these examples, taken with the global generators seeded.

    Raises:
        DataError: if the Dataset fails, or an example is no pair or cannot be put into a batch.
    """
    try:
        with Noise(seed).lent():
            examples = [dataset[i] for i in places]
            for example in examples:
                if not isinstance(example, tuple | list) or len(example) != 2:
                    raise DataError(f"{place} give a {type(example).__name__} as an example; expected a pair (x, y)")
            batch = default_collate(examples)
    except OpenworkError:
        raise
    except Exception as error:
        text = " ".join(str(error).split()) or "no message"
        raise DataError(f"{place} fail with {type(error).__name__}: {text}") from error
    return checks.pair(batch, place, classes)


def load(name: str, parts: Mapping[str, Any], options: Options, classes: int | None = None) -> Datasets:
    """Return the source of these Datasets, "train", "test" and perhaps "validation".

    Every training example is looked at once: for the classes, and to hold out validation examples in proportion.

    Raises:
        DataError: if a Dataset is empty, fails, or gives what a classifier cannot take.
    """
    for part, dataset in parts.items():
        if not len(dataset):
            raise DataError(f"{checks.where(part, name)} have no examples")
    place = checks.where("train", name)
    shape: tuple[int, ...] = ()
    labels = []
    for index, chunk in enumerate(_chunks(len(parts["train"]), 256)):
        x, y = take(parts["train"], chunk, derive(0, "survey", index), place, classes)
        shape = tuple(x.shape[1:])
        labels.append(y)
    y = torch.cat(labels)
    kept, held = divide(y, name, options, hold_out="validation" not in parts)
    sources = {"validation": parts["train"], **parts}
    places = {"validation": held, **{part: torch.arange(len(dataset)) for part, dataset in parts.items()}}
    return Datasets(
        name,
        sources,
        {"train": kept, "validation": places["validation"], "test": places["test"]},
        classes=checks.classes(y, place) if classes is None else classes,
        input_shape=shape,
        augmentation=options.augment,
    )


def _chunks(size: int, length: int) -> Iterator[list[int]]:
    numbers = iter(range(size))
    while chunk := list(islice(numbers, length)):
        yield chunk
