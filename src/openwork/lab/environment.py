"""Where a number was measured: versions, processor, threads, and a digest of the code that computed it."""

from __future__ import annotations

import hashlib
import inspect
import os
import platform
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import openwork

# The code that can change what a trial measures; the command line, reports and statistics cannot.
_ROOMS = ("core", "sparsifier", "nn", "methods", "data", "models", "train", "lab/training.py", "lab/compare.py",
          "studies/_common.py")  # fmt: skip


def identity(threads: int, study: Any) -> dict[str, Any]:
    """Return what the numbers of a trial of `study` depend on beside its settings."""
    source = inspect.getsourcefile(study.run)
    own = hashlib.sha256(Path(source).read_bytes()).hexdigest() if source else ""
    return {
        "torch": version("torch"),
        "threads": threads,
        "code": code_digest(),
        "study": own,
        "machine": platform.machine(),
    }


def describe(threads: int, workers: int) -> dict[str, Any]:
    """Return what a report says about where and when it was made."""
    return {
        "openwork": openwork.__version__,
        "torch": version("torch"),
        "python": platform.python_version(),
        "system": platform.system(),
        "processor": processor(),
        "cores": os.cpu_count() or 1,
        "threads": threads,
        "workers": workers,
        "code": code_digest()[:12],
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


@cache
def code_digest() -> str:
    """Return a digest of the source of the rooms that trials run through."""
    total = hashlib.sha256()
    root = Path(openwork.__file__).parent
    for room in _ROOMS:
        place = root / room
        for path in [place] if place.is_file() else sorted(place.rglob("*.py")):
            total.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return total.hexdigest()


@cache
def processor() -> str:
    """Return the processor's name and the vector features that matter to kernels."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    entry = {key.strip(): value.strip() for key, value in fields.items()}
    flags = set(entry.get("flags", "").split())
    vectors = [name for name in ("avx2", "avx512f") if name in flags]
    return f"{entry.get('model name', platform.machine())} ({', '.join(vectors) or 'no AVX2'})"
