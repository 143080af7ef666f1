"""Mask pictures hold the mask."""

from __future__ import annotations

import base64
import io
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from PIL import Image

from openwork.report.pictures import LIMIT, first_pictures, mask_picture
from tests.report.conftest import HOSTILE


def pixels(svg: str) -> np.ndarray:
    found = re.search(r"data:image/png;base64,([^\"]+)", svg)
    assert found
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(found[1]))))


def test_a_small_matrix_is_itself() -> None:
    mask = np.random.default_rng(0).random((20, 30)) < 0.3
    svg = mask_picture(mask, name="w", ident="m")
    assert (pixels(svg) == 255 * mask).all()
    root = ET.fromstring(svg)
    assert root.get("viewBox") == "0 0 30 20"
    assert root.get("aria-label", "").startswith("Mask of w: shape 20 x 30, ")


def test_a_large_matrix_is_block_means() -> None:
    mask = np.random.default_rng(1).random((2 * LIMIT, 3 * LIMIT)) < 0.2
    means = mask.reshape(LIMIT, 2, LIMIT, 3).mean(axis=(1, 3))
    assert pixels(mask_picture(mask, name="w", ident="m")) == pytest.approx(255 * means / means.max(), abs=0.5001)


def test_blocks_of_unequal_size_keep_the_share() -> None:
    mask = np.zeros((1000, 7), dtype=bool)
    mask[:500] = True
    found = pixels(mask_picture(mask, name="w", ident="m"))
    assert found.shape == (LIMIT, 7)
    assert (found[: LIMIT // 2] == 255).all()
    assert (found[LIMIT // 2 :] == 0).all()


def test_filters_are_a_sheet() -> None:
    mask = np.zeros((5, 2, 3, 3), dtype=bool)
    mask[0] = True
    mask[4, 0, 1, 1] = True
    found = pixels(mask_picture(mask, name="conv", ident="m"))
    assert found.shape == (7, 11)  # 2 rows of 3 filters, 3 x 3 each, a cell between two
    assert (found[:3, :3] == 255).all()
    assert found[5, 5] == 128  # fifth filter, the middle, one of two channels
    assert found.sum() == 9 * 255 + 128


@pytest.mark.parametrize("shape", [(4,), (1, 1), (3, 4, 5), (2, 3, 1, 1), (70, 1, 2, 2)])
@pytest.mark.parametrize("kept", [True, False])
def test_any_shape(shape: tuple[int, ...], kept: bool) -> None:
    found = pixels(mask_picture(np.full(shape, kept), name="w", ident="m"))
    assert set(np.unique(found)) <= {0, 255}
    assert (found.max() == 255) == kept


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_names(kind: str) -> None:
    svg = mask_picture(np.ones((2, 2), dtype=bool), name=HOSTILE[kind], ident=HOSTILE[kind])
    assert {element.tag.rpartition("}")[2] for element in ET.fromstring(svg).iter()} == {"svg", "mask", "image", "rect"}


def test_the_first_weights_with_rows_and_columns() -> None:
    masks = {
        "bias": np.ones(3, bool),
        "a": np.ones((2, 2), bool),
        "empty": np.ones((0, 2), bool),
        "b": np.ones((2, 3), bool),
    }
    found = first_pictures(masks, "m", most=5)
    assert [name for name, _ in found] == ["a", "b"]
    assert 'id="m-0"' in found[0][1]
    assert len(first_pictures(masks, "m", most=1)) == 1
