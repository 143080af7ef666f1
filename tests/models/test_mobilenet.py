from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from openwork import models
from tests.models.helpers import IMAGENET, count, images, multiply_adds, on_meta


@pytest.mark.parametrize(
    ("ref", "multiplier", "parameters"),
    [
        ("mobilenet-v1", 1.0, 4_231_976),
        ("mobilenet-v1", 0.75, 2_585_560),
        ("mobilenet-v1", 0.5, 1_331_592),
        ("mobilenet-v1", 0.25, 470_072),
        ("mobilenet-v2", 1.0, 3_504_872),
        ("mobilenet-v2", 0.5, 1_968_680),
    ],
)
def test_published_parameter_counts(ref: str, multiplier: float, parameters: int) -> None:
    assert count(on_meta(ref, IMAGENET, 1000, multiplier=multiplier)) == parameters


@pytest.mark.parametrize(("ref", "expected"), [("mobilenet-v1", 568_740_352), ("mobilenet-v2", 300_774_272)])
def test_published_multiply_adds(ref: str, expected: int) -> None:
    assert multiply_adds(on_meta(ref, IMAGENET, 1000), IMAGENET) == expected


@given(st.sampled_from(["mobilenet-v1", "mobilenet-v2"]), images)
@settings(deadline=None, max_examples=12)
def test_images_of_any_size(ref: str, shape: tuple[int, int, int]) -> None:
    model = models.build(ref, input_shape=shape, classes=3, seed=0, options={"multiplier": 0.1}).eval()
    assert model(torch.zeros(2, *shape)).shape == (2, 3)


def halvings(ref: str, side: int) -> list[int]:
    """List the places of the convolutions with stride 2."""
    convolutions = [m for m in on_meta(ref, (3, side, side), 10).modules() if isinstance(m, nn.Conv2d)]
    return [i for i, m in enumerate(convolutions) if m.stride == (2, 2)]


@pytest.mark.parametrize("ref", ["mobilenet-v1", "mobilenet-v2"])
@pytest.mark.parametrize(("side", "kept"), [(8, 1), (16, 2), (28, 3), (32, 3), (64, 4), (96, 4), (97, 5), (224, 5)])
def test_small_images_lose_the_first_strides(ref: str, side: int, kept: int) -> None:
    assert halvings(ref, side) == halvings(ref, 224)[5 - kept :]


@pytest.mark.parametrize(
    ("ref", "kind", "options"),
    [("mobilenet-v1", "MobileNetV1", {"hidden_act": "relu"}), ("mobilenet-v2", "MobileNetV2", {})],
)
def test_it_computes_what_transformers_mobilenet_computes(ref: str, kind: str, options: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    ours = models.build(ref, input_shape=(3, 128, 130), classes=6, seed=0, options={"multiplier": 0.5})
    x = torch.randn(4, 3, 128, 130, generator=torch.Generator().manual_seed(0))
    ours(x)  # statistics
    config = getattr(transformers, kind + "Config")(
        depth_multiplier=0.5, tf_padding=False, layer_norm_eps=1e-5, num_labels=6, classifier_dropout_prob=0.0, **options
    )
    other = getattr(transformers, kind + "ForImageClassification")(config)
    values = ours.state_dict().values()  # both name conv, norm, conv, norm, ... in the order of the signal
    other.load_state_dict(dict(zip(other.state_dict(), values, strict=True)))
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(x), other.eval()(x).logits, rtol=1e-4, atol=1e-5)
