"""The tokenizer of a model's folder: the fast kind, read from its files alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from openwork.errors import ModelError
from openwork.models.pretrained.folder import TOKENIZER, hushed, shown, transformers


def load(folder: Path) -> Any:
    """Return the tokenizer of a folder, None if it holds no file of one.

    Raises:
        ModelError: if the files make no tokenizer.
    """
    if not any((folder / name).is_file() for name in TOKENIZER if not name.startswith(("special", "added", "chat"))):
        return None
    library = transformers()
    try:
        with hushed():
            return library.AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False, use_fast=True
            )
    except Exception as error:  # tokenizers raise many kinds
        text = " ".join(str(error).split()) or "no message"
        raise ModelError(
            f"the tokenizer files of {shown(folder)} make no tokenizer ({type(error).__name__}: {text[:300]}): fetch them"
            " again"
        ) from error


def specials(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the special tokens that the tokenizer puts before and after one text: [<s>] and [], [CLS] and [SEP]."""
    bare = _ids(tokenizer("a", add_special_tokens=False))
    full = _ids(tokenizer("a", add_special_tokens=True))
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start], full[start + len(bare) :]
    return [], []


def _ids(encoded: Any) -> list[int]:
    found: Sequence[int] = encoded["input_ids"]
    return list(found)
