"""Names come out harmless, numbers come out readable."""

from __future__ import annotations

import math
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openwork.report.text import (
    count,
    finite,
    lines,
    listing,
    percent,
    points,
    probability,
    ratio,
    scaled,
    significant,
    spread,
    visible,
)
from tests.report.conftest import HOSTILE

NBSP = "\N{NO-BREAK SPACE}"


@given(st.text() | st.text(alphabet=st.characters(categories=["Cc", "Cf", "Cs", "Zl", "Zp"])), st.integers(8, 200))
def test_visible_is_one_short_line_of_printable_characters(text: str, limit: int) -> None:
    shown = visible(text, limit)
    assert len(shown) <= limit
    assert not {unicodedata.category(char) for char in shown} & {"Cc", "Cf", "Cs", "Zl", "Zp"}
    shown.encode()


@given(st.text(alphabet=st.characters(categories=["L", "N", "P", "S"]), max_size=80))
def test_visible_leaves_ordinary_text_alone(text: str) -> None:
    assert visible(text) == text


def test_visible_by_hand() -> None:
    assert visible(HOSTILE["ansi"]) == "red"
    assert visible("a\x00b") == "a\\x00b"
    assert visible("abc\u202ed") == "abc\\u202ed"
    assert visible("one\ntwo\t") == "one\\ntwo\\t"
    assert visible("\U000e0001x") == "\\U000e0001x"
    assert visible("abcdefghijkl", 8) == "abcde…kl"
    assert visible(7) == "7"
    assert lines("a\r\nb\x1b[2Jc\x00") == "a\nbc\\x00"


@pytest.mark.parametrize(
    ("show", "value", "text"),
    [
        (percent, 0.025, f"2.5{NBSP}%"),
        (percent, 0.001, f"0.1{NBSP}%"),
        (percent, 1.0, f"100{NBSP}%"),
        (percent, 12.5, f"1250{NBSP}%"),
        (percent, None, "–"),
        (percent, math.nan, "–"),
        (scaled, 0.91234, "91.2"),
        (points, -0.008, "−0.8"),
        (points, 0.012, "+1.2"),
        (points, 0.0, "0.0"),
        (points, -0.0001, "0.0"),
        (ratio, 0.048, "0.048"),
        (ratio, 0.2, "0.20"),
        (ratio, 1.8, "1.80"),
        (ratio, 0.0, "0.00"),
        (ratio, "x", "–"),
        (significant, -0.012345, "−0.0123"),
        (significant, 123456.0, "123456"),
        (significant, True, "–"),
        (probability, 0.0312, "0.031"),
        (probability, 0.0, f"<{NBSP}0.001"),
        (probability, None, "–"),
    ],
)
def test_numbers(show: object, value: object, text: str) -> None:
    assert show(value) == text  # type: ignore[operator]


def test_small_helpers() -> None:
    assert finite(3) == 3.0
    assert finite(math.inf) is None
    assert finite("3") is None
    assert spread({"mean": 1.0, "low": 0.5, "high": 1.5}) == 0.5
    assert spread({"mean": 1.0, "low": None, "high": None}) is None
    assert spread(None) is None
    assert [listing(list("abc"[:n])) for n in (1, 2, 3)] == ["a", "a and b", "a, b and c"]
    assert (count(1, "seed"), count(0, "seed")) == ("1 seed", "0 seeds")
