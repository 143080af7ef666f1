"""Configurations, recipes and content keys."""

from __future__ import annotations

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openwork.errors import RecipeError
from openwork.lab.spec import Arm, Trial, read_recipe, write_recipe
from tests.lab.toys import ToyConfig


def trial(**changes) -> Trial:
    config = ToyConfig(**changes.pop("config", {}))
    values = {"arm": Arm("good", {"way": "good"}), "seed": 0, "identity": {"torch": "2.13", "threads": 1}, **changes}
    return Trial("toy", config.model_dump(mode="json"), config.content(), **values)


def test_the_key_depends_on_what_the_trial_depends_on():
    keys = {
        trial().key,
        trial(seed=1).key,
        trial(arm=Arm("good", {"way": "dense"})).key,
        trial(config={"scale": 2.0}).key,
        trial(identity={"torch": "2.13", "threads": 2}).key,
    }
    assert len(keys) == 5


def test_the_key_does_not_depend_on_the_plan_or_the_arms_name():
    assert trial(config={"seeds": 9}).key == trial().key
    assert trial(config={"ways": ("good",)}).key == trial().key
    assert trial(arm=Arm("renamed", {"way": "good"})).key == trial().key


def test_the_question_is_the_same_under_other_versions():
    other = trial(identity={"torch": "2.14", "threads": 1})
    assert other.question == trial().question
    assert other.key != trial().key


def test_a_trial_survives_json():
    one = trial()
    assert Trial.from_json(json.loads(json.dumps(one.to_json()))).key == one.key


def test_an_unknown_key_is_named_with_the_known_ones():
    with pytest.raises(RecipeError, match="unknown key 'colour'; known are seeds, ways, scale"):
        ToyConfig.read({"colour": 1})


def test_a_wrong_value_is_named():
    with pytest.raises(RecipeError, match="seeds='many'"):
        ToyConfig.read({"seeds": "many"})


def test_a_recipe_reads_back_what_it_wrote():
    config = ToyConfig(seeds=7, scale=0.25, ways=("dense", "good"))
    assert ToyConfig.read(read_recipe(write_recipe(config))) == config
    assert "# a setting that trials depend on" in write_recipe(config)


@pytest.mark.parametrize("text", ["- a\n- b", "a: [", "{1: 2}", "&a [*a]", "!!python/object:os.system {}", "a: !!binary x"])
def test_what_is_no_recipe_is_refused_in_one_sentence(text):
    with pytest.raises(RecipeError) as caught:
        ToyConfig.read(read_recipe(text))
    assert "\n" not in str(caught.value)


@given(st.text(max_size=200))
def test_any_text_is_a_mapping_or_a_recipe_error(text):
    with contextlib.suppress(RecipeError):
        assert isinstance(read_recipe(text), dict)


def test_an_enormous_recipe_is_refused():
    with pytest.raises(RecipeError, match="at most"):
        read_recipe("a: " + "x" * 1_000_001)
