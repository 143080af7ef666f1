"""Formats: ways to hold a weight and multiply with it. The folder is the registry: one file is one format.

A format is anything with the four functions of `Format`; the modules of this folder are. `openwork.testing.formats`
has the suite that each must pass.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any, Protocol, cast

from torch import Tensor

from openwork.errors import ModelError


class Format(Protocol):
    """What a format offers. Inference only; float32 and float64 on the CPU; torch's thread count is respected."""

    def pack(self, weight: Tensor, bias: Tensor | None = None) -> Any:
        """Return `weight` (out, in) and `bias` (out) packed; the packed object never changes and may be shared."""

    def unpack(self, packed: Any) -> tuple[Tensor, Tensor | None]:
        """Return weight (out, in) and bias (out) as they went in; a negative zero may come back as zero."""

    def matmul(self, packed: Any, x: Tensor) -> Tensor:
        """Return `x @ weight.T + bias` for x (..., in) of any strides: a tensor (..., out) of x's dtype."""

    def nbytes(self, packed: Any) -> int:
        """Return the memory in bytes that the packed object takes."""


def names() -> list[str]:
    """Return the names of the formats, `dense` first."""
    found = (module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))
    return sorted(found, key=lambda name: (name != "dense", name))


def load(name: str) -> Format:
    """Return a format by name.

    Raises:
        ModelError: if there is no such format.
    """
    if name not in names():
        raise ModelError(f"there is no format {name!r}: choose from {', '.join(names())}")
    return cast(Format, importlib.import_module(f"{__name__}.{name}"))
