"""Hypothesis strategies: sizes, densities and seeds are drawn; tensors are built from the seeds, so all of it shrinks."""

from __future__ import annotations

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from openwork.core.rng import generator

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

quick = settings(max_examples=40, deadline=None, derandomize=True)
thorough = settings(max_examples=120, deadline=None, derandomize=True)

seeds = st.integers(0, 2**32 - 1)
densities = st.one_of(st.sampled_from([0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0]), st.floats(0.0, 1.0))
shapes = st.lists(st.integers(1, 6), min_size=1, max_size=4).map(torch.Size)
weights = st.lists(st.integers(1, 6), min_size=2, max_size=4).map(torch.Size)
dtypes = st.sampled_from(DTYPES)


def tensor(shape: torch.Size, seed: int, dtype: torch.dtype = torch.float64, levels: int | None = None) -> Tensor:
    """Return normal numbers, or with `levels` one of so many integers each, so that ties abound."""
    source = generator(seed, "strategy", *shape)
    if levels is None:
        return torch.randn(shape, generator=source, dtype=torch.float64).to(dtype)
    return (torch.randint(levels, shape, generator=source) - levels // 2).to(dtype)


@st.composite
def scores(draw: st.DrawFn, shape: st.SearchStrategy[torch.Size] = shapes) -> Tensor:
    """Scores of any shape and dtype; half of them with many ties."""
    levels = draw(st.sampled_from([None, 1, 2, 5]))
    return tensor(draw(shape), draw(seeds), draw(dtypes), levels)


@st.composite
def bools(draw: st.DrawFn, shape: torch.Size) -> Tensor:
    """A bool tensor of a given shape, of any density."""
    source = generator(draw(seeds), "strategy", "bools")
    return torch.rand(shape, generator=source) < draw(densities)


@st.composite
def layers(draw: st.DrawFn, smallest: int = 1) -> dict[str, torch.Size]:
    """Names and weight shapes of one to five layers."""
    found = draw(st.lists(weights, min_size=smallest, max_size=5))
    return {f"layer{k}": shape for k, shape in enumerate(found)}


def best(score: Tensor, count: int, among: Tensor | None = None) -> Tensor:
    """Return the mask of the `count` best by (-score, index), by a sort of Python numbers: the reference for `top`."""
    flat = score.reshape(-1).tolist()
    places = range(len(flat)) if among is None else among.reshape(-1).nonzero().squeeze(1).tolist()
    order = sorted(places, key=lambda i: (-flat[i], i))[:count]
    mask = torch.zeros(len(flat), dtype=torch.bool)
    mask[order] = True
    return mask.reshape(score.shape)
