from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from openwork.core.masks import Masks
from openwork.errors import MaskError
from tests.strategies import bools, layers, quick


@st.composite
def some_masks(draw):
    return Masks({name: draw(bools(shape)) for name, shape in draw(layers()).items()})


@given(some_masks())
@quick
def test_packing_and_loading_gives_the_same_masks(masks):
    state = masks.state_dict()
    again = Masks.load(state)
    assert list(again) == list(masks)
    assert all(torch.equal(again[name], mask) for name, mask in masks.items())
    bits = sum(tensor.numel() for name, tensor in state.items() if not name.endswith(".shape"))
    assert bits == sum(math.ceil(mask.numel() / 8) for mask in masks.values())
    assert all(tensor.is_contiguous() and tensor.device.type == "cpu" for tensor in state.values())


@given(some_masks())
@quick
def test_counts(masks):
    kept = [entry for mask in masks.values() for entry in mask.reshape(-1).tolist()]
    assert (masks.nnz(), masks.total()) == (sum(kept), len(kept))
    assert masks.density() == sum(kept) / len(kept)
    assert masks.densities() == {name: mask.double().mean().item() for name, mask in masks.items()}


def test_a_parameter_may_be_called_shape():
    masks = Masks({"a.shape": torch.tensor([True, False]), "a.weight": torch.tensor([[True]])})
    again = Masks.load(masks.state_dict())
    assert again["a.shape"].tolist() == [True, False]
    assert again["a.weight"].tolist() == [[True]]


def packed():
    return Masks({"w": torch.ones(3, 4, dtype=torch.bool)}).state_dict()


HOSTILE = {
    "bits missing": lambda s: s.pop("w"),
    "shape missing": lambda s: s.pop("w.shape"),
    "bits cut": lambda s: s.update({"w": s["w"][:1]}),
    "too many bits": lambda s: s.update({"w": torch.zeros(9, dtype=torch.uint8)}),
    "bits of two dimensions": lambda s: s.update({"w": s["w"].reshape(1, 2)}),
    "bits of another dtype": lambda s: s.update({"w": s["w"].float()}),
    "negative side": lambda s: s.update({"w.shape": torch.tensor([-3, -4])}),
    "negative and empty": lambda s: s.update({"w.shape": torch.tensor([-1]), "w": torch.zeros(0, dtype=torch.uint8)}),
    "enormous": lambda s: s.update({"w.shape": torch.tensor([2**40, 2**20])}),
    "product overflows to zero": lambda s: s.update(
        {"w.shape": torch.tensor([2**32, 2**32]), "w": torch.zeros(0, dtype=torch.uint8)}
    ),
    "shape of two dimensions": lambda s: s.update({"w.shape": torch.tensor([[3, 4]])}),
    "shape of floats": lambda s: s.update({"w.shape": torch.tensor([3.0, math.nan])}),
    "something else": lambda s: s.update({"v": torch.zeros(2, dtype=torch.uint8)}),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_state_is_refused(case):
    state = packed()
    HOSTILE[case](state)
    with pytest.raises(MaskError):
        Masks.load(state)


@pytest.mark.parametrize("bad", [torch.ones(2), [True, False], torch.ones(2, dtype=torch.uint8)])
def test_only_bool_tensors_are_masks(bad):
    with pytest.raises(MaskError, match="'w' must be a bool tensor"):
        Masks({"w": bad})


def test_check_names_what_does_not_fit():
    model = nn.Linear(3, 2)
    with pytest.raises(MaskError, match="no parameter 'v'"):
        Masks({"v": torch.ones(2, 3, dtype=torch.bool)}).check(model)
    with pytest.raises(MaskError, match=r"'weight' has shape \(2, 3\), its mask \(3, 2\)"):
        Masks({"weight": torch.ones(3, 2, dtype=torch.bool)}).check(model)
    nn.init.ones_(model.weight)
    with pytest.raises(MaskError, match="6 masked weights of 'weight' are not zero"):
        Masks({"weight": torch.zeros(2, 3, dtype=torch.bool)}).check(model)
    with torch.no_grad():
        model.weight[0, 0] = math.nan  # NaN is not zero either
    mask = torch.ones(2, 3, dtype=torch.bool)
    mask[0, 0] = False
    with pytest.raises(MaskError, match="1 masked weights"):
        Masks({"weight": mask}).check(model)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_apply_selects_and_does_not_multiply(value):
    model = nn.Linear(2, 1)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[value, 2.0]]))
    masks = Masks({"weight": torch.tensor([[False, True]])})
    masks.apply(model)
    assert model.weight.tolist() == [[0.0, 2.0]]
    masks.check(model)


def test_ones_and_of():
    params = {"w": torch.tensor([[0.0, -1.0], [2.0, -0.0]])}
    assert Masks.ones(params).density() == 1.0
    assert Masks.of(params)["w"].tolist() == [[False, True], [True, False]]
    assert Masks({}).density() == 1.0


def test_a_mapping_that_cannot_be_changed_from_outside():
    given_masks = {"w": torch.tensor([True])}
    masks = Masks(given_masks)
    given_masks["v"] = torch.tensor([False])
    assert dict(masks) == {"w": masks["w"]}
    assert repr(masks) == "Masks(1 parameters, 1 of 1 kept, density 1.0000)"
    with pytest.raises(TypeError):
        masks["w"] = torch.tensor([False])
