"""What `openwork sparsify` measures before and after, and the text that it reads for that."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from torch import Tensor

from openwork import atomic
from openwork.cli._sparsify_bars import Bars
from openwork.data import corpus
from openwork.errors import DataError, ModelError
from openwork.models.pretrained import folder as folders
from openwork.models.pretrained import llama2c, loading, pooling, tokenizing
from openwork.models.pretrained.loading import Pretrained
from openwork.train import language, tuning

if TYPE_CHECKING:
    from openwork.cli._sparsify_recipe import Recipe

LENGTH = 512
"""Most tokens of a block unless asked otherwise."""


@dataclass(frozen=True)
class Text:
    """Blocks to calibrate on and blocks held out.

    Attributes:
        calibration: (n, length) int64.
        held_out: (m, length) int64; (0, length) without evaluation.
        source: what the held-out blocks are from: "eval-text" or "text".
        tokens: how many tokens of the calibration text were read.
        files: how many files.
        is_cut: whether the text goes on after them.
        asked: how many calibration blocks were asked for.
        mask: number of the mask token, for a masked model.
        special: numbers of the special tokens.
    """

    calibration: Tensor
    held_out: Tensor
    source: str
    tokens: int
    files: int
    is_cut: bool
    asked: int
    mask: int | None
    special: tuple[int, ...]

    @property
    def length(self) -> int:
        """Tokens a block."""
        return int(self.held_out.shape[1])

    def batches(self, size: int) -> list[Tensor]:
        """Return the calibration blocks in batches of `size`."""
        return list(torch.split(self.calibration, size))

    def sentence(self) -> str:
        """Say what was read."""
        few = f" (asked for {self.asked})" if len(self.calibration) < self.asked else ""
        part = "the text's own end" if self.source == "text" else "text of their own"
        held = f"{len(self.held_out)} held out, from {part}" if len(self.held_out) else "none held out"
        cut = "; the text goes on, unread" if self.is_cut else ""
        return f"{len(self.calibration)} blocks of {self.length} tokens to calibrate on{few}, {held}{cut}"

    def about(self) -> dict[str, Any]:
        """Return the same for the report."""
        return {
            "calibration_blocks": len(self.calibration), "held_out_blocks": len(self.held_out), "length": self.length,
            "held_out_from": self.source, "tokens_read": self.tokens, "files": self.files, "is_cut": self.is_cut,
        }  # fmt: skip


def read(recipe: Recipe, source: Path, pretrained: Pretrained | None) -> Text | None:
    """Read the text that a recipe names; None if it names none.

    Raises:
        DataError: for text that is missing, broken, too short, or not disjoint.
        ModelError: if the model has no tokenizer, or one of another vocabulary.
    """
    if not recipe.text and not recipe.eval_text:
        return None
    tokenizer, kind, longest, vocabulary = _facts(recipe, source, pretrained)
    if tokenizer is None:
        raise ModelError(
            f"{folders.shown(recipe.model)} has no tokenizer, so text cannot be read: put tokenizer.json beside it"
        )
    length = min(longest or LENGTH, LENGTH) if recipe.length is None else recipe.length
    if longest is not None and length > longest:
        raise DataError(f"--length {length} is more than the {longest} tokens that the model takes: give at most {longest}")
    before, after = tokenizing.specials(tokenizer)
    wrap = kind != "causal"
    options: dict[str, Any] = {"length": length, "prefix": before, "suffix": after, "wrap": wrap}
    encode = corpus.encoder(tokenizer)
    own = recipe.eval_samples if recipe.text and not recipe.eval_text else 0
    own = 0 if recipe.stream else own
    found = None
    if recipe.text:
        found = corpus.blocks(recipe.text, encode, samples=recipe.samples, held_out=own, seed=recipe.seed, **options)
    held, where = (torch.empty(0, length, dtype=torch.int64) if found is None else found.held_out), "text"
    if recipe.eval_text and recipe.eval_samples:
        held, where = _held_out(recipe, encode, options), "eval-text"
    if found is None:
        calibration, tokens, count, is_cut = held[:0], 0, 0, False
    else:
        calibration, tokens, count, is_cut = found.calibration, found.tokens, len(found.files), found.is_cut
    _check(calibration, held, vocabulary, where)
    special = tuple(int(one) for one in getattr(tokenizer, "all_special_ids", ()))
    mask = getattr(tokenizer, "mask_token_id", None)
    if kind == "masked" and mask is None:
        raise ModelError(
            f"the tokenizer of {folders.shown(recipe.model)} has no mask token, so hidden words cannot be scored"
        )
    return Text(calibration, held, where, tokens, count, is_cut, recipe.samples, mask, special)


class Judge:
    """Measures a model on held-out text."""

    def __init__(self, pretrained: Pretrained, text: Text | None, recipe: Recipe, work: Path, bars: Bars) -> None:
        self.pretrained, self.text, self.recipe, self.bars = pretrained, text, recipe, bars
        self.vectors = work / "vectors.safetensors"

    def measure(self, name: str) -> dict[str, float] | None:
        """Return the scores by name, None without held-out text; `before` keeps an encoder's dense vectors."""
        text = self.text
        if name == "before" and self.pretrained.kind == "encoder" and text is not None:
            self._keep(text)
        if text is None or not len(text.held_out):
            return None
        with self.bars.counting(f"scores, {name}") as advance:
            if self.pretrained.kind == "encoder":
                return self._encoder(text)
            model = self.pretrained.model

            def moved(done: int, total: int) -> None:
                advance(done, total, "")

            batch = self.recipe.batch
            if self.pretrained.kind == "masked" and text.mask is not None:
                found = language.masked(
                    model,
                    text.held_out,
                    mask=text.mask,
                    special=text.special,
                    seed=self.recipe.seed,
                    batch=batch,
                    progress=moved,
                )
            else:
                found = language.causal(model, text.held_out, batch=batch, progress=moved)
        word = "pseudo-perplexity" if self.pretrained.kind == "masked" else "perplexity"
        return {word: min(found.perplexity, 1e300), "nll": found.nll, "accuracy": found.accuracy, "tokens": found.tokens}

    def loss(self) -> tuning.Loss:
        """Return the loss to fine-tune by: the model's own kind; an encoder's is nearness to the dense one's vectors."""
        assert self.text is not None
        if self.pretrained.kind == "causal":
            return tuning.causal_loss
        if self.pretrained.kind == "masked" and self.text.mask is not None:
            return tuning.masked_loss(self.text.mask, self.text.special, seed=self.recipe.seed)
        return tuning.matching_loss(safetensors.torch.load_file(self.vectors)["calibration"], self.pretrained.pooling)

    def _keep(self, text: Text) -> None:
        parts = {
            "held_out": text.held_out,
            "calibration": text.calibration if self.recipe.finetune_steps else text.calibration[:0],
        }
        found = {name: self._embedded(blocks) for name, blocks in parts.items() if len(blocks)}
        atomic.write_bytes(self.vectors, safetensors.torch.save(found))

    def _encoder(self, text: Text) -> dict[str, float]:
        dense = safetensors.torch.load_file(self.vectors)["held_out"]
        own = self._embedded(text.held_out)
        near, found = language.fidelity(dense, own), language.retrieval(own, dense)
        return {
            "cosine": near.mean,
            "lowest cosine": near.lowest,
            "mrr": found.mrr,
            "recall": found.recall,
            "texts": near.texts,
        }

    def _embedded(self, blocks: Tensor) -> Tensor:
        return language.embed(self.pretrained.model, blocks, self.pretrained.pooling, batch=self.recipe.batch)


def _facts(recipe: Recipe, source: Path, pretrained: Pretrained | None) -> tuple[Any, str, int | None, int]:
    """Return tokenizer, kind, longest text and vocabulary; of a model that is streamed from its folder alone."""
    if pretrained is not None:
        rows: Any = pretrained.model.get_input_embeddings()  # type: ignore[operator]
        return pretrained.tokenizer, pretrained.kind, pretrained.length, int(rows.weight.shape[0])
    if llama2c.is_checkpoint(source):
        model, tokenizer = llama2c.load(source)
        config: Any = model.config
        return tokenizer, "causal", config.max_position_embeddings, config.vocab_size
    config = loading.read_config(source)
    kind = loading.kind_of(source, config, recipe.kind)
    pool = pooling.read(source) if kind == "encoder" else pooling.Pooling()
    return tokenizing.load(source), kind, loading.longest(config, pool), int(config.get_text_config().vocab_size)


def _held_out(recipe: Recipe, encode: corpus.Encode, options: dict[str, Any]) -> Tensor:
    """Return the first blocks of the evaluation text, in their order."""
    same = {path.resolve() for path in corpus.find(recipe.text)[0]} if recipe.text else set()
    for path in corpus.find(recipe.eval_text)[0]:
        if path.resolve() in same:
            raise DataError(f"{corpus.shown(path)} is both --text and --eval-text: held-out text must be other text")
    return corpus.first(recipe.eval_text, encode, count=recipe.eval_samples, **options)


def _check(calibration: Tensor, held: Tensor, vocabulary: int, where: str) -> None:
    for blocks in (calibration, held):
        if blocks.numel() and int(blocks.max()) >= vocabulary:
            raise ModelError(
                f"the tokenizer gives token {int(blocks.max())}, the model has {vocabulary}: they do not belong together"
            )
    shared = corpus.overlap(calibration, held) if len(calibration) and len(held) else 0
    if shared and where == "eval-text":
        raise DataError(
            f"{shared} of {len(held)} held-out blocks are, token for token, also in the text to calibrate on: give another"
        )
