"""How the token states of an encoder become one vector a text, as sentence-transformers' folders say it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from openwork.errors import ModelError
from openwork.models.pretrained.folder import read_json, shown

Mode = Literal["mean", "cls", "max"]
_MODES: dict[str, Mode] = {
    "pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls", "pooling_mode_max_tokens": "max",
}  # fmt: skip


@dataclass(frozen=True)
class Pooling:
    """Token states (batch, tokens, width) -> vectors (batch, width).

    Attributes:
        mode: the mean over the tokens, the first token, or the maximum over the tokens.
        normalize: whether vectors have unit length.
        length: most tokens of a text, None where the folder does not say.
    """

    mode: Mode = "mean"
    normalize: bool = True
    length: int | None = None

    def __call__(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the vectors, float32; positions where `mask` (batch, tokens) is 0 do not count."""
        states = states.float()
        keep = torch.ones(states.shape[:2], device=states.device) if mask is None else mask.float()
        if self.mode == "cls":
            vectors = states[:, 0]
        elif self.mode == "max":
            vectors = states.masked_fill(keep[:, :, None] == 0, float("-inf")).amax(dim=1)
        else:
            vectors = (states * keep[:, :, None]).sum(dim=1) / keep.sum(dim=1, keepdim=True).clamp(min=1.0)
        return torch.nn.functional.normalize(vectors, dim=-1) if self.normalize else vectors


def is_sentence_folder(folder: Path) -> bool:
    """Tell whether a folder has the layout of sentence-transformers."""
    return (folder / "modules.json").is_file()


def read(folder: Path) -> Pooling:
    """Return the pooling that a folder names; the normalised mean where it names none.

    Raises:
        ModelError: for a pooling that is none of mean, first token and maximum.
    """
    length = None
    if (folder / "sentence_bert_config.json").is_file():
        given = read_json(folder / "sentence_bert_config.json", "settings of the sentence encoder").get("max_seq_length")
        length = given if isinstance(given, int) and not isinstance(given, bool) and given > 2 else None
    found = sorted(path for path in folder.glob("*_Pooling/config.json") if path.is_file())
    normalize = bool(sorted(folder.glob("*_Normalize"))) or not is_sentence_folder(folder)
    if is_sentence_folder(folder):
        normalize = normalize or "Normalize" in (folder / "modules.json").read_text(encoding="utf-8", errors="replace")
    if not found:
        return Pooling("mean", normalize, length)
    entries = read_json(found[0], "settings of the pooling")
    modes = [mode for key, mode in _MODES.items() if entries.get(key) is True]
    if len(modes) != 1:
        on = ", ".join(key for key, value in entries.items() if key.startswith("pooling_mode") and value is True)
        raise ModelError(f"{shown(found[0])} asks for the pooling {on or 'of no kind'}: use mean, cls or max alone")
    return Pooling(modes[0], normalize, length)
