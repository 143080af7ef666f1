"""The book of one training run: steps, history, and when a checkpoint is due."""

from __future__ import annotations

import contextlib
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from openwork import atomic
from openwork.errors import DivergedError, StoreError
from openwork.train import checkpoints, state

if TYPE_CHECKING:
    from openwork.sparsifier.sparsifier import Sparsifier

_POINTS = 200

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class History:
    """What happened in training.

    Attributes:
        steps: optimizer steps taken in all, those before a resume included.
        losses: (step, loss of its batch with any penalty), about 200 of them, evenly spaced, with the last.
        seconds: time spent, that before a resume included.
        resumed: the step at which this call took over from a checkpoint, 0 if it began anew.
        notes: what the reader should know, for example that a damaged checkpoint was passed over.
    """

    steps: int
    losses: tuple[tuple[int, float], ...]
    seconds: float
    resumed: int = 0
    notes: tuple[str, ...] = ()


class Keeper:
    """Counts the steps, keeps the history, and writes both to checkpoints with the rest of the state."""

    def __init__(
        self,
        folder: Path | None,
        every_seconds: float,
        run: dict[str, Any],
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        sparsifier: Sparsifier | None,
    ) -> None:
        self.folder, self.every_seconds, self.run = folder, every_seconds, run
        self.parts = (model, optimizer, sparsifier)
        self.step = self.resumed = 0
        self.losses: list[tuple[int, float]] = []
        self.notes: list[str] = []
        self.consistent = True  # False from the start of a step to its end: such a state is not worth keeping
        self.spent = 0.0
        self.began = self.saved_at = time.monotonic()
        self.saved_step: int | None = None
        self.stride = max(1, run["steps"] // _POINTS)

    def resume(self) -> None:
        """Take over from the newest whole checkpoint, if there is one."""
        if self.folder is None:
            return
        snapshot, self.notes = checkpoints.newest(self.folder)
        if snapshot is None:
            # For the reader, and so that a folder that cannot be written to is refused before the work, not after it.
            atomic.write_json(self.folder / "run.json", self.run)
            return
        extra = snapshot.manifest["extra"]
        if not extra.keys() >= {"run", "place", "losses", "seconds"}:
            raise StoreError(f"the checkpoints in {self.folder} were not written by fit; choose another folder")
        for key, value in self.run.items():
            before = extra["run"].get(key)
            if before != value:
                raise StoreError(
                    f"the checkpoints in {self.folder} are of another run: {key!r} was {before}, now it is {value}; "
                    "choose another folder or remove that one"
                )
        state.restore(snapshot, *self.parts)
        if extra["place"] != _place():
            self.note(f"continued under {_place()}, begun under {extra['place']}: not bit for bit the same run")
        self.step = self.resumed = self.saved_step = snapshot.step
        self.losses = [(int(step), float(loss)) for step, loss in extra["losses"]]
        self.spent = float(extra["seconds"])

    def done(self, step: int, loss: float) -> None:
        """Count one step."""
        if step % self.stride == 0 or step == self.run["steps"] - 1:
            self.losses.append((step, loss))
        self.step = step + 1
        self.consistent = True

    def save_if_due(self) -> None:
        """Write a checkpoint if the last one is old."""
        if self.folder is not None and time.monotonic() - self.saved_at >= self.every_seconds:
            self.save()

    def save(self) -> None:
        """Write a checkpoint, unless this step has one; a full disk costs the checkpoint, not the run.

        Raises:
            DivergedError: if a parameter is not finite.
        """
        if self.folder is None or self.saved_step == self.step:
            return
        extra = {"run": self.run, "place": _place(), "losses": self.losses, "seconds": self.seconds()}
        snapshot = state.capture(*self.parts, self.step, extra)
        try:
            checkpoints.write(self.folder, snapshot)
            self.saved_step = self.step
        except StoreError as error:
            self.note(f"no checkpoint of step {self.step}: {error}")
        self.saved_at = time.monotonic()

    def save_at_stop(self) -> None:
        """Write a checkpoint of an interrupted run, if its state is that between two steps and finite."""
        if self.consistent:
            with contextlib.suppress(DivergedError):
                self.save()

    def seconds(self) -> float:
        """Return the time spent in training so far."""
        return self.spent + time.monotonic() - self.began

    def note(self, text: str) -> None:
        """Keep a note for the history, and log it."""
        _log.warning(text)
        self.notes.append(text)

    def history(self) -> History:
        """Return the history up to here."""
        return History(self.step, tuple(self.losses), self.seconds(), self.resumed, tuple(self.notes))


def _place() -> str:
    return f"torch {torch.__version__} with {torch.get_num_threads()} threads"
