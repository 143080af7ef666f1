from __future__ import annotations

import gzip
import hashlib
from dataclasses import replace
from pathlib import Path

import pytest

from openwork.data import catalog, files
from openwork.data.entry import Entry, File
from openwork.errors import DataError
from tests.data.servers import Answer, serving

CONTENT = b"the content of a file" * 50
PACKED = gzip.compress(CONTENT, mtime=1)
AGAIN = gzip.compress(CONTENT, compresslevel=1, mtime=2)


def made(home: str = "https://127.0.0.1:9/set.gz", content: bool = True) -> tuple[Entry, File]:
    file = File(
        "set.gz",
        (home,),
        hashlib.sha256(PACKED).hexdigest(),
        "",
        len(PACKED),
        hashlib.sha256(CONTENT).hexdigest() if content else None,
    )
    return replace(catalog.entry("mnist"), name="made", files=(file,)), file


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENWORK_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("OPENWORK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OPENWORK_OFFLINE", "1")
    (tmp_path / "data").mkdir()


def put(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def test_the_data_folder_comes_before_the_cache(tmp_path: Path) -> None:
    entry, file = made()
    assert files.find(entry, file) is None
    cached = put(tmp_path / "cache/made/set.gz", PACKED)
    assert files.locate(entry, file) == cached
    own = put(tmp_path / "data/made/set.gz", PACKED)
    assert files.locate(entry, file) == own


def test_a_file_packed_again_is_intact_by_its_content(tmp_path: Path) -> None:
    assert AGAIN != PACKED
    path = put(tmp_path / "data/made/set.gz", AGAIN)
    entry, file = made()
    assert files.locate(entry, file) == path
    entry, file = made(content=False)
    with pytest.raises(DataError, match=r"made.set\.gz.* is damaged"):
        files.locate(entry, file)


@pytest.mark.parametrize("data", [b"", b"text", PACKED[:-5], gzip.compress(b"other", mtime=0)])
def test_a_wrong_file_in_the_data_folder_is_named(tmp_path: Path, data: bytes) -> None:
    path = put(tmp_path / "data/made/set.gz", data)
    with pytest.raises(DataError) as caught:
        files.locate(*made())
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_offline_the_sentence_says_what_was_tried_and_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        files.locate(*made())
    text = str(caught.value)
    for part in ("'made'", "set.gz", str(tmp_path / "data/made"), str(tmp_path / "cache/made"), "OPENWORK_OFFLINE",
                 "https://127.0.0.1:9", "set OPENWORK_DATA"):  # fmt: skip
        assert part in text
    assert "\n" not in text


def test_without_a_data_folder_the_sentence_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENWORK_DATA")
    with pytest.raises(DataError, match=r"OPENWORK_DATA \(not set\)"):
        files.locate(*made())


def test_a_damaged_file_in_the_cache_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENWORK_OFFLINE")
    put(tmp_path / "cache/made/set.gz", PACKED[:-1])
    with serving(Answer(body=PACKED)) as site:
        path = files.locate(*made(site.address))
        assert path.read_bytes() == PACKED
        files.locate(*made(site.address))
    assert len(site.asked) == 1  # the second time it was there


def test_a_failed_download_is_told_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENWORK_OFFLINE", "0")
    with serving(Answer(404)) as site, pytest.raises(DataError, match="status 404") as caught:
        files.locate(*made(site.address))
    assert "set OPENWORK_DATA" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_data_folder_that_is_none_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENWORK_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="no folder"):
        files.locate(*made())


def test_whereabouts(tmp_path: Path) -> None:
    entry, _ = made()
    assert files.whereabouts(entry) == "to download"
    put(tmp_path / "cache/made/set.gz", PACKED)
    assert files.whereabouts(entry) == "cache"
    put(tmp_path / "data/made/set.gz", PACKED)
    assert files.whereabouts(entry) == "OPENWORK_DATA"
    assert files.whereabouts(catalog.entry("digits")) == "embedded"


def test_the_cache_is_the_platforms_unless_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENWORK_CACHE")
    assert files.cache().name == "openwork"
