"""From the name or reference of a data set to a source, its images, or its digest."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, TypeVar

from openwork import references
from openwork.data import catalog, files, npz, user
from openwork.data.prepare import Options, arrays
from openwork.data.splits import tensor
from openwork.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

    from openwork.data.source import Source

T = TypeVar("T")


def load(
    ref: str,
    *,
    train: int | None = None,
    validation: float = 0.1,
    augment: str = "none",
    seed: int = 0,
) -> Source:
    """Return the data that `ref` names.

    Args:
        ref: a named set (`names()`); a file `.npz` with x_train, y_train, x_test, y_test; or a function of your own,
            as 'module:function' or 'path/to/file.py:function' (see `user.load` for what it may return).
        train: how many training examples to use, the classes in proportion; None for all.
        validation: share, or number, of training examples to hold out, the classes in proportion.
        augment: "none", "shift", "flip-shift" or "rotate", for training batches.
        seed: of the two choices above. Trials that are to be compared share it.

    Raises:
        DataError: if the data are not there, damaged, empty, or not what a classifier can take.
        LookupFailed: if the function does not exist.
    """
    options = Options(train, validation, augment, seed)
    return _kind(ref, _load_named, npz.load, user.load)(ref, options)


def digest(
    ref: str,
    *,
    train: int | None = None,
    validation: float = 0.1,
    augment: str = "none",
    seed: int = 0,
) -> str:
    """Return the identity of the data that `load` gives for the same arguments, as 64 hexadecimal characters.

    A named set stands for its checksums, an `.npz` for its bytes, a function for its source file: what that function
    reads in turn is not seen. Nothing is downloaded.

    Raises:
        DataError: if `ref` is of no known kind.
        LookupFailed: if the function does not exist.
    """
    content = _kind(ref, _named_identity, lambda ref: files.sha256(npz.path(ref)), references.digest)(ref)
    words = [user.label(ref), content, train, validation, augment, seed]
    return hashlib.sha256("\x1f".join(map(str, words)).encode()).hexdigest()


def load_images(name: str) -> tuple[Tensor, ...]:
    """Return the images of a set without classes, each (channels, height, width) uint8.

    Raises:
        DataError: if there is no such set, or it is one to classify.
    """
    entry = catalog.entry(name)
    if entry.kind != "images":
        classes = entry.kind == "classification"
        what = f"a set to classify: load it with load({name!r})" if classes else f"a set of {entry.kind}"
        raise DataError(f"{name!r} is {what}; images: {catalog.names('images')}")
    return tuple(tensor(entry.read(entry).train[0]).unbind(0))


def _kind(ref: str, named: T, archive: T, function: T) -> T:
    """Return the one of three that `ref` asks for."""
    if ref in catalog.entries():
        return named
    if ref.endswith(".npz"):
        return archive
    if references.is_reference(ref):
        return function
    catalog.entry(ref)  # names the nearest
    raise AssertionError(ref)


def _load_named(ref: str, options: Options) -> Source:
    entry = catalog.entry(ref)
    raw = catalog.read(entry)
    parts = {name: (tensor(x), tensor(y).long()) for name, (x, y) in (("train", raw.train), ("test", raw.test))}
    return arrays(raw.name, parts, classes=entry.classes, unit=raw.unit, options=options, key=entry.name)


def _named_identity(ref: str) -> str:
    entry = catalog.entry(ref)
    if entry.identity is not None:
        return entry.identity(entry)
    return " ".join(file.sha256 for file in entry.files) or entry.name
