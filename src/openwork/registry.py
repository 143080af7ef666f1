"""The registry is the folder: every module under `openwork/methods/<wing>` that holds a `CARD` is a method.

Cards are read from source, so listing methods imports neither them nor torch. Packages of other people register theirs
under the entry-point group `openwork.methods`, one entry a method, pointing at its module.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
from collections.abc import Iterator
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from openwork.cards import Card
from openwork.errors import MethodError

GROUP = "openwork.methods"
_FOLDER = Path(__file__).parent


def names() -> list[str]:
    """Return the names of all methods, by wing, then name."""
    return sorted(_found(), key=lambda name: (_found()[name][0].wing, name))


def card(name: str) -> Card:
    """Return the card of the method called `name` or one of its aliases.

    Raises:
        MethodError: if there is none, naming the nearest.
    """
    return _lookup(name)[0]


def module(name: str) -> ModuleType:
    """Import and return the module of a method."""
    return importlib.import_module(_lookup(name)[1])


def load(name: str) -> Any:
    """Import a method and return the class or function that its card's `entry` names."""
    return getattr(module(name), card(name).entry)


def entries() -> dict[str, str]:
    """Return class or function name -> name of its method, for all methods."""
    return {found.entry: name for name, (found, _) in _found().items()}


def home_of(entry: str) -> str | None:
    """Return the module of the method whose public class or function is called `entry`, or None."""
    name = entries().get(entry)
    return None if name is None else _found()[name][1]


def study_names() -> list[str]:
    """Return the names of all studies: the modules under `openwork/studies/<wing>`."""
    return sorted(name for name, _ in _modules("studies"))


def study_module(name: str) -> ModuleType:
    """Import and return the module of a study.

    Raises:
        MethodError: if there is none, naming the nearest.
    """
    found = dict(_modules("studies"))
    if name not in found:
        raise MethodError(_unknown("study", name, list(found)))
    return importlib.import_module(found[name])


@cache
def _found() -> dict[str, tuple[Card, str]]:
    found: dict[str, tuple[Card, str]] = {}
    for _, path in _modules("methods"):
        one = _read_card(_FOLDER.joinpath(*path.split(".")[1:]).with_suffix(".py"))
        if one is not None:
            found[one.name] = one, path
    for point in entry_points(group=GROUP):
        spec = importlib.util.find_spec(point.module)
        one = _read_card(Path(spec.origin)) if spec and spec.origin else None
        if one is not None:
            found.setdefault(one.name, (one, point.module))
    return found


def _modules(room: str) -> Iterator[tuple[str, str]]:
    """Yield (name with hyphens, module path) of every public module in the shelves of a room."""
    for path in sorted((_FOLDER / room).rglob("*.py")):
        parts = path.relative_to(_FOLDER).with_suffix("").parts
        if len(parts) > 2 and not any(part.startswith("_") for part in parts):
            yield parts[-1].replace("_", "-"), ".".join(("openwork", *parts))


def _read_card(path: Path) -> Card | None:
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["CARD"]:
            call = node.value
            if not isinstance(call, ast.Call):
                break
            try:
                return Card(**{str(word.arg): ast.literal_eval(word.value) for word in call.keywords})
            except (ValueError, TypeError) as error:
                raise MethodError(f"the card in {path} must hold literals for every field of Card: {error}") from error
    return None


def _lookup(name: str) -> tuple[Card, str]:
    found = _found()
    if name in found:
        return found[name]
    for one, path in found.values():
        if name in one.aliases:
            return one, path
    known = [*found, *(alias for one, _ in found.values() for alias in one.aliases)]
    raise MethodError(_unknown("method", name, known))


def _unknown(kind: str, name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=2)
    guess = f"did you mean {' or '.join(near)}? " if near else ""
    return f"there is no {kind} {name!r}; {guess}known are {', '.join(sorted(known))}"
