"""Checkpoints of llama2.c (github.com/karpathy/llama2.c, version 0) as models of transformers.

The file is seven int32 (width, hidden width, layers, heads, key and value heads, vocabulary, context; a negative
vocabulary says that the head is not the embedding) and then the float32 weights, layer after layer of each kind. Rotary
pairs are neighbours there and half a head apart in transformers, so the rows of the query and key projections move.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from openwork.errors import FormatError, ModelError, StoreError
from openwork.models.pretrained.folder import hushed, read_json, shown, transformers

_HEADER = struct.Struct("<7i")
_SPACE = "\u2581"


@dataclass(frozen=True)
class _Sizes:
    """The header of a checkpoint."""

    width: int
    hidden: int
    layers: int
    heads: int
    groups: int
    vocabulary: int
    context: int
    tied: bool

    @property
    def head(self) -> int:
        """Width of a head."""
        return self.width // self.heads

    def shapes(self) -> list[tuple[str, tuple[int, ...]]]:
        """Return name and shape of what the file holds, in its order."""
        w, h, n, kv = self.width, self.hidden, self.layers, self.groups * self.head
        tables = (self.context, self.head // 2)
        found: list[tuple[str, tuple[int, ...]]] = [
            ("embed", (self.vocabulary, w)), ("attention_norm", (n, w)), ("q", (n, w, w)), ("k", (n, kv, w)),
            ("v", (n, kv, w)), ("o", (n, w, w)), ("mlp_norm", (n, w)), ("gate", (n, h, w)), ("down", (n, w, h)),
            ("up", (n, h, w)), ("norm", (w,)), ("cos", tables), ("sin", tables),
        ]  # fmt: skip
        return found if self.tied else [*found, ("head", (self.vocabulary, w))]

    @property
    def bytes(self) -> int:
        """Size of the file."""
        return _HEADER.size + 4 * sum(int(np.prod(shape)) for _, shape in self.shapes())


def is_checkpoint(folder: Path) -> bool:
    """Tell whether a folder holds a llama2.c checkpoint: one .bin file whose header explains its size."""
    return _find(folder) is not None


def load(folder: Path) -> tuple[nn.Module, Any]:
    """Return the causal model (LlamaForCausalLM, float32) and the tokenizer of a folder.

    The tokenizer is the folder's tokenizer.json where there is one, else made from a vocabulary of sentencepiece
    (`*.vocab`) whose pieces are single characters.

    Raises:
        FormatError: if a weight is not finite.
        ModelError: if the vocabulary does not fit.
        StoreError: if the file cannot be read.
    """
    found = _find(folder)
    if found is None:
        raise ModelError(f"{shown(folder)} holds no llama2.c checkpoint")
    path, sizes = found
    library = transformers()
    config = library.LlamaConfig(
        vocab_size=sizes.vocabulary, hidden_size=sizes.width, intermediate_size=sizes.hidden, num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads, num_key_value_heads=sizes.groups, max_position_embeddings=sizes.context,
        tie_word_embeddings=sizes.tied, rms_norm_eps=1e-5, hidden_act="silu", architectures=["LlamaForCausalLM"],
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    with hushed():
        built: Any = library.LlamaForCausalLM
        model, info = built.from_pretrained(
            None, config=config, state_dict=_state(path, sizes), dtype=torch.float32, output_loading_info=True
        )
    if info["missing_keys"] or info["unexpected_keys"]:
        raise ModelError(f"the tensors of {shown(path)} do not fit LlamaForCausalLM of this transformers")
    return model, _tokenizer(folder, sizes.vocabulary)


def convert(folder: Path, out: Path) -> None:
    """Write the checkpoint of `folder` as a folder of transformers into `out`, which must exist."""
    model: Any
    model, tokenizer = load(folder)
    with hushed():
        model.save_pretrained(out)
        if tokenizer is not None:
            tokenizer.save_pretrained(out)


def _find(folder: Path) -> tuple[Path, _Sizes] | None:
    for path in sorted(folder.glob("*.bin")):
        try:
            with path.open("rb") as stream:
                head = stream.read(_HEADER.size)
            size = path.stat().st_size
        except OSError:
            continue
        if len(head) < _HEADER.size:
            continue
        width, hidden, layers, heads, groups, vocabulary, context = _HEADER.unpack(head)
        sane = min(width, hidden, layers, heads, groups, context) > 0 and vocabulary != 0 and max(width, hidden) < 2**20
        if not sane or width % heads or heads % groups:
            continue
        sizes = _Sizes(width, hidden, layers, heads, groups, abs(vocabulary), context, vocabulary > 0)
        if sizes.bytes == size:
            return path, sizes
    return None


def _state(path: Path, sizes: _Sizes) -> dict[str, Tensor]:
    """Return the weights under the names of LlamaForCausalLM."""
    try:
        raw = np.fromfile(path, dtype="<f4", offset=_HEADER.size)
    except OSError as error:
        raise StoreError(f"cannot read {shown(path)}: {error.strerror or error}") from error
    held: dict[str, Tensor] = {}
    start = 0
    for name, shape in sizes.shapes():
        end = start + int(np.prod(shape))
        held[name] = torch.from_numpy(raw[start:end].reshape(shape).astype(np.float32))
        if not bool(held[name].isfinite().all()):
            raise FormatError(f"the weights {name!r} in {shown(path)} hold NaN or infinity: fetch the file again")
        start = end
    state = {"model.embed_tokens.weight": held["embed"], "model.norm.weight": held["norm"]}
    state["lm_head.weight"] = held["embed"] if sizes.tied else held["head"]
    places = {
        "input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm", "self_attn.v_proj": "v",
        "self_attn.o_proj": "o", "mlp.gate_proj": "gate", "mlp.down_proj": "down", "mlp.up_proj": "up",
    }  # fmt: skip
    for layer in range(sizes.layers):
        base = f"model.layers.{layer}."
        state |= {f"{base}{place}.weight": held[name][layer].clone() for place, name in places.items()}
        state[f"{base}self_attn.q_proj.weight"] = _halves(held["q"][layer], sizes.heads)
        state[f"{base}self_attn.k_proj.weight"] = _halves(held["k"][layer], sizes.groups)
    return state


def _halves(weight: Tensor, heads: int) -> Tensor:
    """Move the rows of a projection from pairs of neighbours (2i, 2i+1) to (i, i + half a head)."""
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns).contiguous()


def _tokenizer(folder: Path, vocabulary: int) -> Any:
    library = transformers()
    from openwork.models.pretrained import tokenizing

    if (folder / "tokenizer.json").is_file():
        return tokenizing.load(folder)
    found = sorted(folder.glob("*.vocab"))
    if not found:
        return None
    pieces = _pieces(found[0])
    special = _special(folder)
    if len(pieces) != vocabulary:
        raise ModelError(f"{shown(found[0])} has {len(pieces)} pieces, the model a vocabulary of {vocabulary}")
    if any(len(piece) != 1 for place, piece in enumerate(pieces) if place not in special.values()):
        raise ModelError(f"{shown(found[0])} has pieces of several characters: put a tokenizer.json beside it")
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, processors

    inner = Tokenizer(models.BPE({piece: place for place, piece in enumerate(pieces)}, [], unk_token=pieces[special["unk"]]))
    inner.normalizer = normalizers.Sequence([
        normalizers.Nmt(), normalizers.NFKC(), normalizers.Replace(Regex(" +"), " "), normalizers.Strip(),
        normalizers.Prepend(" "), normalizers.Replace(" ", _SPACE),
    ])  # fmt: skip
    inner.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    bos = pieces[special["bos"]]
    inner.post_processor = processors.TemplateProcessing(f"{bos} $A", None, [(bos, special["bos"])])
    names = {f"{word}_token": pieces[place] for word, place in special.items()}
    return library.PreTrainedTokenizerFast(tokenizer_object=inner, **names)


def _pieces(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"cannot read the vocabulary {shown(path)}: {error}") from error
    return [line.rpartition("\t")[0] or line for line in lines if line]


def _special(folder: Path) -> dict[str, int]:
    """Return the places of the special tokens: those of sentencepiece, unless a config beside the file has others."""
    usual = {"unk": 0, "bos": 1, "eos": 2}
    if not (folder / "config.json").is_file():
        return usual
    given = read_json(folder / "config.json", "description of the checkpoint").get("tokenizer")
    named = given if isinstance(given, dict) else {}
    return {word: named[word] if isinstance(named.get(word), int) else place for word, place in usual.items()}
