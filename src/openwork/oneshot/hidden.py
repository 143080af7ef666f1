"""Hidden states between blocks: in memory, or in files of which two generations are kept."""

from __future__ import annotations

import shutil
from pathlib import Path

import safetensors.torch
from torch import Tensor

from openwork.errors import FormatError, StoreError
from openwork.oneshot.chain import State
from openwork.oneshot.folder import read_tensors


class Memory:
    """States in memory; `turn` makes what was put the current generation."""

    def __init__(self) -> None:
        self._now: dict[int, State] = {}
        self._next: dict[int, State] = {}

    def get(self, number: int) -> State:
        """Return the state of pass `number`."""
        return self._now.get(number, [])

    def put(self, number: int, state: State) -> None:
        """Keep the state of pass `number` for the next generation, and let go of the current one."""
        self._now.pop(number, None)
        self._next[number] = state

    def turn(self) -> None:
        """Go on to the next generation."""
        self._now, self._next = self._next, {}


class Files:
    """States in a folder, one file a pass in a folder a generation, renamed when it is whole.

    They are not forced onto the disk, which would cost more than to compute them again after a power failure.

    Args:
        folder: where generations lie.
        generation: the current one.
    """

    def __init__(self, folder: Path, generation: int = 0) -> None:
        self.folder, self.generation = folder, generation

    def get(self, number: int) -> State:
        """Return the state of pass `number`."""
        found = read_tensors(self._place(self.generation, number))
        places = {int(key): tensor for key, tensor in found.items()}
        return [places.get(place) for place in range(max(places, default=-1) + 1)]

    def put(self, number: int, state: State) -> None:
        """Write the state of pass `number` for the next generation."""
        tensors = {str(place): leaf.contiguous() for place, leaf in enumerate(state) if isinstance(leaf, Tensor)}
        place = self._place(self.generation + 1, number)
        place.parent.mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_file(tensors, place.with_suffix(".half"))
        place.with_suffix(".half").replace(place)

    def turn(self) -> None:
        """Go on to the next generation; the one before the current is removed."""
        shutil.rmtree(self.folder / f"{self.generation - 1:05d}", ignore_errors=True)
        self.generation += 1

    def has(self, passes: int) -> bool:
        """Tell whether the current generation is whole and can be read."""
        try:
            return all(bool(self.get(number)) for number in range(passes))
        except (FormatError, StoreError):
            return False

    def _place(self, generation: int, number: int) -> Path:
        return self.folder / f"{generation:05d}" / f"{number:06d}.safetensors"


States = Memory | Files
