from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openwork.core.rng import generator
from openwork.errors import ModelError
from openwork.runtime import chaining, modules
from openwork.runtime.chaining import ChainedLinear
from openwork.runtime.kernels.target import host
from openwork.runtime.plan import replaced

pytestmark = pytest.mark.skipif(host() is None, reason="no LLVM on this machine")


class Feedforward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.drop = nn.Linear(24, 48), nn.Linear(48, 24), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.fc2(self.drop(F.gelu(self.fc1(x), approximate="tanh"))))


class ReadTwice(Feedforward):
    def forward(self, x: Tensor) -> Tensor:
        between = self.fc1(x)
        return self.fc2(between.relu()) + between.sum()


class Undecided(Feedforward):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x).relu()) if x.sum() > 0 else x


def packed(model: nn.Module, *skipped: str) -> nn.Module:
    model.eval().requires_grad_(False)
    winners = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and name not in skipped:
            draw = generator(0, "chaining", name)
            layer.weight.data *= torch.rand(layer.weight.shape, generator=draw) < 0.3
            winners[name] = modules.pack(layer, "spmm")
    return replaced(model, winners)


def inputs(model: nn.Module) -> dict[str, Tensor]:
    draw = generator(1, "chaining")
    return {
        name: torch.randn(2, 9, layer.in_features, generator=draw)
        for name, layer in model.named_modules()
        if isinstance(layer, modules.PackedLinear)
    }


def chains(model: nn.Module) -> list[list[str]]:
    """The activations of every chain."""
    runners = [module.__dict__["forward"] for module in model.modules() if "forward" in module.__dict__]
    found = [one for runner in runners for one in runner.graph.modules() if isinstance(one, ChainedLinear)]
    return [["clamp" if link.clamp else link.act for link in one.chain.links] for one in found]


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (Feedforward(), [["gelu_tanh", "none"]]),
        (nn.Sequential(nn.Flatten(1), nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 8), nn.Tanh(), nn.Linear(8, 3)),
         [["clamp", "tanh", "none"]]),
        (nn.Sequential(nn.Linear(24, 8), nn.LayerNorm(8), nn.Linear(8, 9), nn.GELU()), [["gelu"]]),
        (nn.Sequential(nn.Linear(24, 8), nn.ReLU(), nn.ReLU6(), nn.Linear(8, 9), nn.Sigmoid()), [["clamp"], ["sigmoid"]]),
        (nn.Sequential(nn.Sequential(nn.Linear(24, 8), nn.SiLU()), nn.Sequential(nn.Linear(8, 9))), [["silu"]]),
        (ReadTwice(), []),
        (Undecided(), []),
        (nn.Sequential(nn.Linear(24, 8), nn.Softplus(), nn.Linear(8, 4)), []),
    ],
)  # fmt: skip
def test_chains_are_found_and_change_nothing(model: nn.Module, expected: list[list[str]]) -> None:
    model = packed(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(5, 24, generator=generator(2, "chaining"))
    dense = copy.deepcopy(model)(x)
    named = chaining.put(model, inputs(model), 0.0)
    assert chains(model) == expected
    assert bool(named) == bool(expected)
    torch.testing.assert_close(model(x), dense, rtol=1e-5, atol=1e-5)
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_layer_in_another_format_ends_a_chain() -> None:
    model = packed(nn.Sequential(nn.Linear(24, 8), nn.ReLU(), nn.Linear(8, 9), nn.ReLU()), "2")
    chaining.put(model, inputs(model), 0.0)
    assert chains(model) == [["clamp"]]


def test_what_does_not_pay_stays() -> None:
    model = packed(Feedforward())
    assert chaining.put(model, inputs(model), 1e9) == []
    assert chaining.put(model, {}, 0.0) == []
    assert chains(model) == []


def test_names_are_enough_to_put_chains_back() -> None:
    model = packed(nn.Sequential(Feedforward(), Feedforward()))
    other = copy.deepcopy(model)
    chaining.restore(other, chaining.put(model, inputs(model), 0.0))
    x = torch.randn(3, 24, generator=generator(3, "chaining"))
    assert len(chains(other)) == 2
    assert torch.equal(model(x), other(x))
    assert torch.equal(copy.deepcopy(model)(x), other(x))
    with pytest.raises(ModelError, match="no chain"):
        chaining.restore(packed(nn.Sequential(nn.LayerNorm(3))), ["0"])


def test_transformers_feedforward_parts_are_chains() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 50, "n_positions": 16}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()
    winners = {}
    for name, layer in model.named_modules():
        if modules.is_conv1d(layer):
            layer.weight.data *= torch.rand(layer.weight.shape, generator=generator(0, name)) < 0.3
            winners[name] = modules.pack(layer, "spmm")
    fast = replaced(model, winners)
    ids = torch.arange(10)[None]
    expected = fast(ids).logits
    given = {name: torch.randn(1, 10, twin.nx, generator=generator(1, name)) for name, twin in winners.items()}
    assert chaining.put(fast, given, 0.0) == ["transformer.h.0.mlp", "transformer.h.1.mlp"]
    torch.testing.assert_close(fast(ids).logits, expected, rtol=1e-4, atol=1e-5)
