from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from openwork.core import metrics
from openwork.core.rng import generator
from openwork.errors import DataError, DivergedError
from openwork.train.evaluate import evaluate, predictions
from tests.train.toys import Toy, net


def batches(source: Toy, size: int = 7) -> list[tuple[Tensor, Tensor]]:
    return list(zip(source.x.split(size), source.y.split(size), strict=True))


def test_scores_are_the_metrics_of_all_predictions() -> None:
    model, source = net(), Toy()
    scores = evaluate(model, batches(source))
    logits, targets = predictions(model, iter(batches(source)))
    assert logits.shape == (40, 3)
    assert torch.equal(targets, source.y)
    model.eval()
    torch.testing.assert_close(logits, model(source.x))
    assert scores.n == 40
    assert scores.accuracy == metrics.accuracy(logits, targets)
    assert scores.nll == pytest.approx(metrics.nll(logits, targets), rel=1e-12)
    probabilities = logits.double().softmax(-1)
    assert scores.ece == pytest.approx(metrics.ece(probabilities, logits.argmax(-1) == targets), rel=1e-9)


def test_nothing_is_left_behind() -> None:
    model = net()
    model[1].eval()  # type: ignore[index]
    modes = [module.training for module in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = torch.get_rng_state()
    evaluate(model, batches(Toy()))
    logits, _ = predictions(model, batches(Toy()))
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), before)
    (logits * torch.ones(3, requires_grad=True)).sum().backward()  # not an inference tensor


def test_language_models_are_scored_word_by_word() -> None:
    table = torch.randn(5, 5, generator=generator(0, "table"))

    class Bigram(nn.Module):
        def forward(self, x: Tensor) -> SimpleNamespace:
            return SimpleNamespace(logits=table[x])

    x = torch.tensor([[0, 1, 2], [3, 4, 0]])
    y = torch.tensor([[1, 2, metrics.IGNORED], [4, 0, 1]])
    scores = evaluate(Bigram(), [(x, y)])
    logs = table.double().log_softmax(-1)
    kept = [(a, b) for a, b in zip(x.flatten().tolist(), y.flatten().tolist(), strict=True) if b >= 0]
    assert scores.n == 5
    assert scores.nll == pytest.approx(-sum(float(logs[a, b]) for a, b in kept) / 5, rel=1e-12)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_logits_are_divergence(bad: float) -> None:
    model = net()
    modes = [module.training for module in model.modules()]
    with torch.no_grad():
        model[-1].bias[1] = bad  # type: ignore[index]
    with pytest.raises(DivergedError, match="not finite"):
        evaluate(model, batches(Toy()))
    assert modes == [module.training for module in model.modules()]


def test_no_data_is_refused() -> None:
    for function in (evaluate, predictions):
        with pytest.raises(DataError, match="no batch"):
            function(net(), [])
