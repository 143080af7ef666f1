"""Checkpoints on disk: a folder a step, renamed into place once, checked by digest; the last two are kept."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch

from openwork import atomic
from openwork.errors import FormatError
from openwork.train.state import Snapshot

KEPT = 2
TENSORS = "tensors.safetensors"
MANIFEST = "manifest.json"
FORMAT = {"format": "openwork checkpoint", "version": 1}
_LARGEST_MANIFEST = 256 * 2**20
_FOLDER = re.compile(r"step-(\d{6,15})")

_log = logging.getLogger(__name__)


def write(folder: Path, snapshot: Snapshot) -> Path:
    """Write `snapshot` to `folder`/step-000123, remove all but the last two, and return where it is.

    A process killed at any moment leaves the old checkpoints, or the old and the new one, never a part of one.

    Raises:
        StoreError: if it cannot be written; what was there stays.
    """
    place = folder / f"step-{snapshot.step:06d}"
    data = safetensors.torch.save(snapshot.tensors)
    manifest = {**FORMAT, **snapshot.manifest, "tensors_sha256": hashlib.sha256(data).hexdigest()}
    manifest["sha256"] = _digest(manifest)
    with atomic.replacing_folder(place) as temporary:
        (temporary / TENSORS).write_bytes(data)
        atomic.write_json(temporary / MANIFEST, manifest)
    # Later steps are of a run that went back to an older checkpoint, because the newer ones were damaged.
    places = _steps(folder)
    kept = [step for step in places if step <= snapshot.step][:KEPT]
    for step in places.keys() - kept:
        shutil.rmtree(places[step], ignore_errors=True)
    return place


def read(place: Path) -> Snapshot:
    """Return the snapshot in the folder `place`.

    Raises:
        FormatError: if a file is missing, or its digest or its form is wrong.
    """
    manifest = _manifest(place / MANIFEST)
    try:
        data = (place / TENSORS).read_bytes()
    except OSError as error:
        raise FormatError(f"checkpoint {place}: {TENSORS} cannot be read: {error}") from error
    if hashlib.sha256(data).hexdigest() != manifest["tensors_sha256"]:
        raise FormatError(f"checkpoint {place}: {TENSORS} is not the file that was written, its digest differs")
    try:
        tensors = safetensors.torch.load(data)
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise FormatError(f"checkpoint {place}: {TENSORS} is no safetensors file: {error}") from error
    return Snapshot(manifest["step"], tensors, manifest)


def to_bytes(snapshot: Snapshot) -> bytes:
    """Return a snapshot as one message, for processes that cannot read its folder."""
    head = json.dumps(snapshot.manifest).encode()
    return len(head).to_bytes(8, "little") + head + safetensors.torch.save(snapshot.tensors)


def from_bytes(message: bytes) -> Snapshot:
    """Return the snapshot that `to_bytes` was given."""
    length = int.from_bytes(message[:8], "little")
    manifest = json.loads(message[8 : 8 + length])
    return Snapshot(manifest["step"], safetensors.torch.load(message[8 + length :]), manifest)


def newest(folder: Path) -> tuple[Snapshot | None, list[str]]:
    """Return the newest checkpoint in `folder` that is whole, None if there is none, and a note for each damaged one.

    What killed writers left behind is removed.

    Raises:
        FormatError: if there are checkpoints and all are damaged.
    """
    notes: list[str] = []
    atomic.sweep(folder)
    places = _steps(folder)
    for place in places.values():
        try:
            return read(place), notes
        except FormatError as error:
            notes.append(f"{error}; going back to the one before")
            _log.warning(notes[-1])
    if places:
        raise FormatError(f"all checkpoints in {folder} are damaged; remove that folder to start anew ({notes[0]})")
    return None, notes


def _manifest(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _LARGEST_MANIFEST:
            raise FormatError(f"{path} is larger than any manifest")
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(f"{path} cannot be read: {error}") from error
    if not isinstance(manifest, dict) or {key: manifest.get(key) for key in FORMAT} != FORMAT:
        raise FormatError(f"{path} is no checkpoint of this version of openwork")
    if manifest.pop("sha256", None) != _digest(manifest):
        raise FormatError(f"{path} is not the file that was written, its digest differs")
    if not isinstance(manifest.get("step"), int) or not isinstance(manifest.get("tensors_sha256"), str):
        raise FormatError(f"{path} lacks its step or the digest of the tensors")
    return manifest


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _steps(folder: Path) -> dict[int, Path]:
    """Return step -> folder, newest first."""
    if not folder.is_dir():
        return {}
    found = {int(match[1]): path for path in folder.iterdir() if (match := _FOLDER.fullmatch(path.name))}
    return dict(sorted(found.items(), reverse=True))
