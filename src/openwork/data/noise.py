"""The global generators, lent to foreign code: seeded for it, and given back as they were."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


class Noise:
    """A state of torch's (CPU), NumPy's and Python's global generators, and of generators that a loader owns.

    It starts at a seed and goes on from one `lent` block to the next. Between the blocks the generators are where the
    code around left them.
    """

    def __init__(self, seed: int, own: Sequence[torch.Generator] = ()) -> None:
        self.own = tuple(own)
        outside = self._states()
        self._seed(seed)
        self.inside = self._states()
        self._set(outside)

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Run a block with this state."""
        outside = self._states()
        self._set(self.inside)
        try:
            yield
        finally:
            self.inside = self._states()
            self._set(outside)

    def _seed(self, seed: int) -> None:
        for generator in (torch.default_generator, *self.own):
            generator.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)

    def _states(self) -> tuple[Any, ...]:
        torches = [generator.get_state() for generator in (torch.default_generator, *self.own)]
        return torches, np.random.get_state(), random.getstate()

    def _set(self, states: tuple[Any, ...]) -> None:
        torches, numpys, pythons = states
        for generator, state in zip((torch.default_generator, *self.own), torches, strict=True):
            generator.set_state(state)
        np.random.set_state(numpys)
        random.setstate(pythons)
