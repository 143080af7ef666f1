"""Every peer that runs here computes the product and the network; those that cannot say what is missing."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from openwork.bench import checking, networks, operators, peers
from openwork.bench.folding import folded
from openwork.bench.peers._planes import sides
from openwork.core.rng import generator
from openwork.errors import ModelError

SLOW = ("compiled", "openvino_sparse")  # a C++ compiler, and the same code as openvino
PEERS = [name for name in peers.operators() if name not in SLOW]


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def draw(out: int, size: int, columns: int, density: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator(seed, "toy", *shape))

    kept = torch.rand(out, size, generator=generator(seed, "kept")) < density
    return normal(out, size) * kept, normal(out), normal(size, columns)


@functools.cache
def missing(name: str) -> str:
    try:
        peers.load(name).operator(*draw(4, 4, 3, 0.5, 0))
    except peers.Unavailable as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", PEERS)
@settings(max_examples=12, deadline=None)
@given(
    out=st.integers(1, 20), size=st.integers(1, 20), columns=st.sampled_from([1, 2, 3, 7, 16, 33]),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]), biased=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_every_operator_peer_computes_the_product(name, out, size, columns, density, biased, seed):
    if missing(name):
        pytest.skip(missing(name))
    weight, bias, x = draw(out, size, columns, density, seed)
    call = peers.load(name).operator(weight, bias if biased else None, x)
    with torch.no_grad():
        for _ in range(2):  # the second call must not depend on what the first one left behind
            y = call()
            assert y.shape == (out, columns)
            assert checking.product_error(weight, bias if biased else None, x, y) <= 1.0


def test_blocks_are_products_too():
    weight, bias, x = operators.make(operators.Cell(32, 24, 19, 0.75, "blocks of 4"))
    arm, call = operators.prepared(peers.load(peers.OURS), weight, bias, x)
    assert arm.status == "ok"
    assert call is not None


def test_what_is_wrong_is_said_and_not_timed():
    class Liar:
        ABOUT, DENSE, APART = "", False, False

        @staticmethod
        def operator(weight: Tensor, bias: Any, x: Tensor) -> Any:
            return lambda: weight @ x + bias[:, None] + 1e-3

        @staticmethod
        def network(model: nn.Module, example: Tensor) -> Any:
            return lambda: model(example) * 1.001

    arm, call = operators.prepared(Liar(), *draw(8, 8, 4, 0.5, 0))
    assert (arm.status, call) == ("wrong", None)
    assert "not timed" in arm.reason
    model = nn.Linear(4, 4)
    arm, call = networks.prepared(Liar(), model, torch.ones(1, 4), checking.reference(model, torch.ones(1, 4)))
    assert (arm.status, call) == ("wrong", None)


@pytest.mark.parametrize("kind", ["operator", "network"])
def test_what_is_unavailable_is_reported_and_not_raised(kind, monkeypatch):
    def gone(name: str, install: str | None = None) -> Any:
        raise peers.Unavailable(f"{name} cannot be imported: pip install {install or name}")

    monkeypatch.setattr("openwork.bench.peers._onnx.package", gone)
    peer = peers.load("onnxruntime")
    if kind == "operator":
        arm, call = operators.prepared(peer, *draw(4, 4, 3, 0.5, 0))
    else:
        model = nn.Linear(3, 3)
        arm, call = networks.prepared(peer, model, torch.ones(1, 3), checking.reference(model, torch.ones(1, 3)))
    assert (arm.status, arm.ms, call) == ("unavailable", None, None)
    assert "pip install onnx" in arm.reason


def test_a_package_that_is_not_there_names_what_to_install():
    with pytest.raises(peers.Unavailable, match="pip install no-such-thing"):
        peers.package("openwork_no_such_module", "no-such-thing")


def test_an_unknown_peer_is_one_sentence():
    with pytest.raises(ModelError, match="onnxruntime"):
        peers.load("tensorrt")


def test_the_folder_is_the_registry_and_every_peer_keeps_the_contract():
    assert peers.names()[0] == peers.OURS
    assert set(peers.operators()) | set(peers.networks()) == set(peers.names())
    for name in peers.names():
        peer = peers.load(name)
        assert isinstance(peer.ABOUT, str)
        assert isinstance(peer.DENSE, bool)
        assert not (peer.DENSE and peer.APART)  # a ratio needs a dense arm in every process
        assert not peer.APART or peer.NEEDS


class Toy(nn.Module):
    """Entry convolution, depthwise, strided 1x1, a sum, max pooling, mean, linear: each step of the conversions."""

    def __init__(self) -> None:
        super().__init__()
        self.entry = nn.Sequential(nn.Conv2d(3, 8, 3, 2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.depth = nn.Sequential(nn.Conv2d(8, 8, 3, 2, padding=1, groups=8), nn.BatchNorm2d(8), nn.ReLU6())
        self.point = nn.Conv2d(8, 8, 1)
        self.pool = nn.MaxPool2d(3, 2, padding=1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        x = self.depth(self.entry(x))
        x = self.pool(x + self.point(x))
        return self.fc(x.mean(dim=(2, 3)))


@pytest.fixture(scope="module")
def toy() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = Toy().eval().requires_grad_(False)
        for norm in (model.entry[1], model.depth[1]):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2.0)
    networks.prune(model, 0.25, "unstructured", "1x1")
    return model


NETWORKS = [name for name in peers.networks() if name not in (*SLOW, peers.OURS)]


@pytest.mark.parametrize(("name", "side"), [*((name, 17) for name in NETWORKS), ("litert", 20), ("litert_sparse", 20)])
def test_every_network_peer_computes_the_network(toy, name, side):
    x = torch.randn(1, 3, side, side, generator=generator(0, "image"))
    arm, call = networks.prepared(peers.load(name), toy, x, checking.reference(toy, x))
    if arm.status == "unavailable":
        pytest.skip(arm.reason)
    assert (arm.status, arm.reason) == ("ok", "")
    assert call is not None
    assert arm.error < 1.0


@pytest.mark.parametrize("name", ["litert", "litert_sparse", "eager_nhwc"])
def test_networks_that_a_peer_cannot_take_are_unavailable_with_a_reason(name):
    model = nn.Sequential(nn.Linear(4, 4), nn.GELU()).eval()
    x = torch.ones(2, 4)
    arm, call = networks.prepared(peers.load(name), model, x, checking.reference(model, x))
    assert (arm.status, call) == ("unavailable", None)
    assert "images" in arm.reason


def test_folding_is_exact_up_to_rounding_and_leaves_the_model_alone(toy):
    x = torch.randn(2, 3, 16, 16, generator=generator(0, "image"))
    fused = folded(toy)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    assert any(isinstance(module, nn.BatchNorm2d) for module in toy.modules())
    assert checking.network_error(checking.reference(toy, x), fused(x)) <= 0.1


@given(st.integers(1, 5000))
def test_columns_are_a_plane(columns):
    high, wide = sides(columns)
    assert high * wide == columns
    assert high <= wide


def test_a_nan_is_never_right():
    weight, bias, x = draw(3, 3, 2, 1.0, 0)
    y = weight @ x + bias[:, None]
    y[1, 1] = float("nan")
    assert checking.product_error(weight, bias, x, y) == float("inf")
    assert checking.product_error(weight, bias, x, y[:2]) == float("inf")
    assert checking.network_error(torch.ones(2), torch.tensor([1.0, float("nan")])) == float("inf")
