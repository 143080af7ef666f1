"""What `openwork essential` scores a model by: text as held-out blocks, and the quality of every block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from openwork.data import corpus
from openwork.errors import DataError, ModelError
from openwork.models import pretrained
from openwork.models.outputs import logits
from openwork.models.pretrained import tokenizing
from openwork.models.pretrained.loading import Pretrained
from openwork.nn.batchnorm import kept_modes
from openwork.train import language, tuning
from openwork.train.language import Pool

if TYPE_CHECKING:
    from openwork.cli._essential import Recipe

LENGTH = 256
"""Most tokens of a block unless asked otherwise."""
CALIBRATION = 1024
"""Most blocks to fine-tune on."""

Score = Callable[[nn.Module], Tensor]


@dataclass(frozen=True)
class Ready:
    """A loaded model with its text.

    Attributes:
        found: the model.
        calibration: blocks to fine-tune on.
        score: model -> quality of every held-out block.
        quality: what that is, in words.
        floor: quality of a guess.
        loss: to fine-tune by.
    """

    found: Pretrained
    calibration: Tensor
    score: Score
    quality: str
    floor: float
    loss: tuning.Loss


def prepare(recipe: Recipe) -> Ready:
    """Load the model and read the text.

    Raises:
        ModelError: if the model cannot be loaded, has no tokenizer or cannot be scored as asked.
        DataError: if the text is missing, broken or too short.
    """
    found = pretrained.load(recipe.model, kind=recipe.kind)
    if found.tokenizer is None:
        name = corpus.shown(recipe.model)
        raise ModelError(f"{name} has no tokenizer, so text cannot be read: put tokenizer.json beside it")
    longest = LENGTH if found.length is None else found.length
    length = min(LENGTH, longest) if recipe.length is None else recipe.length
    if found.length is not None and length > found.length:
        raise DataError(f"--length {length} is more than the {found.length} tokens that the model takes")
    before, after = tokenizing.specials(found.tokenizer)
    samples = min(CALIBRATION, max(1, recipe.finetune * recipe.batch))
    text = corpus.blocks(
        list(recipe.text), corpus.encoder(found.tokenizer), length=length, samples=samples, held_out=recipe.blocks,
        seed=recipe.seed, prefix=before, suffix=after, wrap=found.kind != "causal",
    )  # fmt: skip
    if len(text.held_out) < 2:
        raise DataError(f"the text has {text.tokens} tokens, too few for two held-out blocks of {length}: give more text")
    largest, known = int(max(text.calibration.max(), text.held_out.max())), _vocabulary(found)
    if largest >= known:
        raise ModelError(f"the tokenizer gives token {largest}, the model has {known}: they do not belong together")
    quality = recipe.quality or ("retrieval" if found.kind == "encoder" else "accuracy")
    if (quality == "retrieval") != (found.kind == "encoder"):
        own = "retrieval" if found.kind == "encoder" else "accuracy or likelihood"
        raise ModelError(f"--quality {quality} does not suit a model of kind {found.kind}: use {own}")
    return _ready(recipe, found, text, quality, len(before), len(after))


def _ready(recipe: Recipe, found: Pretrained, text: corpus.Corpus, quality: str, before: int, after: int) -> Ready:
    held, tokenizer = text.held_out, found.tokenizer
    special = tuple(int(one) for one in getattr(tokenizer, "all_special_ids", ()))
    if found.kind == "encoder":
        known = text.calibration if recipe.finetune else text.calibration[:1]
        loss = tuning.matching_loss(language.embed(found.model, known, found.pooling, batch=recipe.batch), found.pooling)
        score = _halves(held, before, after, found.pooling, recipe.batch)
        floor = sum(1.0 / k for k in range(1, len(held) + 1)) / len(held)
        return Ready(found, text.calibration, score, "mean reciprocal rank of a passage's second half", floor, loss)
    if found.kind == "masked":
        mask = getattr(tokenizer, "mask_token_id", None)
        if mask is None:
            name = corpus.shown(recipe.model)
            raise ModelError(f"the tokenizer of {name} has no mask token, so hidden words cannot be scored")
        hidden = language.hide(held, special=special, seed=recipe.seed)
        score = _tokens(held.masked_fill(hidden, mask), held, hidden, quality, recipe.batch, shift=0)
        what, targets = "hidden-token", held[hidden]
        loss = tuning.masked_loss(mask, special, seed=recipe.seed)
    else:
        score = _tokens(held, held, torch.ones_like(held, dtype=torch.bool), quality, recipe.batch, shift=1)
        what, targets, loss = "next-token", held[:, 1:].flatten(), tuning.causal_loss
    if quality == "likelihood":
        return Ready(found, text.calibration, score, f"{what} likelihood, exp(-loss)", 1.0 / _vocabulary(found), loss)
    floor = float(torch.bincount(targets).max()) / targets.numel()
    return Ready(found, text.calibration, score, f"{what} accuracy", floor, loss)


def _vocabulary(found: Pretrained) -> int:
    rows: Any = found.model.get_input_embeddings()  # type: ignore[operator]
    return int(rows.weight.shape[0])


def _tokens(seen: Tensor, wanted: Tensor, where: Tensor, quality: str, batch: int, *, shift: int) -> Score:
    """Return model -> accuracy, or exp of the mean log-likelihood, of the tokens `where` in each block."""

    @torch.inference_mode()
    def score(model: nn.Module) -> Tensor:
        found = []
        place = next(model.parameters()).device
        with kept_modes(model):
            model.eval()
            for ids, right, part in zip(*(torch.split(x, batch) for x in (seen, wanted, where)), strict=True):
                output = logits(model(ids.to(place))).cpu()
                output = output[:, : output.shape[1] - shift]
                right, part = right[:, shift:], part[:, shift:].double()
                if quality == "accuracy":
                    values = (output.argmax(-1) == right).double()
                    found.append((values * part).sum(1) / part.sum(1))
                else:
                    values = output.double().log_softmax(-1).gather(-1, right[..., None])[..., 0]
                    mean = torch.where(part > 0, values, 0.0).sum(1) / part.sum(1)
                    found.append(mean.exp().nan_to_num(0.0, 0.0, 0.0))
        return torch.cat(found)

    return score


def _halves(blocks: Tensor, before: int, after: int, pool: Pool, batch: int) -> Score:
    """Return model -> for every passage 1 / the rank of its own second half among all, by the vector of its first half."""
    body = blocks[:, before : blocks.shape[1] - after]
    middle = body.shape[1] // 2
    head, tail = blocks[:, :before], blocks[:, blocks.shape[1] - after :]
    parts = [torch.cat([head, part, tail], dim=1) for part in (body[:, :middle], body[:, middle:])]

    def score(model: nn.Module) -> Tensor:
        one, two = (language.embed(model, part, pool, batch=batch).double() for part in parts)
        found = one @ two.T
        return 1.0 / (found >= found.diagonal()[:, None]).sum(1).double()

    return score
