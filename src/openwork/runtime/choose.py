"""What each layer of a model gets as input, and which format multiplies its weight fastest."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from openwork.core.rng import generator
from openwork.errors import ModelError
from openwork.runtime import formats, modules, skipping, tuning, wrapping
from openwork.runtime.bounds import bound
from openwork.runtime.kernels.target import host
from openwork.runtime.modules import PackedLayer
from openwork.runtime.recurrent import PackedRecurrent
from openwork.runtime.timing import interleave, refusal, run, timed

MARGIN = 1.05
"""A format replaces a dense layer only if it is this many times as fast."""
DENSEST = 0.8
"""Above this density no format is tried."""
HOPELESS = 3.0
"""A format whose product takes this many times the dense layer's time at first sight is not measured further."""
GLIMPSE = 128
"""Rows of a long input on which a format is tried first: who takes twice `HOPELESS` there never sees the whole."""
SECONDS = 1.0
"""What the measurement of one layer may take, unless five rounds take longer."""
ROWS = 32
"""Input rows on which a format must be right before it is measured."""
STEPS = 4
"""Steps that a recurrent layer must be right on."""
CLOSE = 1e-4
"""Most that a recurrent layer may be off there; its outputs are between -1 and 1, and each product is held to its bound."""
FEW = 64
"""Most rows of an input that formats for few columns are tried on."""
NATIVE = ("block", "few", "nm", "sell", "spmm")
"""Formats that run on openwork's kernels; where there are none they are csr_torch in other words."""
SINGLE = ("block", "few", "nm", "sell")
"""Those that multiply with one column, or a few, at a time."""
RECURRENT = ("csr_scipy", "csr_torch", "spmm")


@dataclass(frozen=True)
class Choice:
    """What was measured for one layer and what was chosen.

    `ms` has the milliseconds of one call by format, on an input of the shape and strides that the layer gets in the
    example; `gain` is dense over chosen; `calls` is how often the example calls the layer.
    """

    layer: str
    kind: str
    shape: tuple[int, ...]
    input_shape: tuple[int, ...]
    calls: int
    density: float
    ms: dict[str, float] = field(default_factory=dict)
    chosen: str = "dense"
    gain: float = 1.0
    note: str = ""


@dataclass(frozen=True)
class Seen:
    """The input of one layer while the example ran: the largest, if there were several.

    `sample` is the input itself where a format outside of the folder may pay on it, for its zeros or its device.
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    calls: int = 1
    sample: Tensor | None = field(default=None, compare=False)


def capture(model: nn.Module, example: Any) -> dict[nn.Module, Seen]:
    """Run the example and return what came into each layer that could be packed.

    Raises:
        ModelError: if the model refuses the example.
    """
    seen: dict[nn.Module, Seen] = {}

    def look(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        if inputs and isinstance(inputs[0], Tensor):
            x, before = inputs[0], seen.get(layer)
            kept = isinstance(layer, nn.Linear) and (x.is_cuda or wrapping.has_zeros(x))
            now = Seen(tuple(x.shape), x.stride(), x.dtype, sample=x.detach().clone() if kept else None)
            if before is not None:
                now = replace(max(before, now, key=lambda one: math.prod(one.shape)), calls=before.calls + 1)
            seen[layer] = now

    layers = [layer for layer in model.modules() if is_candidate(layer)]
    handles = [layer.register_forward_pre_hook(look) for layer in layers]
    try:
        run(model, example)
    except Exception as error:
        raise refusal(type(model).__name__, error) from error
    finally:
        for handle in handles:
            handle.remove()
    return seen


def is_candidate(layer: nn.Module) -> bool:
    """Tell whether a layer has a weight that could be sparse, so that it has a row in the table."""
    return isinstance(layer, (nn.Linear, nn.Conv2d, nn.LSTM, nn.GRU)) or modules.is_conv1d(layer)


def glance(name: str, layer: nn.Module, seen: Seen | None) -> tuple[Choice, float]:
    """Return a row without a choice for a layer, and the milliseconds of its dense call at first sight."""
    blank = _blank(name, layer, seen)
    if seen is None or 0 in seen.shape:
        return blank, 0.0
    return replace(blank, calls=seen.calls), 1e3 * _at_first_sight(layer, noise(name, seen))


def choose(
    name: str, layer: nn.Module, seen: Seen | None, repeats: int, margin: float = MARGIN
) -> tuple[Choice, nn.Module | None]:
    """Measure a layer dense and in every format; return the choice and the packed layer, None where dense stays."""
    blank = _blank(name, layer, seen)
    reason = modules.obstacle(layer)
    others = [] if seen is None or seen.sample is None else wrapping.worth_trying(layer, seen.sample)
    if seen is None or (reason is not None and not others):
        return replace(blank, note=reason or "is not called by the example"), None
    blank = replace(blank, calls=seen.calls)
    if blank.density > DENSEST and not others:
        return replace(blank, note="is dense"), None
    if seen.dtype != modules.weights_of(layer)[0].dtype or 0 in seen.shape:
        return replace(blank, note=f"gets {seen.dtype} of shape {seen.shape}"), None
    x = seen.sample if seen.sample is not None and others else noise(name, seen)
    if reason is None and blank.density <= DENSEST:
        packed, rough = _candidates(name, layer, x)
    else:
        packed, rough = {}, {"dense": _at_first_sight(layer, x)}
    for key in others:
        assert isinstance(layer, nn.Linear)  # the only layers that have others
        twin = wrapping.pack(layer, key)
        if wrapping.is_right(twin, layer, x):
            packed[key], rough[key] = twin, _at_first_sight(twin, x)
    fair = {"dense": layer, **{key: twin for key, twin in packed.items() if rough[key] <= HOPELESS * rough["dense"]}}
    calls = {key: functools.partial(_waited, module, x) for key, module in fair.items()}
    times = interleave(calls, repeats=repeats, seconds=SECONDS)
    ms = {key: 1e3 * times.get(key, rough[key]) for key in rough}
    best = min(times, key=lambda key: times[key])
    if times["dense"] < margin * times[best]:
        return replace(blank, ms=ms), None
    winner, gain = packed[best], times["dense"] / times[best]
    if isinstance(winner, skipping.SkippingLinear):  # its time goes with the share of non-zeros: dense beyond what pays
        winner.until(min(1.0, gain * int(torch.count_nonzero(x)) / x.numel()))
    return replace(blank, ms=ms, chosen=best, gain=gain), winner


def _blank(name: str, layer: nn.Module, seen: Seen | None) -> Choice:
    """Return a row without a choice; its shape is that of the first weight."""
    weights = modules.weights_of(layer)
    shape = tuple(weights[0].shape) if not nn.parameter.is_lazy(weights[0]) else ()
    return Choice(name, type(layer).__name__, shape, seen.shape if seen else (), 0, _density(weights))


def _density(weights: list[Tensor]) -> float:
    """Return the share of weights that are not zero, 1 where there are no values yet."""
    if any(weight.is_meta or nn.parameter.is_lazy(weight) or weight.numel() == 0 for weight in weights):
        return 1.0
    return sum(int(torch.count_nonzero(weight)) for weight in weights) / sum(weight.numel() for weight in weights)


def _candidates(name: str, layer: nn.Module, x: Tensor) -> tuple[dict[str, nn.Module], dict[str, float]]:
    """Return the layer in every format that takes it and is right, and the rough seconds of a call of each."""
    packed: dict[str, nn.Module] = {}
    rough = {"dense": _at_first_sight(layer, x)}
    part = _part(layer, x)
    least = None if part is None else _at_first_sight(layer, part)
    for key in _formats(layer, x):
        try:
            twin = modules.pack(layer, key)
        except ModelError:
            continue
        if _is_right(name, key, twin, layer):
            if isinstance(twin, PackedLayer):
                twin.tune(x, tuning.SECONDS)
            packed[key] = twin
            if part is not None and least is not None:
                glimpse = _at_first_sight(twin, part)
                if glimpse > 2 * HOPELESS * least:
                    rough[key] = rough["dense"] * glimpse / least
                    continue
            rough[key] = _at_first_sight(twin, x)
    return packed, rough


def _part(layer: nn.Module, x: Tensor) -> Tensor | None:
    """Return a few rows of a long input, or a few images of many, None where the whole is no more."""
    if isinstance(layer, (nn.LSTM, nn.GRU)):
        return None
    if isinstance(layer, nn.Conv2d):
        return x[: len(x) // 16] if x.ndim == 4 and len(x) >= 16 else None
    rows = x.reshape(-1, x.shape[-1]) if x.ndim else x
    return rows[:GLIMPSE] if len(rows) >= 4 * GLIMPSE else None


def _formats(layer: nn.Module, x: Tensor) -> list[str]:
    """Return the formats that are worth packing for a layer and its input."""
    found = [key for key in formats.names() if key != "dense" and not (host() is None and key in NATIVE)]
    if isinstance(layer, (nn.LSTM, nn.GRU)):
        return [key for key in found if key in RECURRENT]
    many = isinstance(layer, nn.Conv2d) or x.shape[:-1].numel() > FEW
    return [key for key in found if not (many and key in SINGLE)]


def _at_first_sight(layer: nn.Module, x: Tensor) -> float:
    """Return the seconds of the best of three calls after a first one."""
    _waited(layer, x)
    return min(timed(functools.partial(_waited, layer, x)) for _ in range(3))


def _waited(layer: nn.Module, x: Tensor) -> None:
    """Call a layer and wait until its device is done."""
    layer(x)
    if x.is_cuda:
        torch.cuda.synchronize(x.device)


def _is_right(name: str, key: str, twin: nn.Module, layer: nn.Module) -> bool:
    """Hold a format to its bound on this very weight: a wrong product is never a fast one."""
    if isinstance(twin, PackedLayer):
        same = torch.equal(twin.weight, cast(Tensor, layer.weight))
        return same and _keeps_bound(name, key, twin.packed)
    assert isinstance(twin, PackedRecurrent)
    tensors = twin.tensors()
    if not all(torch.equal(tensors[part], value) for part, value in layer.named_parameters()):
        return False
    weights = [packed for one in twin.weights for way in one for packed in (way.input, way.hidden)]
    x = torch.randn(
        STEPS, 2, twin.input_size, generator=generator(0, "steps", name), dtype=modules.weights_of(layer)[0].dtype
    )
    x = x.transpose(0, 1) if twin.batch_first else x
    return all(_keeps_bound(name, key, packed) for packed in weights) and bool(
        ((twin(x)[0] - layer(x)[0]).abs() <= CLOSE).all()
    )


def _keeps_bound(name: str, key: str, packed: Any) -> bool:
    """Tell whether a format's product with this weight is right on some rows."""
    tested = formats.load(key)
    weight, bias = tested.unpack(packed)
    rows = torch.randn(ROWS, weight.shape[1], generator=generator(0, "rows", name), dtype=weight.dtype)
    expected = rows.double() @ weight.double().t() + (0.0 if bias is None else bias.double())
    error = (tested.matmul(packed, rows).double() - expected).abs()
    return bool((error <= bound(weight, bias, rows)).all())


def noise(name: str, seen: Seen) -> Tensor:
    """Return normal noise of the shape and strides that the layer sees."""
    x = torch.randn(seen.shape, generator=generator(0, "input", name), dtype=seen.dtype)
    return x if 0 in seen.stride else torch.empty_strided(seen.shape, seen.stride, dtype=seen.dtype).copy_(x)
