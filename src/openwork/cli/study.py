"""`openwork study`: test a paper's claim by one command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from openwork import registry
from openwork.errors import OpenworkError, RecipeError
from openwork.lab.engines.catalog import Engine
from openwork.lab.spec import read_recipe


def study(
    name: Annotated[str | None, typer.Argument(help="The study, by its method's name.")] = None,
    preset: Annotated[
        str, typer.Option(help="smoke (seconds), laptop (minutes) or paper (the paper's own scale).")
    ] = "laptop",
    every: Annotated[bool, typer.Option("--all", help="Run all studies.")] = False,
    listing: Annotated[bool, typer.Option("--list", help="List the studies.")] = False,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Change a setting of the preset: --set seeds=5", metavar="KEY=VALUE")
    ] = None,
    out: Annotated[str | None, typer.Option(help="Run folder; runs/study-NAME-PRESET if not given.")] = None,
    docs: Annotated[
        str | None, typer.Option(help="Write the result's page into this folder, for example docs/results.")
    ] = None,
    workers: Annotated[int, typer.Option(help="Trials at a time; 0 is one a core.")] = 0,
    threads: Annotated[int, typer.Option(help="Threads a trial.")] = 1,
    timeout: Annotated[float | None, typer.Option(help="Seconds that a trial may take.")] = None,
    engine: Annotated[str, typer.Option(help="Where trials run: local, or ray for a cluster.")] = "local",
    address: Annotated[str | None, typer.Option(help="The cluster, with --engine ray: auto, HOST:PORT or local.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")] = False,
) -> None:
    """Test a paper's claim: run its study, judge it, and write results and report.

    Examples:

      openwork study --list

      openwork study granet --preset laptop

      openwork study random-pruning --preset laptop --set seeds=5 --docs docs/results

      openwork study --all --preset smoke

      openwork study granet --engine ray --address auto
    """
    if listing:
        _list()
        return
    if (name is None) != every:
        raise RecipeError(f"name one study or give --all; known are {', '.join(registry.study_names())}")
    values = read_recipe("\n".join(_line(one) for one in settings or []), "--set")
    from openwork.cli import _progress

    where, processes = _progress.engine(engine, address)
    trouble: list[str] = []
    for one in registry.study_names() if name is None else [registry.card(name).name]:
        try:
            _run(one, preset, values, out, docs, workers, threads, timeout, quiet, where, processes)
        except OpenworkError as error:
            if not every:
                raise
            trouble.append(f"{one}: {error}")
    if trouble:
        raise RecipeError("; ".join(trouble))


def _run(
    name: str, preset: str, values: dict[str, object], out: str | None, docs: str | None, workers: int, threads: int,
    timeout: float | None, quiet: bool, engine: Engine, processes: int,
) -> None:  # fmt: skip
    from openwork.cli import _finish, _progress
    from openwork.lab import sweep
    from openwork.lab.study import find
    from openwork.web import places

    console = Console()
    console.rule(f"[bold]{name}[/] {preset}", align="left")
    found = find(name)
    folder = Path(out or f"runs/study-{name}-{preset}")
    made = sweep.plan(found, found.preset(preset, **values), folder, threads=threads, processes=processes)
    with made.store.lock():
        places.remember(folder)
        _progress.announce(console, made)
        _progress.run(console, made, workers=workers, timeout=timeout, quiet=quiet, engine=engine)
        _finish.study(
            made, console, preset=preset, threads=threads, workers=workers, docs=None if docs is None else Path(docs)
        )
    trouble = sweep.complaints(made)
    if trouble is not None:
        raise trouble


def _list() -> None:
    from rich.table import Table

    table = Table("study", "paper", "claim", box=None, header_style="bold", padding=(0, 2, 0, 0))
    for name in registry.study_names():
        card = registry.card(name)
        table.add_row(name, f"{card.authors[0].split()[-1]} {card.year}", card.claim)
    Console().print(table)


def _line(text: str) -> str:
    key, equals, value = text.partition("=")
    if not equals:
        raise RecipeError(f"--set {text!r}: write KEY=VALUE, for example --set seeds=5")
    return f"{key.strip()}: {value.strip()}"
