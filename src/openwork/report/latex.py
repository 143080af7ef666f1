"""Tables for a paper: booktabs, in ASCII that every LaTeX engine reads, every special character escaped."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from openwork.report.html import title
from openwork.report.summary import DENSE, Results, Row, rows, standings
from openwork.report.tables import Column, claim_cells, columns
from openwork.report.text import visible

PREAMBLE = "% needs \\usepackage{booktabs}"
_SPECIAL = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
    "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", '"': r"\char34{}", "`": r"\char96{}",
    "\N{NO-BREAK SPACE}": "~", "–": "--", "—": "---", "…": r"\ldots{}", "±": r"$\pm$", "−": r"$-$", "×": r"$\times$",
    "‘": "`", "’": "'", "“": "``", "”": "''", "→": r"$\to$", "≤": r"$\leq$", "≥": r"$\geq$", "·": r"$\cdot$",
    "²": "$^2$", "³": "$^3$", "µ": r"$\mu$", "∞": r"$\infty$",
    "ß": r"\ss{}", "æ": r"\ae{}", "Æ": r"\AE{}", "ø": r"\o{}", "Ø": r"\O{}", "ł": r"\l{}", "Ł": r"\L{}",
}  # fmt: skip
_ACCENTS = {
    "\u0300": "`", "\u0301": "'", "\u0302": "^", "\u0303": "~", "\u0304": "=", "\u0306": "u", "\u0307": ".",
    "\u0308": '"', "\u030a": "r", "\u030b": "H", "\u030c": "v", "\u0327": "c",
}  # fmt: skip
_JOINED = frozenset("-',")
"""Two of these in a row would become a dash or another quote."""
_GREEK_LETTERS = "αβγδεζηθικλμνξπρστυφχψωΓΔΘΛΞΠΣΦΨΩ"


def latex_tables(results: Results) -> str:
    """Return the table of a run, and its claims where there are some, as `table` environments to be read by `\\input`.

    Each row has its mean ± half the 95 % interval; the best of a density is bold. The text is ASCII: letters with
    accents become LaTeX accents, what LaTeX has no letter for becomes its code point.
    """
    parts = [f"{PREAMBLE}\n% {escape(title(results))}, by openwork"]
    if results.get("rows"):
        parts.append(_results(results))
    claims = [claim for claim in results.get("claims") or [] if isinstance(claim, Mapping)]
    if claims:
        parts.append(_claims(results, claims))
    return "\n\n".join(parts) + "\n"


def escape(text: object, limit: int = 2000) -> str:
    """Return a text that LaTeX prints as it stands, in ASCII, without a line break."""
    shown, before = "", ""
    for char in unicodedata.normalize("NFC", visible(text, limit)):
        shown += ("{}" if char in _JOINED and before in _JOINED else "") + _letter(char)
        before = char
    return shown


def _letter(char: str) -> str:
    if char in _SPECIAL:
        return _SPECIAL[char]
    if " " <= char <= "\x7e":
        return char
    if char in _GREEK_LETTERS:
        name = unicodedata.name(char).rpartition(" ")[2].replace("LAMDA", "LAMBDA")
        return rf"$\{name.lower() if char.islower() else name.capitalize()}$"
    base, *marks = list(unicodedata.normalize("NFD", char))
    if base.isascii() and base.isalpha() and len(marks) == 1 and marks[0] in _ACCENTS:
        letter = {"i": r"\i", "j": r"\j"}.get(base, base) if marks[0] != "\u0327" else base
        return rf"\{_ACCENTS[marks[0]]}{{{letter}}}"
    return rf"\texttt{{U+{ord(char):04X}}}"


def _results(results: Results) -> str:
    shown = columns(results)
    best = {id(standing.best) for standing in standings(results) if standing.rivals}
    blocks: list[list[str]] = []
    before: object = None
    for row in rows(results):
        place = DENSE if row.get("method") == DENSE else row.get("density")
        if not blocks or place != before:
            blocks.append([])
        before = place
        blocks[-1].append(_line(_cells(row, shown, bold=id(row) in best)))
    body = "\n\\midrule\n".join("\n".join(block) for block in blocks)
    meaning = "; ".join(f"{escape(c.title)}: {escape(c.meaning)}" for c in shown if c.meaning)
    caption = f"{escape(title(results))}. {meaning}. Intervals are 95\\,\\%, Student's t over seeds."
    if best:
        caption += " Bold: the best of a density."
    head = _line([escape(column.title) for column in shown])
    return _table("".join("r" if column.number else "l" for column in shown), head, body, caption, "results")


def _claims(results: Results, claims: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for claim in claims:
        text, estimate, interval, p = map(escape, claim_cells(claim))
        lines.append(_line([text, escape(visible(claim.get("verdict"), 20)), estimate, interval, p]))
    caption = f"Claims of {escape(title(results))}; p is Holm's, over all of them."
    head = _line(["claim", "verdict", "estimate", r"95\,\% interval", "$p$"])
    return _table(r"p{0.42\linewidth}lrrr", head, "\n".join(lines), caption, "claims")


def _cells(row: Row, shown: Sequence[Column], *, bold: bool) -> list[str]:
    cells = [escape(column.cell(row)) for column in shown]
    return [rf"\textbf{{{cells[0]}}}", *cells[1:]] if bold else cells


def _line(cells: Sequence[str]) -> str:
    # an empty group keeps a cell that starts with a bracket from being read as the row end's argument
    return " & ".join(f"{{}}{text}" if text[:1] in ("[", "*") else text for text in cells) + r" \\"


def _table(layout: str, head: str, body: str, caption: str, label: str) -> str:
    return "\n".join([
        r"\begin{table}", r"\centering", r"\small", rf"\caption{{{caption}}}", rf"\label{{tab:openwork-{label}}}",
        rf"\begin{{tabular}}{{{layout}}}", r"\toprule", head, r"\midrule", body, r"\bottomrule", r"\end{tabular}",
        r"\end{table}",
    ])  # fmt: skip
