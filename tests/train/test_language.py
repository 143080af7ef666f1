from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from openwork.errors import DataError, DivergedError
from openwork.train import language


class Bigram(nn.Module):
    """Logits of the next token from a table; counts how often dropout-like noise was asked for."""

    def __init__(self, size: int = 7, seed: int = 0) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(size, size, generator=torch.Generator().manual_seed(seed)))
        self.drop = nn.Dropout(0.9)

    def forward(self, ids: Tensor) -> Tensor:
        return self.drop(self.table[ids])


def draw(n: int, length: int, size: int = 7, seed: int = 0) -> Tensor:
    return torch.randint(size, (n, length), generator=torch.Generator().manual_seed(seed))


def test_perplexity_is_the_exponential_of_the_mean_over_tokens():
    model, blocks = Bigram(), draw(5, 9)
    logs = model.table.detach().double().log_softmax(-1)
    each = [float(-logs[a, b]) for row in blocks.tolist() for a, b in pairwise(row)]
    right = [int(logs[a].argmax()) == b for row in blocks.tolist() for a, b in pairwise(row)]
    found = language.causal(model, blocks)
    assert found.tokens == 40
    assert found.nll == pytest.approx(math.fsum(each) / 40, rel=1e-12)
    assert found.perplexity == pytest.approx(math.exp(math.fsum(each) / 40), rel=1e-12)
    assert found.accuracy == sum(right) / 40
    assert model.training
    assert model.drop.training


@settings(max_examples=20, deadline=None)
@given(batch=st.integers(1, 8), entries=st.sampled_from([8, 40, 2**24]))
def test_batches_do_not_change_the_scores(batch, entries):
    model, blocks = Bigram(), draw(7, 6)
    before, language._ENTRIES = language._ENTRIES, entries
    try:
        found = language.causal(model, blocks, batch=batch)
        hidden = language.masked(model, blocks, mask=6, batch=batch)
    finally:
        language._ENTRIES = before
    whole = language.causal(model, blocks, batch=7)
    assert found.nll == pytest.approx(whole.nll, rel=1e-12)
    assert (found.tokens, found.accuracy) == (whole.tokens, whole.accuracy)
    assert hidden.nll == pytest.approx(language.masked(model, blocks, mask=6, batch=7).nll, rel=1e-12)


def test_perplexity_is_what_transformers_own_loss_says():
    pytest.importorskip("transformers")
    from tests.models.pretrained import tiny

    model, blocks = tiny.build("llama"), draw(4, 12, 20)
    with torch.no_grad():
        losses = [float(model(row[None], labels=row[None]).loss) for row in blocks]
    found = language.causal(model, blocks, batch=3)
    assert found.nll == pytest.approx(sum(losses) / 4, rel=1e-5)


def test_hidden_tokens_are_a_share_of_the_ordinary_ones_and_the_same_for_every_model():
    blocks = draw(50, 20)
    hidden = language.hide(blocks, special=[0, 1], rate=0.3, seed=3)
    ordinary = (blocks > 1).sum(1)
    assert torch.equal(hidden.sum(1), (ordinary * 0.3).round().clamp(min=1).long())
    assert not bool(hidden[blocks <= 1].any())
    assert torch.equal(hidden, language.hide(blocks, special=[0, 1], rate=0.3, seed=3))
    assert not torch.equal(hidden, language.hide(blocks, special=[0, 1], rate=0.3, seed=4))
    assert not torch.equal(hidden, language.hide(blocks, special=[0, 1], rate=0.3, seed=3, step=1))
    assert bool(language.hide(blocks, rate=1.0).all())


def test_masked_likelihood_sees_the_mask_and_scores_what_it_hides():
    model, blocks = Bigram(), draw(6, 10, 6)
    found = language.masked(model, blocks, mask=6, rate=0.2, seed=1)
    logs = model.table.detach().double().log_softmax(-1)[6]
    wanted = blocks[language.hide(blocks, rate=0.2, seed=1)]
    assert found.tokens == len(wanted) == 12
    assert found.nll == pytest.approx(float(-logs[wanted].mean()), rel=1e-12)


def test_what_cannot_be_scored_is_said():
    model = Bigram()
    with pytest.raises(DataError, match="no token to predict"):
        language.causal(model, draw(3, 1))
    with pytest.raises(DataError, match="no token to predict"):
        language.causal(model, draw(3, 4)[:0])
    with pytest.raises(DataError, match="could be hidden"):
        language.hide(draw(3, 4), special=range(7))
    with pytest.raises(DataError, match=r"rate=0\.0"):
        language.hide(draw(3, 4), rate=0.0)
    model.table.data[2, 3] = float("nan")
    with pytest.raises(DivergedError, match="not finite"):
        language.causal(model, draw(3, 8))
    assert language.Scores(1000.0, 0.0, 1).perplexity == math.inf


def test_retrieval_ranks_by_hand():
    documents = torch.eye(4)
    assert language.retrieval(documents, documents) == language.Retrieval(1.0, 1.0, 4, 4)
    queries = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.9, 0.5, 0.1, 0.0], [0.3, 0.2, 0.1, 0.0]])
    found = language.retrieval(queries, documents)  # ranks 1, 2, 3
    assert found.mrr == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)
    assert found.recall == pytest.approx(1 / 3)
    tied = language.retrieval(torch.ones(1, 4), torch.ones(4, 4))
    assert tied.mrr == 0.25  # the worst rank of a tie: a constant encoder finds nothing
    with pytest.raises(DataError, match="5 queries and 4 documents"):
        language.retrieval(torch.ones(5, 4), documents)


@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 12), extra=st.integers(0, 5), seed=st.integers(0, 1000))
def test_retrieval_is_brute_force(n, extra, seed):
    draw = torch.Generator().manual_seed(seed)
    queries, documents = torch.randn(n, 3, generator=draw), torch.randn(n + extra, 3, generator=draw)
    ranks = []
    for place, query in enumerate(queries):
        scores = [float(query.double() @ one.double()) for one in documents]
        ranks.append(1 + sum(score >= scores[place] for other, score in enumerate(scores) if other != place))
    found = language.retrieval(queries, documents)
    assert found.mrr == pytest.approx(sum(1 / rank for rank in ranks) / n)
    assert found.recall == sum(rank == 1 for rank in ranks) / n


def test_fidelity_is_the_cosine():
    one = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    assert language.fidelity(one, 3 * one) == language.Fidelity(1.0, 1.0, 2)
    turned = language.fidelity(one, torch.tensor([[1.0, 1.0], [0.0, -1.0]]))
    assert turned.mean == pytest.approx((math.sqrt(0.5) - 1) / 2)
    assert turned.lowest == pytest.approx(-1.0)
    with pytest.raises(DataError, match="cannot be compared"):
        language.fidelity(one, one[:1])


def test_vectors_do_not_depend_on_padding_or_batches():
    pytest.importorskip("transformers")
    from openwork.models.pretrained import Pooling
    from tests.models.pretrained import tiny

    model, tokenizer = tiny.build("encoder"), tiny.tokenizer("bert")
    texts = ["the cat sat", "a small dog ran over the green hill", "stars"]
    padded = language.embed(model, language.padded(tokenizer, texts, length=16), Pooling())
    alone = torch.cat([language.embed(model, language.padded(tokenizer, [text], length=16), Pooling()) for text in texts])
    torch.testing.assert_close(padded, alone, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(padded.norm(dim=1), torch.ones(3))
    blocks = draw(5, 6, 20)
    one = language.embed(model, blocks, Pooling(), batch=2)
    torch.testing.assert_close(one, language.embed(model, blocks, Pooling(), batch=5), atol=1e-6, rtol=1e-5)
    headed = tiny.build("bert")
    assert language.embed(headed, blocks, Pooling()).shape == (5, 16)  # the body, not the logits
    with pytest.raises(DataError, match="no text"):
        language.padded(tokenizer, [], length=4)
