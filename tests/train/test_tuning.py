from __future__ import annotations

import copy

import pytest
import torch

from openwork import Fixed
from openwork.core.masks import Masks
from openwork.errors import DivergedError, RecipeError
from openwork.models.pretrained.pooling import Pooling
from openwork.train import checkpoints, language, tuning
from tests.train.test_language import Bigram, draw


def chain(n: int, length: int, size: int = 7) -> torch.Tensor:
    """Blocks in which each token is followed by the next number."""
    return (torch.arange(length)[None] + torch.arange(n)[:, None]) % size


def masked_bigram() -> tuple[Bigram, Masks]:
    model = Bigram()
    mask = torch.rand(7, 7, generator=torch.Generator().manual_seed(1)) < 0.5
    masks = Masks({"table": mask | torch.eye(7, dtype=torch.bool).roll(1, 1)})
    masks.apply(model)
    return model, masks


def test_tuning_learns_and_holds_the_mask():
    model, masks = masked_bigram()
    blocks = chain(10, 8)
    before = language.causal(model, blocks).nll
    last = tuning.tune(model, blocks, tuning.causal_loss, steps=60, sparsifier=Fixed(masks), rate=0.1, batch=4)
    masks.check(model)
    assert language.causal(model, blocks).nll < 0.5 * before
    assert last < before
    assert model.table.grad is None


def test_a_tuning_that_was_stopped_goes_on_bit_for_bit(tmp_path):
    whole, masks = masked_bigram()
    tuning.tune(whole, chain(10, 8), tuning.causal_loss, steps=20, sparsifier=Fixed(masks), rate=0.05, batch=3)

    class Stop(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done == 13:
            raise Stop

    model, _ = masked_bigram()
    options = {"steps": 20, "rate": 0.05, "batch": 3, "keep": tmp_path, "every": 5}
    with pytest.raises(Stop):
        tuning.tune(model, chain(10, 8), tuning.causal_loss, sparsifier=Fixed(masks), progress=stop, **options)
    found, _ = checkpoints.newest(tmp_path)
    assert found is not None
    assert found.step == 10
    model, _ = masked_bigram()
    seen: list[int] = []
    tuning.tune(
        model,
        chain(10, 8),
        tuning.causal_loss,
        sparsifier=Fixed(masks),
        progress=lambda done, _: seen.append(done),
        **options,
    )
    assert seen == list(range(11, 21))
    assert torch.equal(model.table, whole.table)


def test_settings_that_make_no_sense_and_losses_that_diverge():
    model, blocks = Bigram(), chain(4, 5)
    with pytest.raises(RecipeError, match="0 steps"):
        tuning.tune(model, blocks, tuning.causal_loss, steps=0)
    with pytest.raises(RecipeError, match="rate"):
        tuning.tune(model, blocks, tuning.causal_loss, steps=1, rate=float("nan"))
    model.table.data.fill_(float("inf"))
    with pytest.raises(DivergedError, match="step 0"):
        tuning.tune(model, blocks, tuning.causal_loss, steps=2)
    model.requires_grad_(False)
    with pytest.raises(RecipeError, match="requires a gradient"):
        tuning.tune(model, blocks, tuning.causal_loss, steps=1)


def test_the_losses_are_the_scores():
    model, blocks = Bigram().eval(), draw(5, 9, 6)
    loss = tuning.causal_loss(model, blocks, torch.arange(5), 0)
    assert loss.item() == pytest.approx(language.causal(model, blocks).nll, rel=1e-5)
    masked = tuning.masked_loss(6, special=[0], seed=2)
    hidden = language.hide(blocks, special=[0], seed=2, step=1)
    logs = model.table.detach().log_softmax(-1)[6]
    assert masked(model, blocks, torch.arange(5), 0).item() == pytest.approx(float(-logs[blocks[hidden]].mean()), rel=1e-5)
    assert masked(model, blocks, torch.arange(5), 1).item() != masked(model, blocks, torch.arange(5), 0).item()


def test_an_encoder_is_brought_back_to_its_dense_vectors():
    pytest.importorskip("transformers")
    from tests.models.pretrained import tiny

    model, blocks, pool = tiny.build("encoder"), draw(12, 8, 20), Pooling()
    dense = language.embed(model, blocks, pool)
    inner = {name: param for name, param in model.named_parameters() if name.startswith("encoder") and param.dim() == 2}
    masks = Masks({name: param.abs() >= param.abs().median() for name, param in inner.items()})
    masks.apply(model)
    start = copy.deepcopy(model)
    before = language.fidelity(dense, language.embed(start, blocks, pool)).mean
    tuning.tune(model, blocks, tuning.matching_loss(dense, pool), steps=40, sparsifier=Fixed(masks), rate=3e-3)
    after = language.fidelity(dense, language.embed(model, blocks, pool)).mean
    masks.check(model)
    assert 1 - after < 0.6 * (1 - before)
