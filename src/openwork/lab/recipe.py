"""The recipe of `openwork compare`: one readable text that says what is done, when and on what; each key is a flag."""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field, field_validator

from openwork import references, registry
from openwork.errors import RecipeError
from openwork.lab.spec import Config

DENSE = "dense"
_ITEM = re.compile(r"[^,(]+(?:\([^()]*(?:\([^()]*\)[^()]*)*\))?")


class Recipe(Config):
    """What `openwork compare` compares, and how."""

    plan: ClassVar[frozenset[str]] = frozenset(
        {"seeds", "methods", "density", "workers", "threads", "timeout", "latency", "iso", "out", "engine", "address"}
    )

    data: str = Field("digits", description="data set by name, FILE.npz, module:function or path/to/file.py:function")
    model: str = Field("cnn", description="model by name, module:function, path/to/file.py:function or hf:CONFIG.json")
    methods: tuple[str, ...] = Field(
        ("dense", "random", "magnitude", "gmp", "rigl", "granet", "soups"),
        description="methods to compare, with options where wanted: dense,rigl,granet(initial=1.0)",
    )
    density: tuple[float, ...] = Field((0.1, 0.05), description="shares of weights to keep, for example 0.1,0.05")
    seeds: int = Field(3, ge=1, le=1000, description="seeds an arm; intervals need at least 3")
    steps: int = Field(400, ge=1, description="optimizer steps of every arm")
    epochs: float | None = Field(None, gt=0, description="training length in epochs, instead of steps")
    batch_size: int = Field(64, ge=1, description="examples a step")
    lr: float = Field(0.1, gt=0, description="base learning rate")
    optimizer: str = Field("sgd", description="any stepping optimizer of torch.optim, lower case: sgd, adamw, ...")
    momentum: float = Field(0.9, ge=0, lt=1, description="momentum, for optimizers that have one")
    weight_decay: float = Field(5e-4, ge=0, description="weight decay")
    schedule: str = Field("cosine", description="learning rate over training: constant, cosine, linear or step")
    warmup: float = Field(0.05, ge=0, lt=1, description="share of training over which the rate first rises")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of the target spread over all classes")
    clip: float | None = Field(None, gt=0, description="largest norm of the gradient")
    augment: str = Field("none", description="training images: none, shift, flip-shift or rotate")
    train: int | None = Field(None, ge=1, description="use only so many training examples")
    pattern: str = Field("unstructured", description="which masks are legal: unstructured, 2:4, block4x1, channel, ...")
    exclude: tuple[str, ...] = Field((), description="parameters to leave dense, names or globs: fc.weight,stem.*")
    options: dict[str, Any] = Field({}, description="options of the model, for example width=8")
    device: str = Field("cpu", description="where to train: cpu, cuda, cuda:0")
    iso: bool = Field(True, description="beside a method that needs more steps, run it within the common budget too")
    latency: bool = Field(True, description="measure every arm's speed against dense at the end")
    workers: int = Field(0, ge=0, description="trials at a time; 0 is one a core")
    threads: int = Field(1, ge=1, description="threads a trial; numbers depend on it in the last digits")
    timeout: float | None = Field(None, gt=0, description="seconds that a trial may take")
    out: str | None = Field(None, description="run folder; runs/compare-DATA-MODEL if not given")
    engine: str = Field("local", description="where trials run: local, or ray for a cluster")
    address: str | None = Field(None, description="the cluster, with --engine ray: auto, HOST:PORT or local")

    @field_validator("methods", "density", "exclude", mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        if isinstance(value, str):
            return tuple(part.strip() for part in _ITEM.findall(value) if part.strip())
        return (value,) if isinstance(value, int | float) else value

    @field_validator("options", mode="before")
    @classmethod
    def _options(cls, value: Any) -> Any:
        return read_options(value) if isinstance(value, str) else value

    @field_validator("density")
    @classmethod
    def _shares(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not value or not all(0.0 < share <= 1.0 for share in value):
            raise ValueError("each density is the share of weights that is kept, above 0 and at most 1")
        return tuple(dict.fromkeys(value))

    @field_validator("methods")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ValueError(f"name at least one method of {DENSE}, {', '.join(registry.names())}")
        for text in value:
            name, _ = read_method(text)
            if name != DENSE:
                registry.card(name)
        return tuple(dict.fromkeys(value))

    def identity(self) -> dict[str, Any]:
        """Return digests of the data and of the user's own code."""
        from openwork import data

        found: dict[str, Any] = {"data": data.digest(self.data)}
        if references.is_reference(self.model) and not self.model.startswith("hf:"):
            found["model"] = references.digest(self.model)
        return found

    def run_folder(self) -> str:
        """Return where the run goes."""
        words = re.sub(r"[^A-Za-z0-9.-]+", "-", f"{os.path.basename(self.data)}-{os.path.basename(self.model)}").strip("-.")
        return self.out or os.path.join("runs", f"compare-{words[:80]}")


def read_method(text: str) -> tuple[str, dict[str, Any]]:
    """Return name and options of `name` or `name(option=value, ...)`; values are Python literals or bare words.

    Raises:
        RecipeError: if the text has another form.
    """
    match = re.fullmatch(r"\s*([A-Za-z0-9_-]+)\s*(?:\((.*)\))?\s*", text, re.DOTALL)
    if not match:
        raise RecipeError(f"{text!r} is no method: write a name, or name(option=value)")
    return match[1].lower(), read_options(match[2] or "")


def read_options(text: str) -> dict[str, Any]:
    """Return the options of `a=1, b=word`.

    Raises:
        RecipeError: if the text has another form.
    """
    try:
        call = ast.parse(f"f({text})", mode="eval").body
        if not isinstance(call, ast.Call) or call.args or any(word.arg is None for word in call.keywords):
            raise SyntaxError
        return {str(word.arg): _value(word.value) for word in call.keywords}
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise RecipeError(f"cannot read options {text!r}: write option=value, separated by commas") from None


def merged(recipe: Mapping[str, Any], flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recipe's values with the flags that were given laid over them."""
    return {**recipe, **{key: value for key, value in flags.items() if value is not None}}


def _value(node: ast.expr) -> Any:
    return node.id if isinstance(node, ast.Name) else ast.literal_eval(node)
