"""A transformers folder as a source of tensors that are read one at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from openwork.errors import FormatError, StoreError

SINGLE, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".data", ".ot")


@dataclass(frozen=True)
class Source:
    """The tensors of a folder.

    Attributes:
        folder: the folder.
        files: tensor name -> name of the file that holds it.
        shapes: tensor name -> shape.
        dtypes: tensor name -> safetensors' name of the dtype.
    """

    folder: Path
    files: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Read tensors into memory of their own.

        Raises:
            FormatError: if a file is damaged.
        """
        found: dict[str, Tensor] = {}
        for name in names:  # a file stays mapped, and what was read of it in memory, until it is closed
            found |= read_tensors(self.folder / self.files[name], [name])
        return found


def open_folder(folder: Path) -> Source:
    """Look into a transformers folder; no tensor is read.

    Raises:
        StoreError: if there is no such folder.
        FormatError: if the config or the weights are missing, or a file is damaged.
    """
    if not folder.is_dir():
        raise StoreError(f"there is no folder {str(folder)!r}: give a transformers folder with {CONFIG} and {SINGLE}")
    if not (folder / CONFIG).is_file():
        raise FormatError(f"{str(folder)!r} holds no {CONFIG}: give a folder that save_pretrained wrote")
    if (folder / SINGLE).is_file():
        listed: dict[str, list[str]] | None = None
        files = [SINGLE]
    elif (folder / INDEX).is_file():
        listed = _index(folder / INDEX)
        files = list(listed)
    else:
        pickled = any(found.suffix in (".bin", ".pt", ".pth", ".ckpt") for found in folder.iterdir())
        why = "only pickled weights, which openwork does not read" if pickled else f"neither {SINGLE} nor {INDEX}"
        raise FormatError(f"{str(folder)!r} holds {why}: load it with transformers and save it with save_pretrained")
    source = Source(folder, {}, {}, {})
    for file in files:
        _look(source, file, None if listed is None else listed[file])
    if not source.files:
        raise FormatError(f"the weights in {str(folder)!r} hold no tensor: save the model again with save_pretrained")
    return source


def check_depth(config: object, tensors: int, folder: Path) -> None:
    """Refuse a config with more layers than there are tensors: it would be built for hours, or fill the memory.

    Args:
        config: with `num_hidden_layers`, under which transformers' configs answer whatever they call it; or without.
        tensors: how many the folder holds.
        folder: for the message.

    Raises:
        FormatError: says both numbers.
    """
    layers = getattr(config, "num_hidden_layers", None)
    if isinstance(layers, int) and layers > tensors:
        raise FormatError(
            f"{CONFIG} in {str(folder)!r} asks for {layers:,} layers, but the files hold {tensors:,} tensors: fetch config "
            "and weights of one model"
        )


def read_tensors(path: Path, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Read tensors of one safetensors file, all by default; the file is closed before this returns.

    Raises:
        FormatError: if the file is damaged or a tensor is missing.
        StoreError: if it cannot be read.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            wanted = list(file.keys()) if names is None else names
            return {name: file.get_tensor(name).clone() for name in wanted}
    except OSError as error:
        raise StoreError(
            f"cannot read {str(path)!r}: {error.strerror or error}; check the path and its permissions"
        ) from error
    except Exception as error:  # safetensors raises several kinds for a malformed file
        raise FormatError(f"{str(path)!r} is damaged or no safetensors file ({error}): fetch or save it anew") from error


def copy_rest(source: Path, target: Path) -> None:
    """Copy what is no weight file (config, tokenizer, licence, settings of modules), folders of such files included."""
    for found in sorted(source.iterdir()):
        if found.name.startswith(".") or found.suffix in _WEIGHTS or found.name.endswith(".index.json"):
            continue
        if found.is_file():
            shutil.copyfile(found, target / found.name)
        elif found.is_dir() and not found.is_symlink():
            rest = [one for one in found.iterdir() if one.is_file() and one.suffix not in _WEIGHTS]
            if rest and not any(one.suffix in _WEIGHTS for one in found.iterdir()):
                (target / found.name).mkdir(exist_ok=True)
                for one in rest:
                    shutil.copyfile(one, target / found.name / one.name)


def _look(source: Source, name: str, listed: list[str] | None) -> None:
    path = source.folder / name
    if not path.is_file():
        raise FormatError(f"{INDEX} in {str(source.folder)!r} names the file {name!r}, which is missing: fetch it")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            for key in file.keys():  # noqa: SIM118  (a safetensors handle is no mapping)
                part = file.get_slice(key)
                if key in source.files:
                    raise FormatError(f"{str(source.folder)!r} holds the tensor {key!r} twice: save the model anew")
                source.files[key] = name
                source.shapes[key], source.dtypes[key] = tuple(part.get_shape()), str(part.get_dtype())
    except FormatError:
        raise
    except OSError as error:
        raise StoreError(f"cannot read {str(path)!r}: {error.strerror or error}; check its permissions") from error
    except Exception as error:  # safetensors raises several kinds for a malformed file
        raise FormatError(f"{str(path)!r} is damaged or no safetensors file ({error}): fetch or save it anew") from error
    gone = [key for key in listed or [] if source.files.get(key) != name]
    if gone:
        raise FormatError(f"{INDEX} says that {name!r} holds {gone[0]!r}, which it does not: fetch the shard anew")


def _index(path: Path) -> dict[str, list[str]]:
    """Return file -> tensors of an index; a file name may not lead out of the folder."""
    try:
        found = json.loads(path.read_text("utf-8"))["weight_map"]
        pairs = [(str(key), str(name)) for key, name in found.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FormatError(f"{str(path)!r} is no index of safetensors shards ({error}): fetch it anew") from error
    files: dict[str, list[str]] = {}
    for key, name in pairs:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise FormatError(f"{str(path)!r} names the shard {name[:80]!r}, which is no .safetensors file of the folder")
        files.setdefault(name, []).append(key)
    return files


def floating(source: Source) -> torch.dtype:
    """Return the floating dtype that most weights have."""
    known = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    sizes = dict.fromkeys(known, 0)
    for name, dtype in source.dtypes.items():
        if dtype in sizes:
            sizes[dtype] += torch.Size(source.shapes[name]).numel()
    return known[max(sizes, key=sizes.__getitem__)]
