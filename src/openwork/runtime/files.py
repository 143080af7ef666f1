"""Compressed model files: a `.safetensors` file that holds the packed tensors and a manifest with their digests.

The file has one tensor, `openwork.packed`, all payloads in a row. Its `__metadata__` has the manifest (JSON: format
version, one entry a tensor, ties, the sha256 of the payloads, the user's metadata) and the sha256 of the manifest. Any
flipped bit is found: it breaks a digest, or safetensors' own structure. Plain safetensors files are read as they are.

What a file may cost: a packed byte stands for at most 255 entries (`packing`), and the tensors of one file may take at
most 64 GiB, or the memory of the machine where that is less; both are checked before anything is allocated.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from openwork import atomic
from openwork.errors import FormatError, StoreError
from openwork.runtime import packing
from openwork.runtime.packing import DTYPES, ENCODINGS, NAMES, Bytes, Packed

VERSION = 1
PAYLOAD = "openwork.packed"
MANIFEST = "openwork.manifest"
DIGEST = "openwork.manifest.sha256"
MAX_BYTES = 64 * 2**30
MAX_HEADER = 32 * 2**20

_PICKLE = "openwork reads no pickles, which can run code; load it where you trust it and save it with safetensors"
_DAMAGED = "the file is corrupted or was tampered with, fetch or save it anew"
_OTHER = "save it as safetensors with the tool that wrote it"
_MAGIC = {
    b"PK\x03\x04": f"a zip archive, most likely written by torch.save, not safetensors: {_PICKLE}",
    b"\x80": f"a Python pickle, most likely written by an old torch.save, not safetensors: {_PICKLE}",
    b"\x89HDF": f"an HDF5 file, not safetensors: {_OTHER}",
    b"\x93NUMPY": f"a numpy array, not safetensors: {_OTHER}",
    b"GGUF": f"a GGUF file, not safetensors: {_OTHER}",
    b"\x1f\x8b": f"a gzip archive, not safetensors: {_OTHER}",
}


@dataclass(frozen=True)
class _Manifest:
    """The checked content of a manifest."""

    tensors: list[tuple[str, torch.dtype, tuple[int, ...], str, int, int]]
    tied: dict[str, str]
    digest: str
    metadata: dict[str, Any]


def write_state(path: str | Path, state: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None) -> int:
    """Write the tensors to `path`, each in its smallest encoding, atomically; return the bytes on disk.

    Tensors that are the same memory are stored once and come back tied. `metadata` is any JSON-clean mapping.

    Raises:
        FormatError: for a dtype or layout that cannot be stored, or metadata that JSON cannot express.
        StoreError: if the file cannot be written.
    """
    names, tied = ties(state)
    packed = {name: packing.pack(state[name]) for name in names}
    parts = [part for one in packed.values() for part in (one.values, one.index)]
    manifest = {
        "format": VERSION,
        "tensors": [
            [name, NAMES[one.dtype], list(one.shape), one.encoding, one.values.size, one.index.size]
            for name, one in packed.items()
        ],
        "tied": tied,
        "sha256": _digest(*parts),
        "metadata": dict(metadata or {}),
    }
    try:
        text = json.dumps(manifest, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise FormatError(f"metadata cannot be stored: {error}; keep to finite numbers, text, lists and dicts") from error
    size = sum(part.size for part in parts)
    header = json.dumps(
        {
            "__metadata__": {MANIFEST: text, DIGEST: hashlib.sha256(text.encode()).hexdigest()},
            PAYLOAD: {"dtype": "U8", "shape": [size], "data_offsets": [0, size]},
        },
        separators=(",", ":"),
    ).encode()
    header += b" " * (-len(header) % 8)
    with atomic.replacing(path) as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        for part in parts:
            stream.write(part.data)
    return 8 + len(header) + size


def read_state(path: str | Path, *, limit: int | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file written by `write_state`, or any plain safetensors file; return its tensors and metadata.

    Args:
        path: the file.
        limit: the most bytes that the tensors may take; by default 64 GiB or the machine's memory, the smaller one.

    Raises:
        FormatError: if the file is damaged, hostile, too large, or of another format; nothing is ever unpickled.
        StoreError: if there is no such file, or it cannot be read.
    """
    limit = _memory() if limit is None else limit
    _look(Path(path))
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = dict(file.metadata() or {})
            names = list(file.keys())
            if MANIFEST in metadata or DIGEST in metadata or PAYLOAD in names:
                return _read_packed(path, file, metadata, limit)
            if Path(path).stat().st_size > limit:
                raise _too_large(path, Path(path).stat().st_size, limit)
            return {name: file.get_tensor(name).clone() for name in names}, metadata
    except FormatError:
        raise
    except OSError as error:
        raise StoreError(
            f"cannot read {str(path)!r}: {error.strerror or error}; check the path and its permissions"
        ) from error
    except MemoryError as error:
        raise FormatError(
            f"the tensors of {str(path)!r} do not fit into the free memory: free some, or use another machine"
        ) from error
    except Exception as error:  # safetensors raises several kinds for a malformed file
        raise FormatError(f"{str(path)!r} is no safetensors file: {error}") from error


def ties(state: Mapping[str, Tensor]) -> tuple[list[str], dict[str, str]]:
    """Return the names to store, and for each further name of the same memory the name that stores it."""
    first: dict[tuple[Any, ...], str] = {}
    tied: dict[str, str] = {}
    for name, tensor in state.items():
        if tensor.layout != torch.strided or tensor.is_meta or tensor.numel() == 0:
            continue
        memory = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if first.setdefault(memory, name) != name:
            tied[name] = first[memory]
    return [name for name in state if name not in tied], tied


def plain_bytes(state: Mapping[str, Tensor]) -> int:
    """Return the size in bytes of the plain safetensors file of these tensors, ties stored once."""
    names, _ = ties(state)
    order = list(DTYPES)
    header: dict[str, Any] = {}
    start = 0
    for name in sorted(names, key=lambda name: (-order.index(NAMES[state[name].dtype]), name)):
        tensor = state[name]
        end = start + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode(errors="surrogatepass")
    return 8 + -(-len(text) // 8) * 8 + start


def _read_packed(
    path: str | Path, file: Any, metadata: Mapping[str, str], limit: int
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    manifest = _manifest(path, metadata)
    needed = sum(packing.entries(shape) * dtype.itemsize for _, dtype, shape, *_ in manifest.tensors)
    if needed > limit:
        raise _too_large(path, needed, limit)
    payload = file.get_tensor(PAYLOAD)
    raw: Bytes = payload.numpy() if payload.dtype == torch.uint8 and payload.ndim == 1 else np.empty(0, np.uint8)
    if raw.size != sum(entry[4] + entry[5] for entry in manifest.tensors) or _digest(raw) != manifest.digest:
        raise FormatError(
            f"the data of {str(path)!r} do not match their digest: the file is corrupted, fetch or save it anew"
        )
    packed: dict[str, Packed] = {}
    start = 0
    for name, dtype, shape, encoding, values, index in manifest.tensors:
        middle, end = start + values, start + values + index
        packed[name] = Packed(encoding, dtype, shape, raw[start:middle], raw[middle:end])
        packing.check(packed[name])
        start = end
    state = {name: packing.unpack(one) for name, one in packed.items()}
    state |= {name: state[first] for name, first in manifest.tied.items()}
    return state, manifest.metadata


def _manifest(path: str | Path, metadata: Mapping[str, str]) -> _Manifest:
    text = metadata.get(MANIFEST, "")
    if hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest() != metadata.get(DIGEST):
        raise FormatError(
            f"the manifest of {str(path)!r} does not match its digest: the file is corrupted, fetch or save it anew"
        )
    try:
        found = json.loads(text)
        if found["format"] != VERSION:
            raise FormatError(f"{str(path)!r} has format {found['format']!r}, not {VERSION}: a newer openwork reads it")
        tensors = [
            (_text(name), DTYPES[dtype], tuple(map(_count, shape)), encoding, _count(values), _count(index))
            for name, dtype, shape, encoding, values, index in found["tensors"]
        ]
        tied = {_text(name): _text(first) for name, first in found["tied"].items()}
        names = {name for name, *_ in tensors}
        sound = len(names) == len(tensors) and not names & set(tied) and set(tied.values()) <= names
        if not sound or any(encoding not in ENCODINGS for _, _, _, encoding, _, _ in tensors):
            raise ValueError("names twice, ties to nothing, or an unknown encoding")
        return _Manifest(tensors, tied, _text(found["sha256"]), dict(found["metadata"]))
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise FormatError(
            f"the manifest of {str(path)!r} makes no sense ({error}): the file is corrupted or hostile"
        ) from error


def _look(path: Path) -> None:
    """Refuse what is no safetensors file by its first bytes, and say what it is."""
    try:
        if path.exists() and not path.is_file():
            raise StoreError(f"{str(path)!r} is not a file: give the path of a .safetensors file")
        with path.open("rb") as stream:
            head = stream.read(8)
        size = path.stat().st_size
    except FileNotFoundError as error:
        raise StoreError(f"there is no file {str(path)!r}: check the path") from error
    except OSError as error:
        raise _unreadable(path, error) from error
    length = int.from_bytes(head, "little")
    if len(head) == 8 and 2 <= length <= min(size - 8, MAX_HEADER):
        return
    for magic, kind in _MAGIC.items():
        if head.startswith(magic):
            raise FormatError(f"{str(path)!r} is {kind}")
    raise FormatError(f"{str(path)!r} is no safetensors file: its {size} bytes hold no header of {length} bytes")


def _digest(*parts: Bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.data)
    return digest.hexdigest()


def _memory() -> int:
    with contextlib.suppress(AttributeError, OSError, ValueError):
        return min(MAX_BYTES, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return MAX_BYTES


def _unreadable(path: str | Path, error: OSError) -> StoreError:
    return StoreError(f"cannot read {str(path)!r}: {error.strerror or error}; check the path and its permissions")


def _too_large(path: str | Path, needed: int, limit: int) -> FormatError:
    what = f"the tensors of {str(path)!r} would take {needed} bytes, more than the limit of {limit} bytes"
    return FormatError(f"{what}: give a larger limit if you trust the file")


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r} is no size")
    return value
