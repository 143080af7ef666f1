"""What was asked of `openwork sparsify`, checked before anything is read."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from openwork.errors import RecipeError
from openwork.models.pretrained import loading
from openwork.oneshot.settings import settle


@dataclass(frozen=True)
class Recipe:
    """What was asked for, under the names of the flags."""

    model: str
    method: str = "wanda"
    density: float | None = None
    pattern: str = "unstructured"
    text: tuple[str, ...] = ()
    eval_text: tuple[str, ...] = ()
    samples: int = 128
    length: int | None = None
    eval_samples: int = 64
    allocation: str = "uniform"
    exclude: tuple[str, ...] = ()
    stream: bool = False
    finetune_steps: int = 0
    lora: bool = False
    rate: float | None = None
    batch: int = 8
    onnx: bool = False
    kind: str = "auto"
    dtype: str = "auto"
    ignore: tuple[str, ...] = ()
    seed: int = 0

    def check(self) -> None:
        """Check the words and numbers before anything is read.

        Raises:
            RecipeError, PatternError: naming the flag's value, what was expected and the remedy.
        """
        settings = settle(
            method=self.method, density=self.density, pattern=self.pattern, allocation=self.allocation, damping=0.01,
            block_size=128, outliers=5.0, spread=0.08, errors=True, gram_dtype=torch.float64,
        )  # fmt: skip
        if self.kind not in ("auto", *loading.KINDS):
            raise RecipeError(f"--kind {self.kind!r}: use auto, {', '.join(loading.KINDS)}")
        if self.dtype not in ("auto", *loading.DTYPES):
            raise RecipeError(f"--dtype {self.dtype!r}: use auto, {', '.join(loading.DTYPES)}")
        for flag, value, least in (
            ("--samples", self.samples, 1), ("--eval-samples", self.eval_samples, 0), ("--batch", self.batch, 1),
            ("--finetune-steps", self.finetune_steps, 0), ("--length", 2 if self.length is None else self.length, 2),
        ):  # fmt: skip
            if value < least:
                raise RecipeError(f"{flag} {value}: give a whole number of at least {least}")
        if self.rate is not None and not 0.0 < self.rate < 1e3:
            raise RecipeError(f"--rate {self.rate}: give a learning rate above 0, for example 1e-4")
        if (settings.needs_data or self.finetune_steps) and not self.text:
            what = "--finetune-steps" if self.finetune_steps else f"--method {self.method}"
            raise RecipeError(f"{what} needs text: give --text FILE, or prune by magnitude without fine-tuning")
        if self.lora and not self.finetune_steps:
            raise RecipeError("--lora says how to fine-tune: give --finetune-steps too, for example --finetune-steps 100")
        if self.stream and (self.ignore or self.dtype != "auto"):
            raise RecipeError("--stream keeps every tensor and the files' own dtype: leave out --ignore and --dtype")
        if self.stream and (self.finetune_steps or self.onnx):
            raise RecipeError("--stream holds one block at a time, --finetune-steps and --onnx the whole model: give one")

    @property
    def learning_rate(self) -> float:
        """The rate that was asked for, or the usual one."""
        return self.rate if self.rate is not None else 1e-3 if self.lora else 1e-4

    def prune_options(self) -> dict[str, Any]:
        """Return what `oneshot.sparsify` and `oneshot.stream` are given."""
        return {
            "method": self.method, "density": self.density, "pattern": self.pattern, "allocation": self.allocation,
            "exclude": self.exclude, "gram_dtype": torch.float64 if self.method == "sparsegpt" else torch.float32,
        }  # fmt: skip

    def plain(self) -> dict[str, Any]:
        """Return the recipe as JSON holds it."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
