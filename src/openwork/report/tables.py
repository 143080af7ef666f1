"""The table of a comparison, and of claims, for the terminal, for spreadsheets and for Markdown."""

from __future__ import annotations

import csv
import io
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from openwork.report.summary import DENSE, Results, Row, line_of, main_metric, rows, seeds_of
from openwork.report.text import (
    NOTHING,
    finite,
    percent,
    points,
    probability,
    ratio,
    scaled,
    significant,
    spread,
    visible,
)

if TYPE_CHECKING:
    from rich.table import Table

_RATIOS = {
    "kept": ("kept", "parameters kept, biases and norms included, dense = 1"),
    "training_flops": ("train", "training FLOPs, dense = 1"),
    "steps": ("steps", "optimizer steps, dense = 1"),
    "inference_flops": ("infer", "inference FLOPs, dense = 1"),
    "bytes": ("size", "bytes on disk, dense = 1"),
    "latency": ("speed", "measured, times as fast as dense"),
}
STYLES = {"holds": "green", "leans": "yellow", "fails": "red", "not testable here": "dim"}


@dataclass(frozen=True)
class Column:
    """One column: its short title, what it means, and the text of a row's cell."""

    title: str
    meaning: str
    cell: Callable[[Row], str]
    number: bool = True


def columns(results: Results) -> list[Column]:
    """Return the columns that at least one row fills: method and density first, seeds last."""
    found = rows(results)
    main = main_metric(results)
    digits = _digits(found)
    show, change = (scaled, points) if main.share else (significant, significant)
    unit = ", in %" if main.share else ""
    every = [
        Column("method", "", lambda row: visible(line_of(row), 40), number=False),
        Column("density", "share of weights kept", lambda row: percent(row.get("density"))),
        Column(visible(main.heading, 30), f"mean ± half the 95 % interval{unit}", _pair("accuracy", show, digits)),
        Column("vs dense", "paired by seed" + (", in points" if main.share else ""), _pair("difference", change, digits)),
        *(
            Column(visible(heading, 30), "mean ± half the 95 % interval", _extra(str(name)))
            for name, heading in (results.get("columns") or {}).items()
            if name != main.name and name not in _RATIOS
        ),
        *(Column(title, meaning, _ratio(name)) for name, (title, meaning) in _RATIOS.items()),
        Column("seeds", "that ended well", lambda row: _seeds(*seeds_of(results, row))),
    ]
    return [column for column in every if any(column.cell(row) != NOTHING for row in found)]


def results_table(results: Results) -> Table:
    """Return the rows as a table for the terminal, one block a density."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, collapse_padding=True, header_style="bold")
    found = rows(results)
    whole = all(ended == asked for ended, asked in (seeds_of(results, row) for row in found))
    # seeds are worth a column of a narrow terminal only where some did not end well
    shown = [column for column in columns(results) if not (whole and column.title == "seeds")]
    for column in shown:
        table.add_column(
            column.title, justify="right" if column.number else "left", overflow="fold", no_wrap=not column.number
        )
    density: object = None
    for row in rows(results):
        if density is not None and row.get("density") != density:
            table.add_section()
        density = row.get("density")
        style = "dim" if row.get("method") == DENSE else ""
        table.add_row(*(Text(column.cell(row)) for column in shown), style=style)
    return table


def claims_table(claims: Sequence[Mapping[str, Any]]) -> Table:
    """Return claims and verdicts as a table for the terminal."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("verdict", "claim", "estimate", "interval", "p", "why"):
        table.add_column(title, justify="right" if title in ("estimate", "p") else "left", overflow="fold")
    for claim in claims:
        verdict = visible(claim.get("verdict"), 20)
        cells = (*claim_cells(claim)[:4], visible(claim.get("reason"), 300))
        table.add_row(Text(verdict, STYLES.get(verdict, "")), *map(Text, cells))
    return table


def claim_cells(claim: Mapping[str, Any]) -> tuple[str, str, str, str]:
    """Return the sentence, estimate, interval and corrected p of a claim; accuracies are in percentage points."""
    low, high = finite(claim.get("low")), finite(claim.get("high"))
    is_accuracy = str(claim.get("metric")).endswith("accuracy")
    show = points if is_accuracy else significant
    estimate = show(claim.get("estimate"))
    if is_accuracy and estimate != NOTHING:
        estimate += "\N{NO-BREAK SPACE}points"
    interval = NOTHING if low is None or high is None else f"{show(low)} to {show(high)}"
    return visible(claim.get("text"), 300), estimate, interval, probability(claim.get("adjusted_p"))


CSV_FIELDS = (
    *("arm", "method", "density", "n", "asked", "kept", "accuracy", "accuracy_low", "accuracy_high", "difference"),
    *("difference_low", "difference_high", "training_flops", "inference_flops", "bytes", "latency", "steps", "note"),
)


def csv_text(results: Results) -> str:
    """Return the rows as CSV with every digit; text that a spreadsheet would run starts with an apostrophe."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(CSV_FIELDS)
    for row in rows(results):
        flat: dict[str, Any] = {**row, "asked": seeds_of(results, row)[1]}
        for name in ("accuracy", "difference"):
            interval = row.get(name) or {}
            flat |= {
                name: interval.get("mean"),
                f"{name}_low": interval.get("low"),
                f"{name}_high": interval.get("high"),
            }
        writer.writerow([_csv_cell(flat.get(name)) for name in CSV_FIELDS])
    return out.getvalue()


def markdown_table(results: Results) -> str:
    """Return the rows as a Markdown table."""
    shown = columns(results)
    body = [[escape_markdown(column.cell(row)) for column in shown] for row in rows(results)]
    return markdown([escape_markdown(column.title) for column in shown], body, [column.number for column in shown])


def markdown_claims(claims: Sequence[Mapping[str, Any]]) -> str:
    """Return claims and verdicts as a Markdown table."""
    body = []
    for claim in claims:
        text, estimate, interval, p = map(escape_markdown, claim_cells(claim))
        verdict, reason = (escape_markdown(visible(claim.get(name), 300)) for name in ("verdict", "reason"))
        body.append([text, f"**{verdict}**", estimate, interval, p, reason])
    titles = ["claim", "verdict", "estimate", "interval", "p, corrected", "why"]
    return markdown(titles, body, [False, False, True, True, True, False])


def markdown(titles: Sequence[str], body: Sequence[Sequence[str]], numbers: Sequence[bool]) -> str:
    """Return a Markdown table of titles and cells that are already escaped; number columns are aligned to the right."""
    rule = ["---:" if number else ":---" for number in numbers]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (titles, rule, *body))


def escape_markdown(text: str) -> str:
    """Return `text` so that no Markdown, HTML or template engine finds anything to do in it."""
    text = re.sub(r"[&<>{}]", lambda found: f"&#{ord(found.group())};", text)
    return re.sub(r"[\\`*\[\]|~$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\\g<0>", text)


def _digits(found: Sequence[Row]) -> int:
    """Return two decimals where the intervals are narrower than one decimal can tell, one otherwise."""
    widths = [width for row in found if (width := spread(row.get("accuracy")))]
    return 2 if widths and statistics.median(widths) < 0.0015 else 1


def _pair(name: str, show: Callable[[object, int], str], digits: int) -> Callable[[Row], str]:
    """Return what shows an interval as its mean ± half its width."""

    def cell(row: Row) -> str:
        interval = row.get(name)
        if not isinstance(interval, Mapping):
            return NOTHING
        width = spread(interval)
        half = (significant if show is significant else scaled)(width, digits)
        return show(interval.get("mean"), digits) + ("" if width is None else f" ± {half}")

    return cell


def _extra(name: str) -> Callable[[Row], str]:
    show = scaled if name.endswith("accuracy") else significant
    return lambda row: _pair(name, show, 1)(row.get("metrics") or {})


def _ratio(name: str) -> Callable[[Row], str]:
    """Return what shows a ratio; where every arm takes the same steps there is nothing to show."""

    def cell(row: Row) -> str:
        number = finite(row.get(name))
        return NOTHING if name == "steps" and number is not None and abs(number - 1.0) < 0.005 else ratio(number)

    return cell


def _seeds(ended: int, asked: int) -> str:
    return str(ended) if ended == asked else f"{ended} of {asked}"


def _csv_cell(value: object) -> object:
    if value is None or isinstance(value, (int, float)):
        return finite(value) if isinstance(value, float) else value
    text = visible(value, 10_000)
    return "'" + text if text.lstrip().startswith(("=", "+", "-", "@")) else text
