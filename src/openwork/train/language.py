"""What a language model or a text encoder can do: likelihood of held-out text, masked words, and how well texts are found.

All figures are sums over tokens in float64, so that they do not depend on how blocks are put into batches. Every module's
mode is given back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from openwork.core.rng import generator
from openwork.errors import DataError, DivergedError
from openwork.models.outputs import logits
from openwork.nn.batchnorm import kept_modes
from openwork.train import outputs

Progress = Callable[[int, int], object] | None
Pool = Callable[[Tensor, Tensor | None], Tensor]

_ENTRIES = 2**24
"""Logits that are turned into float64 at once."""


@dataclass(frozen=True)
class Scores:
    """Likelihood of text.

    Attributes:
        nll: mean negative log-likelihood of a token in nats.
        accuracy: share of tokens that were the likeliest, 0 to 1.
        tokens: how many were predicted.
    """

    nll: float
    accuracy: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp(nll); infinity where that is too large for a float."""
        return math.exp(self.nll) if self.nll < 709.0 else math.inf


@dataclass(frozen=True)
class Retrieval:
    """How well texts are found by their vectors.

    Attributes:
        mrr: mean reciprocal rank of the right document, 0 to 1; on ties the worst rank counts.
        recall: share of queries whose right document comes first, 0 to 1.
        queries: how many queries there were.
        documents: among how many documents.
    """

    mrr: float
    recall: float
    queries: int
    documents: int


@dataclass(frozen=True)
class Fidelity:
    """Cosine between the vectors of two encoders for the same texts: mean, lowest, and how many texts."""

    mean: float
    lowest: float
    texts: int


def causal(model: nn.Module, blocks: Tensor, *, batch: int = 8, progress: Progress = None) -> Scores:
    """Return how likely a causal language model finds `blocks`: each token but the first of a block, given those before.

    Args:
        model: token numbers (batch, length) -> logits (batch, length, vocabulary).
        blocks: (n, length) int64.
        batch: blocks at a time.
        progress: called as progress(done, total) in blocks.

    Raises:
        DataError: if there is no token to predict.
        DivergedError: if the logits are not finite.
    """
    if blocks.dim() != 2 or not blocks.shape[0] or blocks.shape[1] < 2:
        raise DataError(f"blocks of shape {tuple(blocks.shape)} hold no token to predict: give (n, length) with length > 1")

    def parts() -> Iterator[tuple[Tensor, Tensor]]:
        for ids, output in _run(model, blocks, batch, progress):
            yield output[:, :-1], ids[:, 1:]

    return _scores(model, parts())


def masked(
    model: nn.Module,
    blocks: Tensor,
    *,
    mask: int,
    special: Iterable[int] = (),
    rate: float = 0.15,
    seed: int = 0,
    batch: int = 8,
    progress: Progress = None,
) -> Scores:
    """Return how likely a masked language model finds the tokens that are hidden from it.

    In each block round(rate * tokens) of its tokens, at least one, are replaced by the mask token, drawn from a named
    generator: the same blocks and seed hide the same tokens from every model. Training's random and unchanged tokens are
    left out, so this is a pseudo-likelihood, to compare models of one vocabulary by.

    Args:
        model: token numbers (batch, length) -> logits (batch, length, vocabulary).
        blocks: (n, length) int64.
        mask: number of the mask token.
        special: numbers of tokens that are never hidden.
        rate: share of tokens to hide.
        seed: of the draw.
        batch: blocks at a time.
        progress: called as progress(done, total) in blocks.

    Raises:
        DataError: if there is nothing to hide.
        DivergedError: if the logits are not finite.
    """
    hidden = hide(blocks, special=special, rate=rate, seed=seed)
    seen = blocks.masked_fill(hidden, mask)

    def parts() -> Iterator[tuple[Tensor, Tensor]]:
        start = 0
        for ids, output in _run(model, seen, batch, progress):
            where = hidden[start : start + len(ids)]
            yield output[where.to(output.device)], blocks[start : start + len(ids)][where].to(output.device)
            start += len(ids)

    return _scores(model, parts())


def hide(blocks: Tensor, *, special: Iterable[int] = (), rate: float = 0.15, seed: int = 0, step: int = 0) -> Tensor:
    """Return which tokens of `blocks` (n, length) are hidden: bool, round(rate * its ordinary tokens) a block.

    Raises:
        DataError: if the rate is not in (0, 1], or a block has no ordinary token.
    """
    if not 0.0 < rate <= 1.0:
        raise DataError(f"rate={rate!r}: the share of tokens to hide is in (0, 1]")
    ordinary = ~torch.isin(blocks, torch.tensor(sorted(set(special)), dtype=blocks.dtype))
    counts = ordinary.sum(dim=1)
    if not blocks.numel() or not bool(counts.all()):
        raise DataError("a block has no token that could be hidden: give text, not special tokens alone")
    draw = torch.rand(blocks.shape, generator=generator(seed, "hidden tokens", step)).masked_fill(~ordinary, 2.0)
    ranks = draw.argsort(dim=1, stable=True).argsort(dim=1, stable=True)
    return ranks < (counts * rate).round().clamp(min=1)[:, None]


@torch.inference_mode()
def embed(
    model: nn.Module,
    texts: Sequence[tuple[Tensor, Tensor | None]] | Tensor,
    pool: Pool,
    *,
    batch: int = 16,
    progress: Progress = None,
) -> Tensor:
    """Return one vector a text, (n, width) float32.

    Args:
        model: an encoder of transformers; of a model with a head the body is used.
        texts: blocks (n, length) without padding, or batches (token numbers, attention mask).
        pool: token states, attention mask -> vectors (see `openwork.models.pretrained.Pooling`).
        batch: blocks at a time, where `texts` is a tensor.
        progress: called as progress(done, total) in batches.

    Raises:
        DataError: if there is no text.
        DivergedError: if a vector is not finite.
    """
    batches = [(part, None) for part in torch.split(texts, batch)] if isinstance(texts, Tensor) else list(texts)
    if not batches:
        raise DataError("there is no text to embed")
    place = outputs.device_of(model)
    found = []
    with kept_modes(model):
        model.eval()
        for done, (ids, mask) in enumerate(batches, 1):
            found.append(pool(states(model, ids.to(place), None if mask is None else mask.to(place)), mask).cpu())
            if progress is not None:
                progress(done, len(batches))
    vectors = torch.cat(found).clone()
    if not bool(vectors.isfinite().all()):
        raise DivergedError("the encoder returns vectors that are not finite, so there is nothing to compare")
    return vectors


def states(model: nn.Module, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the last token states (batch, length, width) of an encoder, or of the body of a model with a head."""
    body: Any = getattr(model, "base_model", model)
    output = body(ids) if mask is None else body(ids, attention_mask=mask)
    found: Tensor = output if isinstance(output, Tensor) else output[0]
    return found


def fidelity(dense: Tensor, sparse: Tensor) -> Fidelity:
    """Return how near the vectors `sparse` (n, width) of texts are to the vectors `dense` of the same texts.

    Raises:
        DataError: if there are none, or the shapes differ.
    """
    if dense.shape != sparse.shape or not dense.numel():
        raise DataError(f"vectors of shapes {tuple(dense.shape)} and {tuple(sparse.shape)} cannot be compared text by text")
    cosine = torch.nn.functional.cosine_similarity(dense.double(), sparse.double(), dim=-1)
    return Fidelity(float(cosine.mean()), float(cosine.min()), len(cosine))


def retrieval(queries: Tensor, documents: Tensor) -> Retrieval:
    """Return how well queries (n, width) find their documents: query i belongs to document i, by the dot product.

    Args:
        queries: vectors of the queries.
        documents: (m, width), m >= n; those after the n-th are distractors.

    Raises:
        DataError: if there are none, or more queries than documents.
    """
    n, m = len(queries), len(documents)
    if not n or n > m or queries.shape[1:] != documents.shape[1:]:
        raise DataError(f"{n} queries and {m} documents: give at least one query, and a document of its width for each")
    ranks = []
    for start in range(0, n, 1024):
        part = queries[start : start + 1024].double() @ documents.double().T
        places = torch.arange(start, start + len(part))
        own = part.gather(1, places[:, None])
        ranks.append((part >= own).sum(dim=1))  # its own document counts once, and every tie before it
    rank = torch.cat(ranks).double()
    return Retrieval(float((1.0 / rank).mean()), float((rank == 1).double().mean()), n, m)


def padded(tokenizer: Any, texts: Sequence[str], *, length: int, batch: int = 16) -> list[tuple[Tensor, Tensor]]:
    """Return texts as batches (token numbers, attention mask), each cut to `length` tokens and padded to its longest.

    Raises:
        DataError: if there are no texts, or the tokenizer cannot pad.
    """
    if not texts:
        raise DataError("there is no text to embed")
    if getattr(tokenizer, "pad_token", None) is None:
        raise DataError("the tokenizer has no padding token: set tokenizer.pad_token")
    found = []
    for start in range(0, len(texts), batch):
        part = tokenizer(list(texts[start : start + batch]), truncation=True, max_length=length, padding=True,
                         return_tensors="pt")  # fmt: skip
        found.append((part["input_ids"], part["attention_mask"]))
    return found


def _run(model: nn.Module, blocks: Tensor, batch: int, progress: Progress) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each batch of blocks with its logits, on the model's device."""
    place = outputs.device_of(model)
    with kept_modes(model):
        model.eval()
        done = 0
        for part in torch.split(blocks, batch):
            ids = part.to(place)
            with torch.inference_mode():
                output = logits(model(ids))
            yield ids, output
            done += len(part)
            if progress is not None:
                progress(done, len(blocks))


@torch.inference_mode()
def _scores(model: nn.Module, parts: Iterable[tuple[Tensor, Tensor]]) -> Scores:
    """Return the scores of logits (..., vocabulary) against token numbers (...), a few rows in float64 at a time."""
    nll, right, count = 0.0, 0, 0
    for output, targets in parts:
        rows, wanted = output.reshape(-1, output.shape[-1]), targets.reshape(-1)
        step = max(1, _ENTRIES // rows.shape[-1])
        for start in range(0, len(rows), step):
            logs = rows[start : start + step].double().log_softmax(-1)
            part = wanted[start : start + step]
            nll -= float(logs.gather(-1, part[:, None]).sum())
            right += int((logs.argmax(-1) == part).sum())
        count += wanted.numel()
        if not math.isfinite(nll):
            raise DivergedError(f"{type(model).__name__} returns logits that are not finite, so there is nothing to score")
    return Scores(nll / count, right / count, count)
