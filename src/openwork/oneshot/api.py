"""The two ways in: `sparsify` a model in memory, or `stream` a transformers folder through memory one block at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from openwork.core.patterns import Pattern
from openwork.oneshot.report import LayerReport, Result, Streamed
from openwork.oneshot.settings import settle

Calibration = Iterable[Any] | Callable[[nn.Module], object] | None
Select = str | Iterable[str] | Callable[[str, nn.Module], bool] | None
Progress = Callable[[int, int, str], object] | None

__all__ = ["Calibration", "LayerReport", "Progress", "Result", "Select", "Streamed", "sparsify", "stream"]


def sparsify(
    model: nn.Module,
    calibration: Calibration = None,
    *,
    method: str = "wanda",
    density: float | None = None,
    pattern: Pattern | str | None = None,
    allocation: str | Mapping[str, float] = "uniform",
    select: Select = None,
    exclude: str | Iterable[str] = (),
    damping: float = 0.01,
    block_size: int = 128,
    outliers: float = 5.0,
    spread: float = 0.08,
    errors: bool = True,
    gram_dtype: torch.dtype = torch.float64,
    progress: Progress = None,
) -> Result:
    """Prune `model` in place, in one shot.

    A model with a list of blocks (`model.layers`, `encoder.layer`, `transformer.h`, ...) goes block by block: a block's
    statistics come from inputs that the pruned blocks before it made. A model without one, or whose blocks are not a
    chain or share weights, gets its statistics in one dense pass. All is checked before a weight changes, and if
    something fails on the way the weights are put back. Mode, hooks, gradients' switches and random state are left as
    they were found.

    Args:
        model: any module. Linear layers, transformers' Conv1D, Conv1d and Conv2d are pruned; embeddings and the head
            are left out unless `select` names them.
        calibration: batches: a tensor, a tuple (positional arguments of forward; those beyond what forward takes, labels
            say, are left out), or a mapping (keyword arguments; positions where `attention_mask` is 0 do not count).
            Or a function that is given the model and runs it. "magnitude" needs none.
        method: "magnitude", "wanda" (Sun et al. 2023) or "sparsegpt" (Frantar & Alistarh 2023).
        density: kept share of the pruned weights; None is n/m for an N:M pattern, what the densities of an explicit
            allocation come to, and 0.5 otherwise.
        pattern: a pattern or its name ("2:4", "block4x1"); None is unstructured.
        allocation: "uniform", "owl" (Yin et al. 2023), "global" (a global magnitude ranking decides how much each layer
            keeps) or a density for each layer by name or glob.
        select: names or globs of layers or parameters, or a function (name, module) -> bool; None is as said above.
        exclude: names or globs to leave dense.
        damping: SparseGPT: added to the diagonal of H, as a share of its mean.
        block_size: SparseGPT: columns whose mask is chosen together.
        outliers: OWL: how many times the mean score makes an outlier (M).
        spread: OWL: the most by which a layer's density departs from `density` (lambda).
        errors: whether to report relative output errors, which costs a Gram matrix a layer.
        gram_dtype: dtype of Gram matrices and of SparseGPT's arithmetic.
        progress: called as progress(done, total, name) after each block.

    Returns:
        masks, a report a layer, and what stayed dense.

    Raises:
        PatternError: if the pattern does not divide a layer, or the density is not the pattern's.
        AllocationError: if no layer densities fit.
        ModelError: for non-finite weights, nothing to prune, or names that match nothing.
        DataError: if calibration is empty, refused by the model, makes non-finite activations or misses a layer.
        RecipeError: for any other setting out of range.
    """
    from openwork.oneshot.walk import prune_model

    settings = settle(
        method=method, density=density, pattern=pattern, allocation=allocation, damping=damping, block_size=block_size,
        outliers=outliers, spread=spread, errors=errors, gram_dtype=gram_dtype,
    )  # fmt: skip
    return prune_model(model, calibration, settings, select=select, exclude=exclude, progress=progress)


def stream(
    folder: str | Path,
    out: str | Path,
    calibration: Calibration = None,
    *,
    method: str = "wanda",
    density: float | None = None,
    pattern: Pattern | str | None = None,
    allocation: str | Mapping[str, float] = "uniform",
    select: Select = None,
    exclude: str | Iterable[str] = (),
    damping: float = 0.01,
    block_size: int = 128,
    outliers: float = 5.0,
    spread: float = 0.08,
    errors: bool = True,
    gram_dtype: torch.dtype = torch.float64,
    hidden: Literal["memory", "disk"] = "memory",
    architecture: str | None = None,
    progress: Progress = None,
) -> Streamed:
    """Prune a transformers folder into a new one, holding one block's weights in memory at a time.

    The result is that of `sparsify` on the loaded model. Work goes into a hidden folder beside `out` and is renamed
    once at the end. A run that was stopped goes on at the block where it stopped when it is started again with the same
    arguments. The source is only read.

    Args:
        folder: a folder with config.json and model.safetensors, or shards with an index.
        out: the new folder; must not exist, or be empty.
        calibration: as for `sparsify`; batches must be the same when a run is resumed.
        hidden: where hidden states between blocks are kept. On "disk" a resumed run reads them; in "memory" it makes them
            again with the blocks that are done.
        architecture: a class of transformers to build; None is the first of the config's `architectures`.
        method, density, pattern, allocation, select, exclude, damping, block_size, outliers, spread, errors, gram_dtype,
        progress: as for `sparsify`; `select` names or a function of (name, module on the meta device).

    Returns:
        the folder, a report a layer, and what stayed dense.

    Raises:
        StoreError: if the folder or out cannot be used, or unfinished work of other settings lies beside out.
        FormatError: for a damaged file, tensors missing or left over, or shapes that differ from the config's.
        ModelError: if the model is no chain of blocks, or as for `sparsify`.
        MissingExtra: if transformers is not installed.
        PatternError, AllocationError, DataError, RecipeError: as for `sparsify`.
    """
    from openwork.oneshot.stream import stream_folder

    settings = settle(
        method=method, density=density, pattern=pattern, allocation=allocation, damping=damping, block_size=block_size,
        outliers=outliers, spread=spread, errors=errors, gram_dtype=gram_dtype,
    )  # fmt: skip
    return stream_folder(
        Path(folder), Path(out), calibration, settings,
        select=select, exclude=exclude, hidden=hidden, architecture=architecture, progress=progress,
    )  # fmt: skip
