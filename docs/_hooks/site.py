"""MkDocs hooks: made pages join the written ones, and the navigation names those that are there."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
OPTIONAL = {"sparsify.md", "essential-sparsity.md", "scale.md", "serve.md", "reliability.md"}
"""Pages of parts that may be left out of a copy of the repository."""

if importlib.util.find_spec("openwork") is None:
    sys.path.insert(0, str(ROOT / "src"))


def on_config(config: Any) -> Any:
    """Put the made pages and the results into the navigation, and leave out optional pages that are not there."""
    docs = Path(config.docs_dir)
    made = _made(docs)
    listed = {
        "methods/": [{page.title: page.path} for page in made if page.path.startswith("methods/")],
        "api/": [{page.title: page.path} for page in made if page.path.startswith("api/")],
        "results/": ["results/README.md", *(f"results/{path.name}" for path in _results(docs))],
    }
    config.nav = [entry for item in config.nav if (entry := _entry(item, listed, docs)) is not None]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the made pages."""
    for page in _made(Path(config.docs_dir)):
        files.append(File.generated(config, page.path, content=page.text))
    return files


def _made(docs: Path) -> list[Any]:
    from openwork.report import site

    return [*site.method_pages(docs / "results"), *site.reference_pages(ROOT / "src")]


def _results(docs: Path) -> list[Path]:
    return [path for path in sorted((docs / "results").glob("*.md")) if path.name != "README.md"]


def _entry(item: Any, listed: dict[str, list[Any]], docs: Path) -> Any:
    """Return a navigation entry with its pages in place of a folder's name, or None for an absent optional page."""
    if isinstance(item, str):
        return None if item in OPTIONAL and not (docs / item).is_file() else item
    ((title, value),) = item.items()
    if isinstance(value, list):
        found: list[Any] = []
        for one in value:
            found += listed.get(one, [one]) if isinstance(one, str) else [one]
        kept = [entry for one in found if (entry := _entry(one, listed, docs)) is not None]
        return {title: kept} if kept else None
    return None if value in OPTIONAL and not (docs / value).is_file() else item
