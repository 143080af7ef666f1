from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from openwork.oneshot.collect import Collector
from openwork.oneshot.feed import Padding
from openwork.oneshot.layers import Layer, all_layers, inputs, matrix
from openwork.oneshot.statistics import Statistics, relative_error
from tests.oneshot.networks import correlated, normal
from tests.strategies import quick, seeds


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), seeds)
@quick
def test_sums_do_not_depend_on_how_the_data_are_cut(cuts, seed):
    X = normal(1, sum(cuts), 5, seed=seed)
    whole, parts = (Statistics.zeros(1, 5, gram=torch.float64) for _ in range(2))
    assert whole.add(X)
    assert all(parts.add(part) for part in reversed(X.split(cuts, dim=1)))
    assert parts.tokens == whole.tokens == sum(cuts)
    assert torch.allclose(parts.squares, whole.squares, rtol=1e-13)
    assert parts.gram is not None
    assert torch.allclose(parts.gram, whole.gram, rtol=1e-12, atol=1e-12)
    assert torch.allclose(parts.gram.diagonal(dim1=1, dim2=2), parts.squares, rtol=1e-12)


def test_half_precision_inputs_do_not_overflow():
    sums = Statistics.zeros(1, 2)
    assert sums.add(torch.full((1, 3, 2), 60000.0, dtype=torch.float16))
    assert torch.allclose(sums.squares, torch.tensor([[3 * 60000.0**2] * 2], dtype=torch.float64))
    assert not sums.add(torch.full((1, 3, 2), torch.inf, dtype=torch.float16))


def test_the_relative_error_is_that_of_the_outputs():
    W, X = normal(4, 6, dtype=torch.float64), correlated(30, 6)
    V = W.masked_fill(W.abs() < 0.5, 0)
    expected = float((X @ (W - V).T).square().sum() / (X @ W.T).square().sum())
    assert relative_error(W[None], V[None], (X.T @ X)[None]) == pytest.approx(expected, rel=1e-10)
    assert relative_error(W[None], W[None], (X.T @ X)[None]) == 0.0
    assert relative_error(W[None], V[None], torch.zeros(1, 6, 6)) == 0.0


CONVOLUTIONS = [
    nn.Conv2d(4, 6, 3, padding=1),
    nn.Conv2d(4, 6, (3, 2), stride=(2, 1), dilation=(1, 2), padding=(2, 1)),
    nn.Conv2d(4, 8, 3, groups=2, padding="same", dilation=2),
    nn.Conv2d(6, 6, 3, groups=6, bias=False),
    nn.Conv2d(4, 4, 3, padding=2, padding_mode="circular"),
    nn.Conv2d(4, 4, 3, padding=(1, 0), padding_mode="reflect"),
    nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2),
    nn.Conv1d(4, 6, 4, padding="same", dilation=3),
]


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("conv", CONVOLUTIONS, ids=str)
def test_a_convolution_is_its_matrix_times_its_patches(conv):
    x = normal(3, conv.in_channels, *[9] * len(conv.kernel_size))
    (layer,) = all_layers(conv)
    patches = torch.cat(list(inputs(layer, x)), dim=1)
    product = torch.einsum("goi,gti->tgo", matrix(layer, conv.weight), patches).flatten(1)
    out = conv(x)
    expected = out.movedim(1, -1).reshape(-1, conv.out_channels)
    if conv.bias is not None:
        product = product + conv.bias
    assert torch.allclose(product, expected, atol=1e-5)


def test_large_images_are_unfolded_in_pieces(monkeypatch):
    monkeypatch.setattr("openwork.oneshot.layers._CHUNK", 200)
    conv = nn.Conv2d(2, 3, 3)
    x = normal(5, 2, 6, 6)
    (layer,) = all_layers(conv)
    parts = list(inputs(layer, x))
    assert len(parts) == 5
    monkeypatch.undo()
    assert torch.equal(torch.cat(parts, dim=1), torch.cat(list(inputs(layer, x)), dim=1))


def test_an_image_without_a_batch_dimension_counts():
    conv = nn.Conv2d(2, 3, 3)
    (layer,) = all_layers(conv)
    assert torch.cat(list(inputs(layer, normal(2, 5, 5))), dim=1).shape == (1, 9, 18)


class _Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x, attention_mask=None):
        return self.two(self.one(x).reshape(-1, 3))


def test_padding_does_not_count_flat_or_not():
    model, x = _Masked(), normal(2, 4, 3)
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]])
    padding = Padding()
    collector = Collector(all_layers(model), padding, torch.float64)
    handle = padding.watch(model)
    with collector.watching():
        model(x, attention_mask=mask)
        model(x, mask)  # by position as well
        model(x[:, :2])  # no mask any more
    handle.remove()
    kept = torch.cat([x[mask != 0], x[mask != 0], x[:, :2].reshape(-1, 3)])
    assert {sums.tokens for sums in collector.sums.values()} == {16}
    assert torch.allclose(collector.sums["one.weight"].squares[0], kept.double().square().sum(0))
    assert collector.sums["two.weight"].gram is not None
    out = model.one(kept).double()
    assert torch.allclose(collector.sums["two.weight"].gram[0], out.T @ out, atol=1e-5)


def test_layers_that_share_an_input_have_sums_of_their_own():
    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.q(x) + self.k(x)

    model, x = Fork(), normal(5, 4)
    collector = Collector(all_layers(model), Padding(), torch.float64)
    with collector.watching():
        model(x)
        model(x + 1)
    q, k = collector.sums["q.weight"], collector.sums["k.weight"]
    assert torch.equal(q.squares, k.squares)
    assert q.squares.data_ptr() != k.squares.data_ptr()
    expected = x.double().square().sum(0) + (x + 1).double().square().sum(0)
    assert torch.allclose(q.squares[0], expected, rtol=1e-6)


def test_calls_of_one_layer_and_layers_of_one_weight_add_up():
    a, b = nn.Linear(3, 3), nn.Linear(3, 3)
    b.weight = a.weight
    model = nn.Sequential(a, a, b)
    x = normal(5, 3)
    collector = Collector([Layer("0", a, "linear"), Layer("2", b, "linear")], Padding(), None)
    with collector.watching():
        model(x)
    assert set(collector.sums) == {"0.weight"}
    assert collector.sums["0.weight"].tokens == 15
