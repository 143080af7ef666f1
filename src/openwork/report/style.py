"""One look for every plot: a colour, a marker and a dash for each method, and text in the ink of the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from openwork.report.summary import DENSE

INK = "#010203"
"""Stands for the page's text colour; `openwork.report.svg` replaces it."""

PALETTE = ("#0077bb", "#d9601a", "#009980", "#c2408b", "#8a7a00", "#7a64d0", "#c4364a", "#3b8f3b")
"""Told apart with any common colour vision, and at least 3:1 against a light and a dark page."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p", "<", "h", ">")
DASHES: tuple[tuple[float, ...], ...] = ((), (5.0, 2.0), (1.5, 1.5), (6.0, 2.0, 1.5, 2.0))


@dataclass(frozen=True)
class Style:
    """How one method is drawn; `dash` is empty for a solid line, in points."""

    colour: str
    marker: str
    dash: tuple[float, ...]


def styles(methods: Sequence[str]) -> dict[str, Style]:
    """Return a style for each method in order: the same in every plot; dense is drawn in ink.

    The first eight differ in colour and in marker; from the ninth on colours return with other markers and dashes.
    """
    found: dict[str, Style] = {}
    for method in methods:
        if method == DENSE:
            found[method] = Style(INK, "o", ())
        else:
            at = len(found) - (DENSE in found)
            lap = at // len(PALETTE)
            found[method] = Style(PALETTE[at % len(PALETTE)], MARKERS[at % len(MARKERS)], DASHES[lap % len(DASHES)])
    return found
