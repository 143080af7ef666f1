"""Colours that can be seen and told apart, and a look of its own for each line."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from openwork.report.style import DARK, INK, LIGHT, PAGE_DARK, PAGE_LIGHT, TEXT_DARK, TEXT_LIGHT, styles

# Machado, Oliveira, Fernandes, "A physiologically-based model for simulation of color vision deficiency", 2009,
# severity 1.0; applied to linear RGB.
VISION = {
    "normal": np.eye(3),
    "protan": np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]),
    "deutan": np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]),
    "tritan": np.array([[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]),
}
TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def linear(colour: str) -> np.ndarray:
    code = np.array([int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)])
    return np.where(code <= 0.04045, code / 12.92, ((code + 0.055) / 1.055) ** 2.4)


def contrast(a: str, b: str) -> float:
    low, high = sorted(float(linear(colour) @ [0.2126, 0.7152, 0.0722]) for colour in (a, b))
    return (high + 0.05) / (low + 0.05)


def lab(rgb: np.ndarray) -> np.ndarray:
    f = np.cbrt(TO_XYZ @ np.clip(rgb, 0, 1) / [0.9505, 1.0, 1.089])
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def test_contrast() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21.0)
    assert min(contrast(colour, PAGE_LIGHT) for colour in LIGHT) >= 3.0
    assert min(contrast(colour, PAGE_DARK) for colour in DARK) >= 3.0
    assert contrast(TEXT_LIGHT, PAGE_LIGHT) >= 7.0
    assert contrast(TEXT_DARK, PAGE_DARK) >= 7.0


@pytest.mark.parametrize("vision", VISION)
@pytest.mark.parametrize("palette", [LIGHT, DARK])
def test_every_pair_can_be_told_apart(vision: str, palette: tuple[str, ...]) -> None:
    seen = [lab(VISION[vision] @ linear(colour)) for colour in palette]
    assert min(float(np.linalg.norm(a - b)) for a, b in combinations(seen, 2)) > 20.0


def test_each_line_has_its_own_look() -> None:
    names = [f"m{at}" for at in range(40)]
    found = styles(["dense", *names])
    assert found["dense"].colour == INK
    assert len({(s.colour, s.marker, s.dash) for s in found.values()}) == 41
    assert len({found[name].colour for name in names[:8]}) == 8
    assert styles(names) == {name: found[name] for name in names}  # dense takes no colour away
    assert found["m0"].line == "-"
    assert found["m9"].line == (0.0, (5.0, 2.0))
