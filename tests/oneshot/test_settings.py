from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from openwork.core.patterns import NM, Unstructured
from openwork.errors import PatternError, RecipeError
from openwork.oneshot.api import sparsify
from openwork.oneshot.settings import settle

PLAIN = {
    "method": "wanda", "density": None, "pattern": None, "allocation": "uniform", "damping": 0.01, "block_size": 128,
    "outliers": 5.0, "spread": 0.08, "errors": True, "gram_dtype": torch.float64,
}  # fmt: skip


def test_defaults():
    assert settle(**PLAIN).density == 0.5
    assert settle(**PLAIN).pattern == Unstructured()
    assert settle(**{**PLAIN, "pattern": "1:4"}).density == 0.25
    assert settle(**{**PLAIN, "pattern": NM(4, 8), "density": 0.5}).pattern == NM(4, 8)
    assert settle(**{**PLAIN, "allocation": {"*": 0.3}}).density is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("method", "obs"), ("density", 1.5), ("density", math.nan), ("density", "half"), ("density", True),
        ("allocation", "owls"), ("allocation", 3), ("damping", -1), ("damping", math.inf), ("block_size", 0),
        ("block_size", 2.0), ("block_size", True), ("outliers", 0), ("spread", -0.1), ("spread", 2),
        ("gram_dtype", torch.int8),
    ],
)  # fmt: skip
def test_a_setting_that_makes_no_sense_is_named_before_anything_runs(name, value):
    with pytest.raises(RecipeError, match=f"^{name}="):
        sparsify(nn.Linear(4, 4), [None], **{name: value})


@pytest.mark.parametrize(("pattern", "density"), [("2:4", 0.4), ("5:4", None), ("plaid", None), (3, None)])
def test_a_pattern_that_makes_no_sense_is_refused(pattern, density):
    with pytest.raises(PatternError):
        sparsify(nn.Linear(4, 4), [None], pattern=pattern, density=density)
