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
from openwork.errors import ModelError
from openwork.sparsifier.groups import Group, Part, channel_groups, slices, survey


def flat(group: Group) -> tuple[Any, ...]:
    return (
        group.name, group.size, [p.layer for p in group.producers], [p.layer for p in group.norms],
        [(p.layer, p.repeat) for p in group.consumers],
    )  # fmt: skip


class Net(nn.Module):
    """A convolution and a linear layer with the given middle between them."""

    def __init__(self, middle: Any, features: int = 4 * 9, **parts: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.fc = nn.Linear(features, 3)
        for name, part in parts.items():
            self.add_module(name, part)
        self.middle = middle

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.middle(self, self.conv(x)))


IMAGE = torch.zeros(2, 2, 5, 5)  # the convolution makes maps of 3x3


@given(widths=st.lists(st.integers(1, 9), min_size=2, max_size=6))
@settings(max_examples=20, deadline=None)
def test_a_chain_of_linear_layers_has_a_group_a_hidden_layer(widths: list[int]) -> None:
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    groups = channel_groups(nn.Sequential(*layers[:-1]))
    linear = [f"{2 * i}" for i in range(len(widths) - 1)]
    wanted = [
        Group(name, width, (Part(name),), (), (Part(reader),))
        for name, width, reader in zip(linear, widths[1:-1], linear[1:], strict=False)
    ]
    assert groups == wanted


def test_conv_norm_pool_flatten() -> None:
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout2d(0.1),
        nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.PReLU(6), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 5),
    )  # fmt: skip
    assert [flat(g) for g in channel_groups(net)] == [
        ("0", 4, ["0"], ["1"], [("5", 1)]),
        ("5", 6, ["5"], ["6"], [("9", 4)]),
    ]
    assert survey(net).left == {"9": "its channels are the output of the network"}
    cut = {(s.layer, s.attribute, s.dim, s.repeat) for s in slices(net, channel_groups(net)) if s.group == "0"}
    assert cut == {
        ("0", "weight", 0, 1), ("0", "bias", 0, 1), ("1", "weight", 0, 1), ("1", "bias", 0, 1),
        ("1", "running_mean", 0, 1), ("1", "running_var", 0, 1), ("5", "weight", 1, 1),
    }  # fmt: skip


def test_residual_additions_join_the_layers_of_a_stage() -> None:
    groups = {g.name: g for g in channel_groups(models.build("resnet8", input_shape=(3, 16, 16), classes=4, seed=0))}
    stem = groups["conv1"]
    assert [p.layer for p in stem.producers] == ["conv1", "layer1.0.conv2"]
    assert [p.layer for p in stem.norms] == ["bn1", "layer1.0.bn2"]
    assert {p.layer for p in stem.consumers} == {"layer1.0.conv1", "layer2.0.conv1", "layer2.0.downsample.0"}
    assert {p.layer for p in groups["layer2.0.conv2"].producers} == {"layer2.0.conv2", "layer2.0.downsample.0"}
    assert set(groups) == {
        "conv1", "layer1.0.conv1", "layer2.0.conv1", "layer2.0.conv2", "layer3.0.conv1", "layer3.0.conv2",
    }  # fmt: skip


def test_depthwise_convolutions_pass_channels_on_and_grouped_ones_do_not() -> None:
    def net(groups: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=groups), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1))

    assert [flat(g) for g in channel_groups(net(8))] == [("0", 8, ["0"], ["1", "2"], [("3", 1)])]
    assert channel_groups(net(2)) == []
    assert "grouped" in survey(net(2)).left["0"]


@pytest.mark.parametrize("middle", [
    lambda net, x: F.max_pool2d(F.relu(x), 3, 1, 1).flatten(1),
    lambda net, x: torch.flatten(F.dropout(torch.sigmoid(x), 0.5, net.training), 1),
    lambda net, x: x.view(x.size(0), -1),
    lambda net, x: x.reshape(x.shape[0], -1),
    lambda net, x: 2 * (x + 1).view((x.size()[0], -1)) / 3,
])  # fmt: skip
def test_functional_forms_of_the_same_chain(middle: Any) -> None:
    net = Net(middle)
    assert [flat(g) for g in channel_groups(net)] == [("conv", 4, ["conv"], [], [("fc", 9)])]
    assert channel_groups(net, IMAGE) == channel_groups(net)


@pytest.mark.parametrize("middle", [
    lambda net, x: x.mean((2, 3)),
    lambda net, x: torch.mean(x, dim=[-2, -1]),
    lambda net, x: x.sum(3).amax(dim=2),
    lambda net, x: F.adaptive_avg_pool2d(x, 1).flatten(1),
    lambda net, x: F.avg_pool2d(x, x.shape[2:]).flatten(1),
])  # fmt: skip
def test_means_over_the_pixels(middle: Any) -> None:
    assert [flat(g) for g in channel_groups(Net(middle, features=4))] == [("conv", 4, ["conv"], [], [("fc", 1)])]


@pytest.mark.parametrize(("middle", "word"), [
    (lambda net, x: x.view(-1, 36), "fixed size 36"),
    (lambda net, x: x.permute(0, 2, 3, 1).flatten(1), "permute"),
    (lambda net, x: torch.cat([x, x], 2).flatten(1)[:, :36], "cat"),
    (lambda net, x: F.softmax(x, 1).flatten(1), "softmax"),
    (lambda net, x: (x / x.shape[1]).flatten(1), "truediv"),
    (lambda net, x: (x / x).flatten(1), "truediv"),
    (lambda net, x: (x + torch.zeros(4, 1, 1)).flatten(1), "add"),
    (lambda net, x: x.flip(1).flatten(1), "flip"),
    (lambda net, x: x.mean(1).flatten(1).repeat(1, 4), "mean"),
    (lambda net, x: x.transpose(1, 2).flatten(1), "transpose"),
])  # fmt: skip
def test_what_cannot_be_followed_is_left_whole_with_the_reason(middle: Any, word: str) -> None:
    found = survey(Net(middle))
    assert found.groups == ()
    assert word in found.left["conv"]


def test_layers_that_mix_channels_end_a_group() -> None:
    for layer in (nn.LayerNorm(6), nn.Softmax(1), nn.Bilinear(6, 6, 6)):
        net = nn.Sequential(nn.Linear(3, 6), nn.Linear(6, 6), layer, nn.Linear(6, 2))
        if isinstance(layer, nn.Bilinear):
            net.forward = lambda x, net=net: x  # type: ignore[method-assign]
            with pytest.raises(ModelError, match="replaced on the instance"):
                channel_groups(net)
        else:
            assert [g.name for g in channel_groups(net)] == ["0"]
            assert repr("2") in survey(net).left["1"]


def test_the_rank_of_vectors_comes_from_the_example() -> None:
    net = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Flatten(), nn.Linear(6, 2))
    assert channel_groups(net) == []  # (batch, tokens, 3) would be rearranged
    assert [flat(g) for g in channel_groups(net, torch.zeros(2, 3))] == [("0", 6, ["0"], [], [("3", 1)])]
    tokens = nn.Sequential(nn.Linear(3, 6), nn.Flatten(), nn.Linear(30, 2))
    assert channel_groups(tokens, torch.zeros(2, 5, 3)) == []
    norm = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
    assert [flat(g) for g in channel_groups(norm)] == [("0", 6, ["0"], ["1"], [("2", 1)])]
    assert channel_groups(norm, torch.zeros(2, 6, 3)) == []  # here the norm is over the tokens


def test_a_layer_used_twice_joins_what_it_reads() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.shared, self.out = nn.Linear(3, 5), nn.Linear(3, 5), nn.Linear(5, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(F.relu(self.shared(self.a(x))) * self.shared(self.b(x)))

    assert [flat(g) for g in channel_groups(Twice())] == [
        ("a", 5, ["a", "b"], [], [("shared", 1)]),
        ("shared", 4, ["shared"], [], [("out", 1)]),
    ]


def test_weights_that_are_used_elsewhere_stay() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(7, 5)
            self.hidden, self.head = nn.Linear(5, 5), nn.Linear(5, 7, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.relu(self.hidden(self.embedding(x))))

    assert channel_groups(Tied()) == []
    hidden = Tied()
    hidden.head.weight = nn.Parameter(torch.zeros(7, 5))
    assert [g.name for g in channel_groups(hidden)] == ["hidden"]

    class Peeking(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.fc.weight.sum()

    assert channel_groups(Peeking(lambda net, x: x.flatten(1))) == []


def test_hooked_and_parametrised_layers_stay() -> None:
    net = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
    hooked = copy.deepcopy(net)
    hooked[0].register_forward_hook(lambda module, args, out: out + 1)
    assert [g.name for g in channel_groups(hooked)] == ["2"]
    scaled = copy.deepcopy(net)
    nn.utils.parametrizations.weight_norm(scaled[4])
    assert [g.name for g in channel_groups(scaled)] == ["0"]


class Branching(nn.Module):
    """Chooses its path by value, which no symbolic trace can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) if x.sum() > 0 else x


def test_an_untraceable_forward_is_refused_with_the_remedy() -> None:
    with pytest.raises(ModelError, match=r"Branching cannot be traced .*nn\.Sequential.*mask single weights"):
        channel_groups(Branching())


def test_an_untraceable_part_is_left_whole_and_its_parts_are_looked_into() -> None:
    class Outer(Branching):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.ModuleList([nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4))])

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.body[0](x))

    assert [flat(g) for g in channel_groups(Outer())] == [("body.0.0", 6, ["body.0.0"], [], [("body.0.2", 1)])]
    inner = nn.Sequential(nn.Linear(3, 4), Branching(), Outer(), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    assert [g.name for g in channel_groups(inner)] == ["2.body.0.0", "3"]
    assert "cannot be followed" in survey(inner).left["0"]


def test_transformers_keep_all_but_their_feedforward_units() -> None:
    options = {"width": 8, "depth": 2, "heads": 2}
    vit = models.build("vit-tiny", input_shape=(1, 8, 8), classes=3, seed=0, options=options)
    assert [(g.name, g.size) for g in channel_groups(vit)] == [("blocks.0.mlp.fc1", 32), ("blocks.1.mlp.fc1", 32)]


def test_optional_arguments_take_their_defaults_unless_the_example_gives_them() -> None:
    class Optional(Net):
        def forward(self, x: Tensor, scale: Tensor | None = None, *, flip: bool = False) -> Tensor:
            y = self.conv(x)
            if scale is not None:
                y = y * scale
            return self.fc((y.flip(1) if flip else y).flatten(1))

    net = Optional(None)
    assert len(channel_groups(net)) == 1
    assert channel_groups(net, (IMAGE, torch.ones(4, 1, 1))) == []
    assert channel_groups(net, {"x": IMAGE, "flip": True}) == []
    assert len(channel_groups(net, {"x": IMAGE, "flip": False})) == 1
    with pytest.raises(ModelError, match="does not fit the forward of Optional"):
        channel_groups(net, {"image": IMAGE})
    with pytest.raises(ModelError, match="fails on the example"):
        channel_groups(net, torch.zeros(1, 3, 5, 5))


def test_the_model_is_left_as_it_was() -> None:
    net = models.build("cnn", input_shape=(1, 8, 8), classes=3, seed=0).train()
    net.bn2.eval()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    modes = [module.training for module in net.modules()]
    state = torch.get_rng_state()
    channel_groups(net, torch.randn(2, 1, 8, 8, generator=torch.Generator()))
    assert [module.training for module in net.modules()] == modes
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
