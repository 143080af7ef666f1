"""Names and numbers as a reader sees them: control characters made visible, percentages, points and ratios."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping

_ANSI = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-Z\\^_])")
_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})  # controls, marks without a width, lone surrogates, separators
NOTHING = "–"
MINUS = "−"


def visible(value: object, limit: int = 80) -> str:
    """Return `value` as one line of at most `limit` characters that no terminal, browser or spreadsheet acts upon.

    Terminal sequences are removed; control characters, direction marks, zero-width characters and lone surrogates
    are written as escapes such as `\\x00`; what is too long loses its middle.
    """
    text = _ANSI.sub("", str(value))
    if len(text) > 4 * limit:  # escape no more than can be shown
        text = text[: 2 * limit] + "…" + text[-limit:]
    text = "".join(_escape(char) if unicodedata.category(char) in _HIDDEN else char for char in text)
    if len(text) <= limit:
        return text
    tail = limit // 4
    return text[: limit - tail - 1] + "…" + text[len(text) - tail :]


def lines(value: object, limit: int = 4000) -> str:
    """Return `value` like `visible`, with its line breaks kept: for error messages."""
    return "\n".join(visible(line, 400) for line in str(value)[:limit].replace("\r\n", "\n").split("\n"))


def finite(value: object) -> float | None:
    """Return `value` as a float, or None where it is no finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    if isinstance(value, int) and abs(value) >= 2**1000:  # too large for a float, as JSON may hold it
        return None
    return float(value) if math.isfinite(value) else None


def percent(value: object) -> str:
    """Return a fraction as a percentage with up to three significant digits: 0.025 is "2.5 %"."""
    number = finite(value)
    return NOTHING if number is None else f"{_short(100.0 * number)}\N{NO-BREAK SPACE}%"


def scaled(value: object, digits: int = 1) -> str:
    """Return a fraction as a percentage without its sign: 0.9123 is "91.2"."""
    number = finite(value)
    return NOTHING if number is None else f"{100.0 * number:.{digits}f}".replace("-", MINUS)


def points(value: object, digits: int = 1) -> str:
    """Return a difference of fractions in percentage points with its sign: -0.008 is "−0.8"."""
    number = finite(value)
    if number is None:
        return NOTHING
    text = f"{100.0 * number:+.{digits}f}"
    return text[1:] if float(text) == 0.0 else text.replace("-", MINUS)


def ratio(value: object) -> str:
    """Return a ratio against dense with two significant digits, or two decimals from 0.1 on: 0.048, 0.20, 1.80."""
    number = finite(value)
    if number is None:
        return NOTHING
    return f"{number:.2f}" if abs(number) >= 0.1 or number == 0.0 else f"{number:.2g}"


def significant(value: object, digits: int = 1) -> str:
    """Return a number of unknown unit with three significant digits."""
    number = finite(value)
    return NOTHING if number is None else _short(number).replace("-", MINUS)


def probability(value: object) -> str:
    """Return a p value: "0.031", or "< 0.001"."""
    number = finite(value)
    if number is None:
        return NOTHING
    return "<\N{NO-BREAK SPACE}0.001" if number < 0.001 else f"{number:.3f}"


def spread(interval: object) -> float | None:
    """Return half the width of an interval {"mean", "low", "high"}, or None where it has none."""
    if not isinstance(interval, Mapping):
        return None
    low, high = finite(interval.get("low")), finite(interval.get("high"))
    return None if low is None or high is None else (high - low) / 2.0


def listing(words: list[str]) -> str:
    """Return "a", "a and b", "a, b and c"."""
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


def count(number: int, noun: str) -> str:
    """Return "1 seed", "3 seeds"."""
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _short(number: float) -> str:
    text = f"{number:.3g}"
    return f"{number:.0f}" if "e+" in text and abs(number) < 1e15 else text


def _escape(char: str) -> str:
    code = ord(char)
    return {"\n": "\\n", "\t": "\\t", "\r": "\\r"}.get(char) or (
        f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
    )
