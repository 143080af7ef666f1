from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

from openwork import models
from tests.models.helpers import CIFAR, IMAGENET, count, images, on_meta


@pytest.mark.parametrize(
    ("ref", "parameters"), [("vit-tiny", 5_717_416), ("vit-small", 22_050_664), ("vit-base", 86_567_656)]
)
def test_published_parameter_counts(ref: str, parameters: int) -> None:
    assert count(on_meta(ref, IMAGENET, 1000)) == parameters


@pytest.mark.parametrize(
    ("side", "patch"), [(8, 2), (12, 2), (16, 2), (28, 4), (32, 4), (64, 8), (96, 16), (224, 16), (512, 16)]
)
def test_patch_follows_the_size(side: int, patch: int) -> None:
    model = on_meta("vit-tiny", (3, side, side), 10)
    assert model.patch_embed.proj.kernel_size == (patch, patch)
    assert model.pos_embed.shape == (1, 1 + (-(-side // patch)) ** 2, 192)


@given(images)
@settings(deadline=None, max_examples=20)
def test_images_of_any_size(shape: tuple[int, int, int]) -> None:
    options = {"width": 12, "depth": 1}
    model = models.build("vit-tiny", input_shape=shape, classes=3, seed=0, options=options).eval()
    assert model(torch.zeros(2, *shape)).shape == (2, 3)


def test_the_rim_is_filled_with_zeros() -> None:
    options = {"width": 12, "depth": 1, "patch": 4}
    ragged = models.build("vit-tiny", input_shape=(1, 9, 11), classes=3, seed=0, options=options)
    whole = models.build("vit-tiny", input_shape=(1, 12, 12), classes=3, seed=0, options=options)
    x = torch.randn(2, 1, 9, 11, generator=torch.Generator().manual_seed(0))
    padded = torch.zeros(2, 1, 12, 12)
    padded[:, :, :9, :11] = x
    with torch.no_grad():
        assert torch.equal(ragged(x), whole(padded))


def theirs(state: dict[str, torch.Tensor], depth: int) -> dict[str, torch.Tensor]:
    """Rename our tensors, and split the joint queries, keys and values, as transformers has them."""
    renamed = {
        "vit.embeddings.cls_token": state["cls_token"],
        "vit.embeddings.position_embeddings": state["pos_embed"],
    }
    for kind in ("weight", "bias"):
        renamed[f"vit.embeddings.patch_embeddings.projection.{kind}"] = state[f"patch_embed.proj.{kind}"]
        renamed[f"vit.layernorm.{kind}"] = state[f"norm.{kind}"]
        renamed[f"classifier.{kind}"] = state[f"head.{kind}"]
        for i in range(depth):
            block, layer = f"blocks.{i}", f"vit.layers.{i}"
            for name, part in zip("qkv", state[f"{block}.attn.qkv.{kind}"].chunk(3), strict=True):
                renamed[f"{layer}.attention.{name}_proj.{kind}"] = part
            for ours, other in {
                "attn.proj": "attention.o_proj", "norm1": "layernorm_before", "norm2": "layernorm_after",
                "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2",
            }.items():  # fmt: skip
                renamed[f"{layer}.{other}.{kind}"] = state[f"{block}.{ours}.{kind}"]
    return renamed


def test_it_computes_what_transformers_vit_computes() -> None:
    transformers = pytest.importorskip("transformers")
    options = {"width": 24, "depth": 2, "heads": 3}
    ours = models.build("vit-tiny", input_shape=CIFAR, classes=6, seed=0, options=options).eval()
    config = transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96, image_size=32, patch_size=4,
        layer_norm_eps=1e-6, num_labels=6,
    )  # fmt: skip
    other = transformers.ViTForImageClassification(config).eval()
    other.load_state_dict(theirs(ours.state_dict(), 2))
    x = torch.randn(4, *CIFAR, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(x), other(x).logits, rtol=1e-4, atol=1e-6)
