"""One look for every plot: a colour, a marker and a dash for each method, and text in the ink of the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from openwork.report.summary import DENSE

INK = "#010203"
"""Stands for the text colour of the page; `openwork.report.svg` replaces it."""

LIGHT = ("#0162c9", "#b66542", "#193d02", "#9d87ba", "#af8c10", "#551073", "#6d2742", "#3ba187")
DARK = ("#3874a6", "#c47525", "#a4e7ab", "#c88fa4", "#e8d861", "#a393ff", "#c83e4d", "#6fe7ff")
"""Eight hues each, for a light and a dark page: at least 3:1 against it, and told apart with any common colour vision."""

PAGE_LIGHT, PAGE_DARK = "#fffefa", "#16181b"
TEXT_LIGHT, TEXT_DARK = "#22242a", "#dcdad4"

SANS = 'ui-sans-serif,-apple-system,"Segoe UI","Helvetica Neue",Inter,"Noto Sans",Arial,sans-serif'

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p", "<", "h", ">")
DASHES: tuple[tuple[float, ...], ...] = ((), (5.0, 2.0), (1.5, 1.5), (6.0, 2.0, 1.5, 2.0))


@dataclass(frozen=True)
class Style:
    """How one method is drawn: colour, marker and dash (on, off, ... in points; empty for a solid line)."""

    colour: str
    marker: str
    dash: tuple[float, ...]

    @property
    def line(self) -> tuple[float, tuple[float, ...]] | Literal["-"]:
        """The dash as matplotlib wants it."""
        return (0.0, self.dash) if self.dash else "-"


def series(dark: bool = False) -> str:
    """Return the CSS of the eight hues, a class each: `s0` to `s7`."""
    return "".join(f".s{at}{{color:{colour}}}" for at, colour in enumerate(DARK if dark else LIGHT))


def picture_css() -> str:
    """Return the CSS of a plot that stands in a file of its own and follows the reader's light or dark page."""
    light, dark = (f"svg{{color:{ink};fill:{ink}}}" for ink in (TEXT_LIGHT, TEXT_DARK))
    font = f"svg{{font-family:{SANS}}}"
    return f"{font}{light}{series()}@media (prefers-color-scheme:dark){{{dark}{series(dark=True)}}}"


def styles(lines: Sequence[str]) -> dict[str, Style]:
    """Return a style for each line in order: the same in every plot; dense is drawn in ink.

    The first eight differ in colour and in marker; from the ninth on colours return with other markers and dashes.
    """
    found: dict[str, Style] = {}
    for name in lines:
        if name == DENSE:
            found[name] = Style(INK, "o", ())
        elif name not in found:
            at = len(found) - (DENSE in found)
            lap = at // len(LIGHT)
            found[name] = Style(LIGHT[at % len(LIGHT)], MARKERS[at % len(MARKERS)], DASHES[lap % len(DASHES)])
    return found
