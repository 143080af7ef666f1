from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from torch import nn

from openwork import models
from openwork.errors import ModelError
from openwork.models.efficientnet import MBConv, SqueezeExcitation, StochasticDepth
from tests.models.helpers import IMAGENET, count, images, multiply_adds, on_meta

PUBLISHED = (5_288_548, 7_794_184, 9_109_994, 12_233_232, 19_341_616, 30_389_784, 43_040_704, 66_347_960)
B0 = "efficientnet-b0"


@pytest.mark.parametrize("size", range(8))
def test_published_parameter_counts(size: int) -> None:
    assert count(on_meta(f"efficientnet-b{size}", IMAGENET, 1000)) == PUBLISHED[size]


def test_multiply_adds_of_b0_by_hand() -> None:
    side, width, total = 112, 32, 9 * 3 * 32 * 112**2
    rows = [(1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3), (6, 112, 3, 1, 5), (6, 192, 4, 2, 5),
            (6, 320, 1, 1, 3)]  # fmt: skip
    for expansion, after, repeats, stride, kernel in rows:
        for i in range(repeats):
            inner = width * expansion
            total += side**2 * width * inner * (expansion > 1)
            side //= 1 if i else stride
            total += side**2 * inner * (kernel**2 + after) + 2 * inner * (width // 4)
            width = after
    total += side**2 * 320 * 1280 + 1280 * 1000
    assert multiply_adds(on_meta(B0, IMAGENET, 1000), IMAGENET) == total == 385_814_752  # published: .39 billion


def test_options_scale_as_the_names_do() -> None:
    shapes = {name: value.shape for name, value in on_meta("efficientnet-b4", IMAGENET, 1000).state_dict().items()}
    scaled = on_meta(B0, IMAGENET, 1000, multiplier=1.4, depth=1.8).state_dict()
    assert {name: value.shape for name, value in scaled.items()} == shapes
    shorter = on_meta("efficientnet-b1", IMAGENET, 1000, depth=1.0).state_dict()
    assert shorter.keys() == on_meta(B0, IMAGENET, 1000).state_dict().keys()


@given(images)
@settings(deadline=None, max_examples=8)
def test_images_of_any_size(shape: tuple[int, int, int]) -> None:
    model = models.build(B0, input_shape=shape, classes=3, seed=0, options={"multiplier": 0.1, "depth": 0.3}).eval()
    assert model(torch.zeros(2, *shape)).shape == (2, 3)


def halvings(side: int) -> list[int]:
    """List the places of the convolutions with stride 2."""
    convolutions = [m for m in on_meta(B0, (3, side, side), 10).modules() if isinstance(m, nn.Conv2d)]
    return [i for i, m in enumerate(convolutions) if m.stride == (2, 2)]


@pytest.mark.parametrize(("side", "kept"), [(8, 1), (16, 2), (28, 3), (32, 3), (64, 4), (97, 5), (224, 5)])
def test_small_images_lose_the_first_strides(side: int, kept: int) -> None:
    assert halvings(side) == halvings(224)[5 - kept :]


def test_the_gate_scales_each_channel_by_all_means() -> None:
    gate = SqueezeExcitation(3, 2).double()
    x = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    means = x.mean((2, 3))
    squeezed = means @ gate.reduce.weight[:, :, 0, 0].T + gate.reduce.bias
    squeezed = squeezed * squeezed.sigmoid()
    factor = (squeezed @ gate.expand.weight[:, :, 0, 0].T + gate.expand.bias).sigmoid()
    torch.testing.assert_close(gate(x), x * factor[:, :, None, None])


def test_stochastic_depth_is_off_unless_asked_for_and_rises_with_the_block() -> None:
    assert not [m for m in on_meta(B0, IMAGENET, 10).modules() if isinstance(m, StochasticDepth)]
    blocks = [m for m in on_meta(B0, IMAGENET, 10, drop_path=0.32).modules() if isinstance(m, MBConv)]
    assert len(blocks) == 16
    for place, block in enumerate(blocks):
        dropped = block.residual and place > 0
        assert getattr(block.drop, "rate", 0.0) == pytest.approx(0.02 * place if dropped else 0.0)


def test_stochastic_depth_drops_whole_examples_and_keeps_the_mean() -> None:
    layer, x = StochasticDepth(0.25), torch.ones(4000, 2, 3, 3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        y = layer.train()(x)
    values = y.flatten(1)
    assert torch.equal(values.amin(1), values.amax(1))
    assert set(values[:, 0].tolist()) <= {0.0, float(torch.tensor(1.0) / 0.75)}
    assert abs(float((values[:, 0] == 0).double().mean()) - 0.25) < 5 * (0.25 * 0.75 / 4000) ** 0.5
    assert torch.equal(layer.eval()(x), x)


@pytest.mark.parametrize("options", [{"multiplier": 0.0}, {"depth": -1.0}, {"dropout": 1.0}, {"drop_path": 1.0}])
def test_wrong_options_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ModelError, match=next(iter(options))):
        models.build(B0, input_shape=(3, 32, 32), classes=4, seed=0, options=options)


def test_it_computes_what_transformers_efficientnet_computes() -> None:
    transformers = pytest.importorskip("transformers")
    options = {"multiplier": 0.5, "depth": 1.1}
    ours = models.build(B0, input_shape=(3, 97, 98), classes=6, seed=0, options=options)
    x = torch.randn(4, 3, 97, 98, generator=torch.Generator().manual_seed(0))
    ours(x)  # statistics
    config = transformers.EfficientNetConfig(
        width_coefficient=0.5, depth_coefficient=1.1, batch_norm_eps=1e-5, num_labels=6, dropout_rate=0.0,
        hidden_dim=640, depthwise_padding=list(range(99)),
    )  # fmt: skip
    other = transformers.EfficientNetForImageClassification(config)
    other.efficientnet.embeddings.padding = nn.ZeroPad2d(1)  # theirs pads one side only, as TensorFlow does
    values = ours.state_dict().values()  # both name conv, norm, conv, norm, ... in the order of the signal
    other.load_state_dict(dict(zip(other.state_dict(), values, strict=True)))
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(x), other.eval()(x).logits, rtol=1e-4, atol=1e-5)
