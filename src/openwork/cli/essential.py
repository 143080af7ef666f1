"""`openwork essential`: how much of a pretrained model one-shot pruning can take, and whether the drop is sharp."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from openwork.errors import RecipeError


def essential(
    model: Annotated[str, typer.Argument(help="A folder of transformers, or a name on the hub.", metavar="MODEL")],
    text: Annotated[
        list[str], typer.Option(help="Text: a UTF-8 file or a folder of .txt; may be given again.", metavar="PATH")
    ],
    out: Annotated[str, typer.Option("--out", "-o", help="The folder of the curve; a stopped run goes on there.")],
    grid: Annotated[
        str | None, typer.Option(help="Shares to prune, from 0; 0,0.1,...,0.9 or what an N:M scope has, if not given.")
    ] = None,
    scope: Annotated[
        str,
        typer.Option(
            help="How weights are chosen, a curve each: global, layer, random, erk or N:M such as 2:4.", metavar="SCOPE,..."
        ),
    ] = "global",
    quality: Annotated[
        str | None,
        typer.Option(help="accuracy or likelihood of tokens; retrieval for an encoder. What suits, if not given."),
    ] = None,
    finetune: Annotated[int, typer.Option(help="Steps of fine-tuning after pruning, mask held; 0 for none.")] = 0,
    rate: Annotated[float, typer.Option(help="Learning rate of fine-tuning.")] = 1e-4,
    blocks: Annotated[int, typer.Option(help="Held-out blocks, from the end of the text.")] = 64,
    length: Annotated[
        int | None, typer.Option(help="Tokens a block; what the model takes, at most 256, if not given.")
    ] = None,
    weights: Annotated[
        list[str] | None,
        typer.Option(help="Weights that may go, by name or glob; the matrices of the blocks, if not given.", metavar="NAME"),
    ] = None,
    kind: Annotated[str, typer.Option(help="causal, masked or encoder; auto follows the config.")] = "auto",
    batch: Annotated[int, typer.Option(help="Blocks at a time.")] = 8,
    draws: Annotated[int, typer.Option(help="Bootstrap draws of the intervals.")] = 1000,
    seed: Annotated[int, typer.Option(help="Of random masks, fine-tuning and draws.")] = 0,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")] = False,
) -> None:
    """Prune a pretrained model once at every sparsity of a grid and show where its quality drops.

    Embeddings, head and norms stay. Every point starts from the untouched weights. The knee is the break of the curve, with
    a bootstrap interval over the held-out blocks; it is reported only where a broken line explains the curve better than a
    smooth one.

    Examples:

      openwork essential path/to/model --text corpus.txt -o curve/

      openwork essential path/to/model --text corpus.txt --scope global,layer,2:4 --grid 0,0.1,0.2,0.3,0.4,0.5,0.6 -o curve/

      openwork essential path/to/model --text corpus.txt --finetune 200 --rate 1e-4 -o tuned/

      openwork essential path/to/encoder --text texts/ --quality retrieval -o encoder/

    Points that are measured are kept: the same command goes on from there, and finds a finished curve again. A finer grid
    or another scope adds to it.
    """
    scopes = tuple(part.strip() for part in scope.split(",") if part.strip())
    if not scopes:
        raise RecipeError(f"--scope {scope!r} names no scope: use global, layer, random, erk or N:M such as 2:4")
    points = None if grid is None else _grid(grid)

    from rich.console import Console

    from openwork import atomic
    from openwork.cli import _essential
    from openwork.cli._sparsify_bars import Bars

    recipe = _essential.Recipe(
        model=model, text=tuple(text), scopes=scopes, grid=points, quality=quality, finetune=finetune, rate=rate,
        blocks=blocks, length=length, weights=tuple(weights or ()), kind=kind, batch=batch, draws=draws, seed=seed,
    )  # fmt: skip
    recipe.check()
    console, folder = Console(), Path(out)
    bars = Bars(console, quiet)
    try:
        with bars.status("reading model and text ..."):
            ready = _essential.prepare(recipe)
        with atomic.alone(folder):
            atomic.sweep(folder)
            with bars.counting("points") as advance:
                found = _essential.curves(recipe, ready, folder, advance)
            with bars.status("intervals ..."):
                summaries = _essential.write(recipe, ready, found, folder)
    except KeyboardInterrupt:
        console.print("stopped; the same command goes on from here")
        raise typer.Exit(130) from None
    _show(console, summaries, ready.quality, folder)


def _grid(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise RecipeError(f"--grid {text!r}: give numbers from 0 to 1 with commas between them, 0 first") from None


def _show(console: object, summaries: list[dict[str, object]], quality: str, folder: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    from openwork.report import curves

    assert isinstance(console, Console)
    heads, body = curves.points(summaries)
    for names, rows in ((heads, body), (curves.HEADS, curves.rows(summaries))):
        table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
        for place, name in enumerate(names):
            table.add_column(name, justify="right" if place else "left", no_wrap=not place)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    console.print(f"quality: {quality}", highlight=False, markup=False)
    for one in summaries:
        console.print(f"{one['scope']}: {one['reason']}", highlight=False, markup=False)
    console.print(f"{folder / 'report.html'}\n{folder / 'curves.json'}", highlight=False, markup=False, soft_wrap=True)
