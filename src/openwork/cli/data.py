"""`openwork data`: what named data sets there are, and fetching them ahead of time. Imports no torch."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from openwork.data import catalog, files
from openwork.data.entry import Entry

app = typer.Typer(
    help="Named data sets: what there is, where it lies, and fetching it ahead of time.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)


@app.command(
    "list",
    epilog="Example: [bold]openwork data list[/]. A set lies in OPENWORK_DATA/<name>/, in the cache, or is downloaded "
    "when it is first used.",
)
def list_sets() -> None:
    """List the named data sets: content, size, place and terms."""
    table = Table(box=None, pad_edge=False)
    table.add_column("name", no_wrap=True)
    table.add_column("what")
    table.add_column("examples", min_width=len("50,000 +"))
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("where", min_width=len("OPENWORK_DATA"))
    table.add_column("licence")
    for entry in catalog.entries().values():
        place, size = files.whereabouts(entry), _size(entry.size())
        table.add_row(entry.name, _what(entry), _examples(entry), size, place, entry.licence)
    Console().print(table)


@app.command(
    "get",
    epilog="Example: [bold]openwork data get fashion-mnist cifar10[/]. Files that are there and intact are left alone. "
    "OPENWORK_CACHE names another cache, OPENWORK_OFFLINE=1 forbids downloads.",
)
def get(names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Names that `list` shows.")]) -> None:
    """Make sure that data sets are on this machine and intact; download what is missing into the cache."""
    console = Console(soft_wrap=True)
    wanted = [catalog.entry(name) for name in names]
    for entry in wanted:
        if not entry.files:
            console.print(f"{entry.name}: comes with scikit-learn, nothing to download", highlight=False)
            continue
        folders = {files.locate(entry, file).parent for file in entry.files}
        places = " and ".join(sorted(map(str, folders)))
        console.print(f"{entry.name}: {_size(entry.size())} in {places}", highlight=False, markup=False)


def _what(entry: Entry) -> str:
    classes = f", {entry.classes} classes" if entry.classes else ""
    shape = f", {'x'.join(map(str, entry.shape))}" if any(entry.shape) else ""
    return f"{entry.what}{shape}{classes}"


def _examples(entry: Entry) -> str:
    train, test = entry.sizes
    return f"{train:,} + {test:,}" if test else f"{train:,}"


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count else "-"
