"""Runs are found where they are, links lead nowhere, and nothing but a regular file of the run is read."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from openwork.errors import FormatError, StoreError
from openwork.web import places, reading
from openwork.web.live import held, running
from openwork.web.places import cache, fixed, inside, known, remember, run_id, search, usual
from tests.web.conftest import ask, id_of, over, small, write_run


def names(*roots: Path) -> list[str]:
    return [folder.name for folder in search(roots).folders]


def test_runs_are_found_at_and_below_a_folder_once(runs: Path) -> None:
    assert sorted(names(runs)) == ["compare", "other", "study"]
    assert names(runs / "compare") == ["compare"]
    assert names(runs / "compare" / "trials") == []
    assert sorted(names(runs, runs / "deep", runs / "compare", runs / "nothing")) == ["compare", "other", "study"]


def test_what_is_no_run_is_none(tmp_path: Path) -> None:
    (tmp_path / "a" / "trials").mkdir(parents=True)
    (tmp_path / "b" / "results.json").mkdir(parents=True)
    (tmp_path / ".hidden" / "trials" / ("0" * 24)).mkdir(parents=True)
    (tmp_path / "c" / "trials" / ("0" * 24)).mkdir(parents=True)
    (tmp_path / "d" / "trials").mkdir(parents=True)
    (tmp_path / "d" / ".lock").write_text("1")
    deep = tmp_path / "1" / "2" / "3" / "4" / "5" / "6"
    (deep / "trials" / ("0" * 24)).mkdir(parents=True)
    assert names(tmp_path) == ["c", "d"]


def test_links_are_not_followed_and_said(tmp_path: Path, runs: Path) -> None:
    outside = write_run(tmp_path / "outside" / "secret", small())
    (runs / "link").symlink_to(outside)
    (runs / "loop").symlink_to(runs)
    found = search([runs])
    assert sorted(folder.name for folder in found.folders) == ["compare", "other", "study"]
    assert len(found.complaints) == 1
    assert "is a link that leads elsewhere" in found.complaints[0]
    assert ask(over(runs), f"/runs/{run_id(outside)}").status == 404
    (tmp_path / "door").symlink_to(runs)  # a folder that was named may be a link itself
    assert sorted(names(tmp_path / "door")) == ["compare", "other", "study"]


def test_a_folder_that_becomes_a_link_is_refused(tmp_path: Path, runs: Path) -> None:
    app = over(runs)
    ask(app, "/")
    run = id_of(runs / "other")
    outside = tmp_path / "outside"
    (runs / "other").rename(outside)
    (runs / "other").symlink_to(outside)
    assert ask(app, f"/runs/{run}").status == 404
    assert not inside(runs / "other", [runs])
    assert inside(runs / "compare", [runs])
    assert not inside(outside, [runs])


@pytest.mark.parametrize("what", ["results.json", "trials", "result.json", "log.txt", "spec.json"])
def test_links_inside_a_run_are_refused(tmp_path: Path, runs: Path, what: str) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    folder = runs / "compare"
    key = sorted(os.listdir(folder / "trials"))[0]
    for name in ("spec.json", "result.json", "log.txt", "results.json"):
        (secret / name).write_text(
            json.dumps({"arm": {"name": "TOP SECRET"}, "format": 1, "rows": [], "name": "TOP SECRET"})
        )
    path = folder / what if what in ("results.json", "trials") else folder / "trials" / key / what
    path.rename(tmp_path / "kept")
    path.symlink_to(secret / what if what != "trials" else secret, target_is_directory=what == "trials")
    app = over(runs)
    for address in ("/", f"/runs/{id_of(folder)}", f"/runs/{id_of(folder)}/trials", f"/runs/{id_of(folder)}/trials/{key}"):
        assert "TOP SECRET" not in ask(app, address).text


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_pipes_are_refused_and_nobody_waits(runs: Path) -> None:
    folder = runs / "compare"
    for path in (folder / "results.json", folder / ".lock"):
        path.unlink(missing_ok=True)
        os.mkfifo(path)
    assert "no regular file" in ask(over(runs), f"/runs/{id_of(folder)}").text
    assert not running(folder, None)


def test_large_files_are_refused_and_logs_give_their_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_run(tmp_path / "run", small(), trials=1, log="first\n" + "x" * 100_000 + "\nlast\n")
    key = os.listdir(folder / "trials")[0]
    said = reading.log(folder, key)
    assert said.endswith("last")
    assert "first" not in said
    assert len(said) <= reading.LARGEST_LOG
    with pytest.raises(FormatError, match=r"results.json has [\d,]+ bytes; the page reads at most 100"):
        reading.read(folder, "results.json", limit=100)
    with (folder / "results.json").open("r+b") as stream:
        stream.truncate(2**40)  # a hole: a terabyte that takes no room
    made = ask(over(tmp_path), f"/runs/{id_of(folder)}")
    assert "1,099,511,627,776 bytes" in made.text


@pytest.mark.parametrize("code", ["EACCES", "EIO", "ESTALE"])
def test_what_may_not_be_read_is_said(runs: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    import errno

    real = os.open

    def refused(path: object, *rest: object, **more: object) -> int:
        if str(path).endswith("other/results.json"):
            raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))
        return real(path, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", refused)
    app = over(runs)
    answer = ask(app, "/")
    assert f"Cannot read results.json: {os.strerror(getattr(errno, code))}." in answer.text
    assert "3 runs" in answer.text
    assert ask(app, f"/runs/{id_of(runs / 'other')}").status == 200


def test_a_folder_that_may_not_be_searched_is_said(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.scandir

    def refused(path: str | Path = ".") -> object:
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(places.os, "scandir", refused)
    answer = ask(over(runs), "/")
    assert "deep cannot be searched: Permission denied." in answer.text
    assert "2 runs" in answer.text


def test_searching_has_an_end(tmp_path: Path, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "MOST_FOLDERS", 2)
    found = search([runs])
    assert len(found.folders) < 3
    assert "Only the first 2 folders were searched" in found.complaints[0]


def test_runs_elsewhere_are_remembered(tmp_path: Path, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = tmp_path / os.fsdecode(b"odd \xff \n name")
    write_run(odd, small())
    for folder in (runs / "other", odd, runs / "other", tmp_path / "gone"):
        remember(folder)
    with (cache() / "runs.jsonl").open("a") as stream:
        stream.write('nonsense\n{"a": 1}\n"relative/path"\n"/\\u0000/x"\n' + "[" * 5000 + "\n")
    assert known() == [(runs / "other").resolve(), odd.resolve()]
    monkeypatch.chdir(tmp_path)
    assert usual() == [tmp_path / "runs", *known()]
    assert len(search(usual()).folders) == 4


def test_a_list_that_cannot_be_written_stops_nothing(tmp_path: Path, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("OPENWORK_CACHE", str(tmp_path / "file"))
    remember(runs)
    assert known() == []


def test_who_is_at_work(tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    folder = tmp_path / "run"
    folder.mkdir()
    assert not running(folder, held())
    with (folder / ".lock").open("w") as lock:
        lock.write(str(os.getpid()))
        lock.flush()
        if held() is not None:
            assert not running(folder, held())  # a lock file that nobody holds
        assert running(folder, None)  # all that a living process can tell
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert running(folder, held())
    (folder / ".lock").write_text("99999999")
    assert not running(folder, None)
    (folder / ".lock").write_text("-1")
    assert not running(folder, None)
    (folder / ".lock").write_text("words")
    assert not running(folder, held())


def test_folders_are_fixed_when_they_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    roots = fixed(["runs"])
    monkeypatch.chdir("/")
    assert roots() == [tmp_path / "runs"]


def test_numbers_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"a": NaN, "b": Infinity, "c": 1e999, "d": 12345678901234567890, "e": 7, "f": [[[[]]]]}')
    found = reading.plain(reading.read_object(tmp_path.resolve(), "x.json", limit=1000))
    assert found == {"a": None, "b": None, "c": None, "d": None, "e": 7, "f": [[[[]]]]}
    nested: object = []
    for _ in range(900):
        nested = [nested]
    assert "…" in str(reading.plain(nested))
    assert len(reading.plain("x" * 10**6)) == reading.LONGEST + 1


def test_read_refuses_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"there is no a/b\.json"):
        reading.read(tmp_path.resolve(), "a", "b.json", limit=10)
