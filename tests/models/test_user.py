from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from openwork import models
from openwork.errors import DataError, LookupFailed, ModelError

SOURCE = """
import torch
from torch import nn
from openwork.errors import DataError

torch.manual_seed(0)  # must not leak

class Echo(nn.Module):
    def __init__(self, **given):
        super().__init__()
        self.given = given
        self.layer = nn.Linear(3, 2)

class Net(nn.Module):
    def __init__(self, classes, hidden=4):
        super().__init__()
        self.layer = nn.Linear(hidden, classes)

def everything(**given): return Echo(**given)
def nothing(): return Echo()
def some(classes, width=8): return Echo(classes=classes, width=width)
def shape_only(input_shape, *, seed): return Echo(input_shape=input_shape, seed=seed)
def needs(classes, depth): return Echo(depth=depth)
def positional(classes, /): return Echo()
def positional_and_more(classes, /, **more): return Echo()
def number(): return 3
def fails(classes): raise ValueError("the moon\\nis full")
def silent(): raise KeyError()
def house_error(): raise DataError("no data at all")
"""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("user") / "nets.py"
    file.write_text(SOURCE)
    return file


def build(path: Path, name: str, **options: Any) -> Any:
    return models.build(f"{path}:{name}", input_shape=(1, 8, 8), classes=5, seed=9, options=options)


@pytest.mark.parametrize(
    ("name", "options", "given"),
    [
        ("nothing", {}, {}),
        ("everything", {}, {"input_shape": (1, 8, 8), "classes": 5, "seed": 9}),
        ("everything", {"depth": 3}, {"input_shape": (1, 8, 8), "classes": 5, "seed": 9, "depth": 3}),
        ("some", {}, {"classes": 5, "width": 8}),
        ("some", {"width": 2}, {"classes": 5, "width": 2}),
        ("shape_only", {}, {"input_shape": (1, 8, 8), "seed": 9}),
        ("needs", {"depth": 7}, {"depth": 7}),
    ],
)
def test_a_function_gets_what_its_signature_takes(path: Path, name: str, options: Any, given: Any) -> None:
    assert build(path, name, **options).given == given


def test_a_class_counts_as_a_function(path: Path) -> None:
    assert build(path, "Net").layer.weight.shape == (5, 4)
    assert build(path, "Net", hidden=6).layer.weight.shape == (5, 6)


def test_a_module_on_the_import_path() -> None:
    model = models.build("torch.nn:Identity", input_shape=(3,), classes=2, seed=0)
    assert isinstance(model, nn.Identity)


def test_first_values_follow_the_seed_and_nothing_leaks(path: Path) -> None:
    before = torch.get_rng_state()
    first = build(path, "nothing").layer.weight
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(build(path, "nothing").layer.weight, first)
    other = models.build(f"{path}:nothing", input_shape=(3,), classes=2, seed=10)
    assert not torch.equal(other.layer.weight, first)


def test_users_models_carry_no_recipe(path: Path) -> None:
    assert not hasattr(build(path, "nothing"), "openwork_recipe")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("number", {}, "returns a int: it must return a torch.nn.Module"),
        ("fails", {}, "fails with ValueError: the moon is full$"),
        ("silent", {}, "fails with KeyError: no message$"),
        ("some", {"widht": 2}, "takes no option 'widht'; its options: width$"),
        ("nothing", {"width": 2}, "takes no option 'width'; its options: none$"),
        ("needs", {}, "needs an argument 'depth' that nobody gives"),
        ("positional", {}, "needs an argument 'classes' that nobody gives"),
        ("positional_and_more", {}, "needs an argument 'classes' that nobody gives"),
        ("some", {"classes": 2}, "option 'classes' .* comes from the data"),
    ],
)
def test_what_goes_wrong_is_said_in_one_line(path: Path, name: str, options: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        build(path, name, **options)
    assert "\n" not in str(caught.value)
    assert f"{path}:{name}" in str(caught.value)


def test_errors_of_the_house_pass_through(path: Path) -> None:
    with pytest.raises(DataError, match=r"^no data at all$"):
        build(path, "house_error")


def test_references_that_lead_nowhere(path: Path) -> None:
    with pytest.raises(LookupFailed, match="no function 'gone'"):
        build(path, "gone")


def test_a_callable_without_a_signature() -> None:
    with pytest.raises(ModelError, match="does not tell its arguments"):
        models.build("builtins:type", input_shape=(3,), classes=2, seed=0)
