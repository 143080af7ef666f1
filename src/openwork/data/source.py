"""What training and evaluation ask of data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, Protocol, runtime_checkable

from torch import Tensor

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
Batches = Iterator[tuple[Tensor, Tensor]]


@runtime_checkable
class Source(Protocol):
    """Data to train, choose and test on. Batches are pairs (x, y) on the CPU: y int64, x float32 or int64 tokens."""

    @property
    def name(self) -> str:
        """What to report the data as."""
        ...

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one example."""
        ...

    @property
    def classes(self) -> int:
        """How many classes."""
        ...

    @property
    def train_size(self) -> int:
        """How many examples there are to train on, after validation examples were held out."""
        ...

    def steps_per_epoch(self, batch_size: int) -> int:
        """Return how many batches an epoch has: an incomplete last one is dropped, but there is at least one."""
        ...

    def train_batches(self, seed: int, epoch: int, batch_size: int) -> Batches:
        """Yield the batches of an epoch, shuffled and augmented: a pure function of the arguments."""
        ...

    def batches(self, split: Split, batch_size: int = 512) -> Batches:
        """Yield all examples of a split in a fixed order, without augmentation.

        Raises:
            DataError: if the split is unknown or empty.
        """
        ...

    def corrupted(self, kind: str, severity: int, seed: int = 0, batch_size: int = 512) -> Batches:
        """Yield the test examples with a corruption of `corruptions.KINDS`.

        Raises:
            DataError: if the corruption is unknown or the data are no images of known scale.
        """
        ...
