"""The cost of any model, dense or under masks: FLOPs of a forward pass and of a training step, parameters, bytes.

Every product is charged to the part of the parameter that it reads, so that masks scale it by the kept share of exactly
that part. No module is known by name.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from openwork.core.trace import Region, Trace
from openwork.errors import CostError, MaskError

__all__ = ["Cost", "Region", "Use", "count"]


@dataclass(frozen=True)
class Use:
    """All products with one region of one parameter.

    Attributes:
        name: the parameter.
        flops: dense FLOPs, a multiplication and an addition counted as two.
        region: the part of the parameter that is read; every element of it has the same share of `flops`.
    """

    name: str
    flops: int
    region: Region

    def under(self, mask: Tensor) -> int:
        """Return the FLOPs when only the weights that `mask` (bool, of the parameter's shape) keeps are multiplied."""
        size = math.prod(self.region.size)
        kept = int(torch.count_nonzero(self.region.view(mask)))
        return (2 * self.flops * kept + size) // (2 * size)  # to the nearest; exact for torch's own formulas


@dataclass(frozen=True)
class Cost:
    """What a model costs on one example input.

    Attributes:
        uses: the products with parameters.
        fixed: FLOPs of products without a parameter (attention scores, attention times values), or with a weight whose
            zeros are lost on the way (standardised, added to, concatenated): dense whatever the masks.
        parameters: name -> number of elements; tied parameters once, under their first name.
        shapes: name -> shape.
        itemsizes: name -> bytes per element.
        uncounted: custom operations without a formula, which add nothing; `register_flop_formula` of
            `torch.utils.flop_counter` gives them one.
    """

    uses: tuple[Use, ...]
    fixed: int
    parameters: dict[str, int]
    shapes: dict[str, torch.Size]
    itemsizes: dict[str, int]
    uncounted: tuple[str, ...] = ()

    def flops(self, masks: Mapping[str, Tensor] | None = None) -> int:
        """Return the FLOPs of inference on the example input: products only, as `torch.utils.flop_counter` has them.

        Padding counts as data and causal attention as full; biases, norms and activations do not count.

        Args:
            masks: parameter name -> bool tensor of its shape, True = kept; parameters without a mask are dense.

        Raises:
            MaskError: if a mask fits no parameter.
        """
        return self.fixed + sum(self.by_parameter(masks).values())

    def training_flops(self, masks: Mapping[str, Tensor] | None = None, dense_gradient: bool = False) -> int:
        """Return the FLOPs of one training step on the example input: three times a forward pass.

        The forward pass, the gradient of the activations and that of the weights cost the same each (the first layer's
        needless activation gradient included). As Evci et al. 2020 (RigL), appendix: 3 f_S for a step that is sparse
        throughout, 2 f_S + f_D for one with a dense weight gradient. RigL needs the latter only at its mask updates:
        (3 f_S n + 2 f_S + f_D) / (n + 1) on average, n steps apart. The optimizer is not counted.

        Args:
            masks: as for `flops`.
            dense_gradient: whether the gradient of masked weights is computed too.

        Raises:
            MaskError: if a mask fits no parameter.
        """
        sparse = self.flops(masks)
        return 2 * sparse + (self.flops() if dense_gradient else sparse)

    def by_parameter(self, masks: Mapping[str, Tensor] | None = None) -> dict[str, int]:
        """Return the FLOPs of inference charged to every parameter, 0 if it is in no product; without `fixed`.

        Raises:
            MaskError: if a mask fits no parameter.
        """
        self._check(masks)
        flops = dict.fromkeys(self.parameters, 0)
        for use in self.uses:
            mask = masks.get(use.name) if masks else None
            flops[use.name] += use.flops if mask is None else use.under(mask)
        return flops

    def kept(self, masks: Mapping[str, Tensor] | None = None) -> int:
        """Return how many parameters are kept; those without a mask count whole.

        Raises:
            MaskError: if a mask fits no parameter.
        """
        return sum(self._kept(masks).values())

    def bytes(self, masks: Mapping[str, Tensor] | None = None) -> int:
        """Return the bytes that the parameters need: kept values and a bitmap, or dense where that is not larger.

        Buffers and file headers are not included.

        Raises:
            MaskError: if a mask fits no parameter.
        """
        total = 0
        for name, kept in self._kept(masks).items():
            count, width = self.parameters[name], self.itemsizes[name]
            total += min(count * width, kept * width + -(-count // 8))
        return total

    def _kept(self, masks: Mapping[str, Tensor] | None) -> dict[str, int]:
        self._check(masks)
        return self.parameters | {name: int(torch.count_nonzero(mask)) for name, mask in (masks or {}).items()}

    def _check(self, masks: Mapping[str, Tensor] | None) -> None:
        for name, mask in (masks or {}).items():
            if name not in self.shapes:
                raise MaskError(
                    f"the counted model has no parameter {name!r} that the masks name; use the names that "
                    "named_parameters() gives (for tied parameters the first)"
                )
            if mask.shape != self.shapes[name]:
                raise MaskError(f"{name!r} has shape {tuple(self.shapes[name])}, its mask {tuple(mask.shape)}")


def count(model: nn.Module, example: Any) -> Cost:
    """Count the cost of `model` by one forward pass on `example`, in eval mode and without gradients.

    Training flags, buffers, random state, backend flags and the example are afterwards what they were; hooks of the
    model run as in any forward pass. A model that routes its input is counted along the routes this example takes.
    Works on the meta device, without memory or computation, for models that take no decision on values.

    Args:
        model: any module.
        example: what the model is called with: a tuple gives positional arguments, a mapping keyword arguments,
            anything else is the only argument. FLOPs are those of the whole batch.

    Raises:
        CostError: if a parameter is not initialised yet, or the forward pass fails.
    """
    lazy = next((name for name, parameter in model.named_parameters() if is_lazy(parameter)), None)
    if lazy is not None:
        raise CostError(f"{lazy!r} has no shape yet; run the model once on real input before it is counted")
    trace = Trace(model)
    with _undisturbed(model):
        try:
            args, kwargs = _arguments(example)
            with trace:
                model(*args, **kwargs)
        except Exception as error:
            raise CostError(
                f"{type(model).__name__} fails in eval mode on the example that it is counted on "
                f"({type(error).__name__}: {' '.join(str(error).split())}); give one that it accepts"
            ) from error
    parameters = dict(model.named_parameters())
    return Cost(
        uses=tuple(Use(name, flops, region) for (name, region), flops in trace.flops.items() if flops),
        fixed=trace.fixed,
        parameters={name: parameter.numel() for name, parameter in parameters.items()},
        shapes={name: parameter.shape for name, parameter in parameters.items()},
        itemsizes={name: parameter.element_size() for name, parameter in parameters.items()},
        uncounted=tuple(sorted(trace.uncounted)),
    )


def _arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return positional and keyword arguments; tensors are cloned, for models that write to their input."""
    if isinstance(example, Mapping):
        return (), {name: _fresh(value) for name, value in example.items()}
    return tuple(map(_fresh, example if type(example) is tuple else (example,))), {}


def _fresh(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Put the model into eval mode and torch onto its plainest path; put everything back afterwards.

    oneDNN and cuDNN run a recurrent net as one opaque op, the fast path does so with an encoder layer.
    """
    training = [(module, module.training) for module in model.modules()]
    buffers = [(m, name, buffer) for m in model.modules() for name, buffer in m.named_buffers(recurse=False)]
    values = [buffer.detach().clone() for *_, buffer in buffers]
    backends: tuple[Any, ...] = (torch.backends.mkldnn, torch.backends.cudnn)
    enabled = [backend.enabled for backend in backends]
    fast = torch.backends.mha.get_fastpath_enabled()
    cards = {parameter.device.index for parameter in model.parameters() if parameter.device.type == "cuda"}
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=sorted(cards)))
        stack.enter_context(torch.inference_mode(False))  # inference mode would not split composite ops
        stack.enter_context(torch.no_grad())
        if "torch._dynamo" in sys.modules:  # only then can a part of the model be compiled
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            for backend in backends:
                backend.enabled = False
            torch.backends.mha.set_fastpath_enabled(False)
            model.eval()
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
            for backend, value in zip(backends, enabled, strict=True):
                backend.enabled = value
            for module, flag in training:
                module.training = flag
            for (module, name, buffer), saved in zip(buffers, values, strict=True):
                if buffer.device.type != "meta" and not torch.equal(buffer, saved):
                    buffer.copy_(saved)
                if getattr(module, name, None) is not buffer:
                    setattr(module, name, buffer)
