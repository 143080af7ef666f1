"""`openwork doctor`: is this machine ready, and what would help it; and how reliable openwork is, measured here."""

from __future__ import annotations

import importlib
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from openwork import registry
from openwork.errors import OpenworkError, RecipeError

PLACE = Path("docs") / "results"


def doctor(
    rows: Annotated[
        list[str] | None, typer.Argument(help="Reliability figures to measure; all if none is named.", metavar="R1 R2 ...")
    ] = None,
    long: Annotated[bool, typer.Option("--long", help="Measure the reliability figures at full size: hours.")] = False,
    short: Annotated[bool, typer.Option("--short", help="Measure their short forms: minutes.")] = False,
    listing: Annotated[bool, typer.Option("--list", help="List the reliability figures and their targets.")] = False,
    again: Annotated[bool, typer.Option("--again", help="Measure anew what was measured before.")] = False,
    out: Annotated[str, typer.Option(help="Folder of reliability.md and reliability.json.")] = str(PLACE),
) -> None:
    """Check the installation; with --long or --short, measure how reliable openwork is on this machine.

    Without flags: versions, processor, kernels' exactness, cards, data folders, disk. Ends with status 1 if something is
    broken, or a figure does not reach its target. What is measured is kept part by part: stop it at any time, and the same
    command goes on.

    Examples:

      openwork doctor

      openwork doctor --list

      openwork doctor --long R1 R16

      openwork doctor --long --out docs/results
    """
    if listing:
        _list()
        return
    if long or short:
        if long and short:
            raise RecipeError("give one of --long and --short; the long form contains the short one")
        _measure(rows or [], "long" if long else "short", Path(out), again)
        return
    if rows or again:
        raise RecipeError(f"{' '.join(rows or ['--again'])}: say with --long or --short at which size to measure")
    _check()


def _check() -> None:
    console, broken = Console(highlight=False), 0
    for title, check in _CHECKS.items():
        for good, text in check():
            broken += not good
            console.print(f"{'[green]ok[/]  ' if good else '[red]no[/]  '}{title}: ", end="")
            console.print(text, markup=False)
    raise typer.Exit(1 if broken else 0)


def _list() -> None:
    from rich.table import Table

    from openwork.testing.reliability.matrix import ROWS

    table = Table("", "figure", "target", "how", box=None, header_style="bold", padding=(0, 2, 0, 0))
    for key, row in ROWS.items():
        table.add_row(key, row.figure, row.target, row.how)
    Console().print(table)


def _measure(keys: list[str], scale: Literal["short", "long"], out: Path, again: bool) -> None:
    """Measure rows part by part with a bar, and write the page after each."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(highlight=False, soft_wrap=True)
    with console.status("reading the matrix ..."):
        from openwork import atomic
        from openwork.lab.store import read_json
        from openwork.testing.reliability import matrix, record

    rows, place, missed = matrix.chosen(keys), out / "reliability.json", 0
    bars = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("{task.fields[part]}"), console=console, disable=not console.is_terminal,
    )  # fmt: skip

    def tell(key: str, part: str, number: int, count: int) -> None:
        bars.update(now, description=key, completed=number, total=count, part=part[:50])

    with bars:
        whole, now = bars.add_task("all", total=len(rows), part=""), bars.add_task("", total=None, part="")
        for row in rows:
            try:
                entry = record.measure(row, scale, place, tell, again=again)
            except KeyboardInterrupt:
                bars.stop()
                console.print("stopped; the same command goes on from here")
                raise typer.Exit(130) from None
            finally:
                _page(record, atomic, matrix, read_json(place), out)
            missed += not entry["passed"]
            _tell(console, row.key, entry)
            bars.advance(whole)
    console.print(f"{out / 'reliability.md'}", markup=False)
    raise typer.Exit(1 if missed else 0)


def _page(record: Any, atomic: Any, matrix: Any, known: Any, out: Path) -> None:
    if known is not None:
        atomic.write_bytes(out / "reliability.md", record.page(known, matrix.ROWS).encode())


def _tell(console: Console, key: str, entry: dict[str, Any]) -> None:
    console.print(f"{'[green]ok[/]  ' if entry['passed'] else '[red]no[/]  '}{key}: ", end="")
    console.print(entry["value"] + ("" if entry["passed"] or not entry["detail"] else f" ({entry['detail']})"), markup=False)


def _versions() -> Iterator[tuple[bool, str]]:
    yield sys.version_info >= (3, 11), f"Python {sys.version.split()[0]}"
    for name in ("torch", "numpy", "scipy", "sklearn", "safetensors"):
        try:
            yield True, f"{name} {importlib.import_module(name).__version__}"
        except ImportError as error:
            yield False, f"{name} cannot be imported: {error}"


def _machine() -> Iterator[tuple[bool, str]]:
    import torch

    from openwork.lab import environment

    yield (
        True,
        f"{environment.processor()}, {torch.get_num_threads()} threads, CUDA {'yes' if torch.cuda.is_available() else 'no'}",
    )


def _methods() -> Iterator[tuple[bool, str]]:
    for name in registry.names():
        try:
            registry.load(name)
        except (ImportError, AttributeError, OpenworkError) as error:
            yield False, f"{name}: {error}"
    yield True, f"{len(registry.names())} methods, {len(registry.study_names())} studies"


def _exactness() -> Iterator[tuple[bool, str]]:
    import torch
    from torch import nn

    from openwork.methods.sparsify.magnitude import prune

    generator = torch.Generator().manual_seed(0)
    model = nn.Linear(64, 64)
    with torch.no_grad():
        model.weight.copy_(torch.randn(64, 64, generator=generator))
    masks = prune(model, 0.1)
    exact = masks.nnz() == 410 and int((model.weight != 0).sum()) == 410
    yield exact, f"density 0.1 of 4,096 weights keeps {masks.nnz()} (410 is exact)"


def _places() -> Iterator[tuple[bool, str]]:
    free = shutil.disk_usage(Path.cwd()).free / 1e9
    yield free > 0.1, f"{free:.1f} GB free in {Path.cwd()}"
    from openwork.data import names

    yield True, f"data sets: {', '.join(names())} (where each lies: openwork data list)"


_CHECKS: dict[str, Callable[[], Iterator[tuple[bool, str]]]] = {
    "versions": _versions,
    "machine": _machine,
    "methods": _methods,
    "exactness": _exactness,
    "places": _places,
}
