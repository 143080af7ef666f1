"""Data in a NumPy archive: x_train, y_train, x_test, y_test and, if wanted, x_validation, y_validation."""

from __future__ import annotations

import struct
import zipfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from openwork.data.prepare import Options, own
from openwork.errors import DataError

if TYPE_CHECKING:
    from openwork.data.arrays import Arrays

PARTS = ("train", "test", "validation")

# What a damaged or hostile archive raises; RuntimeError for encryption and unknown compression, MemoryError for a
# header that promises more than there is.
_BROKEN: tuple[type[Exception], ...] = (OSError, EOFError, ValueError, LookupError, RuntimeError, OverflowError)
_BROKEN += (MemoryError, AttributeError, zipfile.BadZipFile, zlib.error, struct.error)


def load(ref: str, options: Options) -> Arrays:
    """Return the source of the archive at `ref`; see `prepare.own` for what the arrays may hold.

    Raises:
        DataError: if there is no such file, it is damaged, lacks an array, or needs pickle.
    """
    found = path(ref)
    try:
        with found.open("rb") as stream:
            archive = np.load(stream, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError("it holds a single array")
            arrays: dict[str, Any] = {name: archive[name] for name in archive.files if name[2:] in PARTS}
    except _BROKEN as error:
        raise DataError(f"{ref!r} cannot be read as an archive of plain arrays: {error}") from error
    parts = {part: (arrays[f"x_{part}"], arrays[f"y_{part}"]) for part in PARTS if _whole(arrays, part, ref)}
    return own(found.name, parts, options)


def path(ref: str) -> Path:
    """Return the path of an archive.

    Raises:
        DataError: if there is no such file.
    """
    found = Path(ref).expanduser()
    if not found.is_file():
        raise DataError(f"there is no file {ref!r} (looked from {Path.cwd()})")
    return found


def _whole(arrays: dict[str, Any], part: str, ref: str) -> bool:
    """Tell whether a part is there; only the validation part may be missing, and none by half."""
    missing = [name for name in (f"x_{part}", f"y_{part}") if name not in arrays]
    if missing and (part != "validation" or len(missing) == 1):
        raise DataError(f"{ref!r} has no array {missing[0]!r}; it has: {', '.join(sorted(arrays)) or 'none of them'}")
    return not missing
