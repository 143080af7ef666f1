"""What a one-shot pruning returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from openwork.core.masks import Masks


@dataclass(frozen=True)
class LayerReport:
    """One pruned weight.

    Attributes:
        name: the parameter's name.
        shape: its shape, as the model holds it.
        kept: weights that stayed under the mask.
        size: all weights.
        error: ||WX - W'X||^2 / ||WX||^2 over the calibration inputs that the layer saw; None without calibration or
            with `errors=False`.
        tokens: calibration inputs that the layer saw, padding left out; for a convolution, output positions.
    """

    name: str
    shape: tuple[int, ...]
    kept: int
    size: int
    error: float | None
    tokens: int

    @property
    def density(self) -> float:
        """kept / size."""
        return self.kept / self.size if self.size else 1.0


@dataclass(frozen=True)
class Result:
    """What `sparsify` did.

    Attributes:
        masks: parameter name -> bool mask, True = kept.
        report: one row a pruned weight, in the order of the model.
        walk: "blocks" where each block saw the outputs of the pruned blocks before it, "dense" where all statistics come
            from the dense network, "none" without calibration.
        left: weights of two or more dimensions that stayed dense.
    """

    masks: Masks
    report: tuple[LayerReport, ...]
    walk: str
    left: tuple[str, ...]

    @property
    def density(self) -> float:
        """Kept / all, over the pruned weights."""
        return density_of(self.report)


@dataclass(frozen=True)
class Streamed:
    """What `stream` wrote.

    Attributes:
        folder: the new transformers folder.
        report: one row a pruned weight, in the order of the model.
        left: weights of two or more dimensions that stayed dense.
        resumed: blocks that an earlier, interrupted run had finished.
    """

    folder: Path
    report: tuple[LayerReport, ...]
    left: tuple[str, ...]
    resumed: int

    @property
    def density(self) -> float:
        """Kept / all, over the pruned weights."""
        return density_of(self.report)

    def masks(self) -> Masks:
        """Read the masks, packed one bit a weight in the folder's `masks.safetensors`."""
        state: dict[str, Tensor] = {}
        with safe_open(self.folder / MASKS, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118  (a safetensors handle is no mapping)
                state[key] = file.get_tensor(key).clone()
        return Masks.load(state)


MASKS = "masks.safetensors"


def density_of(report: Sequence[LayerReport]) -> float:
    """Return kept / all over the rows, 1.0 for none."""
    total = sum(row.size for row in report)
    return sum(row.kept for row in report) / total if total else 1.0
