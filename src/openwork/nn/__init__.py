"""Layers and layer operations that two or more methods need, and the layer that is sparse all the time."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from openwork.nn.batchnorm import recalibrate_norm
    from openwork.nn.sparse_linear import SparseLinear

_HOMES = {"SparseLinear": "openwork.nn.sparse_linear", "recalibrate_norm": "openwork.nn.batchnorm"}

__all__ = ["SparseLinear", "recalibrate_norm"]


def __getattr__(name: str) -> Any:
    """Return a public name from its module, which is imported now."""
    if name not in _HOMES:
        raise AttributeError(f"module 'openwork.nn' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """List the public names."""
    return sorted(__all__)
