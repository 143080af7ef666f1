from __future__ import annotations

import math

import pytest
import torch

from openwork.models.transformer import Attention


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_attention_by_its_definition(heads: int, causal: bool) -> None:
    with torch.random.fork_rng(devices=[]):
        attention = Attention(8, heads, 0.0, causal)
        x = torch.randn(2, 5, 8)
    size = 8 // heads
    joint = attention.qkv(x)
    read = torch.zeros(2, 5, 8)
    for b in range(2):
        for h in range(heads):
            q, k, v = (joint[b, :, part * 8 + h * size : part * 8 + (h + 1) * size] for part in range(3))
            for t in range(5):
                seen = t + 1 if causal else 5
                weights = torch.softmax(torch.stack([q[t] @ k[s] / math.sqrt(size) for s in range(seen)]), dim=0)
                read[b, t, h * size : (h + 1) * size] = sum(weights[s] * v[s] for s in range(seen))
    torch.testing.assert_close(attention(x), attention.proj(read))


def test_dropout_of_weights_acts_in_training_only() -> None:
    with torch.random.fork_rng(devices=[]):
        attention = Attention(8, 2, 0.5, causal=False)
        x = torch.randn(2, 5, 8)
        assert not torch.equal(attention(x), attention(x))
    attention.eval()
    assert torch.equal(attention(x), attention(x))
