from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from openwork import Fixed
from openwork.core.masks import Masks
from openwork.errors import MaskError, MissingExtra
from openwork.integrations import trainer as ours
from openwork.methods.sparsify.rigl import RigL
from tests.models.pretrained import tiny

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")


def masked_model() -> tuple[Any, Masks]:
    model = tiny.build("llama")
    masks = Masks({
        name: param.abs() >= param.abs().median() for name, param in model.named_parameters() if name.endswith("proj.weight")
    })  # fmt: skip
    masks.apply(model)
    return model, masks


def train(
    model: Any, sparsifier: Any, out: Path, *, steps: int = 6, resume: Path | None = None, place: Path | None = None
) -> Any:
    ids = torch.randint(4, 30, (16, 10), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "labels": row} for row in ids]
    args = transformers.TrainingArguments(
        output_dir=str(out), max_steps=steps, per_device_train_batch_size=4, learning_rate=1e-2, save_steps=3, report_to=[],
        disable_tqdm=True, use_cpu=True, logging_strategy="no", lr_scheduler_type="constant", seed=1,
        dataloader_pin_memory=False,
    )  # fmt: skip
    run = transformers.Trainer(model, args, train_dataset=data, callbacks=[ours.holding(sparsifier, resume=place)])
    run.train(resume_from_checkpoint=None if resume is None else str(resume))
    return run


def test_masks_are_exact_after_a_real_run_and_the_kept_weights_moved(tmp_path):
    model, masks = masked_model()
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    sparsifier = Fixed(masks)
    train(model, sparsifier, tmp_path)
    masks.check(model)
    assert sparsifier.step == 6
    for name, mask in masks.items():
        moved = model.get_parameter(name).detach()[mask] != before[name][mask]
        assert moved.float().mean() > 0.9
    for param in model.parameters():
        assert not param._post_accumulate_grad_hooks  # nothing is left behind


def test_without_the_callback_the_same_run_fills_the_zeros(tmp_path):
    model, masks = masked_model()
    callback = transformers.TrainerCallback
    original, ours.holding = ours.holding, lambda *_, **__: callback()
    try:
        train(model, None, tmp_path)
    finally:
        ours.holding = original
    with pytest.raises(MaskError, match="not zero"):
        masks.check(model)


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    whole, masks = masked_model()
    train(whole, Fixed(masks), tmp_path / "whole")
    model, _ = masked_model()
    train(model, Fixed(masks), tmp_path / "half", steps=3)
    again, _ = masked_model()
    sparsifier = Fixed(masks)
    train(again, sparsifier, tmp_path / "half", resume=tmp_path / "half" / "checkpoint-3")
    assert sparsifier.step == 6
    masks.check(again)
    for name, param in whole.named_parameters():
        assert torch.equal(param, again.get_parameter(name)), name


def test_masks_that_change_are_found_again_from_any_folder(tmp_path):
    options = {"density": 0.5, "total_steps": 6, "every": 1, "parameters": ["*proj.weight"]}
    model = tiny.build("llama")
    whole = RigL(**options)
    train(model, whole, tmp_path / "whole")
    whole.masks.check(model)
    train(tiny.build("llama"), RigL(**options), tmp_path / "half", steps=3)
    moved = (tmp_path / "half" / "checkpoint-3").rename(tmp_path / "elsewhere")
    again, sparsifier = tiny.build("llama"), RigL(**options)
    train(again, sparsifier, tmp_path / "half", resume=moved, place=moved)
    assert sparsifier.history == whole.history
    assert all(torch.equal(sparsifier.masks[name], mask) for name, mask in whole.masks.items())
    (moved / ours.FILE).unlink()
    with pytest.raises(MaskError, match="name its folder with resume="):
        train(tiny.build("llama"), RigL(**options), tmp_path / "half", resume=moved, place=moved)


def test_without_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtra, match=r"openwork\[transformers\]"):
        ours.holding(Fixed({"a": torch.ones(1, dtype=torch.bool)}))
