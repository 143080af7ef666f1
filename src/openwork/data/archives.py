"""Reading tar archives in memory: nothing is extracted to the disk, nothing unpickled, nothing unbounded."""

from __future__ import annotations

import bz2
import gzip
import lzma
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

from openwork.errors import DataError

LIMIT = 1 << 29
"""Largest unpacked archive in bytes; CIFAR-10's has 185 MB."""

_OPENERS: dict[str, Callable[[Path], Any]] = {".gz": gzip.GzipFile, ".xz": lzma.LZMAFile, ".bz2": bz2.BZ2File}


def members(path: Path, wanted: Callable[[str], bool], limit: int = LIMIT) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of the files of a compressed tar archive that `wanted` picks by name, in their order.

    Raises:
        DataError: if the archive is damaged, unpacks to more than `limit` bytes, or has any member that is neither a
            file nor a folder, has an absolute path, or a path with `..`.
    """
    opener = _OPENERS.get(path.suffix)
    if opener is None:
        raise DataError(f"{str(path)!r} is no archive that can be read; known: .tar with {', '.join(_OPENERS)}")
    try:
        with opener(path) as stream:
            capped = cast(IO[bytes], _Capped(stream, limit, path))
            with tarfile.open(fileobj=capped, mode="r|") as archive:
                for member in archive:
                    _check(member, path)
                    content = archive.extractfile(member) if member.isfile() and wanted(member.name) else None
                    if content is not None:
                        yield member.name, content.read()
    except (OSError, EOFError, zlib.error, lzma.LZMAError, tarfile.TarError) as error:
        raise DataError(f"{str(path)!r} cannot be unpacked: {error}") from error


def _check(member: tarfile.TarInfo, path: Path) -> None:
    name = PurePosixPath(member.name)
    if name.is_absolute() or ".." in name.parts or "\\" in member.name or ":" in member.name:
        raise DataError(f"{str(path)!r} holds {member.name!r}, a path that leads out of the archive: do not trust it")
    if not (member.isfile() or member.isdir()) or member.issparse():
        raise DataError(f"{str(path)!r} holds {member.name!r}, which is neither a file nor a folder: do not trust it")


class _Capped:
    """The read method of a stream, up to a number of bytes."""

    def __init__(self, stream: IO[bytes], limit: int, path: Path) -> None:
        self.stream, self.left, self.limit, self.path = stream, limit, limit, path

    def read(self, size: int) -> bytes:
        data = self.stream.read(min(size, self.left + 1))
        self.left -= len(data)
        if self.left < 0:
            raise DataError(f"{str(self.path)!r} unpacks to more than {self.limit:,} bytes: do not trust it")
        return data
