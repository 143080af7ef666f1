"""Named generators: every random draw of openwork is a function of a seed and of what it is for.

Nothing reads or writes torch's global generator, so a resumed run draws what the uninterrupted one drew, and two
purposes never disturb one another.
"""

from __future__ import annotations

import hashlib

import torch


def derive(seed: int, *purpose: str | int) -> int:
    """Return a 63-bit seed that depends on `seed` and on every word of `purpose`, the same on every machine."""
    text = "\x1f".join([str(int(seed)), *map(str, purpose)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *purpose: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a fresh torch generator for one purpose, for example `generator(0, "order", epoch)`."""
    return torch.Generator(device=device).manual_seed(derive(seed, *purpose))
