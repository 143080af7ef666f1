"""The hidden folder beside the new one in which a run of `openwork sparsify` keeps what its stages have finished."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from openwork import atomic
from openwork.cli import _sparsify_scores as scores
from openwork.cli._sparsify_recipe import Recipe
from openwork.errors import OpenworkError, StoreError
from openwork.models.pretrained.folder import shown


def place(target: Path) -> Path:
    """Return the hidden folder of the run into `target`."""
    whole = target.absolute()
    return whole.with_name(f".{whole.name[:80]}.openwork-run")


def fingerprint(source: Path, text: scores.Text | None) -> str:
    """Return a digest of what a run reads: the tokens, and name, size and time of the files of the model."""
    digest = hashlib.sha256()
    for blocks in () if text is None else (text.calibration, text.held_out):
        digest.update(repr(tuple(blocks.shape)).encode() + blocks.numpy().tobytes())
    for path in sorted(source.iterdir()):
        if path.suffix in (".safetensors", ".bin", ".json") and path.is_file():
            info = path.stat()
            digest.update(f"{path.name} {info.st_size} {info.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def finished(out: Path, recipe: Recipe) -> dict[str, Any] | None:
    """Return the report of a finished run of the same recipe in `out`, None if there is none."""
    try:
        report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return report if isinstance(report, dict) and report.get("recipe") == recipe.plain() else None


def check(work: Path, recipe: Recipe, out: Path, resume: bool) -> None:
    """Refuse unfinished work unless it is to be resumed and is of the same recipe."""
    if not work.exists():
        return
    if not resume:
        raise StoreError(
            f"a run into {shown(out)} was stopped before its end: add --resume to go on, or remove {shown(work)}"
            " to start anew"
        )
    try:
        found = json.loads((work / "recipe.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    asked = recipe.plain()
    if isinstance(found, dict):
        found["onnx"] = asked["onnx"]  # no stage that was kept depends on it
    if not isinstance(found, dict) or found != asked:
        odd = [key for key in asked if not isinstance(found, dict) or found.get(key) != asked[key]]
        flags = ", ".join(f"--{key.replace('_', '-')}" for key in odd)
        raise StoreError(
            f"the run to resume has other settings ({flags}): give the same, or remove {shown(work)} to start anew"
        )


@contextlib.contextmanager
def holding(work: Path, recipe: Recipe, inputs: str) -> Iterator[None]:
    """Hold the hidden folder of a run; if it fails before anything was pruned it goes, so that nothing is in the way."""
    with atomic.alone(work):
        atomic.sweep(work)
        _same(work, inputs)
        atomic.write_json(work / "recipe.json", recipe.plain())
        yield from _clearing(work)


def _clearing(work: Path) -> Iterator[None]:
    """Remove the folder where what runs fails before anything was pruned."""
    try:
        yield
    except OpenworkError:
        if not any((work / name).exists() for name in ("pruned.safetensors", "streamed", ".streamed.part")):
            shutil.rmtree(work, ignore_errors=True)
        raise


def _same(work: Path, inputs: str) -> None:
    """Refuse to go on with other text or another model; remember them at the start."""
    path = work / "inputs.json"
    if not path.is_file():
        atomic.write_json(path, inputs)
    elif path.read_text(encoding="utf-8") != json.dumps(inputs) + "\n":
        raise StoreError(f"the text or the model has changed since the run was stopped: remove {shown(work)} to start anew")
