"""The end of `openwork sparsify`: a table before and after in the terminal, and the same as a page without script."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup
from rich.console import Console
from rich.table import Table

from openwork.report.html import environment, stylesheet
from openwork.report.text import finite, percent, visible

Rows = list[tuple[str, str, str, str]]

_COUNTS = ("tokens", "texts")
_TEMPLATE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{{ policy }}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="referrer" content="no-referrer">
<title>{{ title }} · openwork</title>
<style>{{ css }}</style>
</head>
<body>
<main>
<header>
<p class="kicker">openwork · One-shot pruning</p>
<h1>{{ title }}</h1>
<p class="lede">{{ lede }}</p>
</header>
{% for name, heads, rows in tables %}
<section>
<h2>{{ name }}</h2>
<div class="scroll" role="region" tabindex="0">
<table class="results">
<thead><tr>{% for head in heads %}<th scope="col"{% if not loop.first %} class="n"{% endif %}>{{ head }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in rows %}
<tr>{% for cell in row %}{% if loop.first %}<th scope="row">{{ cell }}</th>{% else %}<td class="n">{{ cell }}</td>{% endif %}{% endfor %}</tr>
{% endfor %}
</tbody>
</table>
</div>
</section>
{% endfor %}
</main>
</body>
</html>
"""  # noqa: E501


def show(console: Console, report: Mapping[str, Any], out: Path) -> None:
    """Print the table, where the folder is, and how to open it."""
    console.print(_lede(report), highlight=False, markup=False)
    for heads, rows in ((HEADS, compared(report)), (SIZES, sizes(report))):
        if rows:
            table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
            for place, head in enumerate(heads):
                table.add_column(head, justify="right" if place else "left", no_wrap=not place)
            for row in rows:
                table.add_row(*row)
            console.print(table)
    console.print(
        f"{out}: transformers opens it; openwork opens it too, report in report.html", highlight=False, markup=False
    )


def page(report: Mapping[str, Any]) -> str:
    """Return the report as one HTML file with nothing to fetch; the same report gives the same bytes."""
    css = stylesheet()
    digest = base64.b64encode(hashlib.sha256(css.encode()).digest()).decode()
    tables = [
        ("Before and after", HEADS, compared(report)),
        ("On disk", SIZES, sizes(report)),
        ("Layers", ("weight", "shape", "kept", "output error"), layers(report)),
        ("Settings", ("setting", "value"), settings(report)),
    ]
    return environment().from_string(_TEMPLATE).render(
        css=Markup(css),
        policy=f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; form-action 'none'",
        title=visible(report["recipe"]["model"], 80),
        lede=_lede(report),
        tables=[one for one in tables if one[2]],
    )  # fmt: skip


HEADS = ("held-out text", "before", "after", "ratio")
SIZES = ("on disk", "MB", "of the source")


def compared(report: Mapping[str, Any]) -> Rows:
    """Return a row a score: before, after, their ratio."""
    before, after = report.get("before") or {}, report.get("after") or {}
    rows = []
    for name in before:
        one, two = finite(before[name]), finite(after.get(name))
        if one is None or two is None:
            continue
        if name in _COUNTS:
            rows.append((name, f"{one:,.0f}", f"{two:,.0f}", ""))
        else:
            ratio = f"{two / one:.3f}" if one and name != "nll" else ""
            rows.append((name, _figure(one), _figure(two), ratio))
    return rows


def sizes(report: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return a row a file: its size, and its share of the source's weights."""
    found = report.get("bytes") or {}
    names = {"source": "source", "dense": "safetensors, zeros included", "small": "openwork's small file", "onnx": "ONNX"}
    whole = found.get("source") or 0
    return [
        (name, f"{found[key] / 1e6:.2f}", percent(found[key] / whole) if whole else "")
        for key, name in names.items() if key in found
    ]  # fmt: skip


def layers(report: Mapping[str, Any]) -> Rows:
    """Return a row a pruned weight."""
    return [
        (visible(row["name"], 80), "x".join(map(str, row["shape"])), percent(row["density"]), _error(row.get("error")))
        for row in report.get("layers") or []
    ]


def settings(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what was asked for, and where it ran."""
    found = {**report["recipe"], **(report.get("text") or {}), **(report.get("environment") or {})}
    return [(key.replace("_", " "), visible(value, 200)) for key, value in found.items() if value not in (None, [], "")]


def _lede(report: Mapping[str, Any]) -> str:
    recipe, found = report["recipe"], report["layers"]
    how = f"{recipe['method']}, {recipe['pattern']}"
    text = f"{how}: {percent(report['density'])} of the weights of {len(found)} layers kept"
    return f"{text}, fine-tuned for {recipe['finetune_steps']} steps." if recipe["finetune_steps"] else f"{text}."


def _figure(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 1e6 else f"{value:.3e}"


def _error(value: Any) -> str:
    number = finite(value)
    return "" if number is None else f"{number:.3g}"
