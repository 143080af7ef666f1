"""The unfinished work of a streamed run: a hidden folder beside the target that a second run goes on with."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from openwork import atomic
from openwork.core.masks import Masks
from openwork.errors import FormatError, StoreError
from openwork.oneshot.folder import INDEX, Source, read_tensors
from openwork.oneshot.report import MASKS, LayerReport
from openwork.oneshot.settings import Settings
from openwork.runtime.packing import NAMES

STATE = "state.json"


class Unfinished:
    """Shards, masks and the state of a run.

    Attributes:
        out: the folder that is to be.
        folder: where the work lies until then.
        done: blocks that are finished.
        counts: parameter name -> weights that stay, once they are decided.
        rows: finished rows of the report, by parameter name.
    """

    def __init__(self, out: Path, digest: str) -> None:
        self.out = out
        self.folder = out.with_name(f".{out.name}.part")
        self.done, self.digest = 0, digest
        self.counts: dict[str, int] = {}
        self.rows: dict[str, LayerReport] = {}

    @contextlib.contextmanager
    def open(self) -> Iterator[Unfinished]:
        """Make the folder or go on with what is there, alone.

        Raises:
            StoreError: if the work there has other settings, another process has it, or it cannot be written.
        """
        try:
            (self.folder / "out").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"cannot make {str(self.folder)!r}: {error.strerror}; choose another out") from error
        with atomic.alone(self.folder, "lock", choose="out"):
            for place in (self.folder, self.folder / "out", self.folder / "masks"):
                atomic.sweep(place)
            if (self.folder / STATE).is_file():
                self._load()
            else:
                self.save()
            yield self

    def save(self) -> None:
        """Write the state, atomically."""
        rows = [asdict(row) for row in self.rows.values()]
        state = {"digest": self.digest, "done": self.done, "counts": self.counts, "rows": rows}
        atomic.write_json(self.folder / STATE, state)

    def shard(self, number: int, of: int) -> Path:
        """Return where shard `number`, from 1, lies."""
        return self.folder / "out" / f"model-{number:05d}-of-{of:05d}.safetensors"

    def write(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        """Write a safetensors file, atomically, and with no second copy of the tensors in memory."""
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        order = sorted(tensors, key=lambda key: (-tensors[key].element_size(), key))  # aligned without holes
        end = 0
        for key in order:
            start, end = end, end + tensors[key].numel() * tensors[key].element_size()
            shape = list(tensors[key].shape)
            entries[key] = {"dtype": NAMES[tensors[key].dtype], "shape": shape, "data_offsets": [start, end]}
        header = json.dumps(entries, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        with atomic.replacing(path) as stream:
            stream.write(len(header).to_bytes(8, "little") + header)
            for key in order:
                stream.write(tensors[key].detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def keep_masks(self, name: str, masks: Mapping[str, Tensor]) -> None:
        """Write the masks of one stage, packed."""
        if masks:
            self.write(self.folder / "masks" / f"{name}.safetensors", Masks(masks).state_dict())

    def finish(self, shards: int) -> None:
        """Write masks and index, and give the folder its name.

        Raises:
            StoreError: if `out` has come to hold something meanwhile, or cannot be written.
        """
        packed: dict[str, Tensor] = {}
        for path in sorted((self.folder / "masks").glob("*.safetensors")):
            packed |= read_tensors(path)
        self.write(self.folder / "out" / MASKS, packed)
        files: dict[str, str] = {}
        size = 0
        for number in range(1, shards + 1):
            path = self.shard(number, shards)
            header = _header(path)
            files |= dict.fromkeys(header, path.name)
            size += sum(entry["data_offsets"][1] - entry["data_offsets"][0] for entry in header.values())
        atomic.write_json(self.folder / "out" / INDEX, {"metadata": {"total_size": size}, "weight_map": files})
        try:
            with contextlib.suppress(FileNotFoundError):
                self.out.rmdir()  # succeeds on an empty folder alone
            (self.folder / "out").rename(self.out)
        except OSError as error:
            raise StoreError(
                f"cannot name {str(self.out)!r}: {error.strerror}; empty it and start again, the work is kept"
            ) from error
        shutil.rmtree(self.folder, ignore_errors=True)

    def _load(self) -> None:
        try:
            state = json.loads((self.folder / STATE).read_text("utf-8"))
            digest, self.done = str(state["digest"]), int(state["done"])
            self.counts = {str(name): int(count) for name, count in state["counts"].items()}
            rows = [LayerReport(**{**row, "shape": tuple(row["shape"])}) for row in state["rows"]]
            self.rows = {row.name: row for row in rows}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise FormatError(f"the state in {str(self.folder)!r} makes no sense ({error}): delete that folder") from error
        if digest != self.digest:
            raise StoreError(
                f"unfinished work with other settings, data or weights lies in {str(self.folder)!r}: start with the "
                "same to go on, choose another out, or delete that folder"
            )


def digest_of(source: Source, settings: Settings, layers: list[str], model: str, batches: list[Any] | None) -> str:
    """Return what a run depends on, as one hash: files, settings, layers, class and calibration batches.

    A calibration function cannot be looked into and does not count.
    """
    rule = settings.allocation if isinstance(settings.allocation, str) else sorted(settings.allocation.items())
    files = [(name, (path := source.folder / name).stat().st_size, path.stat().st_mtime_ns) for name in _names(source)]
    chosen = [settings.method, settings.density, str(settings.pattern), rule, settings.damping, settings.block_size]
    chosen += [settings.outliers, settings.spread, settings.errors, str(settings.gram_dtype)]
    digest = hashlib.sha256(json.dumps([files, chosen, layers, model], default=str).encode())
    for batch in batches or []:
        batch = dict(batch) if isinstance(batch, Mapping) else batch
        for leaf in tree_leaves(batch):
            if isinstance(leaf, Tensor):
                digest.update(f"{leaf.dtype}{tuple(leaf.shape)}".encode())
                digest.update(leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            else:
                digest.update(repr(leaf).encode())
    return digest.hexdigest()


def _names(source: Source) -> list[str]:
    return sorted({"config.json", *source.files.values()})


def _header(path: Path) -> dict[str, Any]:
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header: dict[str, Any] = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    return header
