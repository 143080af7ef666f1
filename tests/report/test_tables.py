"""Tables for the terminal, spreadsheets and Markdown hold the rows' numbers and no harm."""

from __future__ import annotations

import csv
import io
import unicodedata
from typing import Any

import pytest
from markdown_it import MarkdownIt
from rich.console import Console

from openwork.report.summary import rows
from openwork.report.tables import (
    CSV_FIELDS,
    claim_cells,
    claims_table,
    columns,
    csv_text,
    escape_markdown,
    markdown_claims,
    markdown_table,
    results_table,
)
from tests.report.conftest import HOSTILE, Make


def printed(table: object, width: int = 120) -> str:
    out = io.StringIO()
    Console(file=out, width=width, color_system=None).print(table)
    return out.getvalue()


def test_columns_are_those_that_are_filled(results: dict[str, Any]) -> None:
    titles = [column.title for column in columns(results)]
    assert titles == ["method", "density", "accuracy", "vs dense", "kept", "train", "infer", "size", "speed", "seeds"]
    for row in results["rows"]:
        row.update(latency=None, difference=None, steps=2.0)
    titles = [column.title for column in columns(results)]
    assert titles == ["method", "density", "accuracy", "kept", "train", "steps", "infer", "size", "seeds"]


def test_cells_by_hand(results: dict[str, Any]) -> None:
    results["rows"] = [
        {
            **results["rows"][1],
            "accuracy": {"mean": 0.9123, "low": 0.9073, "high": 0.9173},
            "difference": {"mean": -0.012, "low": -0.02, "high": -0.004},
            "training_flops": 0.048,
            "n": 4,
        }
    ]
    cells = {column.title: column.cell(results["rows"][0]) for column in columns(results)}
    assert cells["method"] == "random"
    assert cells["density"] == "20\N{NO-BREAK SPACE}%"
    assert cells["accuracy"] == "91.2 ± 0.5"
    assert cells["vs dense"] == "−1.2 ± 0.8"
    assert cells["train"] == "0.048"
    assert cells["seeds"] == "4 of 5"


def test_narrow_intervals_get_a_second_decimal(make_results: Make) -> None:
    results = make_results(noise=0.0)
    for row in results["rows"]:
        row["accuracy"] = {"mean": 0.91234, "low": 0.91134, "high": 0.91334}
    assert columns(results)[2].cell(results["rows"][0]) == "91.23 ± 0.10"


def test_a_studys_own_columns(results: dict[str, Any]) -> None:
    results["columns"] = {"nll": "loss (nats)", "l0": "active features", "kept": "kept"}
    for row in results["rows"]:
        row["accuracy"] = {"mean": 1.2345, "low": 1.2, "high": 1.27}
        row["metrics"] = {"nll": row["accuracy"], "l0": {"mean": 31.4, "low": 30.0, "high": 32.8}}
    shown = {column.title: column.cell(results["rows"][1]) for column in columns(results)}
    assert shown["loss (nats)"] == "1.23 ± 0.035"
    assert shown["active features"] == "31.4 ± 1.4"


def test_terminal_table(results: dict[str, Any]) -> None:
    text = printed(results_table(results))
    assert len([line for line in text.splitlines() if line.strip()]) == 1 + len(results["rows"])
    assert "4 of 5" in text
    assert max(map(len, printed(results_table(results), 80).splitlines())) <= 80


def test_terminal_claims(make_results: Make) -> None:
    text = printed(claims_table(make_results(kind="study")["claims"]))
    assert "holds" in text
    assert "not testable here" in text
    assert "points" in text


def test_claim_cells() -> None:
    claim = {"text": "t", "metric": "accuracy", "estimate": 0.012, "low": 0.004, "high": 0.02, "adjusted_p": 0.0001}
    assert claim_cells(claim) == ("t", "+1.2\N{NO-BREAK SPACE}points", "+0.4 to +2.0", "<\N{NO-BREAK SPACE}0.001")
    claim |= {"metric": "nll", "low": None}
    assert claim_cells(claim)[1:3] == ("0.012", "–")


def test_csv_keeps_every_digit(results: dict[str, Any]) -> None:
    read = list(csv.DictReader(io.StringIO(csv_text(results))))
    assert tuple(read[0]) == CSV_FIELDS
    for line, row in zip(read, rows(results), strict=True):
        assert line["arm"] == row["arm"]
        assert float(line["accuracy"]) == row["accuracy"]["mean"]
        assert float(line["accuracy_low"]) == row["accuracy"]["low"]
        assert line["difference"] == ("" if row["difference"] is None else repr(row["difference"]["mean"]))
        assert line["asked"] == "5"


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_names_in_csv_and_terminal(results: dict[str, Any], kind: str) -> None:
    results["rows"][1].update(arm=HOSTILE[kind], method=HOSTILE[kind], note=HOSTILE[kind])
    read = list(csv.DictReader(io.StringIO(csv_text(results))))
    assert len(read) == len(results["rows"])
    for line in read:
        for name in ("arm", "method", "note"):
            assert not line[name].startswith(("=", "+", "-", "@", "\t", "\r"))
    hidden = {"Cc", "Cf", "Cs"}
    for text in (csv_text(results), printed(results_table(results))):
        assert not {unicodedata.category(char) for char in text.replace("\n", "")} & hidden


def test_csv_quotes_formulas(results: dict[str, Any]) -> None:
    for name in ("=1+1", "+1", "-1", "@sum", " =1"):
        results["rows"][1]["arm"] = name
        assert any(row["arm"] == "'" + name for row in csv.DictReader(io.StringIO(csv_text(results))))


def test_markdown_table_renders_the_cells(results: dict[str, Any]) -> None:
    page = MarkdownIt("commonmark").enable("table").render(markdown_table(results))
    assert page.count("<tr>") == 1 + len(results["rows"])
    assert '<td style="text-align:right">4 of 5</td>' in page


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_names_in_markdown(make_results: Make, kind: str) -> None:
    results = make_results(kind="study")
    results["rows"][1].update(arm=HOSTILE[kind], method=HOSTILE[kind])
    results["claims"][0]["text"] = HOSTILE[kind]
    for text, count in ((markdown_table(results), len(results["rows"])), (markdown_claims(results["claims"]), 3)):
        assert "{{" not in text
        assert "{%" not in text
        page = MarkdownIt("commonmark", {"html": True}).enable("table").render(text)
        assert page.count("<tr>") == 1 + count
        assert "<script" not in page
        assert "<a " not in page
        assert "<code>" not in page
        assert page.count("<strong>") == text.count("**") // 2


def test_markdown_escaping_is_exact() -> None:
    for text in ("a_b *c* `d` [e](f) | <g> & {h} \\ ~i~ $j$ _k_ l__", "plain", "train_time", "<b>", "&amp;"):
        (paragraph,) = [t for t in MarkdownIt("commonmark").parse("x " + escape_markdown(text)) if t.type == "inline"]
        assert "".join(child.content for child in paragraph.children or []) == "x " + text
        assert {child.type for child in paragraph.children or []} <= {"text", "text_special"}
