"""Vision transformers (Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021).

`vit-tiny`, `-small` and `-base` have the sizes of Touvron et al. (DeiT, ICML 2021). Parameters are named as in timm.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openwork.errors import ModelError
from openwork.models.common import check_positive, image_shape
from openwork.models.transformer import Block, checked_sizes, initialise

NAMES = ("vit-tiny", "vit-small", "vit-base")
FORM = r"vit-(tiny|small|base)"

SIZES = {"vit-tiny": (192, 12, 3), "vit-small": (384, 12, 6), "vit-base": (768, 12, 12)}
"""Width, depth and heads."""


class PatchEmbed(nn.Module):
    """One vector a patch: images -> (batch, patches, width); zeros fill the right and lower rim up to a whole patch."""

    def __init__(self, shape: tuple[int, int, int], patch: int, width: int) -> None:
        super().__init__()
        channels, height, across = shape
        self.rim = (0, -across % patch, 0, -height % patch)
        self.patches = math.ceil(height / patch) * math.ceil(across / patch)
        self.proj = nn.Conv2d(channels, width, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        """Return the patches' vectors, row by row."""
        if any(self.rim):
            x = F.pad(x, self.rim)
        out: Tensor = self.proj(x).flatten(2).transpose(1, 2)
        return out


class ViT(nn.Module):
    """Patches and a class token with learned positions, pre-norm blocks, readout of the class token."""

    def __init__(
        self, shape: tuple[int, int, int], classes: int, patch: int, width: int, depth: int, heads: int, dropout: float
    ) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(shape, patch, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.patch_embed.patches, width))
        self.blocks = nn.Sequential(*(Block(width, heads, dropout, causal=False) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (batch, classes) of images (batch, channels, height, width)."""
        x = self.patch_embed(x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        logits: Tensor = self.head(self.norm(self.blocks(x))[:, 0])
        return logits


def build(
    name: str,
    input_shape: tuple[int, ...],
    classes: int,
    *,
    patch: int | None = None,
    width: int | None = None,
    depth: int | None = None,
    heads: int | None = None,
    dropout: float = 0.0,
) -> nn.Module:
    """Return the transformer; each option replaces the size that the name stands for.

    `patch` is the side of a patch in pixels: by default the power of 2 between 2 and 16 nearest to an eighth of the
    image's shorter side, so 16 on 224x224, 4 on 32x32 and 28x28, 2 on 8x8.
    """
    shape = image_shape(name, input_shape)
    width, depth, heads = checked_sizes(name, SIZES[name], (width, depth, heads), dropout)
    check_positive(name, patch=patch)
    side = min(shape[1:])
    if patch is None:
        patch = min(16, max(2, 2 ** round(math.log2(side / 8))))
    if patch > side:
        raise ModelError(f"option 'patch' of {name} is {patch}: the image has only {shape[1]}x{shape[2]} pixels")
    model = ViT(shape, classes, patch, width, depth, heads, dropout)
    for vector in (model.cls_token, model.pos_embed):
        nn.init.normal_(vector, std=0.02)
    return initialise(model, depth)
