"""Low-rank adapters (Hu et al., "LoRA", 2022) on a sparse model, through peft, merged without breaking the mask.

A dense update BA fills the zeros of a sparse W when it is merged. Two ways out:

- The adapter is trained under the mask: the layer computes with W + m * (s B A), m the mask, and merging changes nothing
  (as SparsePEFT in Munoz et al., "SQFT", 2024). One product of the weight's size more a forward pass.
- The adapter is trained as peft does it, and what it put on masked places is cut off at the merge. The report tells how
  much of it that was.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openwork.core.masks import Masks
from openwork.errors import MaskError, MissingExtra, RecipeError

_NAME = "openwork"


@dataclass(frozen=True)
class Merged:
    """What a merge did.

    Attributes:
        model: the plain model, its masked weights exactly zero.
        cut: parameter -> share of the update's squared norm that lay on masked places and was cut off, 0 to 1; 0 for an
            adapter trained under the mask, whose forward never used that part.
        change: parameter -> ||change|| / ||W|| of the merge.
    """

    model: nn.Module
    cut: dict[str, float]
    change: dict[str, float]

    @property
    def most(self) -> float:
        """The largest share cut off of any layer."""
        return max(self.cut.values(), default=0.0)


def adapted(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    *,
    rank: int = 8,
    alpha: float | None = None,
    targets: Sequence[str] | None = None,
    under_mask: bool = True,
    seed: int = 0,
) -> Any:
    """Return a PeftModel around `model` whose adapters train and whose own weights are frozen.

    Args:
        model: zero where it is masked; its masked linear layers (and transformers' Conv1D) get adapters.
        masks: parameter name -> bool mask.
        rank: of the adapters.
        alpha: their scale is alpha / rank; None is 2 * rank.
        targets: names of the layers to adapt; None is all masked ones.
        under_mask: whether the layers compute with the masked update, so that the merge loses nothing.
        seed: of the adapters' first values.

    Raises:
        MissingExtra: if peft is not installed.
        MaskError: if the model is not zero where it is masked, or nothing masked can be adapted.
        RecipeError: for a rank below 1.
    """
    peft = _peft()
    if rank < 1:
        raise RecipeError(f"rank={rank!r}: the rank of an adapter is at least 1")
    given = Masks(masks)
    given.check(model)
    layers = {name.removesuffix(".weight"): mask for name, mask in given.items() if name.endswith(".weight")}
    fitting = [name for name in layers if _fits(model.get_submodule(name)) and (targets is None or name in targets)]
    if not fitting or (targets is not None and set(targets) - set(fitting)):
        odd = sorted(set(targets or layers) - set(fitting))
        raise MaskError(f"no adapter fits {', '.join(odd) or 'the model'}: linear layers that the masks name get one")
    conv1d = any(type(model.get_submodule(name)).__name__ == "Conv1D" for name in fitting)
    config = peft.LoraConfig(
        r=rank, lora_alpha=2 * rank if alpha is None else alpha, lora_dropout=0.0, bias="none", target_modules=fitting,
        fan_in_fan_out=conv1d,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of transformers to peft, about names that changed
        torch.manual_seed(seed)
        wrapped = peft.get_peft_model(model, config, adapter_name=_NAME)
    if under_mask:
        for name, layer in _layers(wrapped):
            layer.register_buffer("openwork_mask", layers[name].clone(), persistent=False)
            layer.forward = MethodType(_forward, layer)
    return wrapped


@torch.no_grad()
def merged(wrapped: Any, masks: Mapping[str, Tensor]) -> Merged:
    """Return the plain model of `adapted` with W + m * (s B A) for weights; zeros stay exactly zero.

    Args:
        wrapped: what `adapted` returned; it is taken apart.
        masks: the same masks.

    Raises:
        MaskError: if a weight was not zero where it is masked.
    """
    _peft()
    given = Masks(masks)
    cut: dict[str, float] = {}
    change: dict[str, float] = {}
    for name, layer in _layers(wrapped):
        key, weight = f"{name}.weight", layer.get_base_layer().weight
        mask = given[key].to(weight.device)
        update = layer.get_delta_weight(_NAME)
        whole, kept = _square(update), _square(update.masked_fill(~mask, 0))
        hidden = "openwork_mask" in layer._buffers
        cut[key] = 0.0 if hidden or not whole else max(0.0, 1.0 - kept / whole)
        change[key] = math.sqrt(kept / max(_square(weight), 1e-300))
        update.masked_fill_(~mask, 0)
        weight.add_(update.to(weight.dtype))
        layer.lora_B[_NAME].weight.zero_()  # what peft now merges is nothing
        if hidden:
            del layer.forward, layer._buffers["openwork_mask"]
    model = wrapped.unload()
    given.check(model)
    for param in model.parameters():
        param.requires_grad_(True)
    return Merged(model, cut, change)


def _forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Compute a layer with its update under the mask."""
    base = layer.get_base_layer()
    update = layer.get_delta_weight(_NAME).masked_fill(~layer.openwork_mask, 0)
    output: Tensor = base(x)
    x = x.to(update.dtype)
    extra = x @ update if type(base).__name__ == "Conv1D" else F.linear(x, update)
    return output + extra.to(output.dtype)


def _layers(wrapped: Any) -> list[tuple[str, Any]]:
    """Return the adapted layers by their names in the plain model."""
    from peft.tuners.lora import LoraLayer

    inner = wrapped.get_base_model()
    return [(name, module) for name, module in inner.named_modules() if isinstance(module, LoraLayer)]


def _fits(module: nn.Module) -> bool:
    return type(module) is nn.Linear or type(module).__name__ == "Conv1D"


def _square(tensor: Tensor) -> float:
    return float(tensor.double().square().sum())


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise MissingExtra("adapters need peft: pip install 'openwork[transformers]'") from error
    return peft
