"""The families of reference models, read off the files of this folder without importing them.

A family is a file with two literals at its top level: `NAMES`, the usual names that lists show, and `FORM`, a regular
expression of every name that the family builds.
"""

from __future__ import annotations

import ast
import difflib
import functools
import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Family:
    """One file of models: its module name, the names it shows and the form of all names it takes."""

    module: str
    names: tuple[str, ...]
    form: str


@functools.cache
def families(folder: Path = Path(__file__).parent) -> tuple[Family, ...]:
    """Return the families of `folder` in the order of their file names."""
    found = []
    for path in sorted(folder.glob("*.py")):
        literals = _literals(path)
        if {"NAMES", "FORM"} <= literals.keys():
            found.append(Family(path.stem, tuple(literals["NAMES"]), str(literals["FORM"])))
    return tuple(found)


def names() -> list[str]:
    """Return the usual names of the reference models, sorted with numbers by size.

    The families take more than these: any name of the same form, such as `mlp-64-32`.
    """
    return sorted((name for family in families() for name in family.names), key=_by_number)


def find(name: str) -> Family | None:
    """Return the family that builds `name`, or None."""
    return next((family for family in families() if re.fullmatch(family.form, name)), None)


def nearest(name: str) -> list[str]:
    """Return up to three usual names that are spelt like `name`, the nearest first."""
    return difflib.get_close_matches(name.lower(), names(), n=3, cutoff=0.5)


def _by_number(name: str) -> list[tuple[int, str]]:
    return [(int(part or 0), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)]


def _literals(path: Path) -> dict[str, tuple[str, ...] | str]:
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    return {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id in {"NAMES", "FORM"}
    }
