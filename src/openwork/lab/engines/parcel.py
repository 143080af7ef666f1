"""Files as one run of bytes: what a trial left on another machine, on its way home. Nothing in it is ever executed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from openwork.errors import FormatError

_MAGIC = b"openwork-parcel-1\n"
_DIGEST = 32


def pack(note: Mapping[str, Any], files: Mapping[str, bytes]) -> bytes:
    """Return a note and named files as bytes: magic, sha256 of the rest, length of the header, header, contents.

    Args:
        note: plain JSON values.
        files: relative name, with `/` -> content.
    """
    header = json.dumps({"note": note, "files": [[name, len(content)] for name, content in files.items()]}).encode()
    body = b"".join([len(header).to_bytes(8, "little"), header, *files.values()])
    return _MAGIC + hashlib.sha256(body).digest() + body


def unpack(data: bytes) -> tuple[dict[str, Any], dict[str, memoryview]]:
    """Return the note and the files that `pack` was given.

    Raises:
        FormatError: if the bytes are not whole, or a name leads out of the folder that the files are for.
    """
    start = len(_MAGIC) + _DIGEST
    body = memoryview(data)[start:]
    if data[: len(_MAGIC)] != _MAGIC or hashlib.sha256(body).digest() != data[len(_MAGIC) : start]:
        raise FormatError(f"what came back from a worker is damaged: {len(data)} bytes without their digest")
    try:
        position = 8 + int.from_bytes(body[:8], "little")
        header = json.loads(bytes(body[8:position]))
        files = {}
        for name, size in header["files"]:
            files[_safe(name)] = body[position : position + size]
            position += size
        note = dict(header["note"])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise FormatError(f"what came back from a worker cannot be read: {error}") from error
    if position != len(body):
        raise FormatError(f"what came back from a worker holds {len(body)} bytes where its header says {position}")
    return note, files


def _safe(name: Any) -> str:
    path = PurePosixPath(str(name))
    if not path.parts or path.is_absolute() or ".." in path.parts or "\\" in str(name) or "\0" in str(name):
        raise FormatError(f"what came back from a worker has a file called {name!r}, which leads out of the trial's folder")
    return str(path)
