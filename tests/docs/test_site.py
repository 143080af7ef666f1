"""The documentation builds without a warning, loads nothing from elsewhere, and its made pages say what they should."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import pytest

from openwork import registry
from openwork.report.site import method_pages, prose, reference_pages, sections

ROOT = Path(__file__).parents[2]
MISSING = [name for name in ("mkdocs", "material", "mkdocstrings") if importlib.util.find_spec(name) is None]


class Page(HTMLParser):
    """The links of a page, what it loads, and its anchors."""

    def __init__(self, text):
        super().__init__()
        self.links, self.loads, self.anchors = [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.anchors |= {found[name] for name in ("id", "name") if found.get(name)}
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        if tag in ("script", "img", "iframe", "source", "object", "embed") and (found.get("src") or found.get("data")):
            self.loads.append(found.get("src") or found["data"])
        if tag == "link" and found.get("href") and "canonical" not in found.get("rel", ""):
            self.loads.append(found["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    if MISSING:
        pytest.skip(f"not installed: {', '.join(MISSING)}; pip install 'openwork[docs]'")
    folder = tmp_path_factory.mktemp("site")
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "NO_MKDOCS_2_WARNING": "1", "http_proxy": "http://127.0.0.1:9"}
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)], cwd=ROOT, env=env, text=True,
        capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert "WARNING" not in done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site):
    return {path: Page(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}


def test_every_link_leads_somewhere_and_every_anchor_is_there(site, pages):
    assert len(pages) > 30
    for path, page in pages.items():
        if path.name == "404.html":  # its links start at the root of a server
            continue
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                assert parts.scheme in ("https", "mailto"), link
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            assert target.is_file(), f"{path.relative_to(site)} links to {link}"
            if parts.fragment and parts.fragment != "__skip" and target in pages:
                assert unquote(parts.fragment) in pages[target].anchors, f"{path.relative_to(site)} links to {link}"


def test_nothing_is_loaded_from_elsewhere(site, pages):
    for path, page in pages.items():
        for source in page.loads:
            assert not urlsplit(source).netloc, f"{path.relative_to(site)} loads {source}"
        assert not re.search(r"(@import|url\()\s*[\"']?(https?:)?//", path.read_text(encoding="utf-8"))
    for path in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*[\"']?(https?:)?//", path.read_text(encoding="utf-8")), path


def test_every_method_has_a_page_with_its_reference(site):
    for name in registry.names():
        card = registry.card(name)
        text = (site / "methods" / f"{name}.html").read_text(encoding="utf-8")
        assert f'id="{registry.home_of(card.entry)}.{card.entry}"' in text
        assert card.link in text


def test_the_reference_shows_signatures_and_docstrings(site):
    text = (site / "api" / "openwork.core.html").read_text(encoding="utf-8")
    assert 'id="openwork.core.masks.Masks"' in text
    assert "_sync_folder" not in (site / "api" / "openwork.html").read_text(encoding="utf-8")


def test_search_finds_the_methods(site):
    assert "granet" in (site / "search" / "search_index.json").read_text(encoding="utf-8").lower()


def test_method_pages_are_made_of_card_docstring_and_results():
    made = {page.path: page.text for page in method_pages(ROOT / "docs" / "results")}
    assert set(made) == {"methods/index.md", *(f"methods/{name}.md" for name in registry.names())}
    granet = made["methods/granet.md"]
    assert granet.startswith("# granet\n\nGraNet: gradual pruning")
    for heading in ("Claim", "Equations", "Departures", "Cost", "Use", "Results"):
        assert f"\n## {heading}\n" in granet
    assert "| GraNet is more accurate than RigL |" in granet
    assert "| granet@0.05 | 5" in granet
    assert "openwork study granet --preset laptop" in granet
    assert "::: openwork.methods.sparsify.granet.GraNet\n    options:" in granet
    assert "[granet](../results/granet.md)" in made["methods/rigl.md"]
    assert "| rigl@0.05 |" in made["methods/rigl.md"]
    for name in registry.names():
        assert f"[{name}]({name}.md)" in made["methods/index.md"]
    assert made == {page.path: page.text for page in method_pages(ROOT / "docs" / "results")}


def test_method_pages_do_without_results(tmp_path):
    (tmp_path / "other.json").write_text("[1, 2]")
    (tmp_path / "other.md").write_text("# other")
    made = {page.path: page.text for page in method_pages(tmp_path)}
    assert "No study of it has been run yet." in made["methods/granet.md"]


def test_making_pages_imports_no_method():
    code = (
        "import sys; from pathlib import Path; from openwork.report.site import *\n"
        "method_pages(Path('docs/results')); reference_pages(Path('src'))\n"
        "assert not {'torch', 'mkdocs'} & set(sys.modules), 'a page imported them'\n"
        "assert not [name for name in sys.modules if name.startswith('openwork.methods.')]"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PYTHONPATH": "src"}, check=False)
    assert done.returncode == 0


def test_reference_pages_name_every_public_module_of_a_room():
    made = {page.path: page.text for page in reference_pages(ROOT / "src")}
    core = made["api/openwork.core.md"]
    for path in (ROOT / "src" / "openwork" / "core").glob("[a-z]*.py"):
        assert f"::: openwork.core.{path.stem}\n" in core
    assert "::: openwork.core._" not in "".join(made.values())
    assert "openwork.saving" in made["api/openwork.md"]


def test_sections_of_a_docstring():
    summary, citation, named = sections(
        "RigL: sparse\ntraining.\n\nEvci. ICML 2020.\nClaim: good.\nEquations: a\nb (Eq. 1).\nCost: none."
    )
    assert (summary, citation) == ("RigL: sparse training.", "Evci. ICML 2020.")
    assert named == {"Claim": "good.", "Equations": "a\nb (Eq. 1).", "Cost": "none."}
    assert sections("Only this.") == ("Only this.", "", {})


def test_prose_keeps_code_and_shows_the_rest_as_it_stands():
    assert prose("`a_b*c` and a*b <c> [d](e) |w| {{x}}") == (
        "`a_b*c` and a\\*b &#60;c&#62; \\[d\\](e) \\|w\\| &#123;&#123;x&#125;&#125;"
    )


def test_optional_pages_are_in_the_navigation_when_they_are_there(tmp_path):
    if MISSING:
        pytest.skip(f"not installed: {', '.join(MISSING)}; pip install 'openwork[docs]'")
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "_hooks" / "site.py")
    assert spec is not None
    assert spec.loader is not None
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    (tmp_path / "results").mkdir()
    for name in ("index.md", "scale.md", "results/README.md", "results/rigl.md"):
        (tmp_path / name).write_text("# page")
    config = SimpleNamespace(
        docs_dir=str(tmp_path),
        nav=[{"Home": "index.md"}, {"Guides": [{"Machines": "scale.md"}, {"Page": "serve.md"}]}, {"Only": ["serve.md"]},
             {"Results": ["results/", "why.md"]}],
    )  # fmt: skip
    assert hooks.on_config(config).nav == [
        {"Home": "index.md"},
        {"Guides": [{"Machines": "scale.md"}]},
        {"Results": ["results/README.md", "results/rigl.md", "why.md"]},
    ]
