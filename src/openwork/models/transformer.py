"""The pre-norm transformer block that the image and the language models share, and its first values."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from openwork.errors import ModelError
from openwork.models.common import check_positive, check_rate


class Attention(nn.Module):
    """Multi-head self-attention (batch, tokens, width) -> the same; `causal` hides later tokens from earlier ones.

    Queries, keys and values come from one linear layer, so that every weight matrix belongs to an `nn.Linear`.
    """

    def __init__(self, width: int, heads: int, dropout: float, causal: bool) -> None:
        super().__init__()
        self.heads, self.rate, self.causal = heads, dropout, causal
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return what each token reads from the others."""
        b, t, w = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, w // self.heads).permute(2, 0, 3, 1, 4)
        rate = self.rate if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=rate, is_causal=self.causal)
        out: Tensor = self.proj(y.transpose(1, 2).reshape(b, t, w))
        return out


class Feedforward(nn.Module):
    """Two linear layers with a GELU between them, four times as wide inside."""

    def __init__(self, width: int, tanh: bool) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.act = nn.GELU(approximate="tanh" if tanh else "none")
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return (batch, tokens, width)."""
        out: Tensor = self.fc2(self.act(self.fc1(x)))
        return out


class Block(nn.Module):
    """Attention, then a feedforward pair, each behind a layer norm and added to its input."""

    def __init__(self, width: int, heads: int, dropout: float, *, causal: bool) -> None:
        super().__init__()
        epsilon = 1e-5 if causal else 1e-6  # those of GPT-2 and of ViT
        self.norm1 = nn.LayerNorm(width, eps=epsilon)
        self.attn = Attention(width, heads, dropout, causal)
        self.norm2 = nn.LayerNorm(width, eps=epsilon)
        self.mlp = Feedforward(width, tanh=causal)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Return (batch, tokens, width)."""
        x = x + self.dropout(self.attn(self.norm1(x)))
        out: Tensor = x + self.dropout(self.mlp(self.norm2(x)))
        return out


def checked_sizes(
    name: str, usual: tuple[int, int, int], given: tuple[int | None, int | None, int | None], dropout: float
) -> tuple[int, int, int]:
    """Return width, depth and heads: the given ones, and the usual ones where none is given.

    Raises:
        ModelError: unless they are positive, the heads divide the width, and `dropout` is in [0, 1).
    """
    width, depth, heads = (u if g is None else g for u, g in zip(usual, given, strict=True))
    check_positive(name, width=width, depth=depth, heads=heads)
    check_rate(name, dropout=dropout)
    if width % heads:
        raise ModelError(f"{name} cannot split a width of {width} into {heads} heads: heads must divide width")
    return width, depth, heads


def initialise(model: nn.Module, depth: int) -> nn.Module:
    """Draw first values in place from torch's global generator, as GPT-2 and ViT do; return the model.

    Normal with deviation 0.02 for linear layers and embeddings; the layers that write into the residual stream are
    divided by sqrt(2 * depth) (Radford et al. 2019, section 2.3). Biases 0, norms 1 and 0.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding | nn.Conv2d):
            writes = name.endswith((".attn.proj", ".mlp.fc2"))
            nn.init.normal_(module.weight, std=0.02 / math.sqrt(2 * depth) if writes else 0.02)
        if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
            nn.init.zeros_(module.bias)
    return model
