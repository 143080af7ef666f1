"""Figures of merit of a classifier: accuracy, likelihood, calibration, and how well it tells strangers apart.

Pure functions of tensors, computed in float64. Classes lie on the last axis, so a language model's logits of shape
(batch, tokens, words) are scored word by word; targets equal to `IGNORED` are left out, as torch's loss does.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from openwork.errors import DataError

IGNORED = -100
"""Target value of a position that is not scored (padding)."""


def accuracy(logits: Tensor, targets: Tensor) -> float:
    """Return the share of targets that have the largest logit; of equal logits the lowest class counts.

    Args:
        logits: (..., classes), any floating dtype.
        targets: (...), integers; `IGNORED` marks positions to leave out.

    Raises:
        DataError: if the shapes disagree or nothing is left to score.
    """
    logits, targets = scored(logits, targets)
    return int((logits.argmax(-1) == targets).sum()) / targets.numel()


def nll(logits: Tensor, targets: Tensor) -> float:
    """Return the mean negative log-likelihood of the targets in nats; shapes and errors as in `accuracy`."""
    logits, targets = scored(logits, targets)
    return float(functional.cross_entropy(logits.double(), targets))


def ece(confidence: Tensor, correct: Tensor, bins: int = 15) -> float:
    """Return the expected calibration error: the mean over examples of |accuracy - confidence| of their bin.

    Guo, Pleiss, Sun, Weinberger, "On Calibration of Modern Neural Networks", ICML 2017, Eq. (3). Bins have equal
    width and hold (lower, upper]; a confidence of exactly 0 belongs to the first bin.

    Args:
        confidence: (n,) probability of the predicted class, or (n, classes) probabilities, whose largest is taken.
        correct: (n,) whether the prediction was right.
        bins: how many bins divide [0, 1].

    Raises:
        DataError: if there are no examples, the lengths differ, or a confidence is outside [0, 1].
    """
    if bins < 1:
        raise DataError(f"ece needs at least 1 bin, got {bins}")
    if confidence.dim() == 2:
        confidence = confidence.amax(-1)
    if confidence.dim() != 1 or confidence.shape != correct.shape or confidence.numel() == 0:
        raise DataError(
            f"ece takes one confidence and one verdict an example, got shapes {tuple(confidence.shape)} and "
            f"{tuple(correct.shape)}"
        )
    # A softmax may exceed 1 by a rounding error; anything beyond that is not a probability.
    if not bool(((confidence >= 0) & (confidence <= 1 + 1e-5)).all()):
        raise DataError("ece takes confidences between 0 and 1; pass probabilities, not logits")
    # The edges are rounded to the dtype of the confidences, so that 0.6 lies on the edge 0.6 in any precision.
    edges = (torch.arange(1, bins, dtype=torch.float64) / bins).to(confidence.dtype).to(confidence.device)
    place = torch.bucketize(confidence.contiguous(), edges)
    gap = torch.zeros(bins, dtype=torch.float64, device=confidence.device)
    gap.index_add_(0, place, correct.double() - confidence.double())
    return float(gap.abs().sum()) / confidence.numel()


def auroc(inside: Tensor, outside: Tensor) -> float:
    """Return the probability that an inside score exceeds an outside score, ties counting one half.

    This is the area under the ROC curve of "score above a threshold means in-distribution": Hendrycks, Gimpel, "A
    Baseline for Detecting Misclassified and Out-of-Distribution Examples", ICLR 2017. Exact: it counts pairs.

    Args:
        inside: scores of in-distribution examples, any shape; higher means more familiar.
        outside: scores of out-of-distribution examples, any shape.

    Raises:
        DataError: if a side is empty or holds NaN.
    """
    for name, scores in (("inside", inside), ("outside", outside)):
        if scores.numel() == 0 or bool(scores.isnan().any()):
            raise DataError(f"auroc needs scores on both sides and no NaN; the {name} scores break that")
    dtype = torch.promote_types(inside.dtype, outside.dtype)
    ordered = outside.flatten().to(dtype).sort().values
    probes = inside.flatten().to(dtype).contiguous()
    below = torch.searchsorted(ordered, probes).sum()
    not_above = torch.searchsorted(ordered, probes, right=True).sum()
    return int(below + not_above) / (2 * inside.numel() * outside.numel())


def scored(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return logits as (n, classes) and targets as (n,), without the ignored positions.

    Raises:
        DataError: if the shapes disagree, the targets are no class numbers, or nothing is left to score.
    """
    if logits.shape[:-1] != targets.shape or logits.dim() == 0:
        raise DataError(
            f"logits of shape {tuple(logits.shape)} need targets of shape {tuple(logits.shape[:-1])}, "
            f"got {tuple(targets.shape)}: classes lie on the last axis"
        )
    if targets.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise DataError(f"targets must be class numbers of an integer dtype, got {targets.dtype}")
    logits, targets = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1).long()
    kept = targets != IGNORED
    if not bool(kept.all()):
        logits, targets = logits[kept], targets[kept]
    if targets.numel() == 0:
        raise DataError("there are no targets to score")
    if not bool(((targets >= 0) & (targets < logits.shape[-1])).all()):
        raise DataError(
            f"targets run from {int(targets.min())} to {int(targets.max())}, but the model has "
            f"{logits.shape[-1]} classes, numbered from 0"
        )
    return logits, targets
