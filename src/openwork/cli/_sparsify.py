"""The stages of `openwork sparsify`: text, scores before, pruning, fine-tuning, scores after, the new folder.

Each stage leaves a file in a hidden folder beside the new one, so that a run that was stopped goes on after the last
stage that it finished (pruning from files and fine-tuning: from the last block and checkpoint). The new folder appears
at the end, in one step.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from rich.console import Console
from torch import Tensor

from openwork import atomic
from openwork.cli import _sparsify_scores as scores
from openwork.cli import _sparsify_work
from openwork.cli._sparsify_bars import Bars
from openwork.cli._sparsify_recipe import Recipe
from openwork.core.masks import Masks
from openwork.errors import StoreError
from openwork.models.pretrained import checks, llama2c, loading, writing
from openwork.models.pretrained import folder as folders
from openwork.models.pretrained.loading import Pretrained
from openwork.models.pretrained.pooling import Pooling
from openwork.oneshot import api
from openwork.runtime import files

REPORT = "report.json"
PAGE = "report.html"
SMALL_LIMIT = 2**28
"""Bytes of weights up to which a streamed model gets openwork's small file too, which is made in memory."""


def run(recipe: Recipe, out: Path, *, resume: bool, console: Console, quiet: bool) -> dict[str, Any]:
    """Run all stages that are not finished and return the report; see the command's help.

    Raises:
        OpenworkError: of the kind that fits, in one sentence.
    """
    recipe.check()
    if resume and (found := _sparsify_work.finished(out, recipe)) is not None:
        return found
    target = writing.check_target(out)
    work = _sparsify_work.place(target)
    _sparsify_work.check(work, recipe, out, resume)
    started = time.monotonic()
    bars = Bars(console, quiet)
    with bars.status("reading the model ..."):
        source = folders.locate(recipe.model)
        pretrained = None if recipe.stream else _loaded(recipe, source)
        if recipe.stream and not llama2c.is_checkpoint(source):
            checks.check_files(source)
    with bars.status("reading the text ..."):
        text = scores.read(recipe, source, pretrained)
    if text is not None:
        console.print(text.sentence(), highlight=False, markup=False)
    with _sparsify_work.holding(work, recipe, _sparsify_work.fingerprint(source, text)):
        report = _stages(recipe, target, work, source, pretrained, text, bars, started)
    shutil.rmtree(work, ignore_errors=True)
    return report


def _stages(
    recipe: Recipe, target: Path, work: Path, source: Path, pretrained: Pretrained | None, text: scores.Text | None,
    bars: Bars, started: float,
) -> dict[str, Any]:  # fmt: skip
    report: dict[str, Any] = {"kind": "sparsify", "recipe": recipe.plain()}
    if pretrained is None:
        return _streamed(recipe, target, work, source, text, bars, report, started)
    judge = scores.Judge(pretrained, text, recipe, work, bars)
    before = _kept(work / "before.json", lambda: judge.measure("before"))
    masks, layers = _pruned(recipe, work, pretrained, text, bars)
    report |= {"layers": layers, "density": masks.density(), "before": before}
    report["pruned"] = _kept(work / "pruned.json", lambda: judge.measure("pruned")) if recipe.finetune_steps else None
    if recipe.finetune_steps and text is not None:
        report["finetuned"] = _tuned(recipe, work, pretrained, masks, judge, text, bars)
    report["after"] = _kept(work / "after.json", lambda: judge.measure("after"))
    report |= _about(pretrained, text)
    with atomic.replacing_folder(target) as folder:
        with bars.status("writing ..."):
            written = writing.fill(folder, pretrained, masks, metadata={"sparsify": recipe.plain()})
        report["bytes"] = {"source": _weights(source), "dense": written.dense_bytes, "small": written.small_bytes}
        if recipe.onnx:
            with bars.status("exporting to ONNX ..."):
                report["onnx"] = _onnx(pretrained, folder, text)
            report["bytes"]["onnx"] = report["onnx"]["bytes"]
        _close(folder, report, started)
    return report


def _streamed(
    recipe: Recipe, target: Path, work: Path, source: Path, text: scores.Text | None, bars: Bars, report: dict[str, Any],
    started: float,
) -> dict[str, Any]:  # fmt: skip
    """Prune from file to file; the whole model is loaded only to be evaluated on held-out text that was asked for."""
    origin = source
    if llama2c.is_checkpoint(source):
        source = work / "source"
        if not (source / folders.CONFIG).is_file():
            with atomic.replacing_folder(source) as made:
                llama2c.convert(origin, made)
    evaluated = text is not None and recipe.eval_text and len(text.held_out) > 0

    def measured(name: str, place: Path) -> Any:
        if not evaluated:
            return None
        return scores.Judge(_loaded(recipe, place), text, recipe, work, bars).measure(name)

    config = loading.read_config(source)
    named = loading.class_of(source, config, recipe.kind)
    before = _kept(work / "before.json", lambda: measured("before", source))
    with bars.counting("pruning") as advance:
        done = api.stream(
            source, work / "streamed", _batches(recipe, text), architecture=named, progress=advance,
            **recipe.prune_options(),
        )  # fmt: skip
    masks = done.masks()
    after = _kept(work / "after.json", lambda: measured("after", done.folder))
    report |= {"layers": _rows(done.report), "density": masks.density(), "before": before, "pruned": None, "after": after}
    report["model"] = {"class": named, "kind": loading.kind_of(source, config, recipe.kind)}
    report["text"] = None if text is None else text.about()
    with atomic.replacing_folder(target) as folder:
        for path in sorted(done.folder.iterdir()):
            (shutil.copytree if path.is_dir() else shutil.copyfile)(path, folder / path.name)
        dense = _weights(folder)
        report["bytes"] = {"source": _weights(origin), "dense": dense}
        stub = Pretrained(torch.nn.Identity(), None, "encoder", source, recipe.model, Pooling(), None)
        writing.copy_beside(stub, folder)
        if dense <= SMALL_LIMIT:
            state: dict[str, Tensor] = {}
            for name in folders.weight_files(folder):
                state |= safetensors.torch.load_file(folder / name)
            report["bytes"]["small"] = files.write_state(folder / folders.SMALL, state, {"sparsify": recipe.plain()})
        _close(folder, report, started)
    return report


def _loaded(recipe: Recipe, folder: Path) -> Pretrained:
    return loading.load(folder, kind=recipe.kind, dtype=recipe.dtype, ignore=recipe.ignore)


def _batches(recipe: Recipe, text: scores.Text | None) -> list[Tensor] | None:
    """Return the blocks to calibrate on, None without any."""
    return None if text is None or not len(text.calibration) else text.batches(recipe.batch)


def _pruned(
    recipe: Recipe, work: Path, pretrained: Pretrained, text: scores.Text | None, bars: Bars
) -> tuple[Masks, list[dict[str, Any]]]:
    """Prune the model in place, or put back what an earlier run pruned."""
    place = work / "pruned.safetensors"
    if place.is_file():
        state, found = files.read_state(place)
        masks = Masks.load({key.removeprefix("mask."): one for key, one in state.items() if key.startswith("mask.")})
        _fill(pretrained, {key.removeprefix("model."): one for key, one in state.items() if key.startswith("model.")})
        return masks, list(found["layers"])
    with bars.counting("pruning") as advance:
        result = api.sparsify(pretrained.model, _batches(recipe, text), progress=advance, **recipe.prune_options())
    layers = _rows(result.report)
    _keep_state(place, pretrained, result.masks, {"layers": layers})
    return result.masks, layers


def _tuned(
    recipe: Recipe, work: Path, pretrained: Pretrained, masks: Masks, judge: scores.Judge, text: scores.Text, bars: Bars
) -> dict[str, Any]:
    """Fine-tune in place with the mask held, or put back what an earlier run tuned."""
    from openwork.sparsifier.sparsifier import Fixed
    from openwork.train.tuning import tune

    place = work / "tuned.safetensors"
    if place.is_file():
        state, found = files.read_state(place)
        _fill(pretrained, {key.removeprefix("model."): one for key, one in state.items() if key.startswith("model.")})
        return dict(found["tuning"])
    loss = judge.loss()
    options: dict[str, Any] = {
        "steps": recipe.finetune_steps, "rate": recipe.learning_rate, "batch": recipe.batch, "seed": recipe.seed,
        "keep": work / "tuning",
    }  # fmt: skip
    summary: dict[str, Any] = {"steps": recipe.finetune_steps, "rate": recipe.learning_rate, "lora": recipe.lora}
    trained: Any = pretrained.model.requires_grad_(True)
    if recipe.lora:
        from openwork.integrations import lora

        trained = lora.adapted(pretrained.model, masks, seed=recipe.seed)
    else:
        options["sparsifier"] = Fixed(masks)
    with bars.counting("fine-tuning") as advance:
        options["progress"] = lambda done, total: advance(done, total, "")
        summary["loss"] = tune(trained, text.calibration, loss, **options)
    if recipe.lora:
        summary["unmerged"] = judge.measure("adapted")
        merged = lora.merged(trained, masks)
        summary |= {"merged": judge.measure("merged"), "cut": merged.most}
    _keep_state(place, pretrained, masks, {"tuning": summary})
    return summary


def _onnx(pretrained: Pretrained, folder: Path, text: scores.Text | None) -> dict[str, Any]:
    from openwork.integrations import onnx

    embedding = pretrained.model.get_input_embeddings()  # type: ignore[operator]
    length = min(64, pretrained.length or 64, 64 if text is None else text.length)
    made = onnx.export(pretrained.model, folder / "model.onnx", vocabulary=embedding.num_embeddings, length=length)
    return {"error": made.error, "same": made.same, "bytes": made.bytes, "checked": [list(one) for one in made.checked]}


def _keep_state(place: Path, pretrained: Pretrained, masks: Masks, metadata: dict[str, Any]) -> None:
    state = {f"model.{name}": tensor.detach() for name, tensor in pretrained.model.state_dict().items()}
    state |= {f"mask.{name}": tensor for name, tensor in masks.state_dict().items()}
    files.write_state(place, state, metadata)


def _fill(pretrained: Pretrained, state: dict[str, Tensor]) -> None:
    try:
        pretrained.model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise StoreError(f"the unfinished run is of another model ({error}): remove it and start anew") from error


def _kept(place: Path, make: Callable[[], Any]) -> Any:
    """Return what a finished stage kept, else make and keep it."""
    if place.is_file():
        return json.loads(place.read_text(encoding="utf-8"))["value"]
    value = make()
    atomic.write_json(place, {"value": value})
    return value


def _close(folder: Path, report: dict[str, Any], started: float) -> None:
    from openwork.cli import _sparsify_page
    from openwork.lab.environment import describe

    report["environment"] = describe(torch.get_num_threads(), 1)
    report["seconds"] = round(time.monotonic() - started, 1)
    atomic.write_json(folder / REPORT, report)
    atomic.write_bytes(folder / PAGE, _sparsify_page.page(report).encode("utf-8", "backslashreplace"))


def _rows(report: Any) -> list[dict[str, Any]]:
    return [
        {
            "name": row.name, "shape": list(row.shape), "kept": row.kept, "size": row.size, "density": row.density,
            "error": row.error,
        }
        for row in report
    ]  # fmt: skip


def _about(pretrained: Pretrained, text: scores.Text | None) -> dict[str, Any]:
    params = sum(param.numel() for param in pretrained.model.parameters())
    zeros = sum(int((param == 0).sum()) for param in pretrained.model.parameters())
    made = {"class": type(pretrained.model).__name__, "kind": pretrained.kind, "parameters": params, "zeros": zeros}
    return {"model": made, "text": None if text is None else text.about()}


def _weights(folder: Path) -> int:
    """Return the bytes of a folder's weights."""
    found = [path for path in folder.glob("*.safetensors") if path.name not in (folders.SMALL, writing.MASKS)]
    found = found or [path for path in folder.glob("*.bin") if path.is_file()] or list(folder.glob(folders.SMALL))
    return sum(path.stat().st_size for path in found)


__all__ = ["Recipe", "run"]
