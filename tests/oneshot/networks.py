"""Small networks and data for the tests of one-shot pruning."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from openwork.core.rng import generator

COMMON: dict[str, Any] = {
    "vocab_size": 60, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
}  # fmt: skip


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=generator(seed, "test", *shape), dtype=torch.float64).to(dtype)


def correlated(tokens: int, width: int, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Inputs whose covariance decays with distance and whose scales differ: what activations look like."""
    mix = torch.tensor([[0.8 ** abs(i - j) for j in range(width)] for i in range(width)], dtype=torch.float64)
    scale = torch.exp(normal(width, seed=seed + 1, dtype=torch.float64))
    return (normal(tokens, width, seed=seed, dtype=torch.float64) @ mix * scale).to(dtype)


def seeded(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter normal values of unit fan-in from a named generator."""
    for name, param in model.named_parameters():
        values = normal(*param.shape, seed=seed + len(name))
        param.data = (values / param[0].numel() ** 0.5 if param.dim() > 1 else 1 + 0.1 * values).to(param.dtype)
    return model.eval()


def tokens(count: int = 3, batch: int = 2, length: int = 12, *, vocab: int = 60) -> list[Tensor]:
    return [
        torch.randint(vocab, (batch, length), generator=generator(k, "test", "tokens", batch, length)) for k in range(count)
    ]


def padded(batches: list[Tensor]) -> list[dict[str, Tensor]]:
    """Mask the last third of each batch's first row."""
    found = []
    for ids in batches:
        mask = torch.ones_like(ids)
        mask[0, -ids.shape[1] // 3 :] = 0
        found.append({"input_ids": ids, "attention_mask": mask})
    return found


def llama(**changes: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        **{**COMMON, "num_key_value_heads": 1, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None, **changes}
    )
    return seeded(transformers.LlamaForCausalLM(config))


def gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=60, n_embd=16, n_layer=3, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2
    )
    return seeded(transformers.GPT2LMHeadModel(config))


def bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    return seeded(transformers.BertModel(transformers.BertConfig(**COMMON, max_position_embeddings=32)))


def vit() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(**{**COMMON, "image_size": 8, "patch_size": 4})
    return seeded(transformers.ViTForImageClassification(config))


def t5() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(vocab_size=60, d_model=16, d_ff=32, d_kv=8, num_layers=2, num_heads=2)
    return seeded(transformers.T5ForConditionalGeneration(config))


def mlp() -> nn.Module:
    return seeded(nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 4)))


def mobile() -> nn.Module:
    """A stem, a depthwise and a pointwise convolution, and a head."""
    return seeded(
        nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.ReLU(),
            nn.Conv2d(8, 16, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5),
        )
    )  # fmt: skip


class Residual(nn.Module):
    """A chain of residual blocks in plain torch, each a pair of linear layers."""

    def __init__(self, depth: int = 3, width: int = 8) -> None:
        super().__init__()
        self.entry = nn.Linear(5, width)
        self.blocks = nn.ModuleList([_Block(width) for _ in range(depth)])
        self.exit = nn.Linear(width, 2)
        seeded(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.entry(x)
        for block in self.blocks:
            x = block(x)
        return self.exit(x)


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))
