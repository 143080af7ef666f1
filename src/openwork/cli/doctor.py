"""`openwork doctor`: is this machine ready, and what would help it."""

from __future__ import annotations

import importlib
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import typer
from rich.console import Console

from openwork import registry
from openwork.errors import OpenworkError


def doctor() -> None:
    """Check the installation: versions, processor, kernels' exactness, cards, data folders, disk.

    Ends with status 1 if something is broken.
    """
    console, broken = Console(highlight=False), 0
    for title, check in _CHECKS.items():
        for good, text in check():
            broken += not good
            console.print(f"{'[green]ok[/]  ' if good else '[red]no[/]  '}{title}: ", end="")
            console.print(text, markup=False)
    raise typer.Exit(1 if broken else 0)


def _versions() -> Iterator[tuple[bool, str]]:
    yield sys.version_info >= (3, 11), f"Python {sys.version.split()[0]}"
    for name in ("torch", "numpy", "scipy", "sklearn", "safetensors"):
        try:
            yield True, f"{name} {importlib.import_module(name).__version__}"
        except ImportError as error:
            yield False, f"{name} cannot be imported: {error}"


def _machine() -> Iterator[tuple[bool, str]]:
    import torch

    from openwork.lab import environment

    yield (
        True,
        f"{environment.processor()}, {torch.get_num_threads()} threads, CUDA {'yes' if torch.cuda.is_available() else 'no'}",
    )


def _methods() -> Iterator[tuple[bool, str]]:
    for name in registry.names():
        try:
            registry.load(name)
        except (ImportError, AttributeError, OpenworkError) as error:
            yield False, f"{name}: {error}"
    yield True, f"{len(registry.names())} methods, {len(registry.study_names())} studies"


def _exactness() -> Iterator[tuple[bool, str]]:
    import torch
    from torch import nn

    from openwork.methods.sparsify.magnitude import prune

    generator = torch.Generator().manual_seed(0)
    model = nn.Linear(64, 64)
    with torch.no_grad():
        model.weight.copy_(torch.randn(64, 64, generator=generator))
    masks = prune(model, 0.1)
    exact = masks.nnz() == 410 and int((model.weight != 0).sum()) == 410
    yield exact, f"density 0.1 of 4,096 weights keeps {masks.nnz()} (410 is exact)"


def _places() -> Iterator[tuple[bool, str]]:
    free = shutil.disk_usage(Path.cwd()).free / 1e9
    yield free > 0.1, f"{free:.1f} GB free in {Path.cwd()}"
    from openwork.data import names

    yield True, f"data sets: {', '.join(names())} (where each lies: openwork data list)"


_CHECKS: dict[str, Callable[[], Iterator[tuple[bool, str]]]] = {
    "versions": _versions,
    "machine": _machine,
    "methods": _methods,
    "exactness": _exactness,
    "places": _places,
}
