"""Data for studies in tests: eight hidden patterns under strong noise, few to train on and many to test on."""

from __future__ import annotations

import torch
from torch import Tensor

from openwork.core.rng import generator

CLASSES = 8


def make() -> dict[str, tuple[Tensor, Tensor] | int]:
    """Return images (n, 1, 8, 8) in [0, 1] and labels: 600 to train, 600 to validate and 4,000 to test on."""
    patterns = torch.randn(CLASSES, 1, 8, 8, generator=generator(0, "patterns"))
    sizes = {"train": 600, "validation": 600, "test": 4000}
    return {**{name: _part(patterns, size, name) for name, size in sizes.items()}, "classes": CLASSES}


def _part(patterns: Tensor, size: int, name: str) -> tuple[Tensor, Tensor]:
    source = generator(0, "images", name)
    labels = torch.arange(size) % CLASSES
    signs = 2 * torch.randint(0, 2, (size, 1, 1, 1), generator=source) - 1  # a pattern or its negative: not linear
    noise = torch.randn(size, 1, 8, 8, generator=source)
    return (0.5 + 0.15 * (0.7 * signs * patterns[labels] + noise)).clamp(0, 1), labels
