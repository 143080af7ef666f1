"""openwork: sparse structure in neural networks. Make it, compare it fairly, run it, read it.

Public names are loaded when they are first used, so that importing openwork does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from openwork import registry

if TYPE_CHECKING:
    from openwork import nn
    from openwork.core.masks import Masks
    from openwork.core.patterns import NM, Block, Channel, KernelGroup, Layer, Unstructured
    from openwork.oneshot.api import sparsify
    from openwork.runtime.plan import accelerate
    from openwork.saving import load, load_state, save
    from openwork.sparsifier.sparsifier import Fixed, Sparsifier

__version__ = "0.1.0"

_HOMES = {
    "Block": "openwork.core.patterns",
    "Channel": "openwork.core.patterns",
    "Fixed": "openwork.sparsifier.sparsifier",
    "KernelGroup": "openwork.core.patterns",
    "Layer": "openwork.core.patterns",
    "Masks": "openwork.core.masks",
    "NM": "openwork.core.patterns",
    "Sparsifier": "openwork.sparsifier.sparsifier",
    "Unstructured": "openwork.core.patterns",
    "accelerate": "openwork.runtime.plan",
    "load": "openwork.saving",
    "load_state": "openwork.saving",
    "save": "openwork.saving",
    "sparsify": "openwork.oneshot.api",
}

__all__ = [
    "NM",
    "Block",
    "Channel",
    "Fixed",
    "KernelGroup",
    "Layer",
    "Masks",
    "Sparsifier",
    "Unstructured",
    "__version__",
    "accelerate",
    "load",
    "load_state",
    "nn",
    "save",
    "sparsify",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Return a public name from its home, or a method's class from the folder of methods."""
    if name == "nn":
        return importlib.import_module("openwork.nn")
    home = _HOMES.get(name) or registry.home_of(name)
    if home is None:
        raise AttributeError(f"module 'openwork' has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    """List the public names, the methods' classes included."""
    return sorted({*__all__, *registry.entries()})
