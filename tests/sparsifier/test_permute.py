from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from openwork import models
from openwork.core.rng import generator
from openwork.errors import ModelError, OptimizerError
from openwork.sparsifier.groups import survey
from openwork.sparsifier.permute import ChannelClass, Share, channel_classes, inverse, moved, moves, permute


def stirred(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model with nothing at its default: weights, biases, norms and running statistics."""
    draw = generator(seed, "stirred")
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            shift = 0.0 if name.endswith("running_var") else 0.5
            tensor += 0.2 * (torch.rand(tensor.shape, generator=draw) - shift)
    return model.eval()


def inputs(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=generator(seed, "inputs"))


def orders(model: nn.Module, x: Any, seed: int = 0) -> list[tuple[ChannelClass, Tensor]]:
    """A random permutation of every class that may move."""
    draw = generator(seed, "orders")
    classes = [one for one in channel_classes(model, x) if not one.fixed]
    return [(one, torch.randperm(one.size, generator=draw)) for one in classes]


def shuffled(model: nn.Module, x: Any, optimizer: Any = None, seed: int = 0) -> list[tuple[ChannelClass, Tensor]]:
    found = orders(model, x, seed)
    for cls, perm in found:
        permute(model, cls, perm, optimizer)
    return found


def gap(one: Tensor, other: Tensor) -> float:
    return float((one - other).detach().abs().max() / one.detach().abs().max())


def flat(cls: ChannelClass) -> tuple[Any, ...]:
    def short(shares: tuple[Share, ...]) -> list[tuple[str, int]]:
        return [(one.layer, one.offset) for one in shares]

    return cls.name, cls.size, short(cls.producers), short(cls.tied), short(cls.consumers)


class Dense(nn.Module):
    """Concatenations of concatenations, with a norm, a depthwise convolution and a pool over them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.one, self.two = nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(10, 5, 1)
        self.norm, self.depthwise = nn.BatchNorm2d(15), nn.Conv2d(15, 15, 3, groups=15)
        self.fc = nn.Linear(15 * 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = torch.cat([x, F.relu(self.one(x))], 1)
        x = torch.cat((x, self.two(x)), dim=-3)
        return self.fc(F.max_pool2d(F.relu(self.depthwise(self.norm(x))), 3).flatten(1))


class Ghost(nn.Module):
    """A concatenation of maps with their own depthwise convolution, added to that of a shortcut; then the input."""

    def __init__(self) -> None:
        super().__init__()
        self.primary, self.cheap = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.shortcut, self.last = nn.Conv2d(3, 12, 1, bias=False), nn.Conv2d(15, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.primary(x))
        y = torch.cat([y, self.cheap(y)], 1) + self.shortcut(x)
        return self.last(torch.cat([y, x], 1)).mean((2, 3))


class Excited(nn.Module):
    """Squeeze and excitation over a concatenation, inside a residual block with a depthwise convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.expand, self.side = nn.Conv2d(3, 5, 3), nn.Conv2d(5, 8, 1), nn.Conv2d(5, 4, 1)
        self.depthwise, self.norm = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8)
        self.squeeze, self.excite = nn.Conv2d(12, 3, 1), nn.Conv2d(3, 12, 1)
        self.project, self.act, self.drop = nn.Conv2d(12, 5, 1), nn.PReLU(12), nn.Dropout2d(0.3)
        self.fc = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = torch.cat([F.relu6(self.norm(self.depthwise(self.expand(x)))), self.side(x)], 1)
        y = y * torch.sigmoid(self.excite(F.silu(self.squeeze(F.adaptive_avg_pool2d(y, 1)))))
        return self.fc(self.drop(x + self.project(self.act(y))).mean((2, 3)))


class Scaled(nn.Module):
    """Parameters and a buffer a channel that the forward uses by itself, one of them with pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv2d(2, 6, 1), nn.Linear(6 * 9, 3)
        self.scale, self.place = nn.Parameter(torch.ones(6, 1, 1)), nn.Parameter(torch.ones(1, 6, 3, 3))
        self.glow, self.flat = nn.Parameter(torch.ones(1, 1, 3, 3)), nn.Parameter(torch.ones(6 * 9))
        self.register_buffer("mean", torch.ones(1, 6, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = (self.conv(x) * self.scale - self.mean).div(self.glow) + self.place + self.glow
        return self.out(torch.mul(y.flatten(1), self.flat))


BUILT = {"dense": Dense, "ghost": Ghost, "excited": Excited, "scaled": Scaled}
ZOO = [
    ("mlp-12-9", (1, 8, 8)), ("lenet5", (1, 8, 8)), ("cnn", (1, 8, 8)), ("resnet8", (3, 8, 8)), ("wrn-10-1", (3, 8, 8)),
    ("vit-tiny", (1, 8, 8)), ("mobilenet-v1", (3, 8, 8)), ("mobilenet-v2", (3, 8, 8)), ("dense", (3, 8, 8)),
    ("ghost", (3, 5, 5)), ("excited", (3, 8, 8)), ("scaled", (2, 3, 3)),
]  # fmt: skip


def built(name: str, shape: tuple[int, ...]) -> nn.Module:
    options = {"multiplier": 0.25} if name.startswith("mobilenet") else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BUILT[name]() if name in BUILT else models.build(name, input_shape=shape, classes=3, seed=0, options=options)
    return stirred(model)


@pytest.mark.parametrize(("name", "shape"), ZOO)
def test_the_function_stays_while_everything_that_can_moves(name: str, shape: tuple[int, ...]) -> None:
    model, x = built(name, shape), inputs(4, *shape)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    wanted = model(x)
    found = shuffled(model, x)
    assert found
    assert gap(wanted, model(x)) <= 1e-5
    touched = set().union(*(moves(model, cls, perm) for cls, perm in found))
    after = model.state_dict()
    for key, value in before.items():
        assert torch.equal(value.reshape(-1).sort().values, after[key].reshape(-1).sort().values)  # bit for bit
        assert torch.equal(value, after[key]) or key in touched
    assert sum(not torch.equal(value, after[key]) for key, value in before.items()) > len(touched) / 2
    for cls, perm in reversed(found):
        permute(model, cls, inverse(perm))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(("name", "shape"), [case for case in ZOO if case[0] != "vit-tiny"])
def test_training_mode_too_and_all_layers_but_the_last_make_channels_that_move(name: str, shape: tuple[int, ...]) -> None:
    model, x = built(name, shape).double(), inputs(4, *shape).double()
    for module in model.modules():
        if isinstance(module, nn.Dropout | nn.Dropout2d):
            module.p = 0.0
    twin = copy.deepcopy(model).train()
    found = shuffled(model, x)
    assert gap(twin(x), model.train()(x)) < 1e-12
    for cls, perm in found:
        permute(twin, cls, perm)
    assert all(torch.allclose(a, b) for a, b in zip(model.buffers(), twin.buffers(), strict=True))  # statistics of the step
    last = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)][-1]
    fixed = {share.layer for cls in channel_classes(model, x) if cls.fixed for share in cls.producers}
    assert fixed == ({last, "classifier.head"} if "classifier.head" in fixed else {last})


class Chain(nn.Module):
    """Blocks of the given kinds, one after the other."""

    def __init__(self, kinds: list[str]) -> None:
        super().__init__()
        self.kinds, width = kinds, 3
        for place, kind in enumerate(kinds):
            after = {"plain": 4, "cat": width + 3, "gate": width, "add": width, "depthwise": width}[kind]
            rows = {"cat": 3, "depthwise": width}.get(kind, after)
            groups = width if kind == "depthwise" else 1
            self.add_module(f"conv{place}", nn.Conv2d(width, rows, 3, padding=1, groups=groups))
            self.add_module(f"norm{place}", nn.BatchNorm2d(rows))
            width = after
        self.head = nn.Conv2d(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        for place, kind in enumerate(self.kinds):
            y = torch.tanh(self.get_submodule(f"norm{place}")(self.get_submodule(f"conv{place}")(x)))
            if kind == "cat":
                x = torch.cat([y, x], 1)
            elif kind == "gate":
                x = x * torch.sigmoid(y.mean((2, 3), keepdim=True))
            else:
                x = x + y if kind == "add" else y
        return self.head(x)


@given(st.lists(st.sampled_from(["plain", "cat", "gate", "add", "depthwise"]), min_size=1, max_size=7), st.integers(0, 99))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_any_chain_of_blocks_keeps_its_function(kinds: list[str], seed: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = stirred(Chain(kinds), seed).double()
    x = inputs(2, 3, 4, 4, seed=seed).double()
    wanted = model(x)
    found = shuffled(model, x, seed=seed)
    assert gap(wanted, model(x)) < 1e-12
    if "plain" in kinds:  # before the first plain block all is tied to the input
        assert any(share.layer == f"conv{kinds.index('plain')}" for cls, _ in found for share in cls.producers)


def test_a_concatenation_is_a_class_for_each_block() -> None:
    classes = channel_classes(Dense(), inputs(1, 3, 8, 8))
    assert [flat(cls) for cls in classes if not cls.fixed] == [
        ("stem", 4, [("stem", 0)], [("norm", 0), ("depthwise", 0)], [("one", 0), ("two", 0), ("fc", 0)]),
        ("one", 6, [("one", 0)], [("norm", 4), ("depthwise", 4)], [("two", 4), ("fc", 4 * 4)]),
        ("two", 5, [("two", 0)], [("norm", 10), ("depthwise", 10)], [("fc", 10 * 4)]),
    ]
    assert all(share.repeat == 4 for cls in classes for share in cls.consumers if share.layer == "fc")
    assert {cls.name: cls.reason for cls in classes if cls.fixed} == {
        "into stem": "they are the input of the network", "fc": "its channels are the output of the network",
    }  # fmt: skip
    assert "cat" in survey(Dense(), inputs(1, 3, 8, 8)).left["stem"]  # removing channels does not follow it


def test_what_meets_a_concatenation_is_cut_into_its_blocks() -> None:
    classes = {cls.name: flat(cls) for cls in channel_classes(Excited(), inputs(1, 3, 8, 8)) if not cls.fixed}
    tied = [("act", 0), ("depthwise", 0), ("norm", 0)]
    _, size, producers, found, consumers = classes["expand"]
    assert (size, producers, sorted(found)) == (8, [("expand", 0), ("excite", 0)], tied)
    assert consumers == [("squeeze", 0), ("project", 0)]
    assert classes["side"] == ("side", 4, [("side", 0), ("excite", 8)], [("act", 8)], [("squeeze", 8), ("project", 8)])
    assert classes["stem"][2] == [("stem", 0), ("project", 0)]
    assert set(classes) == {"expand", "side", "stem", "squeeze"}


def test_one_class_may_stand_twice_in_a_layer() -> None:
    classes = {cls.name: cls for cls in channel_classes(Ghost(), inputs(1, 3, 5, 5))}
    assert flat(classes["primary"])[2:] == (
        [("primary", 0), ("shortcut", 0), ("shortcut", 6)], [("cheap", 0)], [("last", 0), ("last", 6)],
    )  # fmt: skip
    assert [(share.layer, share.offset) for share in classes["into primary"].consumers] == [
        ("primary", 0), ("shortcut", 0), ("last", 12),
    ]  # fmt: skip


def test_every_part_of_a_norm_moves() -> None:
    net = stirred(nn.Sequential(nn.Conv2d(1, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(20, 2)))
    before, perm = copy.deepcopy(net.state_dict()), torch.tensor([3, 0, 4, 1, 2])
    cls = channel_classes(net, inputs(1, 1, 4, 4))[0]
    found = permute(net, cls, perm)
    after = net.state_dict()
    for key in ("0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var"):
        assert torch.equal(after[key], before[key][perm])
        assert torch.equal(after[key], moved(before[key], found[key]))
    assert torch.equal(after["4.weight"].reshape(2, 5, 4), before["4.weight"].reshape(2, 5, 4)[:, perm])
    assert torch.equal(after["4.bias"], before["4.bias"])
    assert after["1.num_batches_tracked"] == before["1.num_batches_tracked"]
    assert set(found) == {*before} - {"4.bias", "1.num_batches_tracked"}


OPTIMIZERS = {
    "momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "amsgrad": lambda p: torch.optim.AdamW(p, 0.01, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.9, centered=True),
    "rprop": lambda p: torch.optim.Rprop(p, 0.01),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.01, initial_accumulator_value=0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p, 0.01),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_next_step_is_the_permuted_step(kind: str) -> None:
    model = built("excited", (3, 8, 8)).double()
    optimizer = OPTIMIZERS[kind](model.parameters())
    names = dict(model.named_parameters())

    def step(which: nn.Module, optimizer: torch.optim.Optimizer, found: list[Any], k: int) -> None:
        for name, param in which.named_parameters():
            grad = torch.randn(param.shape, generator=generator(0, name, k), dtype=torch.float64)
            for one in found:
                grad = moved(grad, one.get(name, {}))
            param.grad = grad
        optimizer.step()

    for k in range(3):
        step(model, optimizer, [], k)
    twin = copy.deepcopy(model)
    other = OPTIMIZERS[kind](twin.parameters())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    found = [permute(twin, cls, perm, other) for cls, perm in orders(twin, inputs(1, 3, 8, 8).double())]
    for k in range(3, 5):
        step(model, optimizer, [], k)
        step(twin, other, found, k)
    changed = 0
    for name, param in twin.named_parameters():
        expected = names[name].detach()
        for one in found:
            expected = moved(expected, one.get(name, {}))
        changed += not torch.equal(expected, names[name])
        # element by element the steps are the same; adafactor takes means over rows and columns
        assert torch.equal(param, expected) or (kind == "adafactor" and torch.allclose(param, expected, rtol=1e-12))
    assert changed > 10


def test_a_training_run_goes_on_as_if_nothing_had_moved() -> None:
    model, x = built("resnet8", (3, 8, 8)).double().train(), inputs(6, 3, 8, 8).double()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, backward: bool = True) -> None:
        if backward:
            optimizer.zero_grad()
            F.cross_entropy(model(x), torch.arange(6) % 3).backward()
        optimizer.step()

    step(model, optimizer)
    twin = copy.deepcopy(model)
    other = torch.optim.SGD(twin.parameters(), 0.05, momentum=0.9)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one in (model, twin):
        one.zero_grad()
        F.cross_entropy(one(x), torch.arange(6) % 3).backward()
    average = copy.deepcopy(twin)
    found = orders(twin, x)
    for cls, perm in found:
        permute(twin, cls, perm, [other], copies=[average, twin])
    assert all(torch.equal(a, b) for a, b in zip(average.parameters(), twin.parameters(), strict=True))
    step(model, optimizer, backward=False)  # the gradients have moved too
    step(twin, other, backward=False)
    step(model, optimizer)
    step(twin, other)
    assert gap(model.eval()(x), twin.eval()(x)) < 1e-10
    for cls, perm in reversed(found):
        permute(twin, cls, inverse(perm), other)
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_what_must_stay_says_why_and_is_refused() -> None:
    class Stays(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.grouped, self.b = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 1, groups=2), nn.Conv2d(4, 6, 1)
            self.c, self.d = nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.b(self.grouped(self.a(x))).flatten(2).transpose(1, 2)
            return self.d(F.softmax(self.c(y.mean(1)), -1))

    model, x = Stays(), inputs(1, 2, 3, 3)
    classes = {cls.name: cls for cls in channel_classes(model, x)}
    assert all(cls.fixed for cls in classes.values())
    words = {
        "a": "grouped convolution 'grouped'", "grouped": "its groups tie", "into b": "come from what cannot be followed",
        "b": "transpose", "c": "softmax", "d": "output of the network", "into a": "input of the network",
    }  # fmt: skip
    assert all(word in classes[name].reason for name, word in words.items())
    assert permute(model, classes["c"], range(6)) is not None  # the identity is no move
    with pytest.raises(ModelError, match="channels of 'c' must stay where they are: the operation 'softmax'"):
        permute(model, classes["c"], [1, 0, 2, 3, 4, 5])


def test_an_untraceable_forward_keeps_all_in_place_with_the_reason() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x)) if x.sum() > 0 else self.a(x)[:, :2]

    classes = channel_classes(Branching(), inputs(2, 3))
    assert {cls.name for cls in classes} == {"a", "b", "into a", "into b"}
    assert all("cannot be followed" in cls.reason for cls in classes)
    with pytest.raises(ModelError, match="fails on the example"):
        channel_classes(Dense(), inputs(2, 4, 8, 8))


def test_tensors_used_in_two_ways_stay() -> None:
    class Peeks(Scaled):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.scale.flip(0).sum()

    def movable(model: nn.Module) -> set[str]:
        return {cls.name for cls in channel_classes(model, inputs(1, 2, 3, 3)) if not cls.fixed}

    assert movable(Scaled()) == {"conv"}
    assert movable(Peeks()) == set()

    class Hidden(Scaled):
        def forward(self, x: Tensor) -> Tensor:
            return self.out((self.conv(x) * self.table).flatten(1))

    hidden = Hidden()
    hidden.table = torch.ones(6, 1, 1)  # neither parameter nor buffer: no copy of the model's state holds it
    assert movable(hidden) == set()
    del hidden.table
    hidden.register_buffer("table", torch.ones(6, 1, 1))
    assert movable(hidden) == {"conv"}

    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.out = nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.norm(self.conv(x)) * self.norm.weight.view(1, -1, 1, 1))

    assert movable(Norm()) == set()


def test_tied_weights_move_once() -> None:
    net = nn.Sequential(*(nn.Linear(5, 5) for _ in range(4)))
    net[2].weight, net[2].bias = net[1].weight, net[1].bias
    stirred(net.double())
    x = inputs(3, 5).double()
    wanted = net(x)
    (cls,) = (one for one in channel_classes(net, x) if not one.fixed)
    assert [share.layer for share in cls.producers] == ["0", "1", "2"]
    found = permute(net, cls, [2, 0, 1, 4, 3])
    assert set(found["1.weight"]) == {0, 1}
    assert "2.weight" not in found
    assert gap(wanted, net(x)) < 1e-12
    assert net[2].weight is net[1].weight


def test_wrong_permutations_copies_and_optimizers_are_refused_and_nothing_moves() -> None:
    net = stirred(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)))
    cls = next(one for one in channel_classes(net) if not one.fixed)
    before = copy.deepcopy(net.state_dict())
    for wrong in ([0, 1, 2], [0, 1, 2, 2], [1, 2, 3, 4], [0.0, 1.0, 2.0, 3.0]):
        with pytest.raises(ModelError, match="no permutation of the 4 channels of '0'"):
            permute(net, cls, wrong)
    with pytest.raises(ModelError, match=r"a copy has no '0\.weight' of the same shape"):
        permute(net, cls, [1, 0, 3, 2], copies=[nn.Sequential(nn.Linear(3, 5))])
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    optimizer.state[net[0].weight]["preconditioner"] = torch.eye(4)
    with pytest.raises(OptimizerError, match=r"remembers 'preconditioner' of shape \(4, 4\) for a weight of shape \(4, 3\)"):
        permute(net, cls, [1, 0, 3, 2], optimizer)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_wrappers_are_looked_through_and_the_model_is_left_as_it_was() -> None:
    model, x = built("resnet8", (3, 8, 8)), inputs(2, 3, 8, 8)
    before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    compiled: Any = torch.compile(model, backend="eager")
    assert channel_classes(compiled, x) == channel_classes(model, x)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    cls, perm = orders(model, x)[0]
    assert set(moves(compiled, cls, perm)) == set(moves(model, cls, perm))
    assert [cls for cls in channel_classes(model) if not cls.fixed] == [c for c in channel_classes(model, x) if not c.fixed]
