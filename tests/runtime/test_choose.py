from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from openwork.core.rng import generator
from openwork.runtime import choose, formats, modules, spmm
from openwork.runtime.choose import Seen, capture, glance, is_candidate
from openwork.runtime.kernels.target import VARIABLE
from openwork.runtime.modules import PackedConv2d, PackedLayer
from openwork.runtime.recurrent import PackedRecurrent


@pytest.fixture(autouse=True)
def one_thread(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("OPENWORK_CACHE", str(tmp_path))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def wins(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make one format the fastest, and say which were measured."""

    def make(winner: str) -> list[str]:
        asked: list[str] = []

        def race(calls: dict[str, Any], **_: Any) -> dict[str, float]:
            asked.extend(calls)
            return {name: 1.0 if name == winner else 3.0 for name in calls}

        monkeypatch.setattr(choose, "interleave", race)
        monkeypatch.setattr(choose, "HOPELESS", float("inf"))
        monkeypatch.setattr(choose.tuning, "SECONDS", 0.0)
        return asked

    return make


def thinned(layer: Any, density: float = 0.2) -> Any:
    draw = generator(0, "choose")
    for weight in layer.parameters():
        weight.data = torch.randn(weight.shape, generator=draw, dtype=weight.dtype) / weight[0].numel() ** 0.5
        if weight.ndim > 1:
            weight.data[torch.rand(weight.shape, generator=draw) >= density] = 0
    return layer.eval().requires_grad_(False)


def seen(*shape: int, dtype: torch.dtype = torch.float32) -> Seen:
    x = torch.empty(shape)
    return Seen(tuple(shape), x.stride(), dtype)


def conv1d() -> Any:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(10, 8)


def test_which_layers_may_be_sparse() -> None:
    for layer in (nn.Linear(2, 2), nn.Conv2d(2, 2, 1), nn.LSTM(2, 2), nn.GRU(2, 2), conv1d()):
        assert is_candidate(layer)
    for layer in (nn.Conv1d(2, 2, 1), nn.RNN(2, 2), nn.Embedding(2, 2), nn.ReLU()):
        assert not is_candidate(layer)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(8, 10), (3, 8)),
        (nn.Conv2d(8, 10, 1), (2, 8, 5, 5)),
        (nn.Conv2d(8, 10, 3, padding=1), (2, 8, 5, 5)),
        (conv1d(), (2, 3, 8)),
        (nn.LSTM(8, 10, bidirectional=True, batch_first=True), (2, 3, 8)),
        (nn.GRU(8, 10, num_layers=2), (3, 2, 8)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_every_kind_of_layer_is_measured_and_replaced(layer: Any, shape: tuple[int, ...], wins: Any) -> None:
    asked = wins("spmm")
    layer = thinned(layer)
    choice, twin = choose.choose("x", layer, seen(*shape), 5)
    weights = modules.weights_of(layer)
    kept = sum(int(weight.count_nonzero()) for weight in weights) / sum(weight.numel() for weight in weights)
    assert (choice.chosen, choice.gain, choice.density) == ("spmm", 3.0, kept)
    assert choice.shape == tuple(weights[0].shape)
    assert set(asked) == set(choice.ms) >= {"dense", "csr_scipy", "csr_torch", "spmm"}
    assert isinstance(twin, (PackedLayer, PackedRecurrent))
    x = torch.randn(shape, generator=generator(0, "x"))
    one, two = twin(x), layer(x)
    one, two = (found[0] if isinstance(found, tuple) else found for found in (one, two))
    assert torch.allclose(one, two, atol=1e-5)


def test_formats_for_few_columns_race_where_there_are_few(wins: Any) -> None:
    layer = thinned(nn.Linear(8, 10))
    for rows, expected in ((choose.FEW, True), (choose.FEW + 1, False)):
        asked = wins("dense")
        choose.choose("x", layer, seen(rows, 8), 5)
        assert ("sell" in asked) == expected
        assert "spmm" in asked
    asked = wins("dense")
    choose.choose("x", thinned(nn.Conv2d(8, 10, 1)), seen(1, 8, 1, 1), 5)
    assert not set(choose.SINGLE) & set(asked)
    asked = wins("dense")
    choose.choose("x", thinned(nn.LSTM(8, 10)), seen(3, 1, 8), 5)
    assert set(asked) == {"dense", *choose.RECURRENT}


@pytest.mark.parametrize("layer", [nn.Linear(8, 10), nn.LSTM(8, 10)])
def test_float64_has_compressed_rows_only(layer: Any, wins: Any) -> None:
    asked = wins("csr_torch")
    shape = (3, 2, 8)
    choice, _ = choose.choose("x", thinned(layer.double()), seen(*shape, dtype=torch.float64), 5)
    assert set(asked) == {"dense", "csr_scipy", "csr_torch"}
    assert choice.chosen == "csr_torch"
    layer.float()


def test_without_kernels_nothing_native_is_tried(wins: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "none")
    for layer, shape in ((nn.Linear(8, 10), (3, 8)), (nn.GRU(8, 10), (3, 2, 8))):
        asked = wins("csr_torch")
        choose.choose("x", thinned(layer), seen(*shape), 5)
        assert set(asked) == {"dense", "csr_scipy", "csr_torch"}
    assert set(choose.NATIVE) | {"dense", "csr_scipy", "csr_torch"} == set(formats.names())


def test_a_wrong_recurrent_layer_is_never_measured(wins: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = wins("spmm")
    run = PackedRecurrent._native
    monkeypatch.setattr(PackedRecurrent, "_native", lambda *args, **more: tuple(part + 0.01 for part in run(*args, **more)))
    choose.choose("x", thinned(nn.LSTM(8, 10)), seen(3, 2, 8), 5)
    assert "spmm" not in asked
    assert "csr_torch" in asked


@pytest.mark.parametrize(
    ("layer", "shape", "tokens", "product"),
    [
        (nn.Linear(8, 10), (2, 3, 8), True, (2, 3, 8)),
        (nn.Conv2d(8, 10, 1), (2, 8, 5, 6), False, (2, 8, 30)),
        (nn.Conv2d(8, 10, 3, padding=1), (2, 8, 5, 6), False, (72, 30)),
        (nn.Conv2d(8, 10, 1, stride=2), (2, 8, 5, 6), False, (8, 9)),
        (nn.Conv2d(8, 10, 1), (8, 5, 6), False, (1, 8, 30)),
    ],
)
def test_tilings_are_measured_on_what_the_product_gets(
    layer: Any, shape: tuple[int, ...], tokens: bool, product: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(spmm, "tune", lambda packed, x, *, tokens, seconds: asked.append((tuple(x.shape), tokens, seconds)))
    twin: Any = modules.pack(thinned(layer), "spmm")
    twin.tune(torch.zeros(shape), 0.5)
    assert asked == [(product, tokens, 0.5)]
    if isinstance(twin, PackedConv2d) and shape == (2, 8, 5, 6) and twin.kernel_size == (1, 1) and twin.stride == (1, 1):
        twin.tune(torch.zeros(shape).to(memory_format=torch.channels_last), 0.5)
        assert asked[1] == ((2, 5, 6, 8), True, 0.5)
    modules.pack(thinned(layer), "csr_torch").tune(torch.zeros(shape), 0.5)  # type: ignore[operator]
    assert len(asked) <= 2


def test_the_inputs_of_recurrent_layers_are_captured() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.out = nn.LSTM(8, 10, batch_first=True), nn.Linear(10, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.rnn(x)[0])

    model = Net().eval()
    found = capture(model, torch.zeros(2, 5, 8))
    assert found[model.rnn].shape == (2, 5, 8)
    assert found[model.out].shape == (2, 5, 10)
    blank, ms = glance("rnn", model.rnn, found[model.rnn])
    assert (blank.kind, blank.shape, blank.calls, blank.density) == ("LSTM", (40, 8), 1, 1.0)
    assert ms > 0
    assert glance("rnn", model.rnn, None)[1] == 0.0


def test_layers_that_stay_say_why(wins: Any) -> None:
    wins("spmm")
    cases = [
        (nn.LSTM(8, 10, proj_size=4), seen(3, 2, 8), "projects its state"),
        (nn.LSTM(8, 10), None, "is not called by the example"),
        (thinned(nn.GRU(8, 10), 1.0), seen(3, 2, 8), "is dense"),
        (thinned(nn.GRU(8, 10)), seen(3, 2, 8, dtype=torch.float64), "gets torch.float64 of shape (3, 2, 8)"),
        (nn.LazyLinear(3), seen(3, 8), "has no weight yet"),
        (nn.Linear(8, 10, device="meta"), seen(3, 8), "is torch.float32 on meta"),
    ]
    for layer, was, note in cases:
        choice, twin = choose.choose("x", layer, was, 5)
        assert (choice.note, choice.chosen, twin) == (note, "dense", None)


def test_a_hopeless_format_sees_only_a_part_of_a_long_input(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = nn.Linear(8, 8).eval().requires_grad_(False), torch.randn(4 * choose.GLIMPSE, 8)
    layer.weight[:, ::2] = 0.0
    seen: dict[str, list[int]] = {}

    def at_first_sight(module: nn.Module, rows: torch.Tensor) -> float:
        name = getattr(module, "format", "dense")
        seen.setdefault(name, []).append(len(rows))
        return len(rows) * (1.0 if name != "csr_scipy" else 2.1 * choose.HOPELESS)

    monkeypatch.setattr(choose, "_at_first_sight", at_first_sight)
    packed, rough = choose._candidates("layer", layer, x)
    assert seen["csr_scipy"] == [choose.GLIMPSE]
    assert seen["csr_torch"] == [choose.GLIMPSE, len(x)]
    assert rough["csr_scipy"] == pytest.approx(2.1 * choose.HOPELESS * rough["dense"])
    assert set(rough) == {"dense", *packed}


@pytest.mark.parametrize(
    ("layer", "shape", "expected"),
    [(nn.Linear(8, 8), (4, choose.GLIMPSE, 8), (choose.GLIMPSE, 8)), (nn.Linear(8, 8), (4 * choose.GLIMPSE - 1, 8), None),
     (nn.Linear(8, 8), (8,), None), (nn.Conv2d(3, 4, 3), (64, 3, 9, 9), (4, 3, 9, 9)),
     (nn.Conv2d(3, 4, 3), (8, 3, 9, 9), None), (nn.Conv2d(3, 4, 3), (3, 9, 9), None), (nn.LSTM(8, 8), (4096, 1, 8), None)],
)  # fmt: skip
def test_the_part_of_a_long_input(layer: nn.Module, shape: tuple[int, ...], expected: tuple[int, ...] | None) -> None:
    found = choose._part(layer, torch.randn(shape))
    assert (None if found is None else tuple(found.shape)) == expected
