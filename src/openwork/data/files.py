"""Where the files of a named set are: in `$OPENWORK_DATA`, in the cache, or at their home."""

from __future__ import annotations

import gzip
import hashlib
import os
import zlib
from pathlib import Path

from openwork.data import download
from openwork.data.entry import Entry, File
from openwork.errors import DataError


def root() -> Path | None:
    """Return the folder that `$OPENWORK_DATA` names, None if it is not set.

    Raises:
        DataError: if it names something that is no folder.
    """
    named = os.environ.get("OPENWORK_DATA")
    if not named:
        return None
    folder = Path(named).expanduser()
    if not folder.is_dir():
        raise DataError(f"OPENWORK_DATA is {named!r}, which is no folder: set it to one that holds <set>/<file>")
    return folder


def cache() -> Path:
    """Return the folder that downloads go to: `$OPENWORK_CACHE`, by default the platform's cache folder."""
    named = os.environ.get("OPENWORK_CACHE")
    if named:
        return Path(named).expanduser()
    import pooch

    return Path(pooch.os_cache("openwork"))


def offline() -> bool:
    """Tell whether `$OPENWORK_OFFLINE` forbids downloads: set, and not to 0."""
    return os.environ.get("OPENWORK_OFFLINE", "") not in ("", "0")


def sha256(path: Path) -> str:
    """Return the sha256 of a file as hexadecimal text."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def intact(path: Path, file: File) -> bool:
    """Tell whether `path` has the registered checksum, as a file or, for a gzip packed again, in its content."""
    if sha256(path) == file.sha256:
        return True
    if file.content is None:
        return False
    try:
        with gzip.open(path) as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest() == file.content
    except (OSError, EOFError, zlib.error):
        return False


def find(entry: Entry, file: File) -> Path | None:
    """Return the path of an intact file in `$OPENWORK_DATA` or the cache, None if it is in neither.

    Raises:
        DataError: if the file in `$OPENWORK_DATA` is not intact. A damaged one in the cache counts as absent.
    """
    folder = root()
    if folder is not None and (path := folder / entry.name / file.name).is_file():
        if not intact(path, file):
            raise DataError(
                f"{str(path)!r} is damaged or another file (its sha256 is not {file.sha256[:12]}...): replace it by "
                f"{file.homes[0]}, or remove it to have it downloaded"
            )
        return path
    path = cache() / entry.name / file.name
    return path if path.is_file() and intact(path, file) else None


def locate(entry: Entry, file: File) -> Path:
    """Return the path of a file, downloading it into the cache where needed.

    Raises:
        DataError: if it is in neither place and cannot be downloaded, or is damaged in `$OPENWORK_DATA`.
    """
    found = find(entry, file)
    if found is not None:
        return found
    if offline():
        raise DataError(f"{_absent(entry, file)}, and OPENWORK_OFFLINE forbids to download it; {_remedy(entry)}")
    try:
        return download.fetch(file, cache() / entry.name)
    except download.Failure as error:
        raise DataError(f"{_absent(entry, file)}, and its download fails ({error}); {_remedy(entry)}") from error


def whereabouts(entry: Entry) -> str:
    """Tell in a few words where a set is: a look at file names and sizes only, nothing is read or downloaded."""
    if not entry.files:
        return "embedded"
    folder = root()
    places = []
    for file in entry.files:
        cached = cache() / entry.name / file.name
        if folder is not None and (folder / entry.name / file.name).is_file():
            places.append("OPENWORK_DATA")
        elif cached.is_file() and (file.content is not None or cached.stat().st_size == file.size):
            places.append("cache")
        else:
            note = entry.substitute() if entry.substitute is not None else None
            return note or "to download"
    return " and ".join(sorted(set(places)))


def _absent(entry: Entry, file: File) -> str:
    folder = root()
    data = "OPENWORK_DATA (not set)" if folder is None else f"OPENWORK_DATA ({folder / entry.name})"
    return f"{entry.name!r} needs {file.name}, which is neither in {data} nor in the cache ({cache() / entry.name})"


def _remedy(entry: Entry) -> str:
    homes = sorted({file.homes[0].rpartition("/")[0] for file in entry.files})
    return (
        f"get {', '.join(file.name for file in entry.files)} from {' and '.join(homes)} into a folder {entry.name!r} "
        "and set OPENWORK_DATA to the folder above it"
    )
