from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from openwork.core.rng import generator
from openwork.errors import ModelError
from openwork.runtime import formats, modules
from openwork.runtime.bounds import bound
from openwork.runtime.modules import PackedConv1D, PackedConv2d, PackedLinear, obstacle, pack

GENERAL = [name for name in formats.names() if name not in ("block", "nm")]
"""Formats that take any weight."""


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def thinned(layer: Any, density: float) -> Any:
    draw = generator(0, "modules")
    layer.weight.data = torch.randn(layer.weight.shape, generator=draw, dtype=layer.weight.dtype)
    layer.weight.data[torch.rand(layer.weight.shape, generator=draw) >= density] = 0
    return layer


@pytest.mark.parametrize("format", GENERAL)
@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
def test_linear_within_the_bound(format: str, density: float) -> None:
    layer = thinned(nn.Linear(40, 30), density)
    x = torch.randn(2, 5, 40, generator=generator(0, "x"))
    twin = pack(layer, format)
    assert isinstance(twin, PackedLinear)
    exact = x.double() @ layer.weight.double().t() + layer.bias.double()
    assert bool(((twin(x).double() - exact).abs() <= bound(layer.weight, layer.bias, x)).all())


KERNELS = [
    {"kernel_size": 1},
    {"kernel_size": 1, "stride": 2},
    {"kernel_size": 1, "padding": 1},
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "stride": 2, "padding": 1, "bias": False},
    {"kernel_size": (2, 3), "stride": (1, 2), "padding": (0, 2), "dilation": (2, 1)},
    {"kernel_size": (2, 4), "padding": "same", "dilation": (1, 3)},
    {"kernel_size": 5, "padding": "valid"},
]


@pytest.mark.parametrize("settings", KERNELS, ids=str)
@pytest.mark.parametrize("format", GENERAL)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_convolutions_within_the_bound(settings: dict[str, Any], format: str) -> None:
    layer = thinned(nn.Conv2d(3, 7, **settings), 0.3)
    twin = pack(layer, format)
    assert isinstance(twin, PackedConv2d)
    draw = generator(0, "conv")
    first = torch.randn(4, 3, 13, 11, generator=draw)
    inputs = [
        first,
        first[:1],
        first[0],
        first[:0],
        first.to(memory_format=torch.channels_last),
        torch.randn(2, 3, 13, 22, generator=draw)[..., ::2],
        first[:1].expand(3, 3, 13, 11),
        torch.randn(3, 3, 13, 12, generator=draw)[1:, :, :, :11],
    ]
    for x in inputs:
        exact = layer.double()(x.double()).detach()
        size = functional.conv2d(x.double().abs(), layer.weight.abs(), None, layer.stride, layer.padding, layer.dilation)
        bias = 0.0 if layer.bias is None else layer.bias.abs()[:, None, None]
        terms = (layer.weight != 0).flatten(1).sum(1)[:, None, None] + 1
        found = twin(x)
        assert found.shape == exact.shape
        assert not found.requires_grad
        assert bool(((found - exact).abs() <= 2 * terms * torch.finfo(torch.float32).eps * (size + bias)).all())
        layer.float()


@pytest.mark.parametrize(("rows", "columns"), list(itertools.product([1, 2, 3], repeat=2)))
def test_padding_same_is_torchs(rows: int, columns: int) -> None:
    layer = nn.Conv2d(1, 1, (rows, columns), padding="same", dilation=(1, 2))
    left_right_top_bottom = modules._padding("same", (rows, columns), (1, 2))
    assert left_right_top_bottom == layer._reversed_padding_repeated_twice


class Own(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x


def test_obstacles() -> None:
    hooked, empty = nn.Linear(2, 2), nn.Linear(2, 2)
    empty.weight = nn.Parameter(torch.empty(2, 0))
    hooked.register_forward_hook(lambda *_: None)
    cases = {
        "forward of its own": Own(2, 2),
        "groups": nn.Conv2d(4, 4, 3, groups=2),
        "pads by reflect": nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
        "neither": nn.Conv1d(2, 2, 1),
        "projects its state": nn.LSTM(4, 4, proj_size=2),
        "is parametrized": nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)),
        "bfloat16 on": nn.GRU(2, 2, dtype=torch.bfloat16),
        "hooks": hooked,
        "meta": nn.Linear(2, 2, device="meta"),
        "bfloat16": nn.Linear(2, 2, dtype=torch.bfloat16),
        "no weight": empty,
    }
    for words, layer in cases.items():
        assert words in (obstacle(layer) or "")
    assert obstacle(nn.Linear(2, 2)) is None
    assert obstacle(nn.Conv2d(2, 2, 3)) is None
    assert obstacle(nn.LSTM(2, 2, dropout=0.5, num_layers=2, bidirectional=True)) is None
    assert obstacle(nn.GRU(2, 2, bias=False)) is None
    assert obstacle(conv1d(2, 3)) is None


@pytest.mark.parametrize("format", GENERAL)
@pytest.mark.parametrize("layer", [nn.Linear(4, 3), nn.Conv2d(2, 3, 2, bias=False)], ids=["linear", "conv"])
def test_state_copies_and_pickles_are_the_layers(layer: Any, format: str) -> None:
    twin = pack(thinned(layer, 0.5), format)
    state = twin.state_dict()
    assert state.keys() == layer.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in layer.state_dict().items())
    x = torch.randn(2, 2, 5, 4, generator=generator(0, "x"))
    for other in (copy.deepcopy(twin), pickle.loads(pickle.dumps(twin))):
        assert torch.equal(other(x), twin(x))
        assert other.packed is twin.packed or other is not twin
    assert f"format={format}" in repr(twin)
    assert not list(twin.parameters())
    with pytest.raises(RuntimeError, match="load into the original model"):
        nn.Sequential(twin).load_state_dict({"0." + name: value for name, value in state.items()})


def conv1d(width: int, out: int) -> Any:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(out, width)


@pytest.mark.parametrize("format", GENERAL)
def test_conv1d_of_transformers(format: str) -> None:
    layer = thinned(conv1d(20, 30), 0.3)
    layer.bias.data.normal_(generator=generator(0, "bias"))
    x = torch.randn(2, 7, 20, generator=generator(0, "x"))
    twin = pack(layer, format)
    assert isinstance(twin, PackedConv1D)
    exact = x.double() @ layer.weight.double() + layer.bias.double()
    assert bool(((twin(x).double() - exact).abs() <= bound(layer.weight.t(), layer.bias, x)).all())
    assert twin.weight.shape == (20, 30)
    state = twin.state_dict()
    assert state.keys() == layer.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in layer.state_dict().items())
    same_name = type("Conv1D", (nn.Module,), {})()
    assert "neither" in (obstacle(same_name) or "")


@pytest.mark.parametrize("format", ["csr_torch", "sell", "spmm"])
@pytest.mark.parametrize("layer", [nn.Linear(24, 10), nn.Conv2d(6, 10, 2)], ids=["linear", "conv"])
def test_what_follows_is_applied(layer: Any, format: str) -> None:
    layer = thinned(layer, 0.5)
    shape = (3, 24) if isinstance(layer, nn.Linear) else (2, 6, 5, 4)
    x = torch.randn(shape, generator=generator(0, "x"))
    plain = pack(layer, format)(x)
    assert torch.equal(pack(layer, format, clamp=(0.0, 1.0))(x), plain.clamp(0, 1))
    for act, function in {"silu": functional.silu, "gelu": functional.gelu, "tanh": torch.tanh}.items():
        twin = pack(layer, format, act)  # type: ignore[arg-type]
        assert torch.allclose(twin(x), function(plain), rtol=1e-5, atol=3e-6)  # type: ignore[operator]
        assert torch.equal(pickle.loads(pickle.dumps(twin))(x), twin(x))
        assert act in repr(twin)


def test_pixels_keep_their_memory_format_and_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    twin: Any = pack(thinned(nn.Conv2d(16, 8, 1), 0.3), "spmm")
    x = torch.randn(2, 16, 4, 4, generator=generator(0, "x"))
    read: list[int] = []
    columns = twin._columns
    monkeypatch.setattr(twin, "_columns", lambda packed, x, out: read.append(x.data_ptr()) or columns(packed, x, out))
    y = twin(x)
    assert read == [x.data_ptr()]
    assert y.is_contiguous()
    last = twin(x.to(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(last, y)


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(ModelError, match="no format 'nope'"):
        pack(nn.Linear(2, 2), "nope")


def test_inputs_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ModelError, match="cannot multiply an input"):
        pack(nn.Linear(4, 3), "csr_torch")(torch.ones(1, 5))
    with pytest.raises(ModelError, match="cannot multiply an input"):
        pack(nn.Conv2d(4, 3, 1), "csr_torch")(torch.ones(1, 5, 2, 2))
