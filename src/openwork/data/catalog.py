"""The named data sets: every file of the folder `sets` that defines `ENTRIES` adds its own. Imports no torch."""

from __future__ import annotations

import difflib
import functools
import pkgutil
from importlib import import_module

from openwork.data import sets
from openwork.data.entry import Entry, Raw
from openwork.errors import DataError


@functools.cache
def entries() -> dict[str, Entry]:
    """Return all named sets by name, in alphabetical order."""
    modules = [import_module(f"{sets.__name__}.{found.name}") for found in pkgutil.iter_modules(sets.__path__)]
    every = [entry for module in modules for entry in getattr(module, "ENTRIES", ())]
    return {entry.name: entry for entry in sorted(every, key=lambda entry: entry.name)}


def names(kind: str = "classification") -> list[str]:
    """Return the names of the sets of one kind, sorted: "classification" for `load`, "images", "text" or "model"."""
    return [name for name, entry in entries().items() if entry.kind == kind]


def entry(name: str) -> Entry:
    """Return the set called `name`.

    Raises:
        DataError: if there is none; names the nearest ones.
    """
    found = entries().get(name)
    if found is None:
        near = difflib.get_close_matches(name.lower(), entries(), n=3, cutoff=0.5) or list(entries())
        raise DataError(
            f"there is no data set {name!r}; known: {', '.join(near)}, and your own as 'module:function', "
            "'path/to/file.py:function' or 'file.npz'"
        )
    return found


def read(entry: Entry) -> Raw:
    """Return the content of a classification set, checked against what is known of it.

    Raises:
        DataError: if it is no classification set, cannot be had, or is not what its entry says.
    """
    if entry.kind != "classification":
        how = {
            "images": f"images without classes: read them with load_images({entry.name!r})",
            "text": "text: read it with openwork.data.texts",
            "model": "a model: read it with openwork.models.pretrained",
        }
        raise DataError(f"{entry.name!r} holds {how[entry.kind]}, or load one of {', '.join(names())}")
    raw = entry.read(entry)
    for part, (x, y), size in zip(("training", "test"), (raw.train, raw.test), entry.sizes, strict=True):
        expected = (size, *entry.shape)
        if x.shape != expected or y.shape != (size,):
            raise DataError(
                f"the {part} part of {raw.name!r} has images {x.shape} and labels {y.shape}; expected {expected} and "
                f"({size},)"
            )
        if y.max(initial=0) >= entry.classes:
            raise DataError(f"the {part} part of {raw.name!r} has label {y.max()}; expected 0..{entry.classes - 1}")
    return raw
