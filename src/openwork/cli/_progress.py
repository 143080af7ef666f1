"""Progress of a sweep in the terminal: a bar an arm, and the time that is left."""

from __future__ import annotations

import functools
import threading
from collections import Counter
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from openwork.errors import RecipeError
from openwork.lab import sweep
from openwork.lab.engines import catalog
from openwork.lab.engines.catalog import Engine
from openwork.lab.spec import Trial
from openwork.lab.sweep import Plan

WATCHED = 512


def engine(name: str, address: str | None) -> tuple[Engine, int]:
    """Return where trials run, and how many processes share each: those of torchrun, if it started this command.

    Raises:
        RecipeError: for an engine or address that does not exist, or one beside torchrun.
        typer.Exit: in all processes of torchrun but the first, which have nothing to do.
    """
    from openwork.lab import ddp_trial

    processes = ddp_trial.asked_by_torchrun()
    if processes is None:
        return catalog.find(name, address), 1
    if processes == 0:
        raise typer.Exit
    if name != catalog.LOCAL:
        raise RecipeError(f"--engine {name} under torchrun: give one of them, torchrun runs each trial in its own processes")
    return functools.partial(ddp_trial.run, processes=processes), processes


def announce(console: Console, made: Plan) -> None:
    """Say what will be done and what is found finished."""
    found = len(made.trials) - len(made.missing)
    console.print(
        f"{len(made.arms)} arms x {made.config.seeds} seeds = {len(made.trials)} trials"
        + (f", {found} of them finished before" if found else "")
        + f"; run folder {made.store.folder}",
        highlight=False,
    )
    if made.stale:
        console.print(f"[yellow]{made.stale}[/]", highlight=False)


def run(
    console: Console, made: Plan, *, workers: int, timeout: float | None, quiet: bool, engine: Engine | None = None
) -> None:
    """Run what is missing with a bar an arm; Ctrl-C says how to go on and ends with status 130."""
    try:
        _run(console, made, workers, timeout, quiet, engine)
    except KeyboardInterrupt:
        found = len(made.trials) - len(made.missing)
        console.print(f"stopped with {found} of {len(made.trials)} trials finished; the same command goes on from here")
        raise typer.Exit(130) from None


def _run(console: Console, made: Plan, workers: int, timeout: float | None, quiet: bool, engine: Engine | None) -> None:
    if quiet or not made.missing:
        sweep.run(made, workers=workers, timeout=timeout, done=lambda _trial, _result: None, engine=engine)
        return
    bars = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(), console=console, disable=not console.is_terminal,
    )  # fmt: skip
    with bars, _Watch(bars, made) as watch:
        sweep.run(made, workers=workers, timeout=timeout, done=watch.done, engine=engine)


class _Watch:
    """Moves the bars from the trials' progress files a few times a second."""

    def __init__(self, bars: Progress, made: Plan) -> None:
        todo = Counter(trial.arm.name for trial in made.trials)
        done = todo - Counter(trial.arm.name for trial in made.missing)
        self.bars, self.made = bars, made
        self.all = bars.add_task("all", total=len(made.trials), completed=sum(done.values()))
        self.tasks = {arm: bars.add_task(arm, total=count, completed=done[arm]) for arm, count in todo.items()}
        self.ended = done
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._poll, daemon=True)

    def __enter__(self) -> _Watch:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()
        self._refresh()

    def done(self, trial: Trial, result: dict[str, Any]) -> None:
        """Count a trial as ended, and say so if it did not end well."""
        self.ended[trial.arm.name] += 1
        if result["status"] != "ok":
            self.bars.console.print(
                f"{trial.arm.name}, seed {trial.seed}: {result['status']}: {result['error']}", style="yellow", markup=False
            )
        elif not self.bars.console.is_terminal:
            self.bars.console.print(f"{trial.arm.name}, seed {trial.seed}: done", markup=False, highlight=False)

    def _poll(self) -> None:
        while not self.stop.wait(0.3):
            self._refresh()

    def _refresh(self) -> None:
        shares: Counter[str] = Counter()
        for trial in self.made.missing[:WATCHED]:  # they are begun in this order
            try:
                shares[trial.arm.name] += float((self.made.store.place(trial) / "progress.json").read_text())  # type: ignore[assignment]
            except (OSError, ValueError):
                continue
        for arm, task in self.tasks.items():
            self.bars.update(task, completed=self.ended[arm] + shares[arm])
        self.bars.update(self.all, completed=sum(self.ended.values()) + sum(shares.values()))
