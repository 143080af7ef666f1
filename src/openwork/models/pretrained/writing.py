"""Writing a sparsified model as a folder that transformers opens, with a small file beside the dense weights."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch

from openwork import atomic
from openwork.core.masks import Masks
from openwork.errors import ModelError, StoreError
from openwork.models.pretrained.folder import BESIDE, SMALL, TOKENIZER, hushed, shown
from openwork.models.pretrained.loading import Pretrained
from openwork.runtime import files

MASKS = "masks.safetensors"


@dataclass(frozen=True)
class Written:
    """What was written.

    Attributes:
        folder: the new folder.
        dense_bytes: size of its safetensors weights, zeros included.
        small_bytes: size of openwork's file of the same tensors.
    """

    folder: Path
    dense_bytes: int
    small_bytes: int


def check_target(out: str | Path) -> Path:
    """Return the path of a folder that may be made: it does not exist, or is empty.

    Raises:
        StoreError: if it exists and holds something, is no folder, or its parent cannot be written.
    """
    path = Path(out)
    try:
        if path.is_symlink() or (path.exists() and not path.is_dir()):
            raise StoreError(f"{shown(out)} exists and is no folder: choose another name, nothing is written over")
        if path.is_dir() and any(path.iterdir()):
            raise StoreError(f"{shown(out)} exists and is not empty: choose another folder, nothing is written over")
    except (OSError, ValueError) as error:
        raise StoreError(f"cannot use {shown(out)}: {getattr(error, 'strerror', None) or error}") from None
    return path


def write(out: str | Path, pretrained: Pretrained, masks: Masks, *, metadata: Mapping[str, Any] | None = None) -> Written:
    """Write a model, its tokenizer and what lay beside it to the new folder `out`, in one step.

    Args:
        out: must not exist, or be empty.
        pretrained: the model, zero where it is masked.
        masks: what is kept; written as `masks.safetensors`, one bit a weight.
        metadata: kept in the small file.

    Raises:
        MaskError: if the model is not zero where it is masked.
        StoreError: if `out` is not empty or cannot be written.
    """
    target = check_target(out)
    with atomic.replacing_folder(target) as folder:
        written = fill(folder, pretrained, masks, metadata=metadata)
    return Written(target, written.dense_bytes, written.small_bytes)


def fill(folder: Path, pretrained: Pretrained, masks: Masks, *, metadata: Mapping[str, Any] | None = None) -> Written:
    """Write the files of `write` into a folder that exists; see there."""
    masks.check(pretrained.model)
    saver = getattr(pretrained.model, "save_pretrained", None)
    if saver is None:
        raise ModelError(f"a {type(pretrained.model).__name__} is no model of transformers: use openwork.save")
    with hushed():
        saver(folder)
    return finish(folder, pretrained, masks, metadata=metadata)


def finish(folder: Path, pretrained: Pretrained, masks: Masks, *, metadata: Mapping[str, Any] | None = None) -> Written:
    """Add tokenizer, small files, masks and openwork's weights to a folder that holds config and weights."""
    copy_beside(pretrained, folder)
    for path in folder.glob("*.safetensors"):
        path.chmod((folder / "config.json").stat().st_mode & 0o777)  # safetensors makes them for the owner's eyes only
    small = files.write_state(folder / SMALL, _plain(pretrained), dict(metadata or {}))
    if not (folder / MASKS).exists():
        atomic.write_bytes(folder / MASKS, safetensors.torch.save(masks.state_dict()))
    dense = sum(path.stat().st_size for path in folder.glob("model*.safetensors") if path.name != SMALL)
    return Written(folder, dense, small)


def copy_beside(pretrained: Pretrained, folder: Path) -> None:
    """Copy the tokenizer and the small files of a model; a tokenizer without files is saved anew."""
    source = pretrained.folder
    for name in (*TOKENIZER, *BESIDE):
        if (source / name).is_file() and not (name == "generation_config.json" and (folder / name).exists()):
            shutil.copyfile(source / name, folder / name)
    for path in sorted(source.glob("*_Pooling/config.json")):
        (folder / path.parent.name).mkdir(exist_ok=True)
        shutil.copyfile(path, folder / path.parent.name / path.name)
    if pretrained.tokenizer is not None and not any((source / name).is_file() for name in TOKENIZER):
        with hushed():
            pretrained.tokenizer.save_pretrained(folder)


def _plain(pretrained: Pretrained) -> dict[str, Any]:
    return {name: tensor.detach() for name, tensor in pretrained.model.state_dict().items()}
