"""Programs at hand: each caller takes one that nobody runs, puts the addresses of its own operands in, and gives it back.

A `Program` may be run by one caller at a time and its operands stand in its slots, so threads that multiply with the same
weights at once need one each. A pool makes them as they are needed, never more for a key than callers came at once.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

from openwork.runtime.kernels.launch import Program

Key = TypeVar("Key", bound=Hashable)
KEYS = 64
"""Shapes that a pool remembers; a further one takes the place of the shape that came first."""


@dataclass(frozen=True)
class Ready:
    """A program and where the addresses of its operands go.

    Attributes:
        program: the stages; its slots hold everything but the operands.
        patches: (slots of a call, word, operand): before a run, word `word` gets the address of operand number `operand`.
        keep: whatever else must stay alive as long as the program, such as the arrays whose addresses stand in its slots.
    """

    program: Program
    patches: tuple[tuple[npt.NDArray[np.int64], int, int], ...]
    keep: object = None


class Pool(Generic[Key]):
    """Programs by key (a shape, say), made when no free one is left. Any number of threads may call `run` at once.

    A copy, or one that was pickled, makes its programs anew; `make` is copied with it.
    """

    def __init__(self, make: Callable[[Key], Ready]) -> None:
        self._make = make
        self._free: dict[Key, deque[Ready]] = {}
        self._lock = threading.Lock()

    def run(self, key: Key, operands: Sequence[int], threads: int) -> None:
        """Run a program of `key` on operands at these addresses with at most `threads` threads.

        The operands must stay alive until it returns; they are not looked at here.

        Args:
            key: what `make` is called with.
            operands: addresses, numbered as in `Ready.patches`.
            threads: the caller's included.
        """
        free = self._free.get(key)
        if free is None:
            free = self._room(key)
        try:
            ready = free.pop()
        except IndexError:
            ready = self._make(key)
        for slots, word, operand in ready.patches:
            slots[word] = operands[operand]
        ready.program.run(threads)
        free.append(ready)

    def __len__(self) -> int:
        """Return how many programs lie ready."""
        with self._lock:
            return sum(map(len, self._free.values()))

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return type(self), (self._make,)

    def _room(self, key: Key) -> deque[Ready]:
        """Return the free programs of a key that may be new; a program under way for a key put out is dropped later."""
        with self._lock:
            while key not in self._free and len(self._free) >= KEYS:
                del self._free[next(iter(self._free))]
            return self._free.setdefault(key, deque())
