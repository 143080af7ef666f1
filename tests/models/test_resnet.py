from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from openwork import models
from tests.models.helpers import CIFAR, IMAGENET, count, images, multiply_adds, on_meta


@pytest.mark.parametrize(
    ("ref", "shape", "classes", "parameters"),
    [
        ("resnet18", IMAGENET, 1000, 11_689_512),
        ("resnet34", IMAGENET, 1000, 21_797_672),
        ("resnet50", IMAGENET, 1000, 25_557_032),
        ("resnet101", IMAGENET, 1000, 44_549_160),
        ("resnet152", IMAGENET, 1000, 60_192_808),
        ("resnet20", CIFAR, 10, 272_474),
    ],
)
def test_published_parameter_counts(ref: str, shape: tuple[int, ...], classes: int, parameters: int) -> None:
    assert count(on_meta(ref, shape, classes)) == parameters


@pytest.mark.parametrize(("ref", "expected"), [("resnet18", 1_814_073_344), ("resnet50", 4_089_184_256)])
def test_published_multiply_adds(ref: str, expected: int) -> None:
    assert multiply_adds(on_meta(ref, IMAGENET, 1000), IMAGENET) == expected


def cifar_weights(n: int, w: int, channels: int, classes: int) -> int:
    """Count the weights of convolutions and readout of the CIFAR network with n blocks a stage, by hand."""
    stages = 2 * n * 9 * w * w, 9 * 2 * w * w + (2 * n - 1) * 9 * 4 * w * w, 9 * 8 * w * w + (2 * n - 1) * 9 * 16 * w * w
    return 9 * channels * w + sum(stages) + 2 * w * w + 8 * w * w + 4 * w * classes


@given(st.integers(1, 9), st.integers(1, 20), st.integers(1, 4), st.integers(1, 12))
@settings(deadline=None, max_examples=15)
def test_cifar_weights_in_closed_form(n: int, width: int, channels: int, classes: int) -> None:
    if 6 * n + 2 == 50:
        n = 18
    model = on_meta(f"resnet{6 * n + 2}", (channels, 32, 32), classes, width=width)
    assert sum(p.numel() for p in model.parameters() if p.ndim > 1) == cifar_weights(n, width, channels, classes)


def test_resnet20_has_the_maskable_weights_of_the_sparse_training_papers() -> None:
    model = on_meta("resnet20", CIFAR, 10)
    assert sum(p.numel() for p in model.parameters() if p.ndim > 1) == 270_896 == cifar_weights(3, 16, 3, 10)


@pytest.mark.parametrize("depth", [8, 14, 18, 20, 32, 34, 44, 50, 56, 101, 110, 152])
def test_the_name_counts_the_layers_with_weights(depth: int) -> None:
    model = on_meta(f"resnet{depth}", CIFAR, 10)
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear) and "downsample" not in n]
    assert len(layers) == depth


def test_parameters_are_named_as_in_torchvision() -> None:
    keys = on_meta("resnet50", IMAGENET, 1000).state_dict().keys()
    assert {"conv1.weight", "bn1.running_mean", "layer1.0.downsample.0.weight", "layer1.0.downsample.1.bias",
            "layer4.2.conv3.weight", "layer4.2.bn3.num_batches_tracked", "fc.weight", "fc.bias"} <= keys  # fmt: skip
    assert len(keys) == 320


def test_small_images_get_the_small_stem() -> None:
    assert on_meta("resnet18", CIFAR, 10).conv1.weight.shape == (64, 3, 3, 3)
    assert on_meta("resnet18", (3, 64, 64), 10).conv1.weight.shape == (64, 3, 3, 3)
    assert on_meta("resnet18", (3, 65, 65), 10).conv1.weight.shape == (64, 3, 7, 7)


@given(st.sampled_from(["resnet8", "resnet18", "resnet50"]), images)
@settings(deadline=None, max_examples=20)
def test_images_of_any_size(ref: str, shape: tuple[int, int, int]) -> None:
    model = models.build(ref, input_shape=shape, classes=3, seed=0, options={"width": 2}).eval()
    assert model(torch.zeros(2, *shape)).shape == (2, 3)


def theirs(key: str) -> str:
    """Turn a name of ours into the one that transformers gives the same tensor."""
    key = re.sub(r"^(conv|bn)1\.", lambda m: f"resnet.embedder.embedder.{KIND[m[1]]}.", key)
    key = re.sub(r"^layer(\d)\.", lambda m: f"resnet.encoder.stages.{int(m[1]) - 1}.layers.", key)
    key = re.sub(r"downsample\.([01])", lambda m: f"shortcut.{'convolution' if m[1] == '0' else 'normalization'}", key)
    key = re.sub(r"(\d)\.(conv|bn)(\d)\.", lambda m: f"{m[1]}.layer.{int(m[3]) - 1}.{KIND[m[2]]}.", key)
    return key.replace("fc.", "classifier.1.")


KIND = {"conv": "convolution", "bn": "normalization"}


@pytest.mark.parametrize(
    ("ref", "kind", "depths"), [("resnet18", "basic", [2] * 4), ("resnet50", "bottleneck", [3, 4, 6, 3])]
)
def test_it_computes_what_transformers_resnet_computes(ref: str, kind: str, depths: list[int]) -> None:
    transformers = pytest.importorskip("transformers")
    ours = models.build(ref, input_shape=(3, 70, 80), classes=6, seed=0, options={"width": 4})
    x = torch.randn(4, 3, 70, 80, generator=torch.Generator().manual_seed(0))
    ours(x)  # statistics
    expansion = 1 if kind == "basic" else 4
    config = transformers.ResNetConfig(
        embedding_size=4, hidden_sizes=[4 * expansion << i for i in range(4)], depths=depths, layer_type=kind, num_labels=6
    )
    other = transformers.ResNetForImageClassification(config)
    other.load_state_dict({theirs(key): value for key, value in ours.state_dict().items()})
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(x), other.eval()(x).logits, rtol=1e-4, atol=1e-5)
