from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from openwork import models
from openwork.core.cost import count
from openwork.core.rng import generator
from openwork.errors import MaskError, ModelError
from openwork.sparsifier import Fixed
from openwork.sparsifier.groups import channel_groups
from openwork.sparsifier.physical import compact, node_masks


def halves(model: nn.Module, seed: int = 0, share: float = 0.5) -> dict[str, Tensor]:
    """A random share of every group's channels."""
    draw = generator(seed, "halves")
    groups = channel_groups(model)
    return {g.name: torch.randperm(g.size, generator=draw)[: max(1, int(share * g.size))] for g in groups}


def stirred(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in double precision with nothing at its default: biases, norms and running statistics."""
    draw = generator(seed, "stirred")
    model = model.double()
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            shift = 0.0 if name.endswith("running_var") else 0.5
            tensor += 0.2 * (torch.rand(tensor.shape, generator=draw, dtype=torch.float64) - shift)
    return model


def masked(model: nn.Module, kept: dict[str, Tensor]) -> nn.Module:
    twin = copy.deepcopy(model)
    node_masks(model, kept).apply(twin)
    return twin


def inputs(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=generator(seed, "inputs"), dtype=torch.float64)


def train(model: nn.Module, masks: Any, x: Tensor, steps: int = 5) -> nn.Module:
    """A few steps with momentum and weight decay; gradients are checked to be zero where masked."""
    y = torch.arange(len(x)) % 3
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    holder = None if masks is None else Fixed(masks).attach(model, optimizer)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    if holder is not None:
        for name, param in model.named_parameters():
            if name in masks:
                assert param.grad is not None
                assert torch.count_nonzero(param.grad[~masks[name]]) == 0, name
        holder.finalize()
        masks.check(model)
    return model


class Inverted(nn.Module):
    """A residual block with a depthwise convolution, and a squeeze-and-excitation gate over its channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.expand = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 8, 1, bias=False)
        self.bn1, self.bn2, self.bn3 = nn.BatchNorm2d(8), nn.BatchNorm2d(8), nn.InstanceNorm2d(4, affine=True)
        self.depthwise, self.project = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 4, 1)
        self.squeeze, self.excite = nn.Conv2d(8, 3, 1), nn.Conv2d(3, 8, 1)
        self.act, self.fc = nn.PReLU(8), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.act(self.bn2(self.depthwise(F.relu6(self.bn1(self.expand(x))))))
        y = y * torch.sigmoid(self.excite(F.relu(self.squeeze(y.mean((2, 3), keepdim=True)))))
        return self.fc((x + self.bn3(self.project(y))).mean(dim=(2, 3)))


def built(name: str, shape: tuple[int, ...]) -> nn.Module:
    return Inverted() if name == "inverted" else models.build(name, input_shape=shape, classes=3, seed=0)


ZOO = [
    ("mlp-12-9", (1, 8, 8)), ("lenet5", (1, 8, 8)), ("cnn", (1, 8, 8)), ("resnet8", (3, 8, 8)), ("wrn-10-1", (3, 8, 8)),
    ("inverted", (3, 8, 8)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "shape"), ZOO)
def test_compact_equals_masked_before_and_after_training(name: str, shape: tuple[int, ...]) -> None:
    model = stirred(built(name, shape))
    kept = halves(model)
    big, small = masked(model, kept), compact(model, kept)
    x = inputs(6, *shape)
    for mode in (False, True):  # with the running statistics, and with those of the batch
        difference = copy.deepcopy(big).train(mode)(x) - copy.deepcopy(small).train(mode)(x)
        assert difference.abs().max() < 1e-10
    masks = node_masks(model, kept)
    big, small = train(big, masks, x), train(small, None, x)
    assert (big.eval()(x) - small.eval()(x)).abs().max() < 1e-6
    again = compact(big, kept).eval()
    assert (big(x) - again(x)).abs().max() < 1e-10


@pytest.mark.parametrize(("name", "shape"), ZOO)
def test_the_small_network_has_what_the_masks_keep(name: str, shape: tuple[int, ...]) -> None:
    model = built(name, shape)
    kept = halves(model)
    masks, small = node_masks(model, kept), compact(model, kept)
    params = dict(small.named_parameters())
    for key, param in model.named_parameters():
        assert params[key].numel() == (int(masks[key].sum()) if key in masks else param.numel()), key
    example = torch.zeros(1, *shape)
    assert count(model, example).flops(masks) == count(small, example).flops()
    assert not hasattr(small, "openwork_recipe")


def test_removing_a_node_is_removing_its_row_its_column_and_its_bias() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Sigmoid(), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    masks = node_masks(model, {"0": [0, 1, 3], "2": torch.tensor([True, False, True, True, True])})
    rows, columns = torch.ones(4, dtype=torch.bool), torch.ones(5, dtype=torch.bool)
    rows[2] = columns[1] = False
    wanted = {
        "0.weight": rows[:, None].expand(4, 3), "0.bias": rows, "2.weight": columns[:, None] & rows, "2.bias": columns,
        "4.weight": columns.expand(2, 5),
    }  # fmt: skip
    assert set(masks) == set(wanted)
    assert all(torch.equal(masks[name], mask) for name, mask in wanted.items())
    small = compact(model, {"0": [3, 0, 1], "2": [0, 2, 3, 4]})  # any order: channels keep theirs
    assert torch.equal(small[2].weight, model[2].weight[[0, 2, 3, 4]][:, [0, 1, 3]])
    assert torch.equal(small[0].bias, model[0].bias[[0, 1, 3]])
    assert torch.equal(small[4].weight, model[4].weight[:, [0, 2, 3, 4]])
    assert (small[2].in_features, small[2].out_features, small[4].in_features) == (3, 4, 4)


def test_flattened_maps_take_all_their_pixels_along() -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 2), nn.Flatten(), nn.BatchNorm1d(12), nn.Linear(12, 2))
    masks = node_masks(model, {"0": [0, 2]})
    pixels = torch.tensor([1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 1]).bool()
    assert torch.equal(masks["3.weight"], pixels.expand(2, 12))
    assert torch.equal(masks["2.weight"], pixels)
    small = compact(model, {"0": [0, 2]}, example=torch.zeros(2, 1, 3, 3))
    assert (small[2].num_features, small[2].running_mean.shape, small[3].in_features) == (8, (8,), 8)


@given(
    widths=st.lists(st.integers(1, 7), min_size=3, max_size=5),
    act=st.sampled_from([nn.ReLU, nn.Sigmoid, nn.Softplus, nn.GELU]),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None)
def test_any_perceptron(widths: list[int], act: type[nn.Module], seed: int) -> None:
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), act()]
    model = stirred(nn.Sequential(*layers[:-1]), seed)
    kept = halves(model, seed, share=0.6)
    x = inputs(3, widths[0])
    assert torch.allclose(masked(model, kept)(x), compact(model, kept)(x), atol=1e-12)
    hidden = [max(1, int(0.6 * width)) for width in widths[1:-1]]
    sizes = [widths[0], *hidden, widths[-1]]
    assert [layer.out_features for layer in compact(model, kept) if isinstance(layer, nn.Linear)] == sizes[1:]


def test_ties_stay_ties() -> None:
    class Siamese(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.out = nn.Linear(3, 6), nn.Linear(3, 6), nn.Linear(6, 3)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.tanh(self.a(x)) + self.b(x))

    model = stirred(Siamese())
    kept = {"b": [1, 2, 5]}  # any layer of the group names it
    small = compact(model, kept, example=inputs(2, 3))
    assert small.a.weight is small.b.weight
    assert small.a.weight.shape == (3, 3)
    assert small.b.out_features == 3
    assert set(node_masks(model, kept)) == {"a.weight", "a.bias", "b.bias", "out.weight"}


def test_a_layer_that_reads_and_writes_one_group_is_cut_on_both_sides() -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.mix, self.last = nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            for _ in range(3):
                h = h + F.relu(self.mix(h))
            return self.last(h)

    model = stirred(Loop())
    kept = {"first": torch.tensor([0, 4])}
    small = compact(model, kept)
    assert small.mix.weight.shape == (2, 2)
    x = inputs(4, 3)
    assert torch.allclose(masked(model, kept)(x), small(x), atol=1e-12)


def test_the_model_is_not_changed_and_frozen_weights_stay_frozen() -> None:
    model = models.build("mlp-6", input_shape=(4,), classes=2, seed=0)
    model.head.weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    small = compact(model, {"layers.1": [0, 1]})
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert model.head.in_features == 6
    assert not small.head.weight.requires_grad
    assert small.layers[1].weight.requires_grad
    assert hasattr(model, "openwork_recipe")


@pytest.mark.parametrize(("kept", "words"), [
    ({"head": [0]}, "no channels of 'head'"),
    ({"layers.1": []}, "at least one"),
    ({"layers.1": [0, 6]}, "from 0 to 5"),
    ({"layers.1": [0, 0]}, "twice"),
    ({"layers.1": [-1]}, "from 0 to 5"),
    ({"layers.1": [True, False]}, "bool of shape"),
    ({"layers.1": [0.5]}, "whole numbers"),
])  # fmt: skip
def test_wrong_channels_are_refused(kept: dict[str, list[Any]], words: str) -> None:
    model = models.build("mlp-6", input_shape=(4,), classes=2, seed=0)
    for function in (compact, node_masks):
        with pytest.raises(MaskError, match=words):
            function(model, kept)


def test_one_group_by_two_names_is_refused() -> None:
    model = models.build("resnet8", input_shape=(3, 8, 8), classes=2, seed=0)
    with pytest.raises(MaskError, match="given twice"):
        node_masks(model, {"conv1": [0], "layer1.0.conv2": [1]})


def test_an_example_finds_a_forward_that_computes_with_the_number_of_channels() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x) / self.a.out_features)

    with pytest.raises(ModelError, match="computes with the number of channels"):
        compact(Scaled(), {"a": [0, 1]}, example=torch.ones(2, 3))


def test_wrappers_are_looked_through() -> None:
    model = models.build("mlp-6", input_shape=(4,), classes=2, seed=0)
    wrapped = nn.DataParallel(model)
    assert set(node_masks(wrapped, {"layers.1": [0]})) == {"layers.1.weight", "layers.1.bias", "head.weight"}
    assert type(compact(wrapped, {"layers.1": [0]})) is type(model)
