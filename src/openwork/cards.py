"""Cards: what a method is, in plain data that can be read without importing torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """What a method is, who wrote it and what it claims.

    Every field is a literal in the method's module, so that `openwork list` reads cards from source without importing
    them.

    Attributes:
        name: the paper's name for it, lower case, hyphens; also the module's name with underscores.
        title: the paper's title.
        authors: the paper's authors, in order.
        year: year of publication.
        venue: journal, conference or archive.
        link: where to read it.
        wing: the shelf under `openwork.methods`.
        claim: what the paper claims, in one sentence.
        entry: the public class or function of the module.
        aliases: other names that `openwork compare --methods` takes.
        departures: where this implementation differs from the paper, one sentence each.
    """

    name: str
    title: str
    authors: tuple[str, ...]
    year: int
    venue: str
    link: str
    wing: str
    claim: str
    entry: str
    aliases: tuple[str, ...] = ()
    departures: tuple[str, ...] = ()
