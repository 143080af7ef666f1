"""`openwork compare`: methods, densities and seeds under one budget, with a table, a report and the models."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from openwork.errors import RecipeError
from openwork.lab.recipe import Recipe, merged
from openwork.lab.spec import read_recipe

HELP = """Train methods under one budget and show what each keeps, costs and gains.

Every arm takes the same number of optimizer steps; a method that needs more says so and stands beside itself within the
budget. Finished trials are found again: stop it at any time and start the same command to go on.

Examples:

  openwork compare

  openwork compare --data fashion-mnist --model resnet20 --methods dense,random,gmp,rigl --density 0.1,0.05 --seeds 5

  openwork compare --model my_package:make_model --data path/to/file.py:make_loaders

  openwork compare --methods "dense,granet(initial=1.0),rigl(drop=0.5)"

  openwork compare recipe.yaml --seeds 5

  openwork compare --engine ray --address 10.0.0.5:6379    # the same trials over the machines of a Ray cluster

A recipe holds the same words as the flags: `density: [0.1, 0.05]`. Each run leaves its own as recipe.yaml.
"""


def command() -> Callable[..., None]:
    """Return the command, with a flag for every key of a recipe."""

    def compare(recipe_file: str | None = None, quiet: bool = False, **flags: str | None) -> None:
        values = {} if recipe_file is None else read_recipe(_text(recipe_file), recipe_file)
        run(Recipe.read(merged(values, flags)), quiet=quiet)

    parameters = [
        inspect.Parameter(
            "recipe_file",
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            default=None,
            annotation=Annotated[
                str | None, typer.Argument(help="A YAML recipe; flags given beside it win.", metavar="RECIPE")
            ],
        ),
        *(_flag(name, info) for name, info in Recipe.model_fields.items()),
        inspect.Parameter(
            "quiet",
            inspect.Parameter.KEYWORD_ONLY,
            default=False,
            annotation=Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")],
        ),
    ]
    compare.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    compare.__doc__ = HELP
    return compare


def run(recipe: Recipe, *, quiet: bool = False) -> None:
    """Run a comparison to its end: plan, trials, latency, table, report, models."""
    from rich.console import Console

    console = Console()
    with console.status("reading data and model ..."):
        from openwork.cli import _finish, _progress
        from openwork.lab import compare, sweep
        from openwork.web import places

        engine, processes = _progress.engine(recipe.engine, recipe.address)
        folder = Path(recipe.run_folder())
        made = sweep.plan(compare.STUDY, recipe, folder, threads=recipe.threads, processes=processes)
    with made.store.lock():
        places.remember(folder)
        if made.missing:
            with console.status("trying every arm once ..."):
                compare.preflight(recipe, made.arms)
        _progress.announce(console, made)
        _progress.run(console, made, workers=recipe.workers, timeout=recipe.timeout, quiet=quiet, engine=engine)
        _finish.comparison(made, recipe, console)
    trouble = sweep.complaints(made)
    if trouble is not None:
        raise trouble


def _flag(name: str, info: Any) -> inspect.Parameter:
    default = info.get_default(call_default_factory=True)
    shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
    note = "" if default is None or default in ((), {}) else f"  [dim]\\[{shown}][/]"
    switch = f"--{name.replace('_', '-')}"
    if isinstance(default, bool):
        option = typer.Option(f"{switch}/--no-{name.replace('_', '-')}", help=info.description + note, show_default=False)
        return inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[bool | None, option]
        )
    option = typer.Option(switch, help=info.description + note, show_default=False, metavar=name.upper())
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[str | None, option])


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"cannot read the recipe {path!r}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"the recipe {path!r} is not UTF-8 text: {error.reason} at byte {error.start}") from error
