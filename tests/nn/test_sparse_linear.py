from __future__ import annotations

import copy
import io
import itertools
import math
import pickle
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from openwork.core.rng import generator
from openwork.core.select import count_of
from openwork.errors import MaskError, ModelError, OptimizerError, PatternError
from openwork.nn import SparseLinear
from openwork.runtime import sparse_products
from openwork.runtime.kernels.target import VARIABLE, targets
from openwork.runtime.timing import limited_threads
from openwork.sparsifier.prune_grow import prune_and_grow
from openwork.sparsifier.sparsifier import Fixed
from tests.strategies import densities, quick, seeds, tensor

ROUTES = (*targets(), "none")
everywhere = pytest.mark.parametrize("route", ROUTES)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with limited_threads(1):
        yield


def stack(sizes: tuple[int, ...], density: float, seed: int = 0, **options: Any) -> nn.Sequential:
    source = generator(seed, "stack")
    layers: list[nn.Module] = []
    for width, out in itertools.pairwise(sizes):
        layers += [SparseLinear(width, out, density, generator=source, **options), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return tensor(torch.Size(shape), seed, torch.float32)


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, steps: int, first: int = 0
) -> list[float]:
    losses = []
    for step in range(first, first + steps):
        at = torch.randperm(len(x), generator=generator(step, "batch"))[:64]
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x[at]), y[at])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def equal(one: Any, other: Any) -> bool:
    """Tell whether two states hold the same, bit for bit."""
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


# -- what it is -----------------------------------------------------------------------------------------------------------


@given(density=densities, width=st.integers(1, 20), groups=st.integers(1, 6), block=st.sampled_from([1, 2, 4]), seed=seeds)
@quick
def test_the_number_of_entries_is_exact(density: float, width: int, groups: int, block: int, seed: int) -> None:
    layer = SparseLinear(width, groups * block, density, block=block, generator=generator(seed, "layer"))
    assert layer.values.numel() == block * count_of(density, groups * width)
    assert int(layer.mask.sum()) == layer.values.numel()
    twin = SparseLinear(width, groups * block, mask=layer.mask, block=block, generator=generator(seed, "layer"))
    assert torch.equal(twin.columns, layer.columns)
    assert torch.equal(twin.starts, layer.starts)


def test_layers_of_one_generator_differ_and_a_seed_gives_the_same_again() -> None:
    first, second = stack((30, 30, 30), 0.2)[0], stack((30, 30, 30), 0.2)[2]
    again = stack((30, 30, 30), 0.2)[0]
    assert equal(first.state_dict(), again.state_dict())
    assert not torch.equal(first.mask, second.mask)


def test_first_weights_have_the_scale_of_a_dense_layer_of_as_many_inputs() -> None:
    mask = torch.zeros(3, 4000, dtype=torch.bool)
    mask[0, :40], mask[2, :] = True, True
    layer = SparseLinear(4000, 3, mask=mask, generator=generator(0, "scale"))
    few, many = layer.values.detach().split([40, 4000])
    for values, count in ((few, 40), (many, 4000)):
        assert values.abs().max() <= 1 / math.sqrt(count)
        assert values.abs().max() > 0.9 / math.sqrt(count)
    assert many.var() == pytest.approx(1 / 3 / 4000, rel=0.1)


@given(density=densities, seed=seeds, block=st.sampled_from([1, 2, 4]), bias=st.booleans())
@quick
def test_dense_and_back(density: float, seed: int, block: int, bias: bool) -> None:
    linear = nn.Linear(9, 8, bias=bias).requires_grad_(False)
    linear.weight.copy_(numbers(8, 9, seed=seed))
    mask = torch.rand(8 // block, 1, 9, generator=generator(seed, "mask")).expand(-1, block, -1).reshape(8, 9) < density
    layer = SparseLinear.from_dense(linear, mask, block=block)
    assert torch.equal(layer.to_dense().weight, linear.weight * mask)
    assert (layer.bias is None) == (not bias)
    again = SparseLinear.from_dense(layer.to_dense(), block=block)
    assert equal(again.state_dict(), layer.state_dict())
    x = numbers(6, 9, seed=seed)
    assert torch.allclose(layer(x), layer.to_dense()(x), rtol=1e-5, atol=1e-5)


def test_blocks_around_single_weights_are_kept_whole() -> None:
    linear = nn.Linear(3, 4, bias=False)
    with torch.no_grad():
        linear.weight.zero_()[1, 2] = 5.0
    layer = SparseLinear.from_dense(linear, block=2)
    assert layer.mask.nonzero().tolist() == [[0, 2], [1, 2]]
    assert layer.values.tolist() == [0.0, 5.0]
    with pytest.raises(PatternError, match="parts of blocks"):
        SparseLinear.from_dense(linear, linear.weight != 0, block=2)


def test_what_makes_no_sense_is_refused() -> None:
    source = generator(0, "refused")
    mask = torch.ones(4, 5, dtype=torch.bool)
    for density, given_mask in ((None, None), (0.5, mask)):
        with pytest.raises(MaskError, match="one of the two"):
            SparseLinear(5, 4, density, mask=given_mask, generator=source)
    for density in (-0.1, 1.1, math.nan):
        with pytest.raises(MaskError, match="not in"):
            SparseLinear(5, 4, density, generator=source)
    with pytest.raises(PatternError, match="give a bool mask"):
        SparseLinear(4, 5, mask=mask, generator=source)
    for width, out, block in ((0, 4, 1), (5, 0, 1), (5, 3, 2), (5, 6, 3)):
        with pytest.raises(PatternError, match="cannot make a weight"):
            SparseLinear(width, out, 0.5, block=block, generator=source)
    with pytest.raises(ModelError, match="float32"):
        SparseLinear(5, 4, 0.5, generator=source)(torch.ones(2, 5, dtype=torch.float64))


def test_print_says_what_it_is() -> None:
    layer = SparseLinear(10, 8, 0.25, block=2, bias=False, generator=generator(0, "print"))
    assert repr(layer) == "SparseLinear(in_features=10, out_features=8, density=0.25, block=2, bias=False)"


# -- training -------------------------------------------------------------------------------------------------------------


@everywhere
@pytest.mark.parametrize("optimizer", ["Adam", "SGD"])
def test_it_trains_as_the_masked_dense_layer_does(route: str, optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, route)
    sparse = stack((12, 20, 16, 5), 0.3)
    dense = nn.Sequential(*(one.to_dense() if isinstance(one, SparseLinear) else nn.ReLU() for one in sparse)).double()
    masks = {f"{k}.weight": one.mask for k, one in enumerate(sparse) if isinstance(one, SparseLinear)}
    options = {"Adam": {"lr": 1e-2, "eps": 1e-3}, "SGD": {"lr": 0.1, "momentum": 0.9}}[optimizer]
    build = getattr(torch.optim, optimizer)
    x, y = numbers(200, 12), torch.randint(5, (200,), generator=generator(0, "labels"))
    mine, other = build(sparse.parameters(), **options), build(dense.parameters(), **options)
    Fixed(masks).attach(dense, other)
    losses, expected = train(sparse, mine, x, y, 20), train(dense, other, x.double(), y, 20)
    assert losses == pytest.approx(expected, rel=1e-3)
    for one, twin in zip(sparse, dense, strict=True):
        if isinstance(one, SparseLinear):
            assert torch.allclose(one.to_dense().weight.double(), twin.weight, rtol=1e-2, atol=1e-4)


def test_digits_are_learned_as_well_as_by_the_masked_dense_net() -> None:
    digits = load_digits()
    x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    order = torch.randperm(len(x), generator=generator(0, "split"))
    (x, held), (y, truth) = x[order].split([1400, 397]), y[order].split([1400, 397])
    sparse = stack((64, 200, 200, 10), 0.1)
    dense = nn.Sequential(*(one.to_dense() if isinstance(one, SparseLinear) else nn.ReLU() for one in sparse))
    masks = {f"{k}.weight": one.mask for k, one in enumerate(sparse) if isinstance(one, SparseLinear)}
    accuracies = []
    for model, held_masks in ((sparse, None), (dense, masks)):
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        if held_masks:
            Fixed(held_masks).attach(model, optimizer)
        train(model, optimizer, x, y, 150)
        accuracies.append((model(held).argmax(dim=1) == truth).double().mean().item())
    assert min(accuracies) > 0.9
    assert abs(accuracies[0] - accuracies[1]) < 0.03


class Largest(TorchDispatchMode):
    """Remembers the most numbers that any tensor made by an operation has."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for one in tree_leaves(found):
            if isinstance(one, Tensor):
                self.numbers = max(self.numbers, one.untyped_storage().nbytes() // one.element_size())
        return found


@everywhere
@pytest.mark.parametrize("grow", ["random", "gradient"])
def test_nothing_dense_is_ever_made(route: str, grow: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, route)
    monkeypatch.setattr(sparse_products, "PLAIN", 4096)
    size, batch, density = 400, 8, 0.01
    with Largest() as largest:
        model = stack((size, size, size), density)
        optimizer = torch.optim.Adam(model.parameters())
        for _ in range(3):
            for layer in model[::2]:
                layer.scout(generator(0, "scout"))
            model(numbers(batch, size)).sum().backward()
            for layer in model[::2]:
                layer.exchange(0.3, optimizer, generator=generator(0, "exchange"), grow=grow)
            optimizer.step()
        state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    nnz = int(density * size * size)
    assert nnz <= largest.numbers <= max(4 * nnz, 2 * batch * size) < size * size / 10
    kept = [
        tensor for tensor in tree_leaves([*state, [one.grad for one in model.parameters()]]) if isinstance(tensor, Tensor)
    ]
    spent = sum(one.untyped_storage().nbytes() for one in kept)
    values, biases, starts = 2 * nnz, 2 * size, 2 * (size + 1)
    # value, gradient, two moments; column of each entry; starts of each row; the optimizer's counters of steps
    assert spent == 4 * (4 * (values + biases) + values + starts) + 4 * 4
    assert spent < 4 * 4 * 2 * size * size / 20


@pytest.mark.skipif(not targets(), reason="no LLVM on this machine")
@pytest.mark.parametrize("density", [0.01, 0.5])
def test_indices_take_what_the_docstring_says(density: float) -> None:
    """Torch's own memory is not traced: what is counted are the orders and offsets beside the buffers."""

    def step(layer: SparseLinear, batch: int) -> int:
        x = torch.ones(batch, 1000, requires_grad=True)
        layer(x).sum().backward()
        return tracemalloc.get_traced_memory()[0]

    warm = SparseLinear(1000, 500, density, generator=generator(0, "compile"))
    for batch in (128, 100):
        step(warm, batch)
    layer = SparseLinear(1000, 500, density, generator=generator(0, "memory"))
    tracemalloc.start()
    try:
        first, second = step(layer, 128), step(layer, 100)
    finally:
        tracemalloc.stop()
    entries, little = layer.columns.numel(), 200_000
    assert 16 * entries <= first <= 24 * entries + little
    assert 8 * entries <= second - first <= 16 * entries + little


@everywhere
def test_training_goes_on_from_a_state_bit_for_bit(route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, route)
    x, y = numbers(200, 12), torch.randint(5, (200,), generator=generator(0, "labels"))

    def legs(model: nn.Sequential, optimizer: torch.optim.Optimizer, first: int, count: int) -> None:
        for leg in range(first, first + count):
            train(model, optimizer, x, y, 3, 3 * leg)
            for k, layer in enumerate(model[::2]):
                layer.exchange(0.3, optimizer, generator=generator(leg, "exchange", k))

    whole = stack((12, 20, 5), 0.3)
    optimizer = torch.optim.Adam(whole.parameters(), lr=1e-2)
    legs(whole, optimizer, 0, 2)
    file = io.BytesIO()
    torch.save((whole.state_dict(), optimizer.state_dict()), file)
    legs(whole, optimizer, 2, 2)
    file.seek(0)
    model_state, optimizer_state = torch.load(file, weights_only=True)
    resumed = stack((12, 20, 5), 0.3, seed=9)
    again = torch.optim.Adam(resumed.parameters(), lr=1e-2)
    resumed.load_state_dict(model_state)
    again.load_state_dict(optimizer_state)
    legs(resumed, again, 2, 2)
    assert equal(resumed.state_dict(), whole.state_dict())
    assert equal(again.state_dict(), optimizer.state_dict())


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_of_another_density_is_taken_up_by_the_same_parameter(assign: bool) -> None:
    small, large = (SparseLinear(12, 8, density, block=2, generator=generator(0, "load")) for density in (0.1, 0.5))
    x = numbers(3, 12)
    small(x).sum().backward()
    before = small.values
    small.load_state_dict(large.state_dict(), assign=assign)
    assert assign or small.values is before
    assert torch.equal(small(x), large(x))
    small(x).sum().backward()
    assert small.values.grad is not None
    assert small.values.grad.shape == large.values.shape


def test_states_that_hold_no_positions_are_refused_and_change_nothing() -> None:
    layer = SparseLinear(12, 8, 0.3, generator=generator(0, "load"))
    good = copy.deepcopy(layer.state_dict())
    for key, bad in (
        ("columns", good["columns"] + 12),
        ("columns", good["columns"][1:]),
        ("columns", good["columns"].long()),
        ("starts", good["starts"].flip(0)),
        ("values", good["values"][:-1]),
    ):
        with pytest.raises(RuntimeError, match="cannot load"):
            layer.load_state_dict({**good, key: bad})
        assert equal(layer.state_dict(), good)
    with pytest.raises(RuntimeError, match="Missing key"):
        layer.load_state_dict({key: value for key, value in good.items() if key != "columns"})


def test_copies_work_and_are_their_own() -> None:
    model = stack((12, 20, 5), 0.3)
    x = numbers(4, 12)
    y = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), y)
        with torch.no_grad():
            other[0].values.zero_()
        other[0].exchange(0.5, generator=generator(0, "copy"))
        assert torch.equal(model(x), y)


def test_a_graph_made_before_an_exchange_is_refused_not_wrong() -> None:
    layer = SparseLinear(12, 8, 0.3, generator=generator(0, "graph"))
    loss = layer(numbers(3, 12)).sum()
    layer.exchange(0.5, generator=generator(0, "graph"))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# -- exchange -------------------------------------------------------------------------------------------------------------


@everywhere
@pytest.mark.parametrize("block", [1, 2])
def test_growth_by_gradient_is_rigl_when_everything_is_watched(
    route: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, route)
    layer = SparseLinear(12, 8, 0.4, block=block, generator=generator(3, "rigl"))
    mask, weight = layer.mask, layer.to_dense().weight.detach()
    x, grad = numbers(16, 12), numbers(16, 8, seed=1)
    assert layer.scout(generator(0, "all"), 100.0) == int((~mask).sum()) // block
    layer(x).backward(grad)

    def worth(dense: Tensor) -> Tensor:
        return dense.abs().reshape(-1, block, 12).sum(dim=1)

    kept = mask[::block]
    expected = prune_and_grow(kept, worth(weight), worth(grad.t() @ x), 0.3)
    assert not torch.equal(expected, kept)
    count = layer.exchange(0.3, generator=generator(0, "unused"), grow="gradient")
    assert torch.equal(layer.mask[::block], expected)
    assert count == int((expected & ~kept).sum())
    after = layer.to_dense().weight
    both = mask & layer.mask
    assert torch.equal(after[both], weight[both])
    assert not after[layer.mask & ~mask].any()


def test_random_growth_keeps_the_largest_and_starts_new_entries_at_zero() -> None:
    layer = SparseLinear(30, 20, 0.3, generator=generator(0, "set"))
    optimizer = torch.optim.Adam(layer.parameters())
    layer(numbers(16, 30)).pow(2).sum().backward()
    optimizer.step()
    weight, mask, parameter = layer.to_dense().weight.detach(), layer.mask, layer.values
    moment = torch.zeros_like(weight)
    moment[mask] = optimizer.state[layer.values]["exp_avg"]
    count = layer.exchange(0.25, optimizer, generator=generator(0, "grow"))
    assert layer.values is parameter
    assert layer.values.numel() == 180
    assert 0 < count <= 45
    assert int((layer.mask & ~mask).sum()) == count
    largest = weight.abs() >= weight.abs()[mask].sort(descending=True).values[134]
    assert torch.equal(layer.mask & largest, largest)
    new = layer.mask & ~mask
    after, state = torch.full_like(weight, 9.0), torch.full_like(weight, 9.0)
    after[layer.mask], state[layer.mask] = layer.values.detach(), optimizer.state[layer.values]["exp_avg"]
    assert not after[new].any()
    assert not state[new].any()
    assert torch.equal(after[layer.mask & mask], weight[layer.mask & mask])
    assert torch.equal(state[layer.mask & mask], moment[layer.mask & mask])


@pytest.mark.parametrize("density", [0.0, 1.0])
def test_nothing_to_exchange_changes_nothing(density: float) -> None:
    layer = SparseLinear(5, 4, density, generator=generator(0, "none"))
    before = copy.deepcopy(layer.state_dict())
    assert layer.exchange(1.0, generator=generator(0, "grow")) == 0
    assert equal(layer.state_dict(), before)
    assert layer.scout(generator(0, "scout")) == 0
    layer(numbers(3, 5)).sum().backward()
    assert layer.exchange(0.5, generator=generator(0, "grow"), grow="gradient") == 0


def test_exchanges_that_cannot_be_done_are_refused() -> None:
    layer, source = SparseLinear(5, 4, 0.5, generator=generator(0, "refuse")), generator(0, "refuse")
    for share in (-0.1, 1.1, math.nan):
        with pytest.raises(MaskError, match="share"):
            layer.exchange(share, generator=source)
    with pytest.raises(ModelError, match="random or gradient"):
        layer.exchange(0.1, generator=source, grow="magic")  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="call scout"):
        layer.exchange(0.1, generator=source, grow="gradient")
    layer.scout(source)
    with pytest.raises(ModelError, match="call scout"):
        layer.exchange(0.1, generator=source, grow="gradient")
    with pytest.raises(MaskError, match="ratio"):
        layer.scout(source, math.inf)
    other = torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1)
    for optimizer in (other, torch.optim.LBFGS(layer.parameters())):
        with pytest.raises(OptimizerError):
            layer.exchange(0.1, optimizer, generator=source)
    with torch.no_grad():
        layer.values[0] = math.nan
    with pytest.raises(MaskError, match="not finite"):
        layer.exchange(0.1, generator=source)


# -- in company -----------------------------------------------------------------------------------------------------------


def test_under_autocast_it_stays_in_single_precision() -> None:
    model = stack((12, 20, 5), 0.3)
    x = numbers(4, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
        mixed = nn.Sequential(nn.Linear(12, 12), model)(x)
    assert (y.dtype, mixed.dtype) == (torch.float32, torch.float32)
    assert torch.equal(y, model(x))
    mixed.sum().backward()
    assert model[0].values.grad.dtype == torch.float32


def test_relu_in_place_and_views_work() -> None:
    model = stack((12, 20, 5), 0.3)
    model[1] = nn.ReLU(inplace=True)
    x = numbers(4, 3, 12).requires_grad_()
    y = model(x)
    assert y.shape == (4, 3, 5)
    y.sum().backward()
    assert x.grad is not None


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # torch's own look, hidden elsewhere
def test_compiled_models_run_it_between_their_graphs() -> None:
    model = stack((12, 20, 5), 0.3)
    x = numbers(4, 12)
    compiled = torch.compile(model, backend="eager")
    assert torch.equal(compiled(x), model(x))
    compiled(x).sum().backward()
    assert model[0].values.grad is not None


def test_double_precision_and_moves_between_dtypes_work() -> None:
    layer = SparseLinear(12, 8, 0.3, dtype=torch.float64, generator=generator(0, "double"))
    x = numbers(4, 12)
    exact = layer(x.double())
    assert exact.dtype == torch.float64
    single = layer.float()(x)
    assert torch.allclose(single.double(), exact, rtol=1e-5, atol=1e-5)
    assert torch.autograd.gradcheck(layer.double(), (x.double().requires_grad_(),))


def test_the_layer_is_found_from_the_package() -> None:
    code = "import openwork, sys; assert 'torch' not in sys.modules; print(openwork.nn.SparseLinear.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "SparseLinear"
