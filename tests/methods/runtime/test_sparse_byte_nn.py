from __future__ import annotations

import copy
import itertools
import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from openwork import models
from openwork.core.masks import Masks
from openwork.core.patterns import KernelGroup
from openwork.core.rng import generator
from openwork.core.select import count_of
from openwork.errors import MaskError, MethodError, ModelError, PatternError
from openwork.methods.runtime import _rearrange
from openwork.methods.runtime._rearrange import Rows, climb, greedy, orderings, partitions, search, value
from openwork.methods.runtime.sparse_byte_nn import ByOperator, SparseByteNN, rearrange
from openwork.sparsifier.permute import channel_classes, inverse, moved, permute
from openwork.sparsifier.sparsifier import Sparsifier
from openwork.testing import sparsifier_checks
from openwork.testing._toys import Loop, network

EVERY = partial(SparseByteNN, criterion="taylor", rearrange="every", group=4, trials=2)


@pytest.mark.parametrize(("name", "check"), sparsifier_checks(SparseByteNN))
def test_conformance(name, check):
    check()


@pytest.mark.parametrize(("name", "check"), sparsifier_checks(EVERY, total_steps=8))
def test_conformance_of_first_order_rearranged_at_every_update(name, check):
    check()


# ---- the search -------------------------------------------------------------------------------------------------------


def rows(seed: int, shape: tuple[int, int], group: int, density: float, *, power: int = 1, **options: Any) -> Rows:
    draw = generator(seed, "rows")
    saliency = torch.randn(shape, generator=draw, dtype=torch.float64)
    saliency = saliency if options.pop("signed", False) else saliency.abs() ** power
    groups = 1 if options.get("balanced") else -(-shape[0] // group)
    return Rows("w", saliency, group, count_of(density, groups * shape[1]), **options)


def brute_force(layers: list[Rows]) -> float:
    orders = orderings(list(range(len(layers[0].saliency))), layers[0].group)
    return max(plain(layers, order) for order in orders)


def plain(layers: list[Rows], order: list[int]) -> float:
    """J by a sort of Python numbers."""
    total = 0.0
    for layer in layers:
        groups = [order[start : start + layer.group] for start in range(0, len(order), layer.group)]
        units = []
        for place, group in enumerate(groups):
            sums = [abs(sum(one)) for one in zip(*(layer.saliency[o].tolist() for o in group), strict=True)]
            units.append([(-one / len(group), place, one) for one in sums])
        rivals = units if layer.balanced else [[one for row in units for one in row]]
        total += sum(one for row in rivals for _, _, one in sorted(row, key=lambda one: one[0])[: layer.kept])
    return total


SMALL = [(8, 4), (8, 2), (9, 3)]


@pytest.mark.parametrize(("channels", "group"), SMALL)
@pytest.mark.parametrize("power", [1, 3])
def test_the_search_finds_the_optimum_of_small_classes(channels, group, power):
    hits, single, cases = 0, 0, 12
    for seed in range(cases):
        layer = rows(seed, (channels, (4, 8, 12)[seed % 3]), group, (0.3, 0.5, 0.7)[seed // 3 % 3], power=power)
        best = search([layer], "exact")
        assert best.trace[-1] == pytest.approx(plain([layer], best.order.tolist()), rel=1e-12)
        found = search([layer], "greedy+swap", seed=seed)
        alone = climb([layer], greedy([layer]), generator(seed, "alone"), channels)
        assert max(found.trace[-1], alone.trace[-1]) <= best.trace[-1] * (1 + 1e-12)
        hits += found.trace[-1] >= best.trace[-1] * (1 - 1e-9)
        single += alone.trace[-1] >= best.trace[-1] * (1 - 1e-9)
    assert hits == cases
    assert single >= cases / 2  # without the further starts that small classes get


def test_the_exact_search_goes_through_every_partition():
    for channels, group in [(8, 4), (6, 2), (7, 3), (5, 5), (4, 1), (3, 5)]:
        orders = list(orderings(list(range(channels)), group))
        whole = channels // group * group
        seen = {
            (frozenset(frozenset(order[i : i + group]) for i in range(0, whole, group)), frozenset(order[whole:]))
            for order in orders
        }
        assert len(seen) == len(orders) == partitions(channels, group)
        assert all(sorted(order) == list(range(channels)) for order in orders)
        assert orders[0] == list(range(channels))
    assert partitions(8, 4) == 35
    layer = rows(0, (7, 5), 3, 0.5)
    assert search([layer], "exact").trace[-1] == pytest.approx(brute_force([layer]), rel=1e-12)
    with pytest.raises(MethodError, match="would go through"):
        search([rows(0, (32, 4), 4, 0.5)], "exact")
    with pytest.raises(MethodError, match=r"one group size for all layers of a class, not \[2, 4\]"):
        search([rows(0, (8, 4), 4, 0.5), rows(0, (8, 4), 2, 0.5)], "exact")


KINDS: dict[str, dict[str, Any]] = {
    "layer": {}, "row": {"balanced": True}, "signed": {"signed": True}, "heavy": {"power": 3},
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("channels", "group"), [(24, 4), (22, 4), (20, 8)])
def test_j_never_falls_and_is_what_it_says(kind, channels, group):
    layer = rows(1, (channels, 15), group, 0.4, **KINDS[kind])
    identity = torch.arange(channels)
    for start in (identity, greedy([layer]), torch.randperm(channels, generator=generator(0, "start"))):
        found = climb([layer], start, generator(0, "climb"), channels)
        assert all(b > a for a, b in itertools.pairwise(found.trace))
        assert found.trace[0] == pytest.approx(plain([layer], start.tolist()), rel=1e-12)
        assert found.trace[-1] == pytest.approx(plain([layer], found.order.tolist()), rel=1e-12)
        assert sorted(found.order.tolist()) == list(range(channels))
    best = search([layer], "greedy+swap")
    assert best.trace[-1] >= max(value([layer], identity), search([layer], "sort").trace[-1])
    units = layer.units(best.order)
    assert layer.bound(units) >= best.trace[-1]
    assert int(layer.mask(units).sum()) == layer.kept * (layer.groups if layer.balanced else 1)
    assert best.trace[-1] == pytest.approx(float(units.abs()[layer.mask(units)].sum()), rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_gains_are_upper_bounds_and_the_end_is_a_local_optimum(kind):
    layer = rows(2, (24, 10), 4, 0.5, **KINDS[kind])
    tight = 0
    for order in (torch.arange(24), climb([layer], torch.arange(24), generator(0, "climb"), 24).order):
        state = _rearrange._State(layer, order)
        best = -math.inf
        for one in range(24):
            gains = state.gains(one)
            for other in range(24):
                gain = state.after(one, other)[0] - state.value
                assert gain <= gains[other] + 1e-9
                tight += gain > 0.5 * gains[other] > 1e-9
                best = max(best, gain)
    assert tight > 10  # the bounds say something
    assert best <= 1e-9 * state.value


def test_a_class_of_several_layers_is_searched_for_all_of_them():
    one, two = rows(3, (8, 6), 4, 0.5), rows(4, (8, 9), 4, 0.3)
    found = search([one, two], "greedy+swap")
    assert found.trace[-1] == pytest.approx(brute_force([one, two]), rel=1e-12)
    assert found.trace[-1] == pytest.approx(plain([one, two], found.order.tolist()), rel=1e-12)
    mixed = [one, Rows("v", two.saliency, 2, 10)]  # another group size
    found = search(mixed, "greedy+swap")
    assert found.trace[-1] == pytest.approx(plain(mixed, found.order.tolist()), rel=1e-12)
    assert found.trace[-1] > value(mixed, torch.arange(8))


def test_groups_of_one_or_of_all_have_nothing_to_gain():
    for group in (1, 8):
        found = search([rows(0, (8, 6), group, 0.5)], "greedy+swap")
        assert found.order.tolist() == list(range(8))
        assert len(found.trace) == 1


@pytest.mark.parametrize("density", [0.0, 1.0])
def test_keeping_all_or_nothing_has_nothing_to_gain(density):
    layer = rows(0, (12, 6), 4, density)
    found = search([layer], "greedy+swap")
    assert found.trace[-1] == pytest.approx(density * float(layer.saliency.sum()), abs=1e-12)


def test_hidden_groups_are_found_again():
    draw = generator(5, "hidden")
    columns = (torch.rand(8, 40, generator=draw) < 0.3).double()
    saliency = columns.repeat_interleave(8, 0) * (1 + torch.rand(64, 40, generator=draw, dtype=torch.float64))
    saliency += 0.01 * torch.rand(64, 40, generator=draw, dtype=torch.float64)
    hidden = Rows("w", saliency, 8, int(columns.sum()))
    mixed = Rows("w", saliency[torch.randperm(64, generator=draw)], 8, hidden.kept)
    assert value([mixed], torch.arange(64)) < 0.7 * value([hidden], torch.arange(64))
    assert search([mixed], "greedy+swap").trace[-1] == pytest.approx(value([hidden], torch.arange(64)), rel=1e-12)


def test_a_search_can_be_cut_short_and_is_a_function_of_its_seed():
    layer = rows(6, (64, 32), 4, 0.5)
    identity = value([layer], torch.arange(64))
    none = search([layer], "greedy+swap", deadline=0.0)
    few, whole = search([layer], "greedy+swap", trials=3), search([layer], "greedy+swap")
    assert none.tried == 0
    assert none.trace[-1] >= identity
    assert few.tried < whole.tried
    again = search([layer], "greedy+swap")
    assert torch.equal(again.order, whole.order)
    assert again.trace == whole.trace
    with pytest.raises(MethodError, match="search='anneal'"):
        search([layer], "anneal")


# ---- the whole network ------------------------------------------------------------------------------------------------


def mobile(name: str = "mobilenet-v2", seed: int = 0) -> nn.Module:
    model = models.build(name, input_shape=(3, 8, 8), classes=5, seed=seed, options={"multiplier": 0.25})
    draw = generator(seed, "stirred")
    for key, tensor in model.state_dict().items():
        if tensor.is_floating_point() and tensor.dim() == 1:  # biases, norms and running statistics
            shift = 0.0 if key.endswith("running_var") else 0.5
            tensor += 0.2 * (torch.rand(tensor.shape, generator=draw) - shift)
    return model.eval()


def images(count: int = 4, channels: int = 3) -> Tensor:
    return torch.randn(count, channels, 8, 8, generator=generator(0, "images"))


def saliency_kept(model: nn.Module, pattern: Any, density: float, names: list[str]) -> float:
    params = dict(model.named_parameters())
    scores = {name: params[name].detach().abs().double() for name in names}
    return sum(float(score[pattern.select(score, density)].sum()) for score in scores.values())


@pytest.mark.parametrize(("name", "group"), [("mobilenet-v1", 8), ("mobilenet-v2", 4), ("resnet8", 4)])
def test_a_rearrangement_keeps_the_outputs_and_more_saliency(name, group):
    model = mobile(name) if "mobile" in name else models.build(name, input_shape=(3, 8, 8), classes=5, seed=0).eval()
    x, before = images(), copy.deepcopy(model.state_dict())
    wanted, pattern = model(x), ByOperator(KernelGroup(group), KernelGroup(group, "point"))
    report = rearrange(model, pattern, 0.5, example=x, trials=None if name == "resnet8" else 3)
    names = [gain.name for gain in report.layers]
    gap = (model(x) - wanted).detach().abs().max() / wanted.detach().abs().max()
    assert float(gap) <= 1e-5
    assert report.drift == pytest.approx(float(gap), abs=1e-6)
    assert report.orders
    for key, value_ in model.state_dict().items():
        assert torch.equal(value_, moved(before[key], report.moves.get(key, {})))
        assert torch.equal(value_, before[key]) or key in report.moves
    total = sum(float(before[name].abs().double().sum()) for name in names)
    after = saliency_kept(model, pattern, 0.5, names)
    model.load_state_dict(before)
    assert report.kept_before == pytest.approx(saliency_kept(model, pattern, 0.5, names) / total, rel=1e-5)
    assert report.kept_after == pytest.approx(after / total, rel=1e-5)
    assert report.kept_before < report.kept_after < report.bound < 1.0
    for gain in report.layers:
        assert gain.after <= gain.bound <= gain.total * (1 + 1e-12)
        assert gain.kept == count_of(0.5, gain.units)
    assert (
        next(gain for gain in report.layers if gain.name == "fc.weight").reason
        == "its channels are the output of the network"
    )
    assert all(trace[-1] >= trace[0] for trace in report.traces.values())
    again = rearrange(model, pattern, 0.5, search="identity", example=x)
    assert (again.kept_after, again.orders, again.moves) == (pytest.approx(again.kept_before), {}, {})


def test_the_report_tells_how_to_undo_it_and_what_else_to_move():
    model, x = models.build("resnet8", input_shape=(3, 8, 8), classes=5, seed=0), images()
    before, average = copy.deepcopy(model.state_dict()), copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for param in model.parameters():
        param.grad = param.detach().clone()
    optimizer.step()
    model.load_state_dict(before)
    report = rearrange(model, "group4", 0.5, optimizer=optimizer, copies=[average])
    assert report.drift is None
    after = model.state_dict()
    for key, value_ in average.state_dict().items():
        assert torch.equal(value_, after[key])
    for param in model.parameters():
        assert torch.equal(optimizer.state[param]["momentum_buffer"], param)  # it was the weight before, and still is
        assert torch.equal(param.grad, param)
    for cls in reversed(channel_classes(model, x)):
        if cls.name in report.orders:
            permute(model, cls, inverse(report.orders[cls.name]))
    assert all(torch.equal(value_, before[key]) for key, value_ in model.state_dict().items())


def test_bounds_between_single_weights_and_whole_channels():
    model = mobile("mobilenet-v1")
    options: dict[str, Any] = {"depthwise": True, "trials": 3}
    found = {group: rearrange(copy.deepcopy(model), f"group{group}", 0.5, **options) for group in (1, 4, 8)}
    assert found[1].kept_before == found[1].kept_after == pytest.approx(found[1].bound, rel=1e-12)
    assert not found[1].orders
    assert found[1].kept_after > found[4].kept_after > found[8].kept_after > found[8].kept_before
    full = rearrange(copy.deepcopy(model), "group4", 1.0, **options)
    assert full.kept_after == pytest.approx(1.0, rel=1e-6)


def test_leftover_channels_and_depthwise_convolutions():
    net = nn.Sequential(
        nn.Conv2d(3, 10, 1), nn.Conv2d(10, 10, 3, groups=10, padding=1), nn.BatchNorm2d(10), nn.Conv2d(10, 7, 1),
        nn.Flatten(), nn.Linear(7 * 64, 3),
    )  # fmt: skip
    x = images()
    wanted = net.eval()(x)
    report = rearrange(net, "group4", 0.5, example=x, depthwise=True)
    assert {gain.name: gain.units for gain in report.layers} == {
        "0.weight": 3 * 3, "1.weight": 3, "3.weight": 2 * 10, "5.weight": 7 * 64,
    }  # fmt: skip
    assert next(gain for gain in report.layers if gain.name == "1.weight").classes == ("0",)
    assert torch.allclose(net(x), wanted, rtol=1e-5, atol=1e-6)
    names = [gain.name for gain in rearrange(net, "group4", 0.5).layers]
    assert names == ["0.weight", "3.weight", "5.weight"]


class Gated(nn.Module):
    """Squeeze and excitation over a concatenation: the rows of `excite` belong to two classes."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 6, 1)
        self.squeeze, self.excite, self.fc = nn.Conv2d(14, 8, 1), nn.Conv2d(8, 14, 1), nn.Linear(14, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([self.one(x), self.two(x)], 1)
        return self.fc((y * self.excite(self.squeeze(y.mean((2, 3), keepdim=True)).relu()).sigmoid()).mean((2, 3)))


@pytest.mark.parametrize("seed", range(4))
def test_rows_of_several_classes_never_lose(seed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, x = Gated().eval(), images()
    wanted = model(x)
    report = rearrange(model, "group4", 0.5, example=x)
    assert torch.allclose(model(x), wanted, rtol=1e-5, atol=1e-6)
    assert next(gain for gain in report.layers if gain.name == "excite.weight").classes == ("one", "two")
    assert sum(gain.after for gain in report.layers) >= sum(gain.before for gain in report.layers)
    if report.orders.keys() & {"one", "two"}:
        split = [gain for gain in report.layers if {"one", "two"} & {*gain.classes}]
        assert sum(gain.after - gain.before for gain in split) >= 0


def test_first_order_saliencies_are_sums_before_the_absolute_value():
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    with pytest.raises(MethodError, match=r"needs the gradient of '0\.weight'"):
        rearrange(model, "group4", 0.5, criterion="taylor")
    F.cross_entropy(
        model(torch.randn(5, 6, generator=generator(0, "x"), dtype=torch.float64)), torch.arange(5) % 2
    ).backward()
    first = (model[0].weight * model[0].weight.grad).detach()
    layer = Rows("0.weight", first, 4, 6)
    report = rearrange(model, "group4", 0.5, criterion="taylor")
    gain = report.layers[0]
    assert gain.before == pytest.approx(plain([layer], list(range(8))), rel=1e-12)
    assert gain.after == pytest.approx(brute_force([layer]), rel=1e-12)
    after = (model[0].weight * model[0].weight.grad).detach()
    assert torch.equal(after, first[report.orders["0"]])


def test_a_forward_that_uses_the_places_unseen_is_moved_back():
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.calls = nn.Linear(3, 8), nn.Linear(8, 2), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.b(self.a(x)) * self.calls

    model = Counts()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ModelError, match=r"outputs of Counts on the example differ by .* moved back"):
        rearrange(model, "group4", 0.5, example=torch.ones(1, 3))
    assert all(torch.equal(value_, before[key]) for key, value_ in model.state_dict().items())


def test_what_cannot_be_rearranged_is_refused_or_says_why():
    model = network()
    for wrong, error, word in (
        ({"pattern": "2:4"}, PatternError, "kernel groups"),
        ({"criterion": "norm"}, MethodError, "criterion='norm'"),
        ({"search": "anneal"}, MethodError, "search='anneal'"),
        ({"density": {"0.weight": 0.5}}, MethodError, "no share for 2.weight, 4.weight"),
        ({"density": 1.5}, MaskError, "density 1.5"),
    ):
        with pytest.raises(error, match=word):
            rearrange(model, **{"pattern": "group4", "density": 0.5, **wrong})
    with torch.no_grad():
        model[2].weight[0, 0] = torch.nan
    with pytest.raises(MaskError, match=r"saliencies of '2\.weight' are not finite"):
        rearrange(model, "group4", 0.5)

    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) if x.sum() > 0 else x

    report = rearrange(Branching(), "group4", 0.5)
    assert report.orders == {}
    assert "cannot be followed" in report.layers[0].reason


# ---- training ---------------------------------------------------------------------------------------------------------


def train(model: nn.Module, sparsifier: Sparsifier, steps: int, optimizer: torch.optim.Optimizer | None = None) -> nn.Module:
    optimizer = optimizer or torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    sparsifier.attach(model, optimizer)
    x = torch.randn(6, 3, 8, 8, generator=generator(0, "train"), dtype=next(model.parameters()).dtype)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model.train()(x), torch.arange(6) % 3).backward()
        optimizer.step()
        sparsifier.masks.check(model)
        for mask in sparsifier.masks.values():
            sparsifier.pattern.check(mask)
    return model


@pytest.mark.parametrize("balance", ["layer", "row"])
@pytest.mark.parametrize("density", [0.3, 0.7])
def test_every_layer_keeps_exactly_its_units(balance, density):
    method = SparseByteNN(
        density, total_steps=6, group=4, spatial_group=3, unit="point", balance=balance, schedule="one-shot", search="sort"
    )
    model = train(models.build("resnet8", input_shape=(3, 8, 8), classes=3, seed=0), method, 6)
    masks = method.finalize()
    modules = dict(model.named_modules())
    assert len(method.reports) == 1
    for name, mask in masks.items():
        pattern = KernelGroup(3, "point", balance) if mask.shape[2:].numel() > 1 else KernelGroup(4, "kernel", balance)
        assert method.pattern.of(mask.shape) == pattern
        pattern.check(mask)
        units = pattern.tiles(mask.double()) > 0
        groups = -(-len(mask) // pattern.out)
        if balance == "row":
            assert units.shape[0] == groups
        assert units.sum(1).tolist() == [max(1, count_of(density, units.shape[1]))] * units.shape[0]
        assert isinstance(modules[name.removesuffix(".weight")], nn.Conv2d | nn.Linear)


def test_depthwise_convolutions_stay_dense_unless_asked_for():
    for depthwise in (False, True):
        model = mobile()
        method = SparseByteNN(0.5, total_steps=1, schedule="one-shot", depthwise=depthwise, exclude="fc.*", search="sort")
        method.attach(model)
        layers = {f"{name}.weight": module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
        expected = {name for name, module in layers.items() if depthwise or module.groups == 1}
        assert set(method.masks) == expected
        method.masks.check(model)


def test_the_density_follows_the_cubic_schedule_in_every_layer():
    method = SparseByteNN(0.25, total_steps=40, every=4, begin=0.1, end=0.6)
    run = Loop(method).run(40)
    assert [step for step, _ in run.sparsifier.history] == [0, 8, 12, 16, 20, 24]
    units = {name: run.sparsifier.pattern.tiles(mask.double()).numel() for name, mask in run.sparsifier.masks.items()}
    for place, (step, kept) in enumerate(run.sparsifier.history):
        target = 0.25 + 0.75 * (1 - (step - 4) / 20) ** 3 if place else 1.0
        sizes = [8, 8, 4]
        assert list(kept) == [size * count_of(target, n) for size, n in zip(sizes, units.values(), strict=True)]


def test_pruning_keeps_the_best_units_of_the_rearranged_weights():
    model = network()
    plainly = copy.deepcopy(model)
    report = rearrange(plainly, "group4", 0.5)
    method = SparseByteNN(0.5, total_steps=1, group=4, schedule="one-shot").attach(model)
    assert report.orders
    for name, param in plainly.named_parameters():
        if param.dim() == 2:
            mask = KernelGroup(4).select(param.detach().abs(), 0.5)
            assert torch.equal(method.masks[name], mask)
            assert torch.equal(dict(model.named_parameters())[name], param * mask)
        else:
            assert torch.equal(dict(model.named_parameters())[name], param)
    assert method.reports[0].kept_after == report.kept_after


class Given(Sparsifier):
    """Takes given masks at one step."""

    def __init__(self, masks: Masks, at: int) -> None:
        super().__init__(0.5, parameters=list(masks))
        self.given, self.at = masks, at

    def revise(self, params, grads, step):
        return self.given if step == self.at else None


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_training_goes_on_as_if_the_channels_had_not_moved(kind):
    def build() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = models.build("resnet8", input_shape=(3, 8, 8), classes=3, seed=0).double()
        if kind == "sgd":
            return model, torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-3)
        return model, torch.optim.AdamW(model.parameters(), 0.01)

    model, optimizer = build()
    average = copy.deepcopy(model)
    method = SparseByteNN(
        0.5, total_steps=8, group=4, schedule="one-shot", begin=0.5, copies=[average], trials=10,
        example=torch.ones(2, 3, 8, 8, dtype=torch.float64),
    )  # fmt: skip
    train(model, method, 8, optimizer)
    masked = copy.deepcopy(model)
    method.masks.apply(masked)
    assert method.reports[0].drift < 1e-12
    back, masks, first = copy.deepcopy(model), copy.deepcopy(model), copy.deepcopy(average)
    with torch.no_grad():
        for name, param in masks.named_parameters():
            param.copy_(method.masks[name].double() if name in method.masks else torch.ones_like(param))
    assert method.orders.keys() == method.reports[0].orders.keys()
    for cls in channel_classes(model):
        if cls.name in method.orders:
            permute(back, cls, inverse(method.orders[cls.name]), copies=[masks, first])
    start, other = build()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), start.parameters(), strict=True))
    undone = {name: param.detach() > 0 for name, param in masks.named_parameters() if name in method.masks}
    plainly = Given(Masks(undone), at=4)
    plainly.attach(start, other)
    x = torch.randn(6, 3, 8, 8, generator=generator(0, "train"), dtype=torch.float64)
    for _ in range(8):
        other.zero_grad()
        F.cross_entropy(start.train()(x), torch.arange(6) % 3).backward()
        other.step()
    assert not all(bool(mask.all()) for mask in undone.values())
    for (name, one), two in zip(start.state_dict().items(), back.state_dict().values(), strict=True):
        assert torch.allclose(one.double(), two.double(), rtol=1e-6, atol=1e-9), name


def test_rearranging_at_every_update_moves_masks_and_the_record_along():
    model = models.build("resnet8", input_shape=(3, 8, 8), classes=3, seed=0)
    start = copy.deepcopy(model)
    method = SparseByteNN(0.3, total_steps=12, every=2, end=0.9, group=4, rearrange="every", trials=8)
    seen: list[Tensor] = []
    original = method.revise

    def revise(params, grads, step):
        masks = original(params, grads, step)
        seen.append(torch.tensor([int(mask.sum()) for mask in (masks or method.masks).values()]))
        return masks

    method.revise = revise
    train(model, method, 12, torch.optim.SGD(model.parameters(), 0.0))
    assert len(method.reports) == 5
    assert all(bool((after <= before).all()) for before, after in itertools.pairwise(seen))
    for report in method.reports:
        assert report.kept_after >= report.kept_before - 1e-12
    for cls in channel_classes(start):
        if cls.name in method.orders:
            permute(start, cls, method.orders[cls.name])
    for (name, one), two in zip(start.named_parameters(), model.parameters(), strict=True):  # the rate was 0
        mask = method.masks.get(name, torch.ones_like(one, dtype=torch.bool))
        alive = two != 0
        assert torch.equal(two[alive], one[alive]), name
        assert bool((alive <= mask).all())
    state = method.state_dict()
    fresh = SparseByteNN(0.3, total_steps=12, every=2, end=0.9, group=4, rearrange="every")
    fresh.load_state_dict(state)
    fresh.attach(model)
    assert fresh.orders.keys() == method.orders.keys()
    assert all(torch.equal(order, method.orders[name]) for name, order in fresh.orders.items())


def test_first_order_pruning_keeps_what_moves_the_loss_most():
    method = SparseByteNN(0.5, total_steps=4, criterion="taylor", schedule="one-shot", begin=0.5, group=4, search="identity")
    run = Loop(method).run(2)
    run.backward()
    scores = {n: (p * p.grad).detach() for n, p in run.model.named_parameters() if p.dim() == 2}
    assert method.needs_dense_gradient(2)
    assert not method.needs_dense_gradient(3)
    run.optimizer.step()
    for name, score in scores.items():
        sums = KernelGroup(4).tiles(score).abs().reshape(-1)
        units = KernelGroup(4).tiles(method.masks[name].double()).reshape(-1) > 0
        assert int(units.sum()) == count_of(0.5, len(units))
        assert float(sums[units].min()) >= float(sums[~units].max())


def test_no_layer_is_cut_off():
    masks = Loop(SparseByteNN(0.01, total_steps=20)).run(20).sparsifier.masks
    assert all(mask.any() for mask in masks.values())


def test_wrong_settings_are_refused():
    for wrong, word in (
        ({"criterion": "norm"}, "criterion='norm'"), ({"schedule": "linear"}, "schedule='linear'"),
        ({"search": "exact"}, "search='exact'"), ({"rearrange": "never"}, "rearrange='never'"),
        ({"begin": 0.6}, "begin=0.6 is not before end=0.5"), ({"end": 1.5}, "end=1.5"),
        ({"total_steps": 1}, "no mask update fits"),
        ({"criterion": "taylor", "schedule": "one-shot"}, "none at step 0"),
    ):  # fmt: skip
        with pytest.raises(MethodError, match=word):
            SparseByteNN(0.5, **{"total_steps": 40, **wrong})
    with pytest.raises(PatternError):
        SparseByteNN(0.5, total_steps=40, group=0)
