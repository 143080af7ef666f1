"""The recipe of a comparison: flags and keys say the same."""

from __future__ import annotations

import pytest

from openwork.errors import MethodError, RecipeError
from openwork.lab.recipe import Recipe, merged, read_method, read_options
from openwork.lab.spec import read_recipe, write_recipe


def test_flags_are_read_as_keys_are():
    flags = Recipe.read({"density": "0.1,0.05", "methods": "dense, granet(initial=1.0, grow=random),rigl", "seeds": "5"})
    keys = Recipe.read(
        {"density": [0.1, 0.05], "methods": ["dense", "granet(initial=1.0, grow=random)", "rigl"], "seeds": 5}
    )
    assert flags == keys


def test_a_written_recipe_is_the_same_recipe():
    recipe = Recipe.read({"methods": "dense,soups(members=2)", "options": "width=8", "exclude": "fc.weight"})
    assert Recipe.read(read_recipe(write_recipe(recipe))) == recipe


def test_flags_win_over_the_recipe():
    assert merged({"seeds": 3, "lr": 0.1}, {"seeds": "5", "lr": None}) == {"seeds": "5", "lr": 0.1}


@pytest.mark.parametrize(
    ("text", "name", "options"),
    [
        ("rigl", "rigl", {}),
        ("GraNet(initial=1.0)", "granet", {"initial": 1.0}),
        ("granet(initial=1, grow=random)", "granet", {"initial": 1, "grow": "random"}),
        ("soups( members = 2 , soup='greedy')", "soups", {"members": 2, "soup": "greedy"}),
    ],
)
def test_methods_with_options(text, name, options):
    assert read_method(text) == (name, options)


@pytest.mark.parametrize("text", ["", "ri gl", "rigl(", "rigl)x", "rigl(1)", "rigl(**a)", "rigl(a=b())", "rigl(a=1"])
def test_what_is_no_method_is_refused(text):
    with pytest.raises(RecipeError):
        read_method(text)


def test_options_are_literals_and_never_run():
    with pytest.raises(RecipeError, match="option=value"):
        read_options("a=__import__('os').system('true')")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"density": "0"}, "above 0 and at most 1"),
        ({"density": "1.5"}, "above 0 and at most 1"),
        ({"density": "a"}, "density"),
        ({"seeds": 0}, "seeds"),
        ({"steps": -1}, "steps"),
        ({"methods": ""}, "at least one method"),
    ],
)
def test_senseless_values_are_named(values, message):
    with pytest.raises(RecipeError, match=message):
        Recipe.read(values)


def test_an_unknown_method_names_the_nearest():
    with pytest.raises(MethodError, match="did you mean granet"):
        Recipe.read({"methods": "dense,granett"})


def test_the_run_folder_follows_from_data_and_model():
    assert Recipe.read({}).run_folder() == "runs/compare-digits-cnn"
    assert Recipe.read({"model": "/a/b.py:make"}).run_folder() == "runs/compare-digits-b.py-make"
    assert Recipe.read({"out": "x"}).run_folder() == "x"
