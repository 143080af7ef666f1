"""Study pages and their index."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

from openwork.errors import FormatError
from openwork.report.pages import LARGEST, read_results, write_index, write_study_page
from tests.report.conftest import Make, hostile


def rendered(path: Path) -> str:
    return MarkdownIt("commonmark", {"html": True}).enable("table").render(path.read_text(encoding="utf-8"))


@pytest.fixture
def study(make_results: Make) -> dict[str, Any]:
    return make_results(kind="study", name="rigl", densities=(0.1, 0.05), seeds=3)


def test_study_page(tmp_path: Path, study: dict[str, Any]) -> None:
    page = write_study_page(study, tmp_path / "results" / "rigl.md", tmp_path / "results" / "figures")
    text = page.read_text(encoding="utf-8")
    assert text.startswith("# rigl\n\nOf 3 claims, 1 holds, 1 fails and 1 is not testable here.\n")
    for heading in ("The paper", "Claims", "Results", "Settings", "Where it ran", "Run it again"):
        assert f"\n## {heading}\n" in text
    assert "openwork study rigl --preset laptop" in text
    assert "| torch | 2.13.0 |" in text
    assert "| seeds | 3 |" in text
    assert "| date | 2026-03-01 12:00 UTC |" in text
    assert "Evci" in text
    assert "\n\n\n" not in text
    html = rendered(page)
    assert html.count("<table>") == 4
    assert html.count("<h2>") == 6


def test_figures_stand_alone_and_are_found_from_the_page(tmp_path: Path, study: dict[str, Any]) -> None:
    page = write_study_page(study, tmp_path / "docs" / "my study.md", tmp_path / "figures")
    targets = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", page.read_text(encoding="utf-8"))
    assert len(targets) == 3
    for target in targets:
        file = page.parent / target.replace("%20", " ")
        root = ET.fromstring(file.read_text(encoding="utf-8"))
        assert root.get("width") == "720"


def test_json_beside_the_page_is_the_results_without_curves(tmp_path: Path, study: dict[str, Any]) -> None:
    study["rows"][0]["latency"] = float("nan")
    page = write_study_page(study, tmp_path / "rigl.md", tmp_path)
    found = read_results(page.with_suffix(".json"))
    assert found["rows"][0]["latency"] is None
    assert found["rows"][1:] == study["rows"][1:]
    assert found["claims"] == study["claims"]
    assert all("curves" not in trial for trial in found["trials"])
    assert all("curves" in trial for trial in study["trials"])
    assert write_study_page(found, tmp_path / "again.md", tmp_path).read_text(encoding="utf-8") == page.read_text(
        encoding="utf-8"
    ).replace("rigl-", "again-")


def test_index_has_a_row_a_study(tmp_path: Path, study: dict[str, Any], make_results: Make) -> None:
    write_study_page(study, tmp_path / "rigl.md", tmp_path / "figures")
    (tmp_path / "other.json").write_text(json.dumps(make_results(densities=(0.1,), seeds=3)))
    text = write_index(tmp_path).read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 4
    assert lines[2].startswith("| resnet20 on cifar10 | granet is the most accurate at 10")  # no page, no link
    assert lines[3] == (
        "| [rigl](rigl.md) | 1 holds, 1 fails and 1 not testable here | laptop | 5 | 0.1.0 | 2026-03-01 12:00 UTC |"
    ).replace("| 5 |", "| 3 |")
    assert write_index(tmp_path).read_text(encoding="utf-8") == text


def test_other_measured_pages_are_listed_by_their_headings(tmp_path: Path) -> None:
    (tmp_path / "reliability.json").write_text('{"format": 1, "rows": {}}')
    (tmp_path / "reliability.md").write_text("# Reliability, [measured]\n\ntext")
    text = write_index(tmp_path).read_text(encoding="utf-8")
    assert "- [Reliability, \\[measured\\]](reliability.md)" in text
    (tmp_path / "reliability.md").unlink()
    with pytest.raises(FormatError, match=r"reliability\.json"):
        write_index(tmp_path)


def test_index_of_nothing(tmp_path: Path) -> None:
    assert "No study has been run yet." in write_index(tmp_path).read_text(encoding="utf-8")


@pytest.mark.parametrize("content", ["", "[]", "{", '{"format": 2, "rows": []}', '{"format": 1}', "\xff", "[" * 100_000])
def test_what_is_no_results_file_is_said(tmp_path: Path, content: str) -> None:
    path = tmp_path / "broken.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(FormatError, match=r"broken\.json"):
        write_index(tmp_path)
    assert not (tmp_path / "README.md").exists()


def test_what_is_too_large_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "large.json"
    with path.open("wb") as stream:
        stream.truncate(LARGEST + 1)
    with pytest.raises(FormatError, match="at most"):
        read_results(path)


def test_hostile_names(tmp_path: Path) -> None:
    page = write_study_page(hostile(), tmp_path / "bad.md", tmp_path / "figures")
    index = write_index(tmp_path)
    for path in (page, index):
        text = path.read_text(encoding="utf-8")
        assert "{{" not in text
        assert "{%" not in text
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f\u200f\u202e]", text)
        html = rendered(path)
        assert "<script" not in html
        assert not re.search(r"<a href=\"(?!bad\.md)", html)
        assert "<em>" not in html.replace("<em>holds</em>", "").replace("<em>leans</em>", "").replace(
            "<em>fails</em>", ""
        ).replace("<em>not testable here</em>", "")
    assert rendered(index).count("<tr>") == 2
