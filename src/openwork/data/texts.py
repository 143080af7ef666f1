"""Named sets that are no images: plain texts, records of text, and a small pretrained model's folder."""

from __future__ import annotations

import json
from pathlib import Path

from openwork.data import catalog, files
from openwork.data.entry import Entry
from openwork.errors import DataError


def text(name: str) -> str:
    """Return the content of a text of one file, such as tiny-shakespeare; may download it.

    Raises:
        DataError: if there is no such set, it is not of this kind, or it cannot be had.
    """
    entry = _entry(name, "text")
    if len(entry.files) != 1:
        raise DataError(f"{name!r} has {len(entry.files)} files of records: read one with records({name!r}, part)")
    path = files.locate(entry, entry.files[0])
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{str(path)!r} is not UTF-8 text: {error.reason} at byte {error.start}") from error


def records(name: str, part: str) -> list[dict[str, object]]:
    """Return the records of a part ("train", "dev", "test") of a set of JSON lines, such as sci-abstracts; may download it.

    Raises:
        DataError: if there is no such set or part, it cannot be had, or a line is no JSON object.
    """
    entry = _entry(name, "text")
    file = next((one for one in entry.files if f".{part}." in one.name), None)
    if file is None:
        raise DataError(f"{name!r} has no part {part!r}: its files are {', '.join(one.name for one in entry.files)}")
    path = files.locate(entry, file)
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(f"line {number} of {str(path)!r} is no JSON: {error}") from error
        if not isinstance(record, dict):
            raise DataError(f"line {number} of {str(path)!r} is a {type(record).__name__}, not an object")
        found.append(record)
    return found


def folder(name: str) -> Path:
    """Return the folder that holds all files of a set, such as a model's; may download them.

    Raises:
        DataError: if there is no such set, or its files cannot be had or lie in different folders.
    """
    entry = _entry(name, "model")
    places = {files.locate(entry, file).parent for file in entry.files}
    if len(places) > 1:
        raise DataError(f"the files of {name!r} lie in {' and '.join(sorted(map(str, places)))}: put them into one folder")
    return places.pop()


def at_hand(name: str) -> bool:
    """Tell whether a set can be read without a download: its files lie in `$OPENWORK_DATA` or in the cache."""
    entry = catalog.entry(name)
    return all(files.find(entry, file) is not None for file in entry.files)


def digest(name: str) -> str:
    """Return the checksums of a set's files as one text."""
    return " ".join(file.sha256 for file in catalog.entry(name).files)


def _entry(name: str, kind: str) -> Entry:
    entry = catalog.entry(name)
    if entry.kind != kind:
        raise DataError(f"{name!r} is a set of kind {entry.kind}, not of kind {kind}")
    return entry
