import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from openwork import models
from openwork.core.rng import generator
from openwork.errors import ModelError
from openwork.runtime import chaining, modules
from openwork.runtime.graph import graft, tune
from openwork.runtime.graph.island import Island
from openwork.runtime.graph.ops import Conv, Way
from openwork.runtime.kernels.target import VARIABLE, host, targets
from openwork.runtime.timing import limited_threads
from tests.runtime.graph.nets import Branching, Broken, Headed, InPlace, Plain, Residual, Squeeze, close, thinned

pytestmark = pytest.mark.skipif(not targets(), reason="there is no LLVM on this machine")


@pytest.fixture(params=list(targets()))
def target(request: Any, monkeypatch: Any) -> str:
    monkeypatch.setenv(VARIABLE, request.param)
    return str(request.param)


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed, "images"))


def grafted(model: nn.Module, x: Any) -> tuple[nn.Module, list[Island]]:
    fast = graft.twin(model)
    return fast, graft.graft(fast, x)


NETS = {
    "residual": lambda: Residual(),
    "strided residual": lambda: Residual(stride=2),
    "squeeze": Squeeze,
    "in place": InPlace,
    "pools": lambda: Plain(nn.Conv2d(3, 8, 7, 2, 3), nn.ReLU6(), nn.MaxPool2d(3, 2, 1), nn.Conv2d(8, 9, 1), nn.AvgPool2d(2)),
    "dilated": lambda: Plain(nn.Conv2d(3, 8, 3, 1, 2, dilation=2), nn.GELU(), nn.Conv2d(8, 5, (1, 3), padding=(0, 1))),
    "grouped": lambda: Plain(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 12, 3, 1, 1, groups=4), nn.SiLU(), nn.BatchNorm2d(12)),
    "valid": lambda: Plain(nn.Conv2d(3, 6, 4), nn.Tanh(), nn.Conv2d(6, 7, 5, 3), nn.Sigmoid()),
    "wide border": lambda: Plain(nn.Conv2d(3, 6, 3, padding=4), nn.Hardtanh(-0.2, 0.3), nn.Conv2d(6, 7, 2, padding="same")),
    "depthwise": lambda: Plain(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, 2, 1, groups=8), nn.ReLU(), nn.Conv2d(8, 8, 1)),
}


@pytest.mark.parametrize("name", NETS)
def test_islands_give_the_outputs_of_the_layers_for_any_batch_and_size(name: str, target: str) -> None:
    model = thinned(NETS[name]())
    channels = next(m for m in model.modules() if isinstance(m, nn.Conv2d)).in_channels
    fast, islands = grafted(model, images(1, channels, 16, 18))
    assert len(islands) == 1
    for shape in ((1, 16, 18), (2, 16, 18), (3, 13, 15), (1, 31, 9), (5, 12, 12)):
        x = images(shape[0], channels, *shape[1:], seed=shape[1])
        assert close(fast(x), model, x), shape


@pytest.mark.parametrize("layout", ["channels last", "slice", "transposed", "expanded"])
def test_inputs_may_have_any_strides(layout: str, target: str) -> None:
    model = thinned(Residual(3))
    x = images(2, 3, 10, 12)
    fast, _ = grafted(model, x)
    given_x = {
        "channels last": x.contiguous(memory_format=torch.channels_last),
        "slice": images(4, 7, 20, 12)[::2, 2:5, 3:13],
        "transposed": images(2, 3, 12, 10).transpose(2, 3),
        "expanded": images(1, 1, 10, 12).expand(2, 3, 10, 12),
    }[layout]
    assert torch.equal(fast(given_x), fast(given_x.contiguous()))
    assert close(fast(given_x), model, given_x)


def test_every_result_is_the_same_bits_for_all_threads_ways_and_pieces(target: str, monkeypatch: Any) -> None:
    model, x = thinned(Residual()), images(5, 12, 14, 14)
    fast, (island,) = grafted(model, x)
    expected = fast(x)
    lanes = host().lanes  # type: ignore[union-attr]
    for block, vectors, part in ((1, 1, 3), (1, 3, 1000), (2, 2, 7), (4, 1, 20)):
        plot = island.piece(((5, 12, 14, 14),))
        ways = {}
        for n, op in enumerate(island.chain.ops):
            if isinstance(op, Conv):
                ways[op.spot(plot.planes[1 + n])] = Way(block, vectors, part)
        island.set_ways(ways)
        for count in (1, 2, 3):
            with limited_threads(count):
                assert torch.equal(fast(x), expected), (block, vectors, part, count, lanes)
    monkeypatch.setattr("openwork.runtime.graph.island.RUN_BYTES", 1)
    island.set_ways({})
    assert torch.equal(fast(x), expected)
    assert torch.equal(torch.cat([fast(one[None]) for one in x]), expected)


def test_what_is_not_known_stays_torch_between_islands() -> None:
    model, x = thinned(Broken()), images(2, 3, 9, 8)
    fast, islands = grafted(model, x)
    assert len(islands) == 2
    with torch.no_grad():
        for found, expected in zip(fast(x), model(x), strict=True):
            torch.testing.assert_close(found, expected)


def test_parts_of_a_model_that_cannot_be_traced_get_islands() -> None:
    model, x = thinned(Branching()), images(2, 3, 9, 8)
    fast, islands = grafted(model, x)
    assert len(islands) == 2
    assert {name for island in islands for name in island.layers} >= {"body.0", "body.2", "other.0", "other.1"}
    assert close(fast(x), model, x)


@pytest.mark.parametrize("format", ["nm", "few", "sell", "spmm", "csr_scipy", "csr_torch", "chained"])
def test_packed_layers_and_parts_that_cannot_be_traced_stay_whole_in_the_graph(format: str) -> None:
    model, x = thinned(Headed()), images(2, 3, 9, 8)
    fast = graft.twin(model)
    for name in ("head.0", "head.2"):
        layer = model.get_submodule(name)
        layer.weight.data[:, ::2] = 0.0
        fast.set_submodule(name, modules.pack(layer, chaining.FORMAT if format == "chained" else format))
    if format == "chained":
        chaining.restore(fast, ["head"])
    assert [island.layers for island in graft.graft(fast, x)] == [("first",), ("second",)]
    assert close(fast(x), model, x)


def test_modules_with_hooks_keep_them() -> None:
    model, x, seen = thinned(Plain(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1))), images(1, 3, 5, 5), []
    model.layers[1].register_forward_hook(lambda *_: seen.append(1))
    fast, islands = grafted(model, x)
    assert [island.layers for island in islands] == [("layers.0",)]
    seen.clear()
    fast(x)
    assert seen == [1]


def test_nothing_is_grafted_without_kernels_or_convolutions(monkeypatch: Any) -> None:
    assert grafted(nn.Linear(3, 3), images(2, 3))[1] == []
    monkeypatch.setenv(VARIABLE, "none")
    assert grafted(thinned(Residual()), images(1, 12, 5, 5))[1] == []


def test_an_input_that_does_not_fit_is_refused_in_one_sentence() -> None:
    fast, _ = grafted(thinned(Residual()), images(1, 12, 8, 8))
    with pytest.raises(ModelError, match="take float32 images"):
        fast(images(1, 12, 8, 8).double())


def test_an_empty_batch_gives_an_empty_output() -> None:
    model = thinned(Residual())
    fast, _ = grafted(model, images(1, 12, 8, 8))
    assert fast(images(0, 12, 8, 8)).shape == (0, 24, 8, 8)


def test_copies_and_pickles_run_by_themselves() -> None:
    model, x = thinned(Squeeze()), images(2, 3, 12, 12)
    fast, (island,) = grafted(model, x)
    expected = fast(x)
    assert torch.equal(copy.deepcopy(fast)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(island))(x), expected)


def test_a_nan_reaches_the_pixels_that_read_it_and_no_others(target: str) -> None:
    model = thinned(Plain(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU()), density=1.0)
    x = images(1, 2, 8, 9)
    fast, _ = grafted(model, x)
    x[0, 1, 3, 4] = torch.nan
    with torch.no_grad():
        assert torch.equal(fast(x).isnan(), model(x).isnan())


def test_eight_threads_get_right_answers_and_leave_no_memory_behind() -> None:
    model = thinned(Squeeze())
    batches = [images(1 + i % 3, 3, 16, 16, seed=i) for i in range(8)]
    fast, (island,) = grafted(model, batches[0])
    expected = [fast(x) for x in batches]
    wrong: list[int] = []

    def work(i: int) -> None:
        wrong.extend(i for _ in range(60) if not torch.equal(fast(batches[i]), expected[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(island._pool) <= 8


def test_tuning_and_profiles_name_every_product() -> None:
    model, x = thinned(Residual()), images(1, 12, 14, 14)
    fast, (island,) = grafted(model, x)
    before = fast(x)
    ways = graft.tuned({island: (tuple(x.shape),)}, 1)
    assert len(ways) == sum(isinstance(op, Conv) for op in island.chain.ops) == 3
    assert torch.equal(fast(x), before)
    rows = tune.profile(island.piece((tuple(x.shape),)), host(), 1)  # type: ignore[arg-type]
    assert {row.layer for row in rows if row.layer} == {"one", "two", "down"}
    assert all(row.ms > 0 for row in rows)


@pytest.mark.parametrize(
    ("name", "side", "options"),
    [
        ("mobilenet-v1", 32, {"multiplier": 0.25}), ("mobilenet-v2", 64, {"multiplier": 0.25}), ("resnet18", 64, {}),
        ("resnet20", 32, {}), ("efficientnet-b0", 64, {}), ("cnn", 28, {}), ("wrn-16-2", 32, {}), ("lenet5", 28, {}),
    ],
)  # fmt: skip
def test_reference_networks_run_in_islands(name: str, side: int, options: dict[str, float]) -> None:
    channels = 1 if name in ("cnn", "lenet5") else 3
    model = thinned(models.build(name, input_shape=(channels, side, side), classes=10, seed=0, options=options))
    x = images(2, channels, side, side)
    fast, islands = grafted(model, x)
    assert islands
    assert close(fast(x), model, x)


@settings(max_examples=40, deadline=None)
@given(
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    stride=st.integers(1, 3),
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    dilation=st.integers(1, 2),
    channels=st.tuples(st.integers(1, 7), st.integers(1, 9)),
    size=st.tuples(st.integers(1, 19), st.integers(1, 37)),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    batch=st.integers(1, 3),
    name=st.sampled_from(list(targets())),
)
def test_a_convolution_equals_torchs_for_any_geometry(
    kernel: tuple[int, int], stride: int, padding: tuple[int, int], dilation: int, channels: tuple[int, int],
    size: tuple[int, int], density: float, batch: int, name: str,
) -> None:  # fmt: skip
    if any(n + 2 * p < d for n, p, d in zip(size, padding, (dilation * (k - 1) + 1 for k in kernel), strict=True)):
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, name)
        model = thinned(Plain(nn.Conv2d(*channels, kernel, stride, padding, dilation), nn.ReLU()), density)
        x = images(batch, channels[0], *size)
        fast, islands = grafted(model, x)
        assert len(islands) == 1
        assert close(fast(x), model, x)
