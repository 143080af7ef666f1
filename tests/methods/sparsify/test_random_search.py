from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from openwork import models
from openwork.core.allocation import erk
from openwork.core.cost import count
from openwork.core.masks import Masks
from openwork.core.rng import generator
from openwork.errors import MaskError, MethodError, ModelError
from openwork.methods.sparsify.random_pruning import RandomPruning
from openwork.methods.sparsify.random_search import (
    NodeSpace,
    RandomSearch,
    WeightSpace,
    WidthSpace,
    as_baseline,
    draw,
    search,
    untrained,
)
from openwork.sparsifier import Fixed, Leg, Probe, Procedure, Sparsifier
from openwork.sparsifier.physical import compact, node_masks


class Task:
    """Clusters, a training function with momentum and weight decay, and a probe that counts its losses."""

    def __init__(self, *shape: int, n: int = 48) -> None:
        self.y = torch.arange(n) % 3
        source = generator(3, "task")
        centres = torch.randn(3, *shape, generator=source, dtype=torch.float64)
        self.x = centres[self.y] + 0.5 * torch.randn(n, *shape, generator=source, dtype=torch.float64)
        self.legs: list[Leg] = []
        self.scored = 0

    def train(self, model: nn.Module, sparsifier: Sparsifier | None, leg: Leg) -> nn.Module:
        self.legs.append(leg)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-3)
        if sparsifier is not None:
            sparsifier.attach(model, optimizer)
        model.train()
        for step in range(leg.steps):
            optimizer.zero_grad()
            rows = slice(step * 16 % 48, step * 16 % 48 + 16)
            F.cross_entropy(model(self.x[rows]), self.y[rows]).backward()
            optimizer.step()
        if sparsifier is not None:
            for name, mask in sparsifier.masks.items():
                gradient = dict(model.named_parameters())[name].grad
                assert gradient is not None
                assert torch.count_nonzero(gradient[~mask]) == 0, name
            sparsifier.finalize()
        return model

    def loss(self, model: nn.Module) -> float:
        self.scored += 1
        with torch.no_grad():
            return float(F.cross_entropy(copy.deepcopy(model).eval()(self.x), self.y))

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(zip(self.x.split(16), self.y.split(16), strict=True))

    def probe(self) -> Probe:
        def accuracy(model: nn.Module) -> float:
            with torch.no_grad():
                return float((model(self.x).argmax(1) == self.y).double().mean())

        return Probe(batches=self.batches, accuracy=accuracy, loss=self.loss)


def mlp(name: str = "mlp-20-16", features: int = 10, classes: int = 3) -> nn.Module:
    return models.build(name, input_shape=(features,), classes=classes, seed=1).double()


class Branching(nn.Module):
    """A functional forward that branches on values."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.ones(6, 10)), nn.Parameter(torch.ones(3, 6))

    def forward(self, x: Tensor) -> Tensor:
        h = F.linear(x, self.a)
        return F.linear(F.relu(h) if h.sum() > 0 else h, self.b)


# ---- the node space ---------------------------------------------------------------------------------------------------


def test_the_cards_weight_density() -> None:
    model = models.build("mlp-512-512", input_shape=(784,), classes=10, seed=0)
    space = NodeSpace(model, node_density=0.5)
    assert space.counts == {"layers.1": 256, "layers.3": 256}
    assert (space.weights(space.counts), space.total) == (268_800, 668_672)
    assert round(space.density, 5) == 0.40199
    masks = draw(space, 0, 0)
    weights = Masks({name: mask for name, mask in masks.items() if name.endswith("weight")})
    assert (weights.nnz(), weights.total()) == (268_800, 668_672)
    assert [int(masks[f"layers.{i}.bias"].sum()) for i in (1, 3)] == [256, 256]
    assert NodeSpace(model, 268_800 / 668_672).counts == space.counts  # and back


@given(
    widths=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    features=st.integers(1, 20),
    classes=st.integers(1, 6),
    share=st.floats(0.01, 1.0),
)
@settings(max_examples=40, deadline=None)
def test_delta_of_any_perceptron(widths: list[int], features: int, classes: int, share: float) -> None:
    sizes = [features, *widths, classes]
    layers = [nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
    model = nn.Sequential(*[part for layer in layers for part in (layer, nn.ReLU())][:-1])
    space = NodeSpace(model, node_density=share)
    kept = [max(1, math.floor(share * n + 0.5)) for n in widths]
    assert list(space.counts.values()) == kept
    left = [features, *kept, classes]
    exact = sum(a * b for a, b in itertools.pairwise(left))
    assert space.weights(space.counts) == exact
    masks = draw(space, 7, 0)
    assert sum(int(masks[f"{2 * i}.weight"].sum()) for i in range(len(layers))) == exact
    for i, k in enumerate(kept):
        rows = masks[f"{2 * i}.weight"].any(dim=1)
        assert int(rows.sum()) == k
        assert torch.equal(rows, masks[f"{2 * i}.bias"])
        assert torch.equal(rows, masks[f"{2 * i + 2}.weight"].any(dim=0))


@given(widths=st.lists(st.integers(1, 12), min_size=1, max_size=3), target=st.floats(0.05, 1.0))
@settings(max_examples=40, deadline=None)
def test_the_node_density_is_solved_for_the_nearest_weight_density(widths: list[int], target: float) -> None:
    sizes = [4, *widths, 3]
    layers = [nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
    model = nn.Sequential(*layers)
    reachable = set()
    for rate in {0.0} | {(k - 0.5) / n + 1e-9 for n in widths for k in range(1, n + 1)}:  # every configuration
        left = [4, *[max(1, math.floor(rate * n + 0.5)) for n in widths], 3]
        reachable.add(sum(a * b for a, b in itertools.pairwise(left)))
    total = max(reachable)
    if target * total < min(reachable) - 1e-9:
        with pytest.raises(MaskError, match="cannot be reached by removing nodes"):
            NodeSpace(model, target)
        return
    space = NodeSpace(model, target)
    nearest = min(abs(weights - target * total) for weights in reachable)
    assert abs(space.weights(space.counts) - target * total) == pytest.approx(nearest, abs=1e-6)
    assert min(space.counts.values()) >= 1


def test_every_node_is_equally_likely() -> None:
    space = NodeSpace(mlp("mlp-10"), node_density=0.3)
    hits = torch.zeros(10)
    for index in range(600):
        hits[space.kept(generator(5, "draw", index))["layers.1"]] += 1
    assert hits.sum() == 600 * 3
    assert (hits - 180).abs().max() < 5 * math.sqrt(600 * 0.3 * 0.7)


def test_permuting_nodes_and_masks_leaves_the_score() -> None:
    task, model = Task(10), mlp()
    kept = NodeSpace(model, node_density=0.4).kept(generator(0, "draw", 0))
    order = torch.randperm(20, generator=generator(0, "permute"))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.layers[1].weight.copy_(model.layers[1].weight[order])
        twin.layers[1].bias.copy_(model.layers[1].bias[order])
        twin.layers[3].weight.copy_(model.layers[3].weight[:, order])
    moved = kept | {"layers.1": order.argsort()[kept["layers.1"]]}
    losses = [untrained(m, task.loss)(node_masks(m, k)) for m, k in ((model, kept), (twin, moved))]
    assert losses[0] == pytest.approx(losses[1], abs=1e-12)
    assert losses[0] != pytest.approx(untrained(twin, task.loss)(node_masks(twin, kept)), abs=1e-6)


def test_excluded_layers_stay_whole_and_count_for_nothing() -> None:
    model = mlp()
    space = NodeSpace(model, node_density=0.5, exclude=["head.weight"])
    assert list(space.counts) == ["layers.1"]  # the nodes of layers.3 touch the head
    assert space.total == 20 * 10 + 16 * 20
    assert set(draw(space, 0, 0)) == {"layers.1.weight", "layers.1.bias", "layers.3.weight"}


# ---- the other spaces -------------------------------------------------------------------------------------------------


def test_weight_space_is_random_pruning() -> None:
    model = mlp()
    space = WeightSpace(model, 0.2, allocation="erk")
    masks = draw(space, 3, 1)
    shapes = {name: mask.shape for name, mask in masks.items()}
    assert masks.densities() == erk(shapes, 0.2)
    pruning = RandomPruning(0.2, ratios="erk")
    pruning.generator = generator(3, "draw", 1)
    pruning.attach(copy.deepcopy(model))
    assert all(torch.equal(masks[name], pruning.masks[name]) for name in shapes)
    pairs = draw(WeightSpace(mlp("mlp-20-16", features=8), 0.5, pattern="2:4", exclude=["head"]), 0, 0)
    assert all(int(mask.reshape(-1, 4).sum(1).unique()) == 2 for mask in pairs.values())


def test_width_space_keeps_the_weight_budget() -> None:
    model = models.build("mlp-60-50", input_shape=(40,), classes=5, seed=0)
    space = WidthSpace(model, 0.3)
    seen = set()
    for index in range(12):
        kept = space.kept(generator(0, "draw", index))
        counts = {name: len(nodes) for name, nodes in kept.items()}
        seen.add(tuple(counts.values()))
        step = 40 + 60 + 50 + 5  # one node more or less in each layer changes less than this
        assert abs(space.weights(counts) - 0.3 * space.total) <= step / 2
        masks = draw(space, 0, index)
        assert sum(int(masks[f"{n}.weight"].sum()) for n in ("layers.1", "layers.3", "head")) == space.weights(counts)
    assert len(seen) > 6


# ---- the search -------------------------------------------------------------------------------------------------------


class Numbers:
    """A space whose draws are one random number in a mask's clothes, for simulated scores."""

    def draw(self, source: torch.Generator) -> Masks:
        bits = torch.randint(0, 2, (50,), generator=source)
        return Masks({"weight": bits.bool()})

    @staticmethod
    def score(masks: Masks) -> float:
        places = 0.5 ** torch.arange(1, 51, dtype=torch.float64)
        return float((masks["weight"] * places).sum())  # uniform on [0, 1)


@pytest.mark.parametrize(("budget", "quantile"), [(1, 0.3), (5, 0.2), (12, 0.1)])
def test_the_best_of_b_falls_below_a_quantile_as_often_as_it_must(budget: int, quantile: float) -> None:
    trials = 500
    hits = sum(search(Numbers(), Numbers.score, budget=budget, seed=seed).score <= quantile for seed in range(trials))
    wanted = 1 - (1 - quantile) ** budget
    assert abs(hits / trials - wanted) < 4 * math.sqrt(wanted * (1 - wanted) / trials)


@given(seed=st.integers(0, 1000), budget=st.integers(1, 15))
@settings(max_examples=30, deadline=None)
def test_prefix_property(seed: int, budget: int) -> None:
    small = search(Numbers(), Numbers.score, budget=budget, seed=seed)
    large = search(Numbers(), Numbers.score, budget=budget + 5, seed=seed)
    assert large.scores[:budget] == small.scores
    assert large.score <= small.score
    assert small.score == min(small.scores)
    assert torch.equal(small.masks["weight"], draw(Numbers(), seed, small.best_index)["weight"])


def test_best_median_and_worst_and_ties_by_draw_order() -> None:
    values = [3.0, 1.0, 2.0, 1.0, 3.0, 2.0]

    def found(keep: Any, budget: int) -> int:
        queue = iter(values)
        return search(Numbers(), lambda _: next(queue), budget=budget, keep=keep).best_index

    assert found("min", 6) == 1
    assert found("max", 6) == 0
    assert found("median", 5) == 2  # 1 1 2 3 3
    assert found("median", 6) == 2  # 1 1 2 2 3 3: the lower middle, its first draw
    with pytest.raises(MethodError, match="keep='best'"):
        found("best", 3)
    with pytest.raises(MethodError, match="budget=0"):
        found("min", 0)
    with pytest.raises(MethodError, match="draw 0 is not a number"):
        search(Numbers(), lambda _: math.nan, budget=2)


def test_a_scorer_may_train_its_copy() -> None:
    task, model = Task(10), mlp()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def after_training(copy_: nn.Module) -> float:
        return task.loss(task.train(copy_, None, Leg("score", 2)))

    space = NodeSpace(model, node_density=0.5)
    scores = search(space, untrained(model, after_training), budget=3).scores
    assert len(set(scores)) == 3
    assert scores == search(space, untrained(model, after_training), budget=3).scores
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_as_baseline_spends_what_the_other_method_spent() -> None:
    model = models.build("mlp-20-16", input_shape=(10,), classes=3, seed=0)
    cost, masks = count(model, torch.zeros(8, 10)), draw(NodeSpace(model, node_density=0.5), 0, 0)
    forward = 2 * 8 * (10 * 10 + 10 * 8 + 8 * 3)  # products of the kept nodes, batch of 8
    spent = 100 * 3 * forward + 7.5 * 16 * forward
    assert as_baseline(spent, cost, masks=masks, total_steps=100) == 7
    assert as_baseline(spent, cost, masks=masks, total_steps=100, scoring_batches=8) == 15
    with pytest.raises(MethodError, match="do not pay for"):
        as_baseline(spent, cost, total_steps=100)  # the dense network costs more


# ---- the procedure ----------------------------------------------------------------------------------------------------


def run(task: Task, model: nn.Module, *args: Any, **options: Any) -> tuple[RandomSearch, nn.Module]:
    method = RandomSearch(*args, total_steps=12, **options)
    return method, method.run(model, task.train, task.probe())


@pytest.mark.parametrize("space", ["nodes", "weights", "widths"])
def test_the_best_draw_is_trained_with_its_mask_held(space: str) -> None:
    task, model = Task(10), mlp()
    start = copy.deepcopy(model)
    method, trained = run(task, model, 0.3, space=space, budget=6, seed=2, scoring_batches=3)
    assert isinstance(method, Procedure)
    assert method.found is not None
    scores = [untrained(start, task.loss)(draw(method.space(start), 2, index)) for index in range(6)]
    assert list(method.found.scores) == scores
    assert method.found.best_index == scores.index(min(scores))
    assert [(leg.name, leg.steps) for leg in task.legs] == [("train", 12)]
    assert method.steps == 12 + 6 * 3 / 3
    method.masks.check(trained)
    weights = Masks({n: m for n, m in method.masks.items() if n.endswith("weight")})
    assert method.weight_density == weights.density() == pytest.approx(0.3, abs=0.03)
    assert weights.total() == 20 * 10 + 16 * 20 + 3 * 16
    assert (method.kept is None) == (method.node_density is None) == (space == "weights")


def test_removed_nodes_stay_zero_and_the_small_network_trains_the_same() -> None:
    task, model = Task(10), mlp()
    start = copy.deepcopy(model)
    method, trained = run(task, model, node_density=0.5, budget=4)
    assert method.kept is not None
    assert method.node_density == 0.5
    assert method.density == method.weight_density == (10 * 10 + 10 * 8 + 8 * 3) / (10 * 20 + 20 * 16 + 16 * 3)
    gone = torch.ones(20, dtype=torch.bool)
    gone[method.kept["layers.1"]] = False
    assert torch.count_nonzero(trained.layers[1].weight[gone]) == 0
    assert torch.count_nonzero(trained.layers[1].bias[gone]) == 0
    assert torch.count_nonzero(trained.layers[3].weight[:, gone]) == 0
    assert torch.count_nonzero(trained.layers[1].weight[~gone]) == 100
    small = compact(start, method.kept)
    masked = copy.deepcopy(start)
    method.masks.apply(masked)
    assert (masked(task.x) - small(task.x)).abs().max() < 1e-6
    assert untrained(start, lambda m: m(task.x).sum())(method.masks) == pytest.approx(float(small(task.x).sum().detach()))
    task.train(small, None, Leg("train", 12))
    with torch.no_grad():
        assert (trained(task.x) - small(task.x)).abs().max() < 1e-6
        assert (trained(task.x) - compact(trained, method.kept)(task.x)).abs().max() < 1e-6


@pytest.mark.parametrize(("name", "shape"), [("cnn", (1, 8, 8)), ("resnet8", (3, 8, 8))])
def test_convolutional_and_residual_networks(name: str, shape: tuple[int, ...]) -> None:
    task = Task(*shape)
    model = models.build(name, input_shape=shape, classes=3, seed=0, options={"width": 4} if name == "resnet8" else {})
    method, trained = run(task, model.double(), 0.25, budget=2, scoring_batches=1)
    assert method.kept is not None
    assert method.weight_density == pytest.approx(0.25, abs=0.05)
    norms = [n for n, m in trained.named_modules() if isinstance(m, nn.BatchNorm2d) and "downsample" not in n]
    for norm in norms:  # scale and shift of a removed channel are held at zero
        gone = ~method.masks[f"{norm}.weight"]
        layer = trained.get_submodule(norm)
        assert gone.any()
        assert torch.count_nonzero(layer.weight[gone]) == torch.count_nonzero(layer.bias[gone]) == 0
    trained.eval()
    with torch.no_grad():
        assert (trained(task.x) - compact(trained, method.kept).eval()(task.x)).abs().max() < 1e-6


def test_a_budget_of_one_is_the_random_arm_bit_for_bit() -> None:
    task, model = Task(10), mlp()
    start = copy.deepcopy(model)
    method, trained = run(task, model, 0.3, budget=1, seed=9)
    random = task.train(start, Fixed(draw(NodeSpace(start, 0.3), 9, 0)), Leg("train", 12))
    for name, tensor in trained.state_dict().items():
        assert tensor.numpy().tobytes() == random.state_dict()[name].numpy().tobytes()
    assert method.steps == 12 + 16 / 3


def test_more_draws_never_start_higher_and_the_worst_starts_highest() -> None:
    task = Task(10)
    starts: dict[tuple[str, int], float] = {}
    for keep, budget in (("min", 1), ("min", 4), ("min", 10), ("median", 10), ("max", 10)):
        method, _ = run(task, mlp(), 0.2, budget=budget, keep=keep, seed=4)
        assert method.found is not None
        starts[keep, budget] = method.found.score
    assert starts["min", 10] <= starts["min", 4] <= starts["min", 1]
    assert starts["min", 10] < starts["median", 10] < starts["max", 10]


def test_a_scorer_and_a_space_of_ones_own() -> None:
    task, model = Task(10), mlp()

    class Prefixes:
        """Keeps the first nodes of the hidden layer."""

        def draw(self, source: torch.Generator) -> Masks:
            count_ = int(torch.randint(1, 17, (1,), generator=source))
            return node_masks(model, {"layers.3": torch.arange(count_)})

    make: Callable[[nn.Module], Prefixes] = lambda _: Prefixes()  # noqa: E731
    method, trained = run(
        task, model, 0.5, space=make, budget=5, keep="max", scorer=lambda m: float(torch.count_nonzero(m.head.weight))
    )
    assert method.found is not None
    assert task.scored == 0
    sizes = [int(draw(Prefixes(), 0, i)["head.weight"].sum()) for i in range(5)]
    assert list(method.found.scores) == sizes
    assert int(method.masks["head.weight"].sum()) == max(sizes)
    method.masks.check(trained)


def test_a_network_that_cannot_be_followed_is_refused_with_the_remedy() -> None:
    task = Task(10)
    with pytest.raises(ModelError, match=r"cannot be traced .*mask single weights"):
        run(task, Branching().double(), 0.5)
    with pytest.raises(MaskError, match=r"no nodes of Linear can be removed .*space='weights'"):
        run(task, nn.Linear(10, 3).double(), 0.5)
    method, trained = run(task, Branching().double(), 0.5, space="weights", budget=2)
    assert method.weight_density == 0.5
    method.masks.check(trained)


@pytest.mark.parametrize(("options", "error", "words"), [
    ({"space": "edges"}, MethodError, "use nodes, weights, widths"),
    ({"keep": "best"}, MethodError, "keep='best'"),
    ({"budget": 0}, MethodError, "budget=0"),
    ({"total_steps": 0}, MethodError, "total_steps=0"),
    ({"scoring_batches": 0}, MethodError, "scoring_batches=0"),
    ({"density": None}, MaskError, "either density"),
    ({"node_density": 0.5}, MaskError, "either density"),
    ({"density": 0.0}, MaskError, r"not in \(0, 1\]"),
    ({"density": None, "node_density": 1.5}, MaskError, r"not in \(0, 1\]"),
    ({"density": None, "node_density": 0.5, "space": "weights"}, MethodError, "goes with space='nodes'"),
    ({"pattern": "2:4"}, MethodError, "use space='weights'"),
])  # fmt: skip
def test_settings_that_make_no_sense_are_refused(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        RandomSearch(**{"density": 0.5, "total_steps": 10, **options})
