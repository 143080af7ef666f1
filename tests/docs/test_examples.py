"""Every block of the quick start and of the guides runs as it stands: offline, with data that come along."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.docs.blocks import Block, blocks, run

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "docs" / "quickstart.md", *sorted((ROOT / "docs" / "guides").glob("*.md"))]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty folder to work in, in which `openwork` is this one and there is no network."""
    commands = tmp_path / "bin"
    commands.mkdir()
    script = commands / "openwork"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m openwork "$@"\n')
    script.chmod(0o755)
    paths = [str(commands), str(Path(sys.executable).parent), os.environ.get("PATH", "")]
    monkeypatch.setenv("PATH", os.pathsep.join(paths))
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name, value in {"OPENWORK_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "120"}.items():
        monkeypatch.setenv(name, value)
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    return work


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_blocks_of_a_page_run(page, place):
    run(page)
    assert any(block.runs for block in blocks(page.read_text()))


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("```python\nx = 1\n```\n\n```python\n\nassert x == 2\n```\n", 7),
        ("```python\nimport nothing_of_this_name\n```\n", 2),
        ("```bash\ntrue\nfalse | true\n```\n", 2),
        ("```sh\necho $undefined\n```\n", 2),
        ("```sh\necho one\n```\n<!-- output -->\n```text\ntwo\n```\n", 6),
        ("```python\nprint('one')\n```\n<!-- output -->\n```text\none\ntwo\n```\n", 6),
        ("```bash\nopenwork show nothing-like-this\n```\n", 2),
    ],
)
def test_a_block_that_fails_fails_the_page_and_names_its_line(text, line, place):
    page = place / "page.md"
    page.write_text(text)
    with pytest.raises((AssertionError, ImportError, RuntimeError)) as caught:
        run(page)
    last = caught.traceback[-1]
    assert f"page.md:{line}" in str(caught.value) or (str(last.path), last.lineno + 1) == (str(page), line)


def test_blocks_share_names_and_folder_and_marked_ones_are_left_alone(tmp_path, monkeypatch, capfd):
    page = tmp_path / "page.md"
    page.write_text(
        "```python\nfrom pathlib import Path\n\nx = Path('file').write_text('here') - 3\n```\n"
        "1. In a list:\n\n   ```bash\n   cat file\n   ```\n"
        "<!-- not-run: it would take an hour -->\n```bash\nexit 1\n```\n"
        "<!-- output -->\n\n```text\nhere\n```\n"
        "<!-- needs: no_such_package_here -->\n```python\nraise SystemExit(1)\n```\n"
        "<!-- needs: json -->\n```python\nprint('x is', x)\n```\n"
    )
    monkeypatch.chdir(tmp_path)
    run(page)
    said = capfd.readouterr().out
    assert "here" in said
    assert "x is 1" in said
    assert [block.runs for block in blocks(page.read_text())] == [True, True, False, False, False, True]


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("```python\nx", "never closed"),
        ("```py\nx\n```", "'py'"),
        ("```\nx\n```", "''"),
        ("<!-- not-run -->\n```bash\nx\n```", "reason"),
        ("<!-- skip: me -->\n```bash\nx\n```", "skip"),
    ],
)
def test_a_page_that_hides_a_block_is_refused(text, word):
    with pytest.raises(ValueError, match=word):
        list(blocks(text))


def test_a_mark_belongs_to_the_next_block_only():
    first, second, third = blocks(
        "<!-- output -->\n```bash\na\n```\n```bash\nb\n```\n<!-- output -->\ntext\n```bash\nc\n```"
    )
    assert first == Block("bash", "a\n", 3, "output")
    assert second.runs
    assert third.runs
