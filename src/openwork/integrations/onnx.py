"""A text model as ONNX, checked by onnxruntime against torch. The graph is dense: that runtime does not skip zeros."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from openwork import atomic
from openwork.core.rng import generator
from openwork.errors import MissingExtra, ModelError
from openwork.models.outputs import logits
from openwork.nn.batchnorm import kept_modes

TOLERANCE = 1e-5


@dataclass(frozen=True)
class Exported:
    """An ONNX file and how near it is to torch.

    Attributes:
        path: the file.
        error: the largest difference of an output, divided by the largest absolute output, over all checked inputs.
        same: share of positions whose largest output is the same one, 0 to 1.
        checked: shapes (batch, length) of the inputs.
        bytes: size of the file.
    """

    path: Path
    error: float
    same: float
    checked: tuple[tuple[int, int], ...]
    bytes: int


def export(
    model: nn.Module, path: str | Path, *, vocabulary: int, length: int, seed: int = 0, tolerance: float = TOLERANCE
) -> Exported:
    """Write `model` as ONNX with free batch and length, and check it on random tokens of several shapes.

    The graph takes `input_ids` and `attention_mask` (batch, length) int64 and gives `output`: logits, or the last states of
    an encoder. It is written to `path` only when onnxruntime's outputs are those of torch.

    Args:
        model: a causal, masked or encoder model of transformers, float32, on the CPU.
        path: the .onnx file; replaced atomically.
        vocabulary: token numbers are below this.
        length: most tokens to check with.
        seed: of the random tokens.
        tolerance: largest allowed difference relative to the largest output.

    Raises:
        MissingExtra: if onnx, onnxscript or onnxruntime is not installed.
        ModelError: if the model cannot be exported, or the outputs differ.
        StoreError: if the file cannot be written.
    """
    runtime = _runtime()
    shapes = tuple(dict.fromkeys([(1, min(3, length)), (2, min(8, length)), (3, length)]))
    wrapped = _Plain(model)
    with kept_modes(model):
        model.eval()
        data = _exported(wrapped, _inputs((2, max(2, length // 2)), vocabulary, seed))
        session = runtime.InferenceSession(data, _options(runtime), providers=["CPUExecutionProvider"])
        error, same = 0.0, 1.0
        for shape in shapes:
            one, agreed = _compared(wrapped, session, _inputs(shape, vocabulary, seed))
            error, same = max(error, one), min(same, agreed)
    if not error <= tolerance or same < 1.0:
        raise ModelError(
            f"onnxruntime's outputs differ from torch's by {error:.2g} of the largest (allowed are {tolerance:g}), with "
            f"{100 * same:.2f} % of the choices the same: nothing was written; export in float32, or with another version"
        )
    atomic.write_bytes(path, data)
    return Exported(Path(path), error, same, shapes, len(data))


class _Plain(nn.Module):
    """A model of transformers as tensors in, one tensor out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return logits, or the last states."""
        cache = {"use_cache": False} if getattr(getattr(self.model, "config", None), "use_cache", False) else {}
        output = self.model(input_ids=input_ids, attention_mask=attention_mask, return_dict=True, **cache)
        return output["last_hidden_state"] if "last_hidden_state" in output else logits(output)


def _inputs(shape: tuple[int, int], vocabulary: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return random tokens; where there are several rows, the last one is padded on its right."""
    ids = torch.randint(vocabulary, shape, generator=generator(seed, "onnx", *shape))
    mask = torch.ones_like(ids)
    if shape[0] > 1 and shape[1] > 2:
        mask[-1, -(shape[1] // 3) :] = 0
    return ids, mask


def _exported(wrapped: nn.Module, inputs: tuple[Tensor, Tensor]) -> bytes:
    axes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    try:
        with _hushed(), torch.inference_mode():
            program = torch.onnx.export(
                wrapped, inputs, dynamo=True, dynamic_shapes=(axes, axes), input_names=["input_ids", "attention_mask"],
                output_names=["output"], verbose=False,
            )  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder) / "model.onnx"
            program.save(place)  # type: ignore[union-attr]
            return place.read_bytes()
    except Exception as error:  # the exporter raises many kinds
        text = " ".join(str(error).split()) or "no message"
        raise ModelError(f"the model cannot be exported to ONNX: {type(error).__name__}: {text[:300]}") from error


@torch.inference_mode()
def _compared(wrapped: nn.Module, session: Any, inputs: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Return the largest relative difference and the share of equal choices at positions that count."""
    ids, mask = inputs
    ours = wrapped(ids, mask).float()
    theirs = torch.from_numpy(session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})[0]).float()
    if ours.shape != theirs.shape:
        raise ModelError(f"onnxruntime gives shape {tuple(theirs.shape)} for torch's {tuple(ours.shape)}")
    where = mask.bool()
    ours, theirs = ours[where], theirs[where]
    scale = max(float(ours.abs().max()), 1e-30)
    return float((ours - theirs).abs().max()) / scale, float((ours.argmax(-1) == theirs.argmax(-1)).double().mean())


def _options(runtime: Any) -> Any:
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    return options


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """Keep the exporter's advice to itself; what goes wrong is raised."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _runtime() -> Any:
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingExtra(f"ONNX needs {error.name}: pip install 'openwork[onnx]'") from error
    return onnxruntime
