"""Models: reference networks by name, the user's own by `module:function`, transformers' by their config.

The folder is the list: a file that defines `NAMES`, `FORM` and `build` is a family. Reading the names needs no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from openwork.models.catalog import names

if TYPE_CHECKING:
    from openwork.models.building import build
    from openwork.models.outputs import logits, preflight

__all__ = ["build", "logits", "names", "preflight"]


def __getattr__(name: str) -> Any:
    """Import what needs torch when it is first asked for."""
    if name == "build":
        from openwork.models import building

        return building.build
    if name in __all__:
        from openwork.models import outputs

        return getattr(outputs, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
