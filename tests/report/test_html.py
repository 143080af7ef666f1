"""The report holds what the results hold, runs nothing, fetches nothing, and lets no name out of its place."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from openwork.errors import StoreError
from openwork.report.html import asked, command, recipe_text, report, title, write_report
from openwork.report.style import DARK, LIGHT
from openwork.report.summary import headline
from openwork.report.text import visible
from tests.report.conftest import HOSTILE, Make, hostile

ALLOWED = {
    *("html", "head", "meta", "title", "style", "body", "main", "header", "footer", "section", "figure", "figcaption"),
    *("p", "h1", "h2", "h3", "span", "div", "dl", "dt", "dd", "ol", "li", "i", "b", "pre", "code"),
    *("table", "thead", "tbody", "tr", "th", "td"),
    *("svg", "path", "g", "defs", "use", "text", "clippath", "rect", "mask", "image"),
}


class Page(HTMLParser):
    """Elements with their attributes, text by element, ids."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self.open[-1], data.strip()))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def of(self, *tags: str) -> list[str]:
        return [text for tag, text in self.texts if tag in tags]


def masks() -> dict[str, dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return {"rigl@0.05": {"stem.weight": rng.random((16, 3, 3, 3)) < 0.05, "bias": np.ones(3, bool)}}


@pytest.fixture(scope="module")
def page_text() -> str:
    from tests.report.conftest import make

    return report(make(lost=[("set@0.05", 2, "diverged")]), masks())


@pytest.fixture(scope="module")
def page(page_text: str) -> Page:
    return Page(page_text)


@pytest.fixture(scope="module")
def hostile_text() -> str:
    return report(hostile(), {HOSTILE["script"]: {HOSTILE["quotes"]: np.ones((2, 2), bool)}})


def test_report_is_well_formed(page: Page) -> None:
    assert page.open == []
    assert {tag for tag, _ in page.elements} <= ALLOWED
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(set(ids)) == len(ids)


def test_report_runs_and_fetches_nothing(page: Page, page_text: str) -> None:
    for _, attributes in page.elements:
        assert not any(key.startswith("on") or key in ("style", "src") for key in attributes)
        link = attributes.get("href") or attributes.get("xlink:href")
        assert link is None or link.startswith(("#", "data:image/png;base64,"))
    assert not re.search(r"(?<!xmlns=\")https?://", page_text)
    assert "@import" not in page_text
    assert "url(" not in page_text.split("</style>")[0]


def test_policy_allows_this_style_and_nothing_else(page: Page, page_text: str) -> None:
    policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    style = re.search(r"<style>(.*?)</style>", page_text, re.DOTALL)
    assert style
    digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
    assert policy == (f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; form-action 'none'")
    assert page_text.count("<style") == 1
    for colour in LIGHT + DARK:
        assert colour in style[1]
    assert "prefers-color-scheme:dark" in style[1]
    assert "@media print" in style[1]
    assert "/*" not in style[1]


def test_report_says_what_the_results_say(page: Page, results: dict[str, Any]) -> None:
    assert page.of("h1") == ["resnet20 on cifar10"]
    assert headline(results) in page.of("p")
    assert "1 of 80 trials did not end well: 1 diverged." in page.of("p")
    cells = page.of("td", "th")
    for row in results["rows"]:
        assert f"{100 * row['accuracy']['mean']:.1f} ± " in " ".join(cells)
    assert cells.count("4 of 5") == 1
    assert "set@0.05" in cells
    assert any("loss is nan at step 312\nfirst in" in cell for cell in cells)
    assert "2.13.0" in page.of("dd")
    assert "openwork compare recipe.yaml" in page.of("code")
    assert [text for text in page.of("b") if text.startswith("Figure")] == [f"Figure {n}." for n in (1, 2, 3, 4)]


def test_report_is_accessible(page: Page) -> None:
    assert page.all("html") == [{"lang": "en"}]
    assert all("scope" in a for a in page.all("th"))
    for svg in page.all("svg"):
        assert svg.get("aria-hidden") == "true" or (svg.get("role") == "img" and svg.get("aria-label"))
    assert len(page.all("figure")) == len(page.all("figcaption"))
    assert any("width=device-width" in (a.get("content") or "") for a in page.all("meta"))
    for a in page.all("section"):
        assert any(b.get("id") == a["aria-labelledby"] for b in page.all("h2"))


def test_same_results_same_bytes(page_text: str, results: dict[str, Any]) -> None:
    assert report(results, masks()) == page_text


def test_write_is_a_file_and_says_where(tmp_path: Path, make_results: Make) -> None:
    path = write_report(make_results(densities=(0.1,), seeds=2), tmp_path / "new" / "report.html")
    assert path == tmp_path / "new" / "report.html"
    assert path.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError):
        write_report({}, tmp_path / "file" / "report.html")


def test_empty_results_still_make_a_page() -> None:
    page = Page(report({}))
    assert "No trial was run." in page.of("p")
    assert page.all("table") == []


def test_study(make_results: Make) -> None:
    page = Page(report(make_results(kind="study", densities=(0.1,), name="rigl")))
    assert page.of("h1") == ["rigl"]
    classes = [a.get("class") for a in page.all("span")]
    assert [c for c in classes if c and c.startswith("verdict")] == ["verdict holds", "verdict fails", "verdict untested"]
    assert "openwork study rigl --preset laptop" in page.of("code")


def test_what_a_verdict_rests_on(results: dict[str, Any]) -> None:
    claim = {"text": "t", "metric": "nll", "estimate": 1.5, "low": 1.0, "high": 2.0, "adjusted_p": 0.02, "verdict": "holds"}
    results["rows"], results["trials"] = [], []
    results["claims"] = [
        {**claim, "reason": "the interval is above 0; n = 3 of 3"},
        {**claim, "adjusted_p": None, "reason": ""},
        {"text": "u", "metric": "nll", "verdict": "?"},
    ]
    told = Page(report(results)).of("p")
    assert "Estimate 1.5, interval 1 to 2, corrected p 0.020. The interval is above 0; n = 3 of 3." in told
    assert "Estimate 1.5, interval 1 to 2." in told


def test_hostile_names_stay_in_their_places(hostile_text: str, tmp_path: Path) -> None:
    page = Page(hostile_text)
    assert page.open == []
    assert {tag for tag, _ in page.elements} <= ALLOWED
    for _, attributes in page.elements:
        assert not any(key.startswith("on") or key in ("style", "src") for key in attributes)
    assert "<script" not in hostile_text.lower()
    assert "{{7*7}}" in " ".join(page.of("th"))  # as written, and not as 49
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", hostile_text)
    assert "x" * 500 not in hostile_text.split('id="again"')[0]
    written = write_report(hostile(), tmp_path / "report.html")
    written.read_text(encoding="utf-8")


def test_hostile_recipes_can_be_run_again(hostile_text: str) -> None:
    results = hostile("compare")
    again = yaml.safe_load(recipe_text(results))
    assert again == results["recipe"]
    assert recipe_text(results).isascii()
    shown = Page(hostile_text).of("code")[-1]
    assert yaml.safe_load(shown) == hostile()["recipe"]


def test_recipe_text_is_the_runs_own_where_it_can_be_seen(results: dict[str, Any]) -> None:
    results["recipe_text"] = "# data set by name\ndata: cifar10\n"
    assert recipe_text(results) == results["recipe_text"]
    results["recipe_text"] = "data: \u202ecifar10\n"
    assert yaml.safe_load(recipe_text(results)) == results["recipe"]
    del results["recipe_text"]
    results["recipe"]["model"] = "网络"
    assert "网络" in recipe_text(results)


def test_titles_and_commands(results: dict[str, Any]) -> None:
    results["recipe"].update(data="digits")
    assert title(results) == "resnet20 on digits"
    results["recipe"].update(data={"name": "digits"})
    assert title(results) == "resnet20 on cifar10"  # the run's own name
    assert title({"kind": "study", "name": "rigl\n"}) == "rigl\\n"
    assert command({"kind": "study", "name": "a; rm -rf", "preset": None}) == "openwork study 'a; rm -rf'"


def test_asked_reads_like_settings() -> None:
    recipe = {"a_b": 1, "c": {"d": [0.1, 0.05], "e": None}, "f": True, "g": (), "h": 5e-4, "i": "x"}
    assert list(asked(recipe)) == [("a b", "1"), ("c.d", "0.1, 0.05"), ("f", "yes"), ("h", "0.0005"), ("i", "x")]


def test_long_lists_of_failures_are_cut(make_results: Make) -> None:
    lost = [(f"{m}@{d:g}", s, "failed") for m in ("a", "b", "c", "d") for d in (0.2, 0.1, 0.05) for s in range(5)]
    page = Page(report(make_results(methods=("a", "b", "c", "d", "e"), lost=lost)))
    assert page.of("td").count("failed") == 50
    assert "10 more are in results.json." in page.of("p")


def test_visible_names_of_masks(hostile_text: str) -> None:
    assert visible(HOSTILE["quotes"]) in Page(hostile_text).of("figcaption")
