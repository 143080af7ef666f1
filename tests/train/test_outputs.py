from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from openwork.core.metrics import IGNORED
from openwork.core.rng import generator
from openwork.errors import ModelError
from openwork.train import outputs

SCORES = torch.randn(2, 3, 5, generator=generator(0, "outputs"))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_cross_entropy_of_words_is_the_mean_over_words_that_count(smoothing: float) -> None:
    targets = torch.tensor([[1, IGNORED, 4], [0, 2, IGNORED]])
    logs = SCORES.log_softmax(-1)
    losses = [
        -(1 - smoothing) * logs[b, t, targets[b, t]] - smoothing * logs[b, t].mean()
        for b in range(2)
        for t in range(3)
        if targets[b, t] != IGNORED
    ]
    torch.testing.assert_close(outputs.cross_entropy(SCORES, targets, smoothing), torch.stack(losses).mean())


def test_cross_entropy_of_images_is_torchs() -> None:
    targets = torch.tensor([0, 4])
    assert torch.equal(outputs.cross_entropy(SCORES[:, 0], targets), functional.cross_entropy(SCORES[:, 0], targets))


def test_shapes_that_disagree_are_refused() -> None:
    with pytest.raises(ModelError, match=r"logits of shape \(2, 3, 5\) for targets of shape \(2, 4\)"):
        outputs.cross_entropy(SCORES, torch.zeros(2, 4, dtype=torch.long))


def test_device_of_a_model() -> None:
    assert outputs.device_of(nn.ReLU()) == torch.device("cpu")
    assert outputs.device_of(nn.Linear(2, 2, device="meta")) == torch.device("meta")
