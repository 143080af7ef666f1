"""What the files of weights hold, looked at before a model is built: structure first, then that every number is finite."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from openwork.errors import FormatError, StoreError
from openwork.models.pretrained.folder import shown, weight_files

_ENTRIES = 2**26
_MAGIC = {
    b"PK\x03\x04": "a zip archive, most likely written by torch.save",
    b"\x80": "a Python pickle",
    b"version https://git-lfs": "a pointer of git-lfs, not the file itself",
}


def check_files(folder: Path, *, values: bool = True) -> int:
    """Check the safetensors files of a folder against their index, and that no tensor holds NaN or infinity.

    One tensor is in memory at a time, one of many entries in parts.

    Args:
        folder: of the model.
        values: whether the numbers are looked at too.

    Returns:
        the size of the files in bytes.

    Raises:
        ModelError: if there are no such files.
        FormatError: for a damaged file, a tensor missing or in two files, or one that is not finite, by name.
        StoreError: if a file cannot be read.
    """
    seen: dict[str, str] = {}
    total = 0
    for file, listed in weight_files(folder).items():
        path = folder / file
        with _opened(path) as held:
            names = list(held.keys())
            for name in names:
                if name in seen:
                    raise FormatError(f"{shown(name)} is in {shown(seen[name])} and in {shown(file)}: fetch them again")
                seen[name] = file
            missing = sorted(set(listed or ()) - set(names))
            if missing:
                raise FormatError(f"the index puts {_some(missing)} into {shown(file)}, which lacks them: fetch it again")
            if values:
                for name in names:
                    _check_finite(path, name, held)
        total += path.stat().st_size
    return total


def count(folder: Path) -> int:
    """Return how many tensors the safetensors files of a folder hold; nothing but their heads is read."""
    total = 0
    for file in weight_files(folder):
        with _opened(folder / file) as held:
            total += len(list(held.keys()))
    return total


def whole_numbers(folder: Path) -> list[str]:
    """Return the names of the tensors whose numbers are whole or truth values; nothing but the files' heads is read."""
    found = []
    for file in weight_files(folder):
        with _opened(folder / file) as held:
            found += [name for name in held.keys() if held.get_slice(name).get_dtype().startswith(("I", "U", "BOOL"))]  # noqa: SIM118
    return found


def _check_finite(path: Path, name: str, held: Any) -> None:
    try:
        for part in _parts(held, name):
            if part.is_floating_point() and not bool(part.float().isfinite().all()):
                kind = "NaN" if bool(part.float().isnan().any()) else "infinity"
                raise FormatError(
                    f"the tensor {shown(name)} in {shown(path)} holds {kind}: the training diverged or the file is "
                    "corrupted, fetch it again"
                )
    except FormatError:
        raise
    except Exception as error:  # safetensors raises several kinds
        raise FormatError(f"the tensor {shown(name)} in {shown(path)} cannot be read: {error}") from error


def _parts(held: Any, name: str) -> Iterator[Tensor]:
    """Yield a tensor, in parts along its first dimension where it has many entries."""
    whole = held.get_slice(name)
    shape = whole.get_shape()
    rows = shape[0] if shape else 1
    row = max(1, int(torch.Size(shape[1:]).numel()))
    step = max(1, _ENTRIES // row)
    if len(shape) < 2 or step >= rows:
        yield held.get_tensor(name)
        return
    for start in range(0, rows, step):
        yield whole[start : start + step]


def _open(path: Path) -> Any:
    opener: Any = safe_open
    return opener(path, framework="pt", device="cpu").__enter__()


class _opened:
    """A safetensors file, with errors of this library's own kinds."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> Any:
        try:
            with self.path.open("rb") as stream:
                head = stream.read(32)
            for magic, kind in _MAGIC.items():
                if head.startswith(magic):
                    raise FormatError(f"{shown(self.path)} is {kind}, not safetensors: fetch the safetensors file")
            self.file = _open(self.path)
        except OSError as error:
            raise StoreError(f"cannot read {shown(self.path)}: {error.strerror or error}") from error
        except FormatError:
            raise
        except Exception as error:  # safetensors raises several kinds for a malformed file
            raise FormatError(f"{shown(self.path)} is a damaged safetensors file ({error}): fetch it again") from error
        return self.file

    def __exit__(self, *_: object) -> None:
        self.file.__exit__(None, None, None)


def _some(names: list[str]) -> str:
    return ", ".join(shown(name) for name in names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
