"""Networks are built with the zeros they say, and their least time is the sum of their layers'."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from openwork import saving
from openwork.bench import networks
from openwork.bench.networks import Network
from openwork.bench.roofline import Limits, Work, least_seconds
from openwork.errors import ModelError, PatternError
from openwork.models import build

LIMITS = Limits("avx2", 8, 1, 1e9, ((2**14, 1e9),), 1e9)


def test_a_part_is_pruned_layer_by_layer_and_nothing_else():
    model, example = networks.build(
        Network("mobilenet-v1", (1, 3, 32, 32), {"multiplier": 0.25}, 0.1, part="1x1", classes=10)
    )
    assert example.shape == (1, 3, 32, 32)
    for layer in model.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            kept, total = int(torch.count_nonzero(layer.weight)), layer.weight.numel()
            is_pruned = isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1)
            assert kept == (round(0.1 * total) if is_pruned else total)


def test_the_first_convolution_and_depthwise_ones_stay_dense():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 3), nn.Linear(4, 4))
    assert networks.prune(model, 0.5, "block2x1", "convolutions") == 1
    assert [int((layer.weight == 0).sum()) for layer in model] == [0, 0, 288, 0]
    assert networks.prune(model, 0.5, "unstructured", "linear", "random") == 1
    assert int((model[3].weight == 0).sum()) == 8


def test_pruning_says_what_is_wrong():
    model = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(ModelError, match="no layer"):
        networks.prune(model, 0.5, "block4x1", "all")
    with pytest.raises(ModelError, match="part"):
        networks.prune(model, 0.5, "unstructured", "embeddings")
    with pytest.raises(ModelError, match="density"):
        networks.prune(model, 0.0, "unstructured", "all")
    with pytest.raises(PatternError):
        networks.prune(model, 0.5, "wavy", "all")


def test_a_saved_model_is_measured_as_it_is(tmp_path):
    model = build("mlp-16", input_shape=(12,), classes=3, seed=0)
    networks.prune(model, 0.25, "unstructured", "all")
    saving.save(model, tmp_path / "model.safetensors")
    found, example = networks.build(Network(str(tmp_path / "model.safetensors"), (2, 12)))
    assert all(torch.equal(one, two) for one, two in zip(found.parameters(), model.parameters(), strict=True))
    assert example.shape == (2, 12)


def test_a_model_that_wants_tokens_gets_tokens():
    example = networks.example(nn.Embedding(200, 4), (2, 5))
    assert example.dtype == torch.int64
    with pytest.raises(ModelError, match="Linear"):
        networks.example(nn.Linear(3, 3), (2, 5))


def test_the_least_time_is_the_sum_over_layers():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Flatten(), nn.Linear(4 * 36, 16)).eval()
    with torch.no_grad():
        model[2].weight[:, 10:] = 0.0  # neighbouring rows share their pattern
    entry = Work(out=4, size=3, columns=36, kept=108, block=16)  # dense
    readout = Work(out=16, size=144, columns=2, kept=160, block=16)
    entry_of_two = Work(out=4, size=3, columns=72, kept=108, block=16)
    total = networks.least_seconds(model, torch.randn(2, 3, 6, 6), LIMITS)
    assert total == pytest.approx(least_seconds(LIMITS, entry_of_two) + least_seconds(LIMITS, readout))
    one = networks.work_of(model[0], torch.zeros(1, 4, 6, 6))
    assert one == entry


def test_a_network_is_measured_with_its_dense_arms():
    network = Network("mlp-16", (2, 12), {}, 0.5, classes=3)
    row = networks.measure(network, ["eager", "matmul", "litert"], LIMITS, seconds=0.01)
    assert row.key == f"{network.key} {torch.get_num_threads()}"
    assert set(row.arms) == {"eager", "litert"}  # matmul is no way to run a network
    assert row.arms["eager"].status == "ok"
    assert row.arms["litert"].status == "unavailable"
    assert Network.from_json(row.cell) == network


def test_the_encoder_is_always_the_same_and_costs_nobody_his_generator():
    before = torch.get_rng_state()
    one, two = networks.encoder(16, 1, 2), networks.encoder(16, 1, 2)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert one(torch.zeros(1, 3, 16)).shape == (1, 3, 16)
