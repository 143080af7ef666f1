"""The work behind `openwork essential`: curves that are kept point by point, and what is written at the end."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from openwork import atomic
from openwork.cli._essential_scores import Ready, prepare
from openwork.core.masks import Masks
from openwork.data import corpus, files
from openwork.errors import FormatError, ModelError, RecipeError, StoreError
from openwork.methods.sparsify import essential_sparsity as method
from openwork.methods.sparsify.essential_sparsity import Curve
from openwork.sparsifier import Fixed
from openwork.train import tuning

__all__ = ["Recipe", "curves", "prepare", "write"]

RESULT = "essential.json"
FORMAT = 1
QUALITIES = ("accuracy", "likelihood", "retrieval")


@dataclass(frozen=True)
class Recipe:
    """What was asked for.

    Attributes:
        model: folder or hub name.
        text: paths of text.
        scopes: how weights are chosen, a curve each.
        grid: sparsities, None for a scope's own.
        quality: "accuracy", "likelihood" or "retrieval"; None is what suits the model.
        finetune: steps after pruning, 0 for none.
        rate: learning rate of fine-tuning.
        blocks: held-out blocks.
        length: tokens a block, None for what the model takes, at most 256.
        weights: globs of parameters, none for the matrices of the blocks.
        kind: causal, masked, encoder or auto.
        batch: blocks at a time.
        draws: bootstrap draws.
        seed: of random masks, blocks, fine-tuning and draws.
    """

    model: str
    text: tuple[str, ...]
    scopes: tuple[str, ...]
    grid: tuple[float, ...] | None
    quality: str | None
    finetune: int
    rate: float
    blocks: int
    length: int | None
    weights: tuple[str, ...]
    kind: str
    batch: int
    draws: int
    seed: int

    def check(self) -> None:
        """Refuse what makes no sense before anything is loaded.

        Raises:
            RecipeError: naming the flag, its value and what is allowed.
            MethodError: for a scope or grid that does not exist.
        """
        if self.quality is not None and self.quality not in QUALITIES:
            raise RecipeError(f"--quality {self.quality!r}: use one of {', '.join(QUALITIES)}")
        for name, least in (("finetune", 0), ("blocks", 2), ("batch", 1), ("draws", 20)):
            value = getattr(self, name)
            if value < least:
                raise RecipeError(f"--{name} {value}: give at least {least}")
        if not 0.0 < self.rate < float("inf"):
            raise RecipeError(f"--rate {self.rate}: give a learning rate above 0")
        if self.length is not None and self.length < 4:
            raise RecipeError(f"--length {self.length}: give at least 4 tokens")
        if len(set(map(method.str_scope, self.scopes))) < len(self.scopes):
            raise RecipeError(f"--scope {','.join(self.scopes)}: name every scope once")
        for scope in self.scopes:
            method.points_of(self.grid, scope)


def curves(recipe: Recipe, ready: Ready, out: Path, tell: Callable[[int, int, str], object]) -> list[Curve]:
    """Return a curve a scope; every point is written into `out` as soon as it is measured, and found again there.

    Raises:
        StoreError: if `out` holds something else, or measurements of other settings.
    """
    select, finetune = _select(recipe.weights), _finetune(recipe, ready) if recipe.finetune else None
    identity = _identity(recipe, ready, select)
    kept = _open(out, recipe, identity)
    wanted = {scope: method.points_of(recipe.grid, scope) for scope in recipe.scopes}
    total, found = sum(map(len, wanted.values())), []

    def moved(words: str) -> None:
        names = {method.str_scope(scope): set(map(repr, grid)) for scope, grid in wanted.items()}
        tell(sum(len(names[scope] & set(kept["points"].get(scope, {}))) for scope in names), total, words)

    for scope, grid in wanted.items():
        points: dict[str, list[float]] = kept["points"].setdefault(method.str_scope(scope), {})

        def done(s: float, values: Any, points: dict[str, list[float]] = points, scope: str = scope) -> None:
            points[repr(s)] = [float(v) for v in np.asarray(values)]
            atomic.write_json(out / RESULT, kept)
            moved(f"{scope} {s:.3g}")

        moved(scope)
        known = {float(s): values for s, values in points.items()}
        curve = method.essential_sparsity(
            lambda: deepcopy(ready.found.model), ready.score, grid, scope, finetune=finetune, floor=ready.floor,
            select=select, seed=recipe.seed, known=known, done=done,
        )  # fmt: skip
        found.append(curve)
    return found


def write(recipe: Recipe, ready: Ready, found: list[Curve], out: Path) -> list[dict[str, Any]]:
    """Write curves.json, curves.svg and report.html; return the curves' numbers."""
    from openwork.report import curves as drawn
    from openwork.report.svg import standalone

    summaries = [{**curve.summary(draws=recipe.draws, seed=recipe.seed), "quality_is": ready.quality} for curve in found]
    facts = _facts(recipe, ready)
    title = f"{Path(recipe.model).name or recipe.model}: {found[0].protocol}"
    page = drawn.page(summaries, title=title, quality=ready.quality, facts=facts, command=_command(recipe, out))
    plain = {"format": FORMAT, "model": recipe.model, "facts": dict(facts), "curves": summaries}
    picture = standalone(drawn.figure(summaries, ready.quality))
    atomic.write_json(out / "curves.json", plain)
    atomic.write_bytes(out / "curves.svg", picture.encode("utf-8", "backslashreplace"))
    atomic.write_bytes(out / "report.html", page.encode("utf-8", "backslashreplace"))
    return summaries


def _finetune(recipe: Recipe, ready: Ready) -> Callable[[nn.Module, Masks], nn.Module]:
    def train(model: nn.Module, masks: Masks) -> nn.Module:
        tuning.tune(model, ready.calibration, ready.loss, steps=recipe.finetune, sparsifier=Fixed(masks), rate=recipe.rate,
                    batch=recipe.batch, seed=recipe.seed)  # fmt: skip
        return model.eval()

    return train


def _select(globs: tuple[str, ...]) -> method.Select:
    if not globs:
        return method.transformer_linears

    def chosen(model: nn.Module) -> dict[str, nn.Parameter]:
        every = {name: param for name, param in model.named_parameters() if param.dim() >= 2 and param.is_floating_point()}
        for glob in globs:
            if not any(fnmatchcase(name, glob) for name in every):
                raise ModelError(f"--weights {glob!r} matches none of {', '.join(list(every)[:10])}, ...")
        return {name: param for name, param in every.items() if any(fnmatchcase(name, glob) for glob in globs)}

    return chosen


def _identity(recipe: Recipe, ready: Ready, select: method.Select) -> dict[str, Any]:
    """Return what a point depends on: settings, weights and text. Scopes, grid and draws may change between two calls."""
    weights = hashlib.sha256()
    for name, param in ready.found.model.named_parameters():
        weights.update(name.encode() + param.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    plain = {k: v for k, v in asdict(recipe).items() if k not in ("model", "text", "scopes", "grid", "draws")}
    text = [files.sha256(path) for path in corpus.find(list(recipe.text))[0]]
    return json.loads(json.dumps({  # type: ignore[no-any-return]
        **plain, "quality": ready.quality, "weights_sha256": weights.hexdigest(), "text_sha256": text,
        "masked": list(select(ready.found.model)),
    }))  # fmt: skip


def _open(out: Path, recipe: Recipe, identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return the points kept in `out`; an empty record for a new folder."""
    place = out / RESULT
    if not place.exists():
        other = sorted(path.name for path in out.iterdir() if not path.name.startswith("."))
        if other:
            name = corpus.shown(out)
            raise StoreError(f"{name} holds {other[0]!r} and no {RESULT}: choose an empty or a new folder with -o")
        return {"format": FORMAT, "model": recipe.model, "identity": dict(identity), "points": {}}
    try:
        found = json.loads(place.read_text(encoding="utf-8"))
        before, points = found["identity"], found["points"]
        good = found["format"] == FORMAT and isinstance(before, dict) and all(
            isinstance(values, list) and values and all(isinstance(v, float | int) for v in values) and float(s) >= 0.0
            for one in points.values() for s, values in one.items()
        )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        text = f"{corpus.shown(place)} is damaged ({error}): remove it, or choose another folder with -o"
        raise FormatError(text) from error
    if not good:
        raise FormatError(f"{corpus.shown(place)} is damaged: remove it, or choose another folder with -o")
    odd = [key for key in identity if before.get(key) != identity[key]]
    if odd:
        raise StoreError(
            f"{corpus.shown(out)} holds measurements of other settings ({', '.join(odd)}): choose another folder with -o"
        )
    return dict(found)


def _facts(recipe: Recipe, ready: Ready) -> list[tuple[str, str]]:
    params = _select(recipe.weights)(ready.found.model)
    count = sum(param.numel() for param in params.values())
    whole = sum(param.numel() for param in ready.found.model.parameters())
    found = [
        ("model", recipe.model), ("class", f"{type(ready.found.model).__name__}, {ready.found.kind}"),
        ("weights that may go", f"{count:,} of {whole:,}, in {len(params)} matrices"),
        ("text", ", ".join(recipe.text)), ("quality", f"{ready.quality}; a guess gives {ready.floor:.4g}"),
        ("protocol", method.PROTOCOLS[bool(recipe.finetune)]), ("seed", str(recipe.seed)),
    ]  # fmt: skip
    if recipe.finetune:
        how = f"{recipe.finetune} steps of {recipe.batch} blocks, AdamW at {recipe.rate:g}, mask held"
        found.append(("fine-tuning", how))
    return found


def _command(recipe: Recipe, out: Path) -> str:
    """Return the command that makes the folder again."""
    usual = {"quality": None, "finetune": 0, "rate": 1e-4, "blocks": 64, "length": None, "kind": "auto", "batch": 8,
             "draws": 1000, "seed": 0}  # fmt: skip
    words = ["openwork", "essential", recipe.model]
    words += [word for path in recipe.text for word in ("--text", path)]
    words += ["--scope", ",".join(recipe.scopes)]
    words += ["--grid", ",".join(f"{s:g}" for s in recipe.grid)] if recipe.grid is not None else []
    words += [word for glob in recipe.weights for word in ("--weights", glob)]
    words += [word for key, value in usual.items() if getattr(recipe, key) != value
              for word in (f"--{key}", str(getattr(recipe, key)))]  # fmt: skip
    return shlex.join([*words, "-o", str(out)])
