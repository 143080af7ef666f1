from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from openwork import data
from openwork.core.masks import Masks
from openwork.methods.sparsify import random_pruning as method
from openwork.studies import _common
from openwork.studies.sparsify import random_pruning as study
from openwork.studies.sparsify.random_pruning import STUDY, Config, widening
from openwork.testing.studies import check_study
from openwork.train.evaluate import evaluate
from openwork.train.robustness import fgsm_accuracy
from tests.studies.judging import verdicts

# Small, yet telling on digits: a width where a mask at density .05 trains, and one where it does not.
WIDTHS = Config(epochs=6, batch_size=64, widths=(16, 256), density=(0.05,), probe=360)
RATIOS = Config(epochs=6, batch_size=64, widths=(192, 256), density=(0.05,), probe=360)
POSITIONS = Config(epochs=8, batch_size=64, widths=(32, 128), density=(0.9,), probe=360)

GAP = "The gap to dense shrinks from width 16 to 256 with ERK at density 0.05"
ERK = "ERK is more accurate than uniform at density 0.05 and width 192"
REDRAWN = "Redrawn positions change SNIP's accuracy by less than a point at density 0.9"


def test_conforms(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    check_study(STUDY, tmp_path, seeds=(0,))


def test_the_gap_shrinks_with_width(tmp_path: Path) -> None:
    assert verdicts(STUDY, WIDTHS, ["dense", "erk@0.05"], tmp_path)[GAP] == "holds"


def test_masks_that_starve_wide_layers_lose_the_claim_on_width(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = method.RandomPruning.initial

    def starved(self, params):  # type: ignore[no-untyped-def]
        masks = plain(self, params)
        thin = {name: mask & (torch.arange(mask.shape[0]) < 4)[:, None] for name, mask in masks.items()}
        return Masks({name: thin[name] if mask.shape[0] >= 256 else mask for name, mask in masks.items()})

    monkeypatch.setattr(method.RandomPruning, "initial", starved)
    assert verdicts(STUDY, WIDTHS, ["dense", "erk@0.05"], tmp_path)[GAP] != "holds"


def test_erk_beats_uniform(tmp_path: Path) -> None:
    assert verdicts(STUDY, RATIOS, ["erk@0.05", "uniform@0.05"], tmp_path)[ERK] == "holds"


def test_erk_that_is_uniform_loses_the_claim_on_ratios(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(method, "_ratios", lambda ratios: "uniform")
    assert verdicts(STUDY, RATIOS, ["erk@0.05", "uniform@0.05"], tmp_path)[ERK] != "holds"


def test_redrawn_positions_are_as_good_where_most_weights_stay(tmp_path: Path) -> None:
    assert verdicts(STUDY, POSITIONS, ["snip-mask@0.9", "snip-redrawn@0.9"], tmp_path, seeds=6)[REDRAWN] == "holds"


def test_a_redraw_of_the_wrong_layers_loses_the_claim_on_positions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crowded(masks: Masks, seed: int) -> Masks:
        return Masks({name: mask & (torch.arange(mask.shape[0]) < 3)[:, None] for name, mask in masks.items()})

    monkeypatch.setattr(study, "shuffle_within_layers", crowded)
    assert verdicts(STUDY, POSITIONS, ["snip-mask@0.9", "snip-redrawn@0.9"], tmp_path, seeds=6)[REDRAWN] != "holds"


def test_widening_is_the_gain_along_a_line_over_the_logarithm_of_the_width() -> None:
    assert widening((32, 128, 512), [0.7, 0.9, 0.8]) == pytest.approx(0.1)  # equal ratios: last minus first
    widths, accuracies = (8, 16, 24), [0.5, 0.8, 0.7]
    slope = np.polyfit(np.log(widths), accuracies, 1)[0]
    assert widening(widths, accuracies) == pytest.approx(slope * math.log(3))


def test_snip_mask_and_redraw_have_the_same_layer_counts_at_other_places() -> None:
    cfg = Config(density=(0.1,))
    source = _common.load_source(cfg)
    model = study._model(cfg, source, 32, 0)
    arms = {arm.name: arm for arm in STUDY.arms(cfg)}
    masks = {}
    for name in ("snip-mask@0.1", "snip-redrawn@0.1"):
        made = study._method(cfg, source, model, arms[name], 0)
        assert made is not None
        masks[name] = made.initial(dict(model.named_parameters()))
    one, other = masks.values()
    assert one.nnz() == round(0.1 * one.total())
    assert {k: int(v.sum()) for k, v in one.items()} == {k: int(v.sum()) for k, v in other.items()}
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_an_attack_of_size_nothing_sees_the_plain_accuracy() -> None:
    cfg = Config(probe=360)
    source = study._pixels(_common.load_source(cfg))
    model = study._model(cfg, source, 32, 0)
    wrapped = study._OnPixels(model, source.mean, source.std)
    images = [(x * source.std + source.mean, y) for x, y in source.batches("test")]
    assert min(float(x.min()) for x, _ in images) > -1e-6
    assert max(float(x.max()) for x, _ in images) < 1 + 1e-6
    assert fgsm_accuracy(wrapped, images, 0.0, clamp=None) == evaluate(model, source.batches("test")).accuracy


def test_shuffled_strangers_keep_each_images_pixels() -> None:
    cfg = Config(probe=360)
    source = study._pixels(data.load("digits"))
    plain = torch.cat([x for x, _ in source.batches("test")])
    strange = torch.cat([x for x, _ in study._strangers(cfg, source)])
    assert not torch.equal(plain, strange)
    assert torch.equal(plain.flatten(1).sort(1).values, strange.flatten(1).sort(1).values)
