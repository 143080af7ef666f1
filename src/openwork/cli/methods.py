"""`openwork list` and `openwork show`: the methods, from their cards, without importing torch."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from openwork import registry


def list_methods(
    wing: Annotated[str | None, typer.Option(help="Only methods of this wing.")] = None,
) -> None:
    """List the methods with what they claim.

    Example: openwork list --wing sparsify
    """
    studies = set(registry.study_names())
    table = Table("method", "also called", "paper", "study", "claim", box=None, header_style="bold", padding=(0, 2, 0, 0))
    for name in registry.names():
        card = registry.card(name)
        if wing is None or card.wing == wing:
            paper = f"{card.authors[0].split()[-1]} {card.year}"
            table.add_row(name, ", ".join(card.aliases), paper, "yes" if name in studies else "", card.claim)
    Console().print(table)


def show(name: Annotated[str, typer.Argument(help="A method's name or alias.")]) -> None:
    """Show a method: paper, claim, departures, and how to use it.

    Example: openwork show granet
    """
    card = registry.card(name)
    console = Console(highlight=False)
    console.print(f"[bold]{card.name}[/]  {card.title}")
    console.print(f"{', '.join(card.authors)}. {card.venue} {card.year}. {card.link}\n", markup=False)
    console.print(f"Claim: {card.claim}", markup=False)
    for departure in card.departures or ("none",):
        console.print(f"Departure: {departure}", markup=False)
    trained = card.entry[0].isupper()  # a class, that of a method to train with, and no function
    compared = f"   or   openwork compare --methods dense,{card.name}" if trained else ""
    console.print(f"\nUse: openwork.{card.entry}{compared}", markup=False)
    if card.name in registry.study_names():
        console.print(f"Study: openwork study {card.name} --preset laptop", markup=False)
