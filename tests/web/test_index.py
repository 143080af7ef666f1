"""The index is the folders, whatever becomes of its file, and asks the same few questions of ten runs and of a thousand."""

from __future__ import annotations

import os
import sqlite3
import time
from pathlib import Path

import pytest

from openwork.errors import StoreError
from openwork.web import index as module
from openwork.web.index import Index
from openwork.web.places import cache, fixed
from openwork.web.query import Query
from tests.web.conftest import ask, over, small, write_run


def build(folder: Path, name: str = "test") -> Index:
    made = Index(fixed([folder]), name)
    made.fresh = 0.0
    return made


def titles(index: Index, **asked: object) -> list[str]:
    return [entry.folder.name for entry in index.page(Query(sort="name", **asked), 100)[0]]  # type: ignore[arg-type]


def test_changes_are_seen_and_nothing_else_is_read(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = build(runs)
    read: list[str] = []
    real = module.make
    monkeypatch.setattr(module, "make", lambda folder, mark: read.append(folder.name) or real(folder, mark))
    assert index.refresh().whole
    assert sorted(read) == ["compare", "other", "study"]
    read.clear()
    index.refresh()
    build(runs).refresh()  # another process finds the file
    assert read == []
    write_run(runs / "new", small())
    os.utime(runs / "other" / "results.json", ns=(1, 1))
    (runs / "compare" / "results.json").rename(runs / "gone.json")
    index.refresh()
    assert sorted(read) == ["compare", "new", "other"]
    assert sorted(titles(index)) == ["compare", "new", "other", "study"]
    assert titles(index, status="stopped") == ["compare"]


def test_a_folder_that_goes_is_gone(runs: Path) -> None:
    index = build(runs)
    index.refresh()
    (entry,) = [entry for entry in index.page(Query(), 10)[0] if entry.folder.name == "other"]
    assert index.get(entry.id) is not None
    for name in ("results.json", "trials"):
        (runs / "other" / name).rename(runs.parent / name)
    (runs / "other").rmdir()
    assert index.get(entry.id) is None
    index.refresh()
    assert sorted(titles(index)) == ["compare", "study"]
    assert index.choices()["study"] == ["compare", "rigl"]


@pytest.mark.parametrize("damage", ["delete", "garbage", "truncate", "version", "table"])
def test_the_file_can_be_thrown_away(runs: Path, damage: str) -> None:
    index = build(runs)
    index.refresh()
    (path,) = cache().glob("*.sqlite")
    if damage == "delete":
        path.unlink()
    elif damage == "garbage":
        path.write_bytes(b"no database at all" * 1000)
    elif damage == "truncate":
        os.truncate(path, path.stat().st_size // 2 + 7)
    else:
        base = sqlite3.connect(path)
        base.executescript("PRAGMA user_version = 99" if damage == "version" else "DROP TABLE methods")
        base.close()
    again = build(runs)
    again.refresh()
    assert sorted(titles(again)) == ["compare", "other", "study"]
    assert sorted(titles(again, method="rigl")) == ["compare", "other", "study"]


def test_damage_while_it_is_used_is_said_once(runs: Path) -> None:
    app = over(runs)
    ask(app, "/")
    (path,) = cache().glob("*.sqlite")
    path.write_bytes(b"no database at all" * 1000)
    answer = ask(app, "/")
    assert answer.status == 404
    assert "made anew" in answer.text
    assert "3 runs" in ask(app, "/").text


def test_a_cache_that_cannot_be_written_costs_only_time(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("OPENWORK_CACHE", str(tmp_path / "file" / "below"))
    index = build(runs)
    index.refresh()
    assert sorted(titles(index)) == ["compare", "other", "study"]


def test_a_short_look_goes_on_where_it_stopped(runs: Path) -> None:
    index = build(runs)
    seen = []
    while not index.refresh(0.0).whole:
        seen.append(len(titles(index)))
    assert seen == [1, 2]
    assert len(titles(index)) == 3


def test_a_locked_file_is_said_and_kept(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = build(runs)
    index.refresh()
    monkeypatch.setattr(module, "WAIT", 0.05)
    (path,) = cache().glob("*.sqlite")
    other = sqlite3.connect(path)
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(StoreError, match="another page is writing"):
        index.page(Query(), 10)
    other.rollback()
    other.close()
    assert len(titles(index)) == 3


def test_a_thousand_runs_take_the_same_few_statements_as_three(tmp_path: Path, runs: Path) -> None:
    text = small(seeds=2, methods=("rigl",), densities=(0.1,))
    for at in range(1000):
        text["recipe"].update(model=f"model{at:04d}", data="cifar10")
        write_run(tmp_path / "many" / f"run{at:04d}", text)
    few, many = over(runs), over(tmp_path / "many")
    started = time.perf_counter()
    first = ask(many, "/")
    first_page = time.perf_counter() - started
    many.state.index.refresh()
    many.state.index.fresh = 1e9
    counts = {}
    for name, app in (("few", few), ("many", many)):
        ask(app, "/")
        app.state.index.fresh = 1e9
        statements: list[str] = []
        app.state.index.trace = statements.append
        asked = ("/", "/?page=7&sort=name", "/?q=rigl&method=rigl&status=complete&verdict=holds&since=2020-01-01")
        times = []
        for address in asked:
            started = time.perf_counter()
            answer = ask(app, address)
            times.append(time.perf_counter() - started)
            assert answer.status == 200
        counts[name] = len([text for text in statements if text.startswith("SELECT")])
        app.state.index.trace = None
    assert counts["few"] == counts["many"] == 9
    assert "1000 runs" in ask(many, "/").text
    assert "Page 7 of 20" in ask(many, "/?page=7").text
    shown = [name for at in range(1, 21) for name in ask(many, f"/?page={at}&sort=name").text.split("model")[1:]]
    assert len({name[:4] for name in shown}) == 1000
    assert first.status == 200
    print(f"1,000 runs: first page {first_page:.3f} s with an empty index, then {', '.join(f'{t:.3f}' for t in times)} s")
