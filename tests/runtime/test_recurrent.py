from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence

from openwork.core.rng import generator
from openwork.errors import ModelError
from openwork.runtime import recurrent
from openwork.runtime.kernels.target import VARIABLE, targets
from openwork.runtime.modules import obstacle, pack
from openwork.runtime.recurrent import PackedRecurrent

EPS = torch.finfo(torch.float32).eps
TARGETS = [*targets(), "none"]


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def layer(kind: Any = nn.LSTM, width: int = 11, size: int = 13, density: float = 0.3, **options: Any) -> Any:
    made = kind(width, size, **options).eval().requires_grad_(False)
    draw = generator(0, "recurrent", str(density))
    for weight in made.parameters():
        weight.copy_(torch.randn(weight.shape, generator=draw) / size**0.5)
        if weight.ndim > 1:
            weight[torch.rand(weight.shape, generator=draw) >= density] = 0
    return made


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=generator(0, "x", *shape))


def state(made: Any, batch: int | None) -> Any:
    count = made.num_layers * (1 + made.bidirectional)
    shape = (count, made.hidden_size) if batch is None else (count, batch, made.hidden_size)
    return (normal(*shape), normal(*shape) / 2) if isinstance(made, nn.LSTM) else normal(*shape)


def leaves(found: Any) -> list[Tensor]:
    y, last = found
    return [y, *last] if isinstance(last, tuple) else [y, last]


def close(made: nn.Module, found: Any, *inputs: Any) -> bool:
    """Tell whether outputs and states are those of the float64 layer, and as near as the float32 layer's own."""
    double = copy.deepcopy(made).double()

    def widen(value: Any) -> Any:
        return tuple(map(widen, value)) if isinstance(value, tuple) else None if value is None else value.double()

    exact = leaves(double(*map(widen, inputs)))
    own = leaves(made(*inputs))
    pairs = zip(leaves(found), own, exact, strict=True)
    return all(
        one.shape == two.shape and bool(((one - three).abs() <= 4 * (two - three).abs().max() + 40 * EPS).all())
        for one, two, three in pairs
    )


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_layers": 2, "bidirectional": True, "batch_first": True, "dropout": 0.5},
        {"num_layers": 3, "bias": False},
        {"bidirectional": True},
    ],
    ids=str,
)
def test_any_batch_and_length(name: str, kind: Any, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, name)
    monkeypatch.setattr(recurrent, "STEPS", 4)
    made = layer(kind, **options)
    twin = pack(made, "spmm")
    assert isinstance(twin, PackedRecurrent)
    for batch, steps in ((1, 1), (1, 9), (2, 4), (3, 8), (5, 3), (17, 5), (90, 2)):
        x = normal(batch, steps, 11) if made.batch_first else normal(steps, batch, 11)
        for first in (None, state(made, batch)):
            assert close(made, twin(x, first), x, first)
    x = normal(6, 11)
    for first in (None, state(made, None)):
        assert close(made, twin(x, first), x, first)
    assert not leaves(twin(x.clone().requires_grad_()))[0].requires_grad


@given(
    kind=st.sampled_from([nn.LSTM, nn.GRU]),
    width=st.integers(1, 40),
    size=st.integers(1, 40),
    batch=st.integers(1, 40),
    steps=st.integers(1, 6),
    density=st.sampled_from([0.0, 0.1, 1.0]),
    name=st.sampled_from(TARGETS),
)
@settings(max_examples=40, deadline=None)
def test_any_size(kind: Any, width: int, size: int, batch: int, steps: int, density: float, name: str) -> None:
    made = layer(kind, width, size, density)
    x, first = normal(steps, batch, width), state(made, batch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, name)
        assert close(made, pack(made, "spmm")(x, first), x, first)


@pytest.mark.parametrize("name", targets())
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_threads_and_runs_of_steps_change_no_bit(name: str, kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, name)
    monkeypatch.setattr(recurrent.tuning, "useful_threads", lambda work, target, threads: threads)
    made = layer(kind, 30, 64, bidirectional=True)
    twin = pack(made, "spmm")
    for batch in (1, 3, 16, 70):
        x = normal(7, batch, 30)
        expected = leaves(twin(x))
        for threads, steps in ((2, 32), (3, 32), (1, 2), (2, 3)):
            torch.set_num_threads(threads)
            monkeypatch.setattr(recurrent, "STEPS", steps)
            assert all(map(torch.equal, leaves(twin(x)), expected))
        torch.set_num_threads(1)
        monkeypatch.setattr(recurrent, "STEPS", 32)


@pytest.mark.parametrize("name", TARGETS)
def test_rows_of_a_batch_are_the_same_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, name)
    made = layer()
    twin = pack(made, "spmm")
    x = normal(5, 20, 11)
    y, (h, c) = twin(x)
    for row in (0, 7, 19):
        alone, (alone_h, alone_c) = twin(x[:, row : row + 1])
        assert torch.allclose(alone[:, 0], y[:, row], rtol=0, atol=40 * EPS)
        assert torch.allclose(alone_h[:, 0], h[:, row], rtol=0, atol=40 * EPS)
        assert torch.allclose(alone_c[:, 0], c[:, row], rtol=0, atol=80 * EPS)


@pytest.mark.parametrize("format", ["csr_scipy", "csr_torch", "dense", "sell"])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_other_formats_go_step_by_step(format: str, kind: Any) -> None:
    made = layer(kind, bidirectional=True, num_layers=2)
    twin = pack(made, format)
    x, first = normal(6, 4, 11), state(made, 4)
    assert close(made, twin(x, first), x, first)
    double = copy.deepcopy(made).double()
    if format == "sell":
        with pytest.raises(ModelError, match="float64"):
            pack(double, format)
    else:
        found = leaves(pack(double, format)(x.double()))
        expected = leaves(double(x.double()))
        assert all(torch.allclose(one, two, rtol=0, atol=1e-13) for one, two in zip(found, expected, strict=True))


def test_blocks_of_rows() -> None:
    made = layer(nn.LSTM, 16, 32)
    for part in (made.weight_ih_l0, made.weight_hh_l0):
        part.mul_((torch.rand(32, part.shape[1], generator=generator(0, "blocks")) < 0.3).repeat_interleave(4, dim=0))
        part[part == 0] = 0
    made.weight_hh_l0.copy_(
        torch.where(made.weight_hh_l0.reshape(32, 4, -1).any(1, keepdim=True), 0.1, 0).expand(32, 4, 32).reshape(128, 32)
    )
    twin: Any = pack(made, "spmm")
    assert twin.weights[0][0].hidden.block == 4
    x = normal(6, 9, 16)
    assert close(made, twin(x), x)


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("enforced", [True, False])
def test_packed_sequences(name: str, kind: Any, enforced: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, name)
    made = layer(kind, bidirectional=True, num_layers=2)
    twin = pack(made, "spmm")
    lengths = [7, 5, 5, 1] if enforced else [5, 1, 7, 5]
    x = pack_sequence([normal(length, 11) for length in lengths], enforce_sorted=enforced)
    for first in (None, state(made, 4)):
        y, last = twin(x, first)
        own, own_last = made(x, first)
        assert torch.equal(y.batch_sizes, own.batch_sizes)
        (padded, found), (expected, there) = pad_packed_sequence(y), pad_packed_sequence(own)
        assert found.tolist() == there.tolist() == lengths
        pairs = zip(leaves((padded, last)), leaves((expected, own_last)), strict=True)
        assert all(torch.allclose(one, two, rtol=0, atol=100 * EPS) for one, two in pairs)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_state_copies_and_pickles_are_the_layers(kind: Any) -> None:
    made = layer(kind, bidirectional=True, num_layers=2)
    twin = pack(made, "spmm")
    x = normal(5, 3, 11)
    y = twin(x)[0]
    kept = twin.state_dict()
    assert list(kept) == list(made.state_dict())
    assert all(torch.equal(kept[name], value) for name, value in made.state_dict().items())
    for other in (copy.deepcopy(twin), pickle.loads(pickle.dumps(twin))):
        assert torch.equal(other(x)[0], y)
    assert "format=spmm" in repr(twin)
    assert not list(twin.parameters())
    for weight in made.parameters():
        weight.zero_()
    assert torch.equal(twin(x)[0], y)
    with pytest.raises(RuntimeError, match="load into the original model"):
        nn.Sequential(twin).load_state_dict({"0." + name: value for name, value in kept.items()})


class Own(nn.GRU):
    def forward(self, *inputs: Any) -> Any:
        return super().forward(*inputs)


def test_obstacles() -> None:
    assert obstacle(nn.LSTM(3, 4, num_layers=2, bidirectional=True, dropout=0.1)) is None
    assert obstacle(nn.LSTM(3, 4, proj_size=2)) == "projects its state"
    assert obstacle(Own(3, 4)) == "has a forward of its own"
    assert "neither" in (obstacle(nn.RNN(3, 4)) or "")
    hooked = nn.LSTM(3, 4)
    hooked.register_forward_hook(lambda *_: None)
    assert obstacle(hooked) == "has hooks"


def test_inputs_that_do_not_fit_are_refused() -> None:
    twin = pack(layer(), "spmm")
    for x in (normal(4, 2, 12), normal(11), normal(4, 0, 11), normal(0, 2, 11)):
        with pytest.raises(ModelError, match="cannot run LSTM"):
            twin(x)
    for hx in (
        (normal(1, 3, 13), normal(1, 2, 13)),
        (normal(1, 2, 12), normal(1, 2, 12)),
        (normal(1, 2, 13), normal(2, 2, 13)),
    ):
        with pytest.raises(ModelError, match="the first state has shape"):
            twin(normal(4, 2, 11), hx)


@pytest.mark.parametrize("name", TARGETS)
def test_eight_threads_at_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, name)
    twin = pack(layer(), "spmm")
    inputs = [normal(5 + number % 2, 1 + number % 3 * 4, 11) for number in range(8)]
    expected = [twin(x)[0] for x in inputs]
    wrong: list[int] = []
    together = threading.Barrier(8)

    def work(number: int) -> None:
        together.wait()
        wrong.extend(number for _ in range(10) if not torch.equal(twin(inputs[number])[0], expected[number]))

    workers = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for one in workers:
        one.start()
    for one in workers:
        one.join()
    assert not wrong
