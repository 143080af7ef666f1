"""A source over the user's own loaders, honoured as they are: their batch size, their order, their augmentation.

A loader shuffles and augments with global generators, so these are lent to it, seeded by seed and epoch, for as long
as it makes a batch: the batches are a pure function of seed and epoch, and the noise of the code around is untouched.

Where validation data are missing they must come out of the training data, for good. From a torch DataLoader with a
map-style Dataset and an ordinary order they are taken by index, in proportion to the classes, and two loaders with the
same settings are made (the transforms of the Dataset then act on both). From a list of batches whole batches are
taken. Any other loader makes its batches anew in every epoch, so that no batch of it can be held out: it must come
with validation data.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler, Subset

from openwork.core.rng import derive, generator
from openwork.data import checks, splits
from openwork.data.noise import Noise
from openwork.data.prepare import Options, divide
from openwork.data.source import Batches, Split
from openwork.errors import DataError, OpenworkError

_END = object()


class Loaders:
    """Data in loaders; a `Source`. The batch size asked for is not used: a loader has its own."""

    def __init__(
        self,
        name: str,
        parts: Mapping[str, Iterable[Any]],
        *,
        classes: int,
        input_shape: tuple[int, ...],
        train_size: int,
        steps: int,
    ) -> None:
        """Keep the loaders.

        Args:
            name: what to report the data as.
            parts: "train", "test" and perhaps "validation": anything that gives batches (x, y) again and again.
            classes: how many classes.
            input_shape: shape of one example.
            train_size: how many training examples there are.
            steps: how many batches the training loader gives.
        """
        self.name = name
        self.parts = dict(parts)
        self.classes = classes
        self.input_shape = input_shape
        self.train_size = train_size
        self._steps = steps

    def steps_per_epoch(self, batch_size: int) -> int:
        """Return how many batches the training loader gives, whatever the batch size asked for."""
        return self._steps

    def train_batches(self, seed: int, epoch: int, batch_size: int) -> Batches:
        """Yield the batches of an epoch as the loader makes them: a pure function of seed and epoch."""
        return self._batches("train", derive(seed, "loader", epoch), epoch)

    def batches(self, split: Split, batch_size: int = 512) -> Batches:
        """Yield the batches of a split with fixed noise, hence in a fixed order; transforms of a loader's own stay.

        Raises:
            DataError: if the split is unknown or missing, or a batch is not what it should be.
        """
        if split not in checks.PARTS:
            raise DataError(f"there is no split {split!r}; known: {', '.join(checks.PARTS)}")
        if split not in self.parts:
            raise DataError(f"{self.name!r} has no {split} data: return (train, validation, test)")
        return self._batches(split, derive(0, "loader", split), 0)

    def corrupted(self, kind: str, severity: int, seed: int = 0, batch_size: int = 512) -> Batches:
        """Refuse: the scale of a loader's images is not known.

        Raises:
            DataError: always.
        """
        raise DataError(f"{self.name!r} cannot be corrupted: only named sets and arrays have images of known scale")

    def _batches(self, split: str, seed: int, epoch: int) -> Batches:
        place = checks.where(split, self.name)
        for x, y in run(self.parts[split], seed, place, epoch, self.classes):
            if tuple(x.shape[1:]) != self.input_shape:
                raise DataError(f"{place} have an example of shape {tuple(x.shape[1:])}; expected {self.input_shape}")
            yield checks.ready(x), y


def run(loader: Iterable[Any], seed: int, place: str, epoch: int = 0, classes: int | None = None) -> Batches:
    """Yield the checked batches of one pass over `loader`, with the global generators seeded for it.

    Raises:
        DataError: if the loader fails, gives nothing, or a batch is not what it should be.
    """
    noise = Noise(seed, _generators(loader))
    announce = getattr(getattr(loader, "sampler", None), "set_epoch", None)
    if announce is not None:
        announce(epoch)
    iterator: Iterator[Any] | None = None
    count = 0
    while True:
        try:
            with noise.lent():
                iterator = iter(loader) if iterator is None else iterator
                batch = next(iterator, _END)
        except OpenworkError:
            raise
        except Exception as error:
            text = " ".join(str(error).split()) or "no message"
            raise DataError(f"{place} fail at batch {count} with {type(error).__name__}: {text}") from error
        if batch is _END:
            break
        yield checks.pair(batch, place, classes)
        count += 1
    if not count:
        raise DataError(f"{place} give no batch: the loader is empty, or gives its batches only once")


def load(name: str, parts: Mapping[str, Any], options: Options, classes: int | None = None) -> Loaders:
    """Return the source of these loaders, "train", "test" and perhaps "validation".

    The training data are gone through once, for the classes and the sizes.

    Raises:
        DataError: if a loader cannot be honoured, is empty, or gives what a classifier cannot take.
    """
    place = checks.where("train", name)
    if options.augment != "none":
        raise DataError(f"{place} come in a loader, which augments by itself: set augment to 'none'")
    for part, loader in parts.items():
        if getattr(loader, "persistent_workers", False):
            raise DataError(
                f"{checks.where(part, name)} come from persistent workers, whose noise depends on what ran before: set "
                "persistent_workers=False"
            )
    parts, survey = _divided(name, parts, options, place, classes)
    source = Loaders(
        name,
        parts,
        classes=survey.classes if classes is None else classes,
        input_shape=survey.shape,
        train_size=survey.size,
        steps=survey.steps,
    )
    for part in parts.keys() - {"train"}:  # a first look, so that what is wrong is told before training
        next(iter(source.batches("test" if part == "test" else "validation")))
    return source


@dataclass(frozen=True)
class _Survey:
    """What one pass over the training data shows."""

    classes: int
    shape: tuple[int, ...]
    size: int
    steps: int
    labels: Tensor  # zeros where labels are sequences, which have no classes to keep in proportion


def _survey(loader: Iterable[Any], place: str, classes: int | None) -> _Survey:
    shape: tuple[int, ...] = ()
    largest, labels = 0, []
    for x, y in run(loader, derive(0, "survey"), place, classes=classes):
        shape = tuple(x.shape[1:])
        largest = max(largest, int(y.max()))
        labels.append(y if y.dim() == 1 else torch.zeros(len(y), dtype=torch.int64))
    every = torch.cat(labels)
    return _Survey(largest + 1, shape, every.numel(), len(labels), every)


def _divided(
    name: str, parts: Mapping[str, Any], options: Options, place: str, classes: int | None
) -> tuple[dict[str, Any], _Survey]:
    """Return the parts with validation data, and the survey of the training data that are left."""
    loader, left = parts["train"], dict(parts)
    hold_out = "validation" not in parts and options.validation != 0
    if hold_out and isinstance(loader, list | tuple) and options.train is None:
        left["train"], left["validation"] = _held_batches(loader, name, options, place)
    elif hold_out or options.train is not None:
        if not _indexed(loader):
            wish = "has no validation data" if hold_out else f"is to be limited to {options.train} examples"
            raise DataError(
                f"{name!r} {wish}, and its training loader makes its batches anew in every epoch: return (train, "
                "validation, test), or a Dataset or arrays instead of the loader"
            )
        survey = _survey(_again(loader, None), place, classes)
        kept, held = divide(survey.labels, name, options, hold_out)
        left["train"] = _again(loader, kept)
        if hold_out:
            left["validation"] = _again(loader, held, evaluate=True)
        if not len(left["train"]):
            raise DataError(f"{place} give no batch of {loader.batch_size} once validation examples are held out")
        return left, _Survey(survey.classes, survey.shape, kept.numel(), len(left["train"]), survey.labels)
    return left, _survey(left["train"], place, classes)


def _held_batches(batches: Any, name: str, options: Options, place: str) -> tuple[list[Any], list[Any]]:
    count = max(1, splits.count_of(options.validation, len(batches))) if len(batches) > 1 else 0
    if not count or count == len(batches):
        raise DataError(f"{place} have {len(batches)} batches; expected at least 2 to hold one out for validation")
    order = torch.randperm(len(batches), generator=generator(options.seed, "validation", name))
    held = set(order[:count].tolist())
    return [b for i, b in enumerate(batches) if i not in held], [b for i, b in enumerate(batches) if i in held]


def _indexed(loader: Any) -> bool:
    """Tell whether a loader is a torch DataLoader that goes once through a map-style Dataset, in order or shuffled."""
    if type(loader) is not DataLoader or isinstance(loader.dataset, IterableDataset):
        return False
    sampler = loader.sampler
    plain = type(sampler) is SequentialSampler or (
        type(sampler) is RandomSampler and not sampler.replacement and sampler._num_samples is None
    )
    return plain and type(loader.batch_sampler) is BatchSampler and hasattr(loader.dataset, "__len__")


def _again(loader: DataLoader[Any], places: Tensor | None, evaluate: bool = False) -> DataLoader[Any]:
    """Return a loader with the same settings over some of the examples; in order, and all, without places."""
    plain = evaluate or places is None
    return DataLoader(
        loader.dataset if places is None else Subset(loader.dataset, places.tolist()),
        batch_size=loader.batch_size,
        shuffle=not plain and type(loader.sampler) is RandomSampler,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        drop_last=not plain and loader.drop_last,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
        prefetch_factor=loader.prefetch_factor,
    )


def _generators(loader: Any) -> list[torch.Generator]:
    """Return the torch generators that a loader or its samplers own, each once."""
    sampler, batches = getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)
    holders = (loader, sampler, batches, getattr(batches, "sampler", None))
    found = [getattr(holder, "generator", None) for holder in holders]
    return list({id(one): one for one in found if isinstance(one, torch.Generator)}.values())
