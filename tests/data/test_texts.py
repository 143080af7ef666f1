"""Named texts: read from made files everywhere, from the real ones where OPENWORK_DATA has them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

from openwork.data import catalog, texts
from openwork.data.entry import Entry
from openwork.errors import DataError


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OPENWORK_DATA", str(tmp_path))
    monkeypatch.setenv("OPENWORK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OPENWORK_OFFLINE", "1")
    return tmp_path


def known(monkeypatch: pytest.MonkeyPatch, place: Path, name: str, contents: list[bytes]) -> Entry:
    """Write these contents as the files of a set, and let the catalog know their checksums."""
    entry = catalog.entry(name)
    made = []
    for file, content in zip(entry.files, contents, strict=True):
        path = place / name / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        made.append(replace(file, sha256=hashlib.sha256(content).hexdigest()))
    changed = replace(entry, files=tuple(made))
    monkeypatch.setattr(catalog, "entry", lambda asked: changed)
    return changed


def test_a_text_is_read_as_it_is(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not texts.at_hand("tiny-shakespeare")
    known(monkeypatch, place, "tiny-shakespeare", ["Café\n".encode()])
    assert texts.at_hand("tiny-shakespeare")
    assert texts.text("tiny-shakespeare") == "Café\n"
    known(monkeypatch, place, "tiny-shakespeare", [b"\xff\xfe"])
    with pytest.raises(DataError, match="not UTF-8"):
        texts.text("tiny-shakespeare")


def test_records_by_part(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [json.dumps({"title": name}).encode() + b"\n" for name in ("train", "dev", "test")]
    known(monkeypatch, place, "sci-abstracts", lines)
    assert [texts.records("sci-abstracts", part) for part in ("train", "test")] == [
        [{"title": "train"}],
        [{"title": "test"}],
    ]
    with pytest.raises(DataError, match="no part 'valid'"):
        texts.records("sci-abstracts", "valid")
    known(monkeypatch, place, "sci-abstracts", [b"{}\n[1]\n", b"{", b""])
    with pytest.raises(DataError, match=r"line 2 .* is a list"):
        texts.records("sci-abstracts", "train")
    with pytest.raises(DataError, match=r"line 1 .* is no JSON"):
        texts.records("sci-abstracts", "dev")
    assert texts.records("sci-abstracts", "test") == []


def test_a_models_folder(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = known(monkeypatch, place, "tiny-lm", [b"weights", b"pieces"])
    assert texts.folder(entry.name) == place / "tiny-lm" / "babyllama-105"
    (place / entry.name / "babyllama-105" / "tok105.vocab").write_bytes(b"other")
    with pytest.raises(DataError, match="damaged or another file"):
        texts.folder(entry.name)


def test_a_set_of_another_kind_or_not_there_is_refused(place: Path) -> None:
    for read, name in ((texts.text, "digits"), (texts.folder, "tiny-shakespeare")):
        with pytest.raises(DataError, match="of kind"):
            read(name)
    with pytest.raises(DataError, match=r"needs input\.txt.*OPENWORK_OFFLINE"):
        texts.text("tiny-shakespeare")
    with pytest.raises(DataError, match="records"):
        texts.text("sci-abstracts")
    with pytest.raises(DataError, match=r"texts\.text\('tiny-shakespeare'\)"):
        catalog.entry("tiny-shakespeare").read(catalog.entry("tiny-shakespeare"))


def test_real_abstracts_have_their_counts() -> None:
    if not texts.at_hand("sci-abstracts"):
        pytest.skip("sci-abstracts is not in OPENWORK_DATA or the cache")
    found = {part: texts.records("sci-abstracts", part) for part in ("train", "dev", "test")}
    assert {part: len(rows) for part, rows in found.items()} == {"train": 1992, "dev": 619, "test": 618}
    assert all(row["title"] and row["source"] for row in found["test"])
