from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy

from openwork import models
from openwork.errors import ModelError
from tests.models.helpers import count, on_meta


def small(length: int = 16, vocabulary: int = 11, seed: int = 0, **options: object) -> nn.Module:
    chosen = {"width": 16, "depth": 2, **options}
    return models.build("gpt-small", input_shape=(length,), classes=vocabulary, seed=seed, options=chosen)


def test_gpt2_has_the_published_number_of_parameters() -> None:
    assert count(on_meta("gpt2", (1024,), 50_257)) == 124_439_808


@given(st.integers(1, 40), st.integers(1, 99), st.integers(1, 5), st.integers(1, 4), st.booleans())
@settings(deadline=None, max_examples=15)
def test_parameters_in_closed_form(length: int, vocabulary: int, heads: int, depth: int, tied: bool) -> None:
    w = 8 * heads
    model = on_meta("gpt-small", (length,), vocabulary, width=w, depth=depth, heads=heads, tied=tied)
    block = (4 * w * w + 4 * w) + (8 * w * w + 5 * w) + 4 * w
    assert count(model) == depth * block + 2 * w + (length + vocabulary * (1 if tied else 2)) * w


@given(st.integers(0, 15), st.integers(1, 10), st.integers(0, 3))
@settings(deadline=None, max_examples=25)
def test_a_token_never_changes_earlier_logits(place: int, shift: int, seed: int) -> None:
    model = small(seed=seed).eval()
    x = torch.randint(0, 11, (3, 16), generator=torch.Generator().manual_seed(seed))
    changed = x.clone()
    changed[:, place] = (changed[:, place] + shift) % 11
    with torch.no_grad():
        before, after = model(x), model(changed)
    assert torch.equal(before[:, :place], after[:, :place])
    assert (before[:, place:] != after[:, place:]).any(dim=-1).all()  # and it does change all the later ones


def test_shorter_sequences_give_the_same_beginning() -> None:
    model = small().eval()
    x = torch.randint(0, 11, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model(x[:, :5]), model(x)[:, :5])


@pytest.mark.parametrize("tied", [True, False])
def test_tied_readout_is_the_embedding(tied: bool) -> None:
    model = small(tied=tied)
    assert (model.head.weight is model.token.weight) is tied


def test_residual_writers_start_smaller() -> None:
    model = small(width=256, heads=4, depth=8)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            writes = name.endswith(("attn.proj.weight", "mlp.fc2.weight"))
            assert parameter.std().item() == pytest.approx(0.02 / (math.sqrt(16) if writes else 1), rel=0.06), name


def test_images_are_refused() -> None:
    with pytest.raises(ModelError, match=r"gpt-small takes sequences of token numbers, .* not \(3, 8, 8\)"):
        models.build("gpt-small", input_shape=(3, 8, 8), classes=5, seed=0)


def test_it_learns_to_count_in_threes() -> None:
    model = small(length=12, vocabulary=12, width=32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(120):
        sequence = (torch.randint(0, 12, (16, 1), generator=generator) + 3 * torch.arange(13)) % 12
        loss = cross_entropy(model(sequence[:, :-1]).flatten(0, 1), sequence[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.2  # log 12 = 2.48 at the start


def test_it_computes_what_transformers_gpt2_computes() -> None:
    transformers = pytest.importorskip("transformers")
    ours = small(heads=4).eval()
    config = transformers.GPT2Config(
        vocab_size=11, n_positions=16, n_embd=16, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0
    )
    other = transformers.GPT2LMHeadModel(config).eval()
    state = {}
    for key, value in ours.state_dict().items():
        for a, b in {
            "token.": "transformer.wte.", "position.": "transformer.wpe.", "blocks.": "transformer.h.", "norm1": "ln_1",
            "norm2": "ln_2", "attn.qkv": "attn.c_attn", "attn.proj": "attn.c_proj", "mlp.fc1": "mlp.c_fc",
            "mlp.fc2": "mlp.c_proj", "head.": "lm_head.",
        }.items():  # fmt: skip
            key = key.replace(a, b)
        key = f"transformer.ln_f.{key[5:]}" if key.startswith("norm.") else key
        state[key] = value.T if "c_" in key and value.ndim == 2 else value  # GPT-2 stores (in, out)
    other.load_state_dict(state)
    x = torch.randint(0, 11, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(x), other(x).logits, rtol=1e-4, atol=1e-6)
