from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import nn

from openwork import models
from openwork.errors import ModelError
from tests.models.helpers import SMALL, example


def small(ref: str, seed: int = 0) -> nn.Module:
    shape, options = SMALL[ref]
    return models.build(ref, input_shape=shape, classes=5, seed=seed, options=options)


def equal(a: nn.Module, b: nn.Module) -> bool:
    one, two = a.state_dict(), b.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("ref", SMALL)
def test_seed_decides_every_number_and_the_global_generator_is_untouched(ref: str) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = small(ref)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert equal(first, small(ref))
    other = small(ref, seed=1).state_dict()
    moved = {name for name, value in first.named_parameters() if value.ndim > 1 and torch.equal(value, other[name])}
    assert not moved


@pytest.mark.parametrize("ref", SMALL)
def test_recipe_rebuilds_the_model(ref: str) -> None:
    model = small(ref)
    shape, options = SMALL[ref]
    assert model.openwork_recipe == {"ref": ref, "input_shape": list(shape), "classes": 5, "options": options}
    recipe: dict[str, Any] = json.loads(json.dumps(model.openwork_recipe))
    again = models.build(recipe.pop("ref"), seed=0, **recipe)
    assert equal(model, again)
    assert not any("recipe" in key for key in model.state_dict())


def test_recipe_does_not_follow_the_callers_options() -> None:
    options = {"width": 4}
    model = models.build("resnet8", input_shape=(1, 8, 8), classes=2, seed=0, options=options)
    options["width"] = 99
    assert model.openwork_recipe == {"ref": "resnet8", "input_shape": [1, 8, 8], "classes": 2, "options": {"width": 4}}


@pytest.mark.parametrize("ref", SMALL)
def test_training_reaches_every_parameter(ref: str) -> None:
    model, (shape, _) = small(ref), SMALL[ref]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        output = model(example(shape, 6))
    assert output.shape == ((6, *shape, 5) if len(shape) == 1 else (6, 5))
    output.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.ndim == 1 or parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("ref", SMALL)
def test_examples_do_not_see_one_another_in_evaluation(ref: str) -> None:
    model, (shape, _) = small(ref), SMALL[ref]
    x = example(shape, 5)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        model(x)  # gives the batch norms statistics that are not 0 and 1
        model.eval()
        torch.testing.assert_close(model(x)[2:4], model(x[2:4]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ref", SMALL)
def test_deepcopy_is_equal_and_independent(ref: str) -> None:
    model, (shape, _) = small(ref).eval(), SMALL[ref]
    twin = copy.deepcopy(model)
    x = example(shape, 2)
    with torch.no_grad():
        kept = model(x)
        assert torch.equal(twin(x), kept)
        for parameter in twin.parameters():
            parameter.zero_()
        assert torch.equal(model(x), kept)
        assert not twin(x).any()
    assert twin.openwork_recipe == model.openwork_recipe
    assert twin.openwork_recipe is not model.openwork_recipe


def test_models_are_built_on_the_cpu_whatever_the_default_device() -> None:
    with torch.device("meta"):
        model = small("cnn")
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    assert equal(model, small("cnn"))


def test_first_values_keep_the_scale_of_the_signal() -> None:
    torch.manual_seed(0)
    model = models.build("mlp-400-400-400-400", input_shape=(400,), classes=400, seed=3)
    with torch.no_grad():
        output = model(torch.randn(500, 400))
    # He's condition: the second moment after each rectified layer is that of the input; the readout halves it.
    assert 0.8 < output.var().item() < 1.25


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        ("resent20", r"no model 'resent20'; did you mean resnet20.*The names: cnn,.*wrn-40-2\. Your own: 'module:function'"),
        ("xyzzy", r"no model 'xyzzy'; The names: cnn"),
        ("nets/mine.py", r"'nets/mine.py' is a file: name the function in it too, 'nets/mine.py:function'"),
        ("resnet21", r"no resnet21: its depth must be 6n\+2"),
        ("resnet2", r"no resnet2: "),
        ("wrn-27-1", r"no wrn-27-1: the depth must be 6n\+4"),
        ("wrn-4-1", r"no wrn-4-1: "),
    ],
)
def test_unknown_names_are_refused(ref: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        models.build(ref, input_shape=(3, 32, 32), classes=10, seed=0)


@pytest.mark.parametrize(
    ("ref", "options", "message"),
    [
        ("resnet20", {"widht": 8}, r"resnet20 has no option 'widht'; its options: width$"),
        ("lenet5", {"width": 8}, r"its options: none$"),
        ("resnet20", {"width": 8.0}, r"option 'width' of resnet20 is 8.0: it must be of type int$"),
        ("resnet20", {"width": True}, r"must be of type int$"),
        ("resnet20", {"width": 0}, r"option 'width' of resnet20 is 0: it must be above 0"),
        ("cnn", {"multiplier": "2"}, r"must be of type float or int$"),
        ("cnn", {"multiplier": -1}, r"'multiplier' of cnn is -1: it must be above 0"),
        ("cnn", {"multiplier": float("nan")}, r"it must be above 0"),
        ("cnn", {"multiplier": float("inf")}, r"it must be above 0"),
        ("wrn-16-4", {"dropout": 1}, r"'dropout' of wrn-16-4 is 1: it must be at least 0 and below 1"),
        ("mlp-10", {"dropout": -0.1}, r"at least 0 and below 1"),
        ("vit-tiny", {"heads": 5}, r"width of 192 into 5 heads"),
        ("vit-tiny", {"depth": 0}, r"'depth' of vit-tiny is 0"),
        ("vit-tiny", {"patch": 33}, r"'patch' of vit-tiny is 33: the image has only 32x32 pixels"),
    ],
)
def test_bad_options_are_refused(ref: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        models.build(ref, input_shape=(3, 32, 32), classes=10, seed=0, options=options)


@pytest.mark.parametrize("shape", [(), (3, 0, 8), (3.0, 8, 8), (True,), "abc", 5])
def test_input_shapes_are_positive_integers(shape: Any) -> None:
    with pytest.raises(ModelError, match=r"input_shape is .* must be a list of whole numbers"):
        models.build("mlp-10", input_shape=shape, classes=10, seed=0)


@pytest.mark.parametrize("classes", [0, -1, 2.0, True])
def test_classes_is_a_positive_integer(classes: Any) -> None:
    with pytest.raises(ModelError, match=r"classes is .* whole number"):
        models.build("mlp-10", input_shape=(4,), classes=classes, seed=0)


CONVOLUTIONAL = [ref for ref in SMALL if not ref.startswith(("mlp", "lenet-", "gpt"))]


@pytest.mark.parametrize("ref", CONVOLUTIONAL)
def test_image_models_refuse_flat_features_and_tiny_images(ref: str) -> None:
    with pytest.raises(ModelError, match=rf"{ref} takes images .*not input_shape \(64,\).*mlp"):
        models.build(ref, input_shape=(64,), classes=10, seed=0)
    with pytest.raises(ModelError, match=f"{ref} takes images of at least 8x8 pixels, not 7x9"):
        models.build(ref, input_shape=(3, 7, 9), classes=10, seed=0)


def test_a_failed_build_puts_the_global_generator_back() -> None:
    before = torch.get_rng_state()
    with pytest.raises(ModelError):
        models.build("vit-tiny", input_shape=(3, 8, 8), classes=2, seed=0, options={"patch": 9})
    assert torch.equal(torch.get_rng_state(), before)
