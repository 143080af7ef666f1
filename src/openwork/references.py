"""Functions of the user's own, named as `module:function` or `path/to/file.py:function`."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from openwork.errors import LookupFailed, OpenworkError


def is_reference(text: str) -> bool:
    """Tell whether `text` has the form `module:function` or `path/to/file.py:function`."""
    place, colon, name = text.rpartition(":")
    return bool(colon and place) and name.isidentifier()


def resolve(text: str) -> Callable[..., Any]:
    """Return the function that `text` names.

    A file is executed under a name of its own, with its folder on the import path so that it can import its
    neighbours; a module is looked for on the import path and in the current folder.

    Raises:
        LookupFailed: if the file, module or function does not exist, is not callable, or fails while it is imported.
    """
    place, _, name = text.rpartition(":")
    if not is_reference(text):
        raise LookupFailed(f"{text!r} is no reference: write 'module:function' or 'path/to/file.py:function'")
    module = _from_file(Path(place)) if place.endswith(".py") else _from_module(place)
    found = getattr(module, name, None)
    if found is None:
        own = {n: v for n, v in vars(module).items() if callable(v) and getattr(v, "__module__", "") == module.__name__}
        public = ", ".join(sorted(n for n in own if not n.startswith("_")))
        raise LookupFailed(f"{place!r} has no function {name!r}; it has: {public or 'no functions'}")
    if not callable(found):
        raise LookupFailed(f"{text!r} is a {type(found).__name__}, not a function")
    return found  # type: ignore[no-any-return]


def digest(text: str) -> str:
    """Return the sha256 of the source file that `text` leads to, so that an edited file is a different file."""
    resolve(text)
    place = text.rpartition(":")[0]
    if place.endswith(".py"):
        return hashlib.sha256(Path(place).read_bytes()).hexdigest()
    path = getattr(sys.modules[place], "__file__", None)
    return hashlib.sha256(Path(path).read_bytes() if path else place.encode()).hexdigest()


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise LookupFailed(f"there is no file {str(path)!r} (looked from {Path.cwd()})")
    name = f"openwork_user_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise LookupFailed(f"{str(path)!r} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)
    try:
        spec.loader.exec_module(module)
    except OpenworkError:
        del sys.modules[name]
        raise
    except Exception as error:
        del sys.modules[name]
        raise LookupFailed(f"{str(path)!r} fails while it is imported: {type(error).__name__}: {error}") from error
    return module


def _from_module(name: str) -> ModuleType:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(error.name + ".")):
            raise LookupFailed(f"there is no module {name!r} on the import path or in {here}") from error
        raise LookupFailed(f"module {name!r} needs {error.name!r}, which is not installed") from error
    except Exception as error:
        raise LookupFailed(f"module {name!r} fails while it is imported: {type(error).__name__}: {error}") from error
