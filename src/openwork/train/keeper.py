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
from openwork.train import checkpoints, divergence, state

if TYPE_CHECKING:
    from openwork.sparsifier.sparsifier import Sparsifier
    from openwork.train.ddp import Team
    from openwork.train.state import Snapshot

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
    """Counts the steps, keeps the history, and writes both to checkpoints with the rest of the state.

    Of several processes that train together the first one reads and writes for all.
    """

    def __init__(
        self,
        folder: Path | None,
        every_seconds: float,
        run: dict[str, Any],
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        sparsifier: Sparsifier | None,
        team: Team,
    ) -> None:
        self.folder, self.every_seconds, self.run = folder, every_seconds, run
        self.parts, self.team = (model, optimizer, sparsifier), team
        self.step = self.resumed = 0
        self.losses: list[tuple[int, float]] = []
        self.notes: list[str] = []
        self.consistent = True  # False from the start of a step to its end: such a state is not worth keeping
        self.spent = 0.0
        self.began = self.saved_at = time.monotonic()
        self.saved_step: int | None = None
        self.checked_step: int | None = None
        self.stride = max(1, run["steps"] // _POINTS)

    def resume(self) -> None:
        """Take over from the newest whole checkpoint, if there is one."""
        if self.folder is None:
            return
        if self.team.peers.alone:
            snapshot = self._newest(self.folder)
        else:
            folder = self.folder
            message = self.team.peers.ask(lambda: _sent(self._newest(folder)))
            snapshot = checkpoints.from_bytes(message) if message else None
        if snapshot is None:
            return
        extra = snapshot.manifest["extra"]
        state.restore(snapshot, *self.parts)
        if extra["place"] != self._place():
            self.note(f"continued under {self._place()}, begun under {extra['place']}: not bit for bit the same run")
        self.step = self.resumed = self.saved_step = snapshot.step
        self.losses = [(int(step), float(loss)) for step, loss in extra["losses"]]
        self.spent = float(extra["seconds"])

    def _newest(self, folder: Path) -> Snapshot | None:
        """Return the newest whole checkpoint of this run; where there is none, begin the folder."""
        snapshot, self.notes = checkpoints.newest(folder)
        if snapshot is None:
            # For the reader, and so that a folder that cannot be written to is refused before the work, not after it.
            atomic.write_json(folder / "run.json", self.run)
            return None
        extra = snapshot.manifest["extra"]
        if not extra.keys() >= {"run", "place", "losses", "seconds"}:
            raise StoreError(f"the checkpoints in {folder} were not written by fit; choose another folder")
        for key, value in self.run.items():
            before = extra["run"].get(key)
            if before != value:
                raise StoreError(
                    f"the checkpoints in {folder} are of another run: {key!r} was {before}, now it is {value}; "
                    "choose another folder or remove that one"
                )
        return snapshot

    def done(self, step: int, loss: float) -> None:
        """Count one step."""
        if step % self.stride == 0 or step == self.run["steps"] - 1:
            self.losses.append((step, loss))
        self.step = step + 1
        self.consistent = True

    def due(self) -> bool:
        """Tell whether the last checkpoint is old."""
        return self.folder is not None and time.monotonic() - self.saved_at >= self.every_seconds

    def save_if_due(self, due: bool | None = None) -> None:
        """Write a checkpoint if the last one is old, or if several processes agreed that it is."""
        if self.due() if due is None else due:
            self.save()

    def save(self, check: bool = True) -> None:
        """Write a checkpoint, unless this step has one; a full disk costs the checkpoint, not the run.

        Processes that train together all call it, and first check that they hold the same state.

        Raises:
            DivergedError: if a parameter is not finite.
            MaskError: if the processes do not hold the same masks.
            ModelError: if they do not hold the same weights.
        """
        model, _, sparsifier = self.parts
        if check and self.checked_step != self.step:
            self.team.check(sparsifier)
            self.checked_step = self.step
        if self.folder is None or self.saved_step == self.step:
            return
        if self.team.peers.first:
            self._write(self.folder)
        else:
            divergence.check_parameters(model, self.step)
        self.saved_at = time.monotonic()

    def save_at_stop(self) -> None:
        """Write a checkpoint of an interrupted run, if its state is that between two steps and finite."""
        if self.consistent:
            with contextlib.suppress(DivergedError):
                self.save(check=False)

    def _write(self, folder: Path) -> None:
        extra = {"run": self.run, "place": self._place(), "losses": self.losses, "seconds": self.seconds()}
        snapshot = state.capture(*self.parts, self.step, extra)
        try:
            checkpoints.write(folder, snapshot)
            self.saved_step = self.step
        except StoreError as error:
            self.note(f"no checkpoint of step {self.step}: {error}")

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

    def _place(self) -> str:
        world = self.team.peers.world
        shared = f" in {world} processes" if world > 1 else ""
        return f"torch {torch.__version__} with {torch.get_num_threads()} threads{shared}"


def _sent(snapshot: Snapshot | None) -> bytes:
    return b"" if snapshot is None else checkpoints.to_bytes(snapshot)
