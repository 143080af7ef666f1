"""Data for studies in tests: eight patterns under strong noise, few images to train on and many to test on."""

from __future__ import annotations

import torch
from torch import Tensor

from openwork.core.rng import generator

CLASSES = 8


def make() -> dict[str, tuple[Tensor, Tensor] | int]:
    """Return images (n, 1, 8, 8) in [0, 1] and labels: 600 to train, of which a fifth are wrong, 400 and 2,000."""
    patterns = torch.randn(CLASSES, 1, 8, 8, generator=generator(0, "patterns"))
    sizes = {"train": 600, "validation": 400, "test": 2000}
    parts = {name: _part(patterns, size, name) for name, size in sizes.items()}
    labels = parts["train"][1]
    wrong = torch.rand(len(labels), generator=generator(0, "wrong")) < 0.2
    labels[wrong] = torch.randint(0, CLASSES, (int(wrong.sum()),), generator=generator(0, "labels"))
    return {**parts, "classes": CLASSES}


def _part(patterns: Tensor, size: int, name: str) -> tuple[Tensor, Tensor]:
    source = generator(0, "images", name)
    labels = torch.arange(size) % CLASSES
    noise = torch.randn(size, 1, 8, 8, generator=source)
    return (0.5 + 0.15 * (0.35 * patterns[labels] + noise)).clamp(0, 1), labels
