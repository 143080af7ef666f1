"""Where a pretrained model is: a local folder, or the hub's copy of a name; and what its folder must hold."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from openwork.errors import FormatError, MissingExtra, ModelError

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SMALL = "model.openwork.safetensors"
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt", "vocab.json",
    "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "chat_template.jinja",
)  # fmt: skip
BESIDE = (
    "generation_config.json", "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json", "LICENSE",
    "LICENSE.txt", "LICENSE.md", "NOTICE",
)  # fmt: skip
"""Small files that go along with the weights."""

_HUB = re.compile(r"[\w][\w.-]{0,95}(/[\w][\w.-]{0,95})?")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_LARGEST = 64 * 2**20


def shown(value: object, limit: int = 160) -> str:
    """Return a name as a sentence can hold it: quoted, controls and direction marks escaped, its middle left out."""
    text = str(value)
    return repr(text if len(text) <= limit else f"{text[: limit // 2]}...{text[-limit // 4 :]}")


def transformers() -> Any:
    """Return the transformers library.

    Raises:
        MissingExtra: if it is not installed.
    """
    try:
        import transformers as library
    except ImportError as error:
        raise MissingExtra("pretrained models need transformers: pip install 'openwork[transformers]'") from error
    return library


def locate(model: str | Path, revision: str | None = None) -> Path:
    """Return the local folder of a model; one that the hub has is fetched into the hub's cache, without code or pickles.

    Args:
        model: a folder, or the name of a model on the hub such as "org/name".
        revision: branch, tag or commit on the hub.

    Raises:
        ModelError: if there is no such folder and the hub cannot be reached, is not allowed, or knows no such name.
    """
    path = Path(model)
    try:
        if path.is_dir():
            return path
        there = path.exists() or path.is_symlink()
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {shown(model)}: {getattr(error, 'strerror', None) or error}") from None
    if there:
        raise ModelError(f"{shown(model)} is a file: give the folder that holds {CONFIG} and the weights")
    if isinstance(model, Path) or not _HUB.fullmatch(str(model)) or ".." in str(model):
        raise ModelError(f"there is no folder {shown(model)} (looked from {shown(Path.cwd())}): check the path")
    return _from_hub(str(model), revision)


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        ModelError: if the file is missing, cannot be read, or holds no JSON object.
    """
    try:
        if path.stat().st_size > _LARGEST:
            raise ModelError(f"{shown(path)} is larger than any {what}: it is corrupted or hostile")
        entries = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{shown(path.parent)} holds no {path.name}, the {what}: give a folder of transformers") from None
    except OSError as error:
        raise ModelError(f"cannot read {shown(path)}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{shown(path)} is not JSON ({error}): fetch the {what} again") from None
    if not isinstance(entries, dict):
        raise ModelError(f"{shown(path)} holds a {type(entries).__name__}: a {what} is a JSON object")
    return entries


def weight_files(folder: Path) -> dict[str, list[str] | None]:
    """Return the safetensors files of a folder -> the tensors that its index puts there, None without an index.

    Raises:
        ModelError: if there are none; weights as pickles are named, and never read.
        FormatError: if the index makes no sense, or names a file that is not there.
    """
    if (folder / WEIGHTS).is_file():
        return {WEIGHTS: None}
    if not (folder / INDEX).is_file():
        pickles = sorted(path.name for glob in _PICKLES for path in folder.glob(glob) if path.is_file())
        if pickles:
            raise ModelError(
                f"{shown(folder)} holds its weights as {shown(pickles[0])}, a pickle, which can run code and is never read: "
                "where you trust it, load it with transformers and save it again, which writes safetensors"
            )
        if (folder / "adapter_config.json").is_file():
            raise ModelError(f"{shown(folder)} holds an adapter, not a model: merge it into its base model and save that")
        raise ModelError(f"{shown(folder)} holds no weights: expected {WEIGHTS}, or shards with {INDEX}")
    table = read_json(folder / INDEX, "index of the shards").get("weight_map")
    if not isinstance(table, dict) or not table or not all(isinstance(file, str) for file in table.values()):
        raise FormatError(f"{shown(folder / INDEX)} has no weight_map of tensor to file: fetch it again")
    files: dict[str, list[str] | None] = {}
    for name, file in table.items():
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise FormatError(f"{shown(folder / INDEX)} puts {shown(name)} into {shown(file)}, which is no shard beside it")
        if not (folder / file).is_file():
            raise FormatError(f"{shown(folder)} lacks the shard {shown(file)} that holds {shown(name)}: fetch it again")
        held = files.setdefault(file, [])
        assert held is not None
        held.append(name)
    return files


@contextlib.contextmanager
def hushed() -> Iterator[None]:
    """Keep transformers from printing, whose findings are errors or reports here; its own settings come back."""
    logging = transformers().utils.logging
    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


def is_offline() -> bool:
    """Tell whether the hub must not be asked: OPENWORK_OFFLINE, HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set."""
    names = ("OPENWORK_OFFLINE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    return any(os.environ.get(name, "").strip().lower() not in ("", "0", "false", "no", "off") for name in names)


def _from_hub(name: str, revision: str | None) -> Path:
    transformers()
    import huggingface_hub

    wanted = [CONFIG, "model*.safetensors", INDEX, *TOKENIZER, *BESIDE, "*_Pooling/config.json"]
    offline = is_offline()
    try:
        found = huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=wanted, local_files_only=offline)
    except Exception as error:  # the hub's client raises errors of several libraries
        raise ModelError(_unreachable(name, error, offline)) from error
    return Path(found)


def _unreachable(name: str, error: Exception, offline: bool) -> str:
    start = f"there is no folder {shown(name)}, and the hub"
    kind = type(error).__name__
    if offline:
        return f"{start} may not be asked (offline is set) and its cache has no such model: give a local folder"
    if kind in ("RepositoryNotFoundError", "GatedRepoError", "RevisionNotFoundError", "HFValidationError"):
        return f"{start} has no such model that is open to you ({kind}): check the name, or log in to the hub"
    return f"{start} cannot be reached ({kind}): check the network, or give a local folder"
