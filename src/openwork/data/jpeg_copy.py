"""A JPEG copy of CIFAR-10 that may lie in `$OPENWORK_DATA/cifar10`: the same images, about 8 grey levels off.

`cifar10-jpeg-train.tar.xz` holds `train/<class>/NNNN.jpg`, `cifar10-jpeg-test.tar.xz` likewise. The classes in
alphabetical order are the classes of CIFAR-10 in their own. It is reported under a name of its own.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from openwork import atomic
from openwork.data import archives, files
from openwork.data.entry import Entry, Raw
from openwork.errors import DataError, StoreError

if TYPE_CHECKING:
    from openwork.data.entry import Bytes

NAME = "cifar10 (JPEG copy)"
PARTS = ("train", "test")


def paths() -> tuple[Path, Path] | None:
    """Return the paths of the two archives, None unless both are there."""
    folder = files.root()
    if folder is None:
        return None
    train, test = (folder / "cifar10" / f"cifar10-jpeg-{part}.tar.xz" for part in PARTS)
    return (train, test) if train.is_file() and test.is_file() else None


def note() -> str | None:
    """Return the words for a list of sets, None if there is no copy."""
    return "OPENWORK_DATA (JPEG copy)" if paths() else None


def stands_in(entry: Entry) -> bool:
    """Tell whether the copy is to be read: it is there, and the original is not on this machine."""
    return paths() is not None and files.find(entry, entry.files[0]) is None


def identity(entry: Entry) -> str:
    """Return text that tells the copy from the original and from another copy."""
    found = paths()
    if found is None or not stands_in(entry):
        return entry.files[0].sha256
    return " ".join(files.sha256(path) for path in found)


def read(entry: Entry) -> Raw:
    """Return the copy, from the decoded arrays in the cache where they are, else decoded (some ten seconds).

    Raises:
        DataError: if the copy is not there or is not what it should be.
    """
    found = paths()
    if found is None:
        raise DataError("there is no JPEG copy of CIFAR-10 in OPENWORK_DATA")
    cached = files.cache() / entry.name / f"jpeg-copy-{'-'.join(files.sha256(path)[:12] for path in found)}.npz"
    raw = _load(cached)
    if raw is None:
        raw = Raw(NAME, _decode(found[0], PARTS[0], entry), _decode(found[1], PARTS[1], entry))
        _keep(raw, cached)
    return raw


def _decode(path: Path, part: str, entry: Entry) -> tuple[Bytes, Bytes]:
    import numpy as np

    pictures = sorted(archives.members(path, lambda name: name.startswith(f"{part}/") and name.endswith(".jpg")))
    kinds = sorted({name.split("/")[1] for name, _ in pictures})
    if len(kinds) != entry.classes:
        raise DataError(f"{str(path)!r} has {len(kinds)} classes; expected {entry.classes} folders {part}/<class>/")
    x = np.empty((len(pictures), *entry.shape), np.uint8)
    for place, (name, data) in zip(x, pictures, strict=True):
        place[...] = _picture(data, name, path).transpose(2, 0, 1)
    order = {kind: index for index, kind in enumerate(kinds)}
    return x, np.array([order[name.split("/")[1]] for name, _ in pictures], np.uint8)


def _picture(data: bytes, name: str, path: Path) -> Bytes:
    import numpy as np
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
            if image.size != (32, 32) or image.mode != "RGB":
                raise DataError(f"{name!r} in {str(path)!r} is {image.mode} of {image.size}; expected RGB of 32x32")
            return np.asarray(image)
    except (OSError, SyntaxError) as error:
        raise DataError(f"{name!r} in {str(path)!r} is no JPEG: {error}") from error


def _load(cached: Path) -> Raw | None:
    """Return the decoded arrays; None if they are not there or damaged (the zip has checksums)."""
    import zipfile

    import numpy as np

    try:
        with cached.open("rb") as stream, np.load(stream, allow_pickle=False) as kept:
            return Raw(NAME, (kept["x_train"], kept["y_train"]), (kept["x_test"], kept["y_test"]))
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
        return None


def _keep(raw: Raw, cached: Path) -> None:
    """Write the decoded arrays; a cache that cannot be written costs time at the next load, nothing else."""
    import numpy as np

    try:
        with atomic.replacing(cached) as stream:
            np.savez(stream, x_train=raw.train[0], y_train=raw.train[1], x_test=raw.test[0], y_test=raw.test[1])
    except (StoreError, OSError):
        return
