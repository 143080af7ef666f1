"""Every module in the methods folder keeps the house's contract, whoever adds one."""

from __future__ import annotations

import inspect
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

import openwork
from openwork import registry
from openwork.errors import MethodError
from openwork.sparsifier.sparsifier import Sparsifier
from openwork.testing import sparsifier_checks

METHODS = registry.names()
FOLDER = Path(openwork.__file__).parent / "methods"
TESTS = Path(__file__).parent
MODULES = sorted(path for path in FOLDER.rglob("*.py") if not path.name.startswith("_") and path.parent != FOLDER)
PARTS = ("Claim:", "Equations:", "Departures:", "Cost:")

# Checks of the conformance suite that a method breaks on purpose, with the reason.
EXCEPTIONS = {("dpf", "gradient clipping"): "its gradients stay dense: they bring pruned weights back"}


def sparsifiers():
    return [name for name in METHODS if inspect.isclass(registry.load(name)) and issubclass(registry.load(name), Sparsifier)]


def build(name, density, total_steps):
    made = registry.load(name)
    takes = inspect.signature(made).parameters
    return made(density, total_steps=total_steps) if "total_steps" in takes else made(density)


CASES = [
    pytest.param(check, id=f"{method}-{name}")
    for method in sparsifiers()
    for name, check in sparsifier_checks(partial(build, method), total_steps=12)
    if (method, name) not in EXCEPTIONS
]


@pytest.mark.parametrize("check", CASES)
def test_conformance(check):
    check()


def test_exceptions_are_needed():
    for method, name in EXCEPTIONS:
        with pytest.raises(AssertionError):
            dict(sparsifier_checks(partial(build, method), total_steps=12))[name]()


def test_every_module_is_a_method():
    assert len(MODULES) == len(METHODS) >= 10
    found = {inspect.getsourcefile(registry.module(name)) for name in METHODS}
    assert found == {str(path) for path in MODULES}


@pytest.mark.parametrize("name", METHODS)
def test_the_card(name):
    card, module = registry.card(name), registry.module(name)
    assert card.name == name == module.__name__.rpartition(".")[2].replace("_", "-")
    assert card.wing == module.__name__.split(".")[2]
    assert card == module.CARD
    assert registry.load(name) is getattr(module, card.entry)
    assert card.authors
    assert 1943 <= card.year <= 2100
    assert card.link.startswith("https://")
    for text in (card.title, card.venue, card.claim, *card.departures):
        assert text == " ".join(text.split())
        assert text
    assert card.claim.endswith(".")


@pytest.mark.parametrize("name", METHODS)
def test_the_docstring_has_its_parts_in_order(name):
    text = inspect.getdoc(registry.module(name))
    places = [text.find(f"\n{part}") for part in PARTS]
    assert -1 not in places, dict(zip(PARTS, places, strict=True))
    assert places == sorted(places)
    assert str(registry.card(name).year) in text[: places[0]]  # the citation comes first
    assert inspect.getdoc(registry.load(name))


@pytest.mark.parametrize("name", METHODS)
def test_there_is_a_test_file(name):
    card = registry.card(name)
    path = TESTS / card.wing / f"test_{name.replace('-', '_')}.py"
    assert path.is_file()
    assert card.entry in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", METHODS)
def test_the_entry_is_a_name_of_openwork(name):
    entry = registry.card(name).entry
    assert getattr(openwork, entry) is registry.load(name)
    assert entry in dir(openwork)


def test_names_and_aliases_are_unique():
    words = [word for name in METHODS for word in (name, *registry.card(name).aliases)]
    assert len(set(words)) == len(words)
    entries = [registry.card(name).entry for name in METHODS]
    assert len(set(entries)) == len(entries)
    for name in METHODS:
        for alias in registry.card(name).aliases:
            assert registry.load(alias) is registry.load(name)


def test_listing_imports_neither_torch_nor_numpy():
    code = (
        "import sys, openwork; from openwork import registry; cards = [registry.card(n) for n in registry.names()];"
        "assert cards and dir(openwork); print(sorted({'torch', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_unknown_name_gets_a_guess():
    with pytest.raises(MethodError, match="there is no method 'rigll'; did you mean rigl"):
        registry.card("rigll")
    with pytest.raises(AttributeError, match="no attribute 'RigLL'"):
        openwork.RigLL  # noqa: B018


@pytest.mark.parametrize("name", METHODS)
def test_methods_know_nothing_above_them(name):
    source = Path(inspect.getsourcefile(registry.module(name))).read_text(encoding="utf-8")
    for room in ("data", "models", "train", "lab", "studies", "report", "cli", "testing"):
        assert f"openwork.{room}" not in source, room
