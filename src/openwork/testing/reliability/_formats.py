"""The files that openwork reads, small ones, each with its reader: what is damaged on purpose."""

from __future__ import annotations

import gzip
import io
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from openwork import atomic
from openwork.core.masks import Masks
from openwork.core.rng import generator
from openwork.data import archives, idx, npz
from openwork.data.prepare import Options
from openwork.errors import FormatError, StoreError
from openwork.lab import store
from openwork.lab.recipe import Recipe
from openwork.lab.spec import read_recipe, write_recipe
from openwork.runtime import files
from openwork.testing.reliability._work import digest
from openwork.train import checkpoints
from openwork.train.state import Snapshot


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        write: folder -> the path of a sound file in it.
        read: path -> what it holds, comparable; raises openwork's own errors.
        checked: whether a digest protects the content, so that nothing but the same content may ever be read.
    """

    write: Callable[[Path], Path]
    read: Callable[[Path], Any]
    checked: bool


def sample(seed: int = 0, density: float = 0.2) -> dict[str, torch.Tensor]:
    """Return a small state: a sparse weight, a bias, a counter."""
    draw = generator(seed, "reliability", "sample")
    weight = torch.randn(12, 20, generator=draw)
    weight[torch.rand(12, 20, generator=draw) >= density] = 0
    return {"fc.weight": weight, "fc.bias": torch.randn(12, generator=draw), "steps": torch.tensor(7)}


def _write_model(folder: Path) -> Path:
    files.write_state(folder / "model.safetensors", sample(), {"note": "sound"})
    return folder / "model.safetensors"


def _read_model(path: Path) -> Any:
    state, metadata = files.read_state(path)
    return digest(state), metadata


def _write_checkpoint(folder: Path) -> Path:
    return checkpoints.write(folder, Snapshot(3, sample(), {"step": 3, "extra": {"seed": 0}}))


def _read_checkpoint(path: Path) -> Any:
    found = checkpoints.read(path.parent)
    return found.step, digest(found.tensors), found.manifest


def _write_result(folder: Path) -> Path:
    store.write_result(folder, {"key": "k", "status": "ok", "metrics": {"accuracy": 0.875}, "curves": {"loss": [[0, 1.5]]}})
    return folder / "result.json"


def _read_result(path: Path) -> Any:
    found = store.read_result(path.parent, "k")
    if found is None:
        raise StoreError("no result is found, and the trial is run again")
    return found


def _write_recipe(folder: Path) -> Path:
    text = write_recipe(Recipe.read({"density": "0.1,0.05", "methods": "dense,granet(initial=1.0)", "options": "width=8"}))
    atomic.write_bytes(folder / "recipe.yaml", text.encode())
    return folder / "recipe.yaml"


def _read_recipe(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(f"{path} is not UTF-8 text") from error
    return Recipe.read(read_recipe(text)).model_dump()


def _write_masks(folder: Path) -> Path:
    packed = Masks.of({"w": sample()["fc.weight"]}).state_dict()
    atomic.write_bytes(folder / "masks", packed["w.shape"].numpy().tobytes() + packed["w"].numpy().tobytes())
    return folder / "masks"


def _read_masks(path: Path) -> Any:
    data = np.frombuffer(path.read_bytes(), np.uint8).copy()
    if len(data) < 16:
        raise FormatError(f"{path} is too short")
    shape, bits = torch.from_numpy(data[:16]).view(torch.int64), torch.from_numpy(data[16:])
    return digest(Masks.load({"w": bits, "w.shape": shape}))


def _write_npz(folder: Path) -> Path:
    draw, stream = generator(0, "reliability", "npz"), io.BytesIO()
    parts = {f"x_{part}": torch.rand(20, 3, generator=draw).numpy() for part in ("train", "test")}
    np.savez(stream, **parts, **{f"y_{part}": np.arange(20) % 2 for part in ("train", "test")})  # type: ignore[arg-type]
    atomic.write_bytes(folder / "data.npz", stream.getvalue())
    return folder / "data.npz"


def _read_npz(path: Path) -> Any:
    return npz.load(str(path), Options()).classes


def _write_idx(folder: Path) -> Path:
    head = bytes([0, 0, 8, 3]) + b"".join(size.to_bytes(4, "big") for size in (4, 5, 5))
    atomic.write_bytes(folder / "images.gz", gzip.compress(head + bytes(range(100)), mtime=0))
    return folder / "images.gz"


def _read_idx(path: Path) -> Any:
    return idx.read(path, limit=2**20).tolist()


def _write_tar(folder: Path) -> Path:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        for name in ("batch/one.bin", "batch/two.bin"):
            member = tarfile.TarInfo(name)
            member.size = 600
            archive.addfile(member, io.BytesIO(name.encode() * 50))
    atomic.write_bytes(folder / "set.tar.gz", stream.getvalue())
    return folder / "set.tar.gz"


def _read_tar(path: Path) -> Any:
    return [(name, len(content)) for name, content in archives.members(path, lambda _name: True, limit=2**20)]


KINDS: dict[str, Kind] = {
    "packed model": Kind(_write_model, _read_model, checked=True),
    "checkpoint tensors": Kind(lambda f: _write_checkpoint(f) / checkpoints.TENSORS, _read_checkpoint, checked=True),
    "checkpoint manifest": Kind(lambda f: _write_checkpoint(f) / checkpoints.MANIFEST, _read_checkpoint, checked=True),
    "trial result": Kind(_write_result, _read_result, checked=True),
    "packed masks": Kind(_write_masks, _read_masks, checked=False),
    "recipe": Kind(_write_recipe, _read_recipe, checked=False),
    "npz data": Kind(_write_npz, _read_npz, checked=False),
    "idx data": Kind(_write_idx, _read_idx, checked=False),
    "tar archive": Kind(_write_tar, _read_tar, checked=False),
}
