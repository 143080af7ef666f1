"""Data: named sets with their homes and checksums, the user's own by `module:function` or `.npz`, one form for all.

`load` gives a `Source`. Reading the names, homes and licences needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from openwork.data.catalog import names

if TYPE_CHECKING:
    from openwork.data.arrays import Arrays
    from openwork.data.corruptions import corrupt
    from openwork.data.loading import digest, load, load_images
    from openwork.data.source import Source

__all__ = ["Arrays", "Source", "corrupt", "digest", "load", "load_images", "names"]

_HOMES = {
    "Arrays": "arrays",
    "Source": "source",
    "corrupt": "corruptions",
    "digest": "loading",
    "load": "loading",
    "load_images": "loading",
}


def __getattr__(name: str) -> Any:
    """Import what needs torch when it is first asked for."""
    if name in _HOMES:
        return getattr(import_module(f"openwork.data.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
