"""Decoder-only language models in the manner of GPT-2 (Radford et al., "Language Models are Unsupervised ...", 2019).

`gpt-small` is a small one for characters and laptops (4 layers, width 128); `gpt2` has the sizes of GPT-2 small.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from openwork.models.common import sequence_length
from openwork.models.transformer import Block, checked_sizes, initialise

NAMES = ("gpt-small", "gpt2")
FORM = r"gpt-small|gpt2"

SIZES = {"gpt-small": (128, 4, 4), "gpt2": (768, 12, 12)}
"""Width, depth and heads."""


class GPT(nn.Module):
    """Token numbers (batch, tokens) int64 -> logits of the next token (batch, tokens, vocabulary), causal.

    Sequences shorter than `length` are fine. With `tied`, the readout is the embedding itself.
    """

    def __init__(self, length: int, vocabulary: int, width: int, depth: int, heads: int, dropout: float, tied: bool) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(length, width)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.blocks = nn.Sequential(*(Block(width, heads, dropout, causal=True) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.token.weight

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits; those at place t depend on the tokens up to t only."""
        places = torch.arange(x.shape[1], device=x.device)
        h = self.dropout(self.token(x) + self.position(places))
        logits: Tensor = self.head(self.norm(self.blocks(h)))
        return logits


def build(
    name: str,
    input_shape: tuple[int, ...],
    classes: int,
    *,
    width: int | None = None,
    depth: int | None = None,
    heads: int | None = None,
    dropout: float = 0.0,
    tied: bool = True,
) -> nn.Module:
    """Return the model for sequences of `input_shape[0]` tokens out of `classes`; options replace the name's sizes."""
    length = sequence_length(name, input_shape)
    width, depth, heads = checked_sizes(name, SIZES[name], (width, depth, heads), dropout)
    return initialise(GPT(length, classes, width, depth, heads, dropout, tied), depth)
