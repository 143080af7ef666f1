"""Public conformance suites: run them over your own method, pattern, format or study as openwork does over its own."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from openwork.testing.formats import check_format
    from openwork.testing.patterns import check_pattern
    from openwork.testing.sparsifiers import check_sparsifier, sparsifier_checks
    from openwork.testing.studies import check_study

_HOMES = {
    "check_format": "openwork.testing.formats",
    "check_pattern": "openwork.testing.patterns",
    "check_sparsifier": "openwork.testing.sparsifiers",
    "check_study": "openwork.testing.studies",
    "sparsifier_checks": "openwork.testing.sparsifiers",
}

__all__ = ["check_format", "check_pattern", "check_sparsifier", "check_study", "sparsifier_checks"]


def __getattr__(name: str) -> Any:
    """Return a suite from its module, which is imported now."""
    if name not in _HOMES:
        raise AttributeError(f"module 'openwork.testing' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOMES[name]), name)
