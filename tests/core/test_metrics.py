from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, log_loss, roc_auc_score

from openwork.core import metrics
from openwork.core.rng import generator
from openwork.errors import DataError

CONFIDENCE = [0.95, 0.85, 0.85, 0.6, 0.55, 0.35, 0.99, 0.72]
CORRECT = [1, 1, 0, 1, 0, 0, 1, 1]


@pytest.mark.parametrize("bins", [10, 15])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ece_worked_number(bins: int, dtype: torch.dtype) -> None:
    found = metrics.ece(torch.tensor(CONFIDENCE, dtype=dtype), torch.tensor(CORRECT), bins)
    assert found == pytest.approx(0.1925, abs=1e-7 if dtype == torch.float32 else 1e-15)


def test_ece_takes_the_largest_probability() -> None:
    probabilities = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]], dtype=torch.float64)
    correct = torch.tensor([True, False])
    assert metrics.ece(probabilities, correct) == metrics.ece(probabilities.amax(-1), correct) == pytest.approx(0.55)


@given(
    # Multiples of 1/60 put many examples exactly on the edges of 10, 12, 15 and 20 bins.
    cases=st.lists(
        st.tuples(st.one_of(st.integers(0, 60).map(lambda k: k / 60), st.floats(0, 1)), st.booleans()), min_size=1
    ),
    bins=st.sampled_from([1, 3, 10, 12, 15, 20]),
)
def test_ece_is_the_definition(cases: list[tuple[float, bool]], bins: int) -> None:
    confidence = torch.tensor([c for c, _ in cases], dtype=torch.float64)
    correct = torch.tensor([v for _, v in cases])
    total = 0.0
    for index in range(bins):
        low, high = index / bins, (index + 1) / bins
        inside = [(c, v) for c, v in cases if low < c <= high or (index == 0 and c == 0)]
        if inside:
            accuracy = sum(v for _, v in inside) / len(inside)
            mean = math.fsum(c for c, _ in inside) / len(inside)
            total += len(inside) / len(cases) * abs(accuracy - mean)
    assert metrics.ece(confidence, correct, bins) == pytest.approx(total, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_ece_edges_belong_below_in_every_precision(dtype: torch.dtype) -> None:
    # One wrong example a tenth: were an edge to fall into the bin above, it would meet its neighbour there.
    confidence = torch.tensor([k / 10 for k in range(1, 11)], dtype=dtype)
    correct = torch.tensor([k % 2 == 0 for k in range(1, 11)])
    expected = (correct.double() - confidence.double()).abs().mean()
    assert metrics.ece(confidence, correct, 10) == pytest.approx(float(expected), abs=1e-12)


@pytest.mark.parametrize(
    ("confidence", "correct"),
    [([], []), ([0.5], [True, False]), ([1.2], [True]), ([-0.1], [True]), ([float("nan")], [True])],
)
def test_ece_refuses(confidence: list[float], correct: list[bool]) -> None:
    with pytest.raises(DataError, match="ece takes"):
        metrics.ece(torch.tensor(confidence), torch.tensor(correct))
    with pytest.raises(DataError, match="at least 1 bin, got 0"):
        metrics.ece(torch.tensor([0.5]), torch.tensor([True]), 0)


def test_auroc_worked_number() -> None:
    assert metrics.auroc(torch.tensor([0.9, 0.8, 0.7, 0.6]), torch.tensor([0.85, 0.5, 0.6, 0.2])) == 0.78125


@given(
    inside=st.lists(st.integers(-4, 4), min_size=1, max_size=30),
    outside=st.lists(st.integers(-4, 4), min_size=1, max_size=30),
)
def test_auroc_counts_pairs_and_agrees_with_sklearn(inside: list[int], outside: list[int]) -> None:
    pairs = sum((a > b) + (a == b) / 2 for a in inside for b in outside)
    found = metrics.auroc(torch.tensor(inside).float(), torch.tensor(outside).double())
    assert found == pairs / (len(inside) * len(outside))
    truth = [1] * len(inside) + [0] * len(outside)
    assert found == pytest.approx(roc_auc_score(truth, inside + outside), abs=1e-12)


def test_auroc_ranks_infinities_and_refuses_nan_and_nothing() -> None:
    assert metrics.auroc(torch.tensor([math.inf]), torch.tensor([3.0, -math.inf])) == 1.0
    with pytest.raises(DataError, match="the inside scores"):
        metrics.auroc(torch.tensor([math.nan]), torch.tensor([1.0]))
    with pytest.raises(DataError, match="the outside scores"):
        metrics.auroc(torch.tensor([1.0]), torch.tensor([]))


@given(seed=st.integers(0, 10**6), n=st.integers(1, 20), classes=st.integers(2, 5))
def test_accuracy_and_nll_agree_with_sklearn(seed: int, n: int, classes: int) -> None:
    draw = generator(seed, "metrics")
    logits = torch.randn(n, classes, generator=draw, dtype=torch.float64)
    targets = torch.randint(0, classes, (n,), generator=draw)
    assert metrics.accuracy(logits, targets) == accuracy_score(targets, logits.argmax(-1))
    expected = log_loss(targets, logits.softmax(-1), labels=range(classes))
    assert metrics.nll(logits, targets) == pytest.approx(expected, rel=1e-12)


def test_nll_of_a_float32_model_is_summed_in_float64() -> None:
    # log(1 + e^-20) is 2e-9: float32 would give 0.
    logits = torch.tensor([[20.0, 0.0]])
    assert metrics.nll(logits, torch.tensor([0])) == pytest.approx(math.log1p(math.exp(-20)), rel=1e-6)


def test_words_are_scored_one_by_one_and_padding_is_left_out() -> None:
    logits = torch.randn(2, 3, 5, generator=generator(0, "words"))
    targets = torch.tensor([[1, 2, metrics.IGNORED], [4, metrics.IGNORED, 0]])
    kept = [(0, 0), (0, 1), (1, 0), (1, 2)]
    flat = torch.stack([logits[place] for place in kept])
    flat_targets = torch.stack([targets[place] for place in kept])
    assert metrics.accuracy(logits, targets) == metrics.accuracy(flat, flat_targets)
    assert metrics.nll(logits, targets) == metrics.nll(flat, flat_targets)


def test_of_equal_logits_the_lowest_class_counts() -> None:
    assert metrics.accuracy(torch.zeros(4, 3), torch.tensor([0, 1, 2, 0])) == 0.5


@pytest.mark.parametrize(
    ("logits", "targets", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(3, dtype=torch.long), r"need targets of shape \(2,\), got \(3,\)"),
        (torch.zeros(2, 3), torch.zeros(2), "integer dtype, got torch.float32"),
        (torch.zeros(2, 3), torch.tensor([0, 3]), "from 0 to 3, but the model has 3 classes"),
        (torch.zeros(2, 3), torch.tensor([-100, -100]), "no targets"),
        (torch.zeros(0, 3), torch.zeros(0, dtype=torch.long), "no targets"),
    ],
)
def test_bad_targets_are_refused(logits: torch.Tensor, targets: torch.Tensor, message: str) -> None:
    for metric in (metrics.accuracy, metrics.nll):
        with pytest.raises(DataError, match=message):
            metric(logits, targets)
