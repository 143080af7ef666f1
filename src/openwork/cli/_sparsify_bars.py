"""Progress of `openwork sparsify` in the terminal."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Advance = Callable[[int, int, str], object]


class Bars:
    """Bars on a terminal, a line a finished stage elsewhere, nothing if quiet."""

    def __init__(self, console: Console, quiet: bool) -> None:
        self.console, self.quiet = console, quiet

    def status(self, words: str) -> AbstractContextManager[object]:
        """Show that something short is going on."""
        return contextlib.nullcontext() if self.quiet else self.console.status(words)

    @contextlib.contextmanager
    def counting(self, words: str) -> Iterator[Advance]:
        """Yield a function (done, total, name) that moves a bar."""
        if self.quiet:
            yield lambda done, total, name: None
            return
        bars = Progress(
            TextColumn(f"{words:<12}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"),
            TimeRemainingColumn(), TextColumn("{task.description}"), console=self.console,
            disable=not self.console.is_terminal, transient=True,
        )  # fmt: skip
        with bars:
            task = bars.add_task("", total=None)
            yield lambda done, total, name: bars.update(task, completed=done, total=total, description=escape(name[-40:]))
        if not self.console.is_terminal:
            self.console.print(f"{words}: done", highlight=False)
