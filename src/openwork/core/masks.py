"""Masks: what is kept of a model, held outside the model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from openwork.errors import MaskError


class Masks(Mapping[str, Tensor]):
    """An immutable mapping from parameter name to bool tensor of the parameter's shape; True = kept.

    Args:
        masks: parameter name -> bool tensor.

    Raises:
        MaskError: if a mask is not a bool tensor.
    """

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        for name, mask in masks.items():
            if not isinstance(mask, Tensor) or mask.dtype is not torch.bool:
                kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
                raise MaskError(f"the mask of {name!r} must be a bool tensor, not {kind}")
        self._masks = dict(masks)

    def __getitem__(self, name: str) -> Tensor:
        return self._masks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def __repr__(self) -> str:
        return f"Masks({len(self)} parameters, {self.nnz():,} of {self.total():,} kept, density {self.density():.4f})"

    def nnz(self) -> int:
        """Return the number of kept weights."""
        return sum(int(mask.sum()) for mask in self.values())

    def total(self) -> int:
        """Return the number of weights under a mask."""
        return sum(mask.numel() for mask in self.values())

    def density(self) -> float:
        """Return kept / total, 1.0 for no weights at all."""
        total = self.total()
        return self.nnz() / total if total else 1.0

    def densities(self) -> dict[str, float]:
        """Return kept / total of every parameter."""
        return {name: int(mask.sum()) / max(1, mask.numel()) for name, mask in self.items()}

    def check(self, model: nn.Module) -> None:
        """Check that the masks fit `model` and that every masked weight is exactly zero.

        Raises:
            MaskError: naming the first parameter that is missing, of another shape, or not zero where it is masked.
        """
        params = dict(model.named_parameters())
        for name, mask in self.items():
            if name not in params:
                raise MaskError(f"the model has no parameter {name!r} that the masks name")
            weight = params[name].detach()
            if weight.shape != mask.shape:
                raise MaskError(f"{name!r} has shape {tuple(weight.shape)}, its mask {tuple(mask.shape)}")
            alive = int(torch.count_nonzero(weight[~mask.to(weight.device)]))
            if alive:
                raise MaskError(
                    f"{alive} masked weights of {name!r} are not zero; call sparsifier.project() after loading weights"
                )

    @torch.no_grad()
    def apply(self, model: nn.Module) -> None:
        """Set every masked weight of `model` to exactly zero, by selection: an infinite weight becomes 0, not NaN."""
        params = dict(model.named_parameters())
        for name, mask in self.items():
            params[name].masked_fill_(~mask.to(params[name].device), 0)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the masks packed, one bit a weight: `name` -> uint8 bits and `name.shape` -> int64 shape."""
        state: dict[str, Tensor] = {}
        for name, mask in self.items():
            state[name] = torch.from_numpy(np.packbits(mask.cpu().numpy().reshape(-1)))
            state[f"{name}.shape"] = torch.tensor(mask.shape, dtype=torch.int64)
        return state

    @classmethod
    def load(cls, state: Mapping[str, Tensor]) -> Masks:
        """Return the masks that `state_dict` packed.

        Raises:
            MaskError: if a tensor is missing, left over, of the wrong kind or of the wrong size.
        """
        masks = {}
        shapes = {key: size for key, size in state.items() if key.endswith(".shape") and size.dtype is torch.int64}
        for key, size in shapes.items():
            name = key.removesuffix(".shape")
            shape, count, bits = size.reshape(-1).tolist(), math.prod(size.reshape(-1).tolist()), state.get(name)
            if min(shape, default=0) < 0 or size.dim() != 1:
                raise MaskError(f"the packed mask of {name!r} has the shape {size.tolist()}, which no tensor has")
            if bits is None or bits.dtype is not torch.uint8 or bits.shape != (-(-count // 8),):
                raise MaskError(f"the packed mask of {name!r} does not hold {count} bits")
            flat = np.unpackbits(bits.cpu().numpy(), count=count).astype(bool)
            masks[name] = torch.from_numpy(flat).reshape(shape)
        left = [key for key in state if key not in shapes and key not in masks]
        if left:
            raise MaskError(f"{left[0]!r} is no packed mask: its shape is missing; the state was cut or made by hand")
        return cls(masks)

    @classmethod
    def ones(cls, params: Mapping[str, Tensor]) -> Masks:
        """Return the masks that keep everything of `params`."""
        return cls({name: torch.ones_like(param, dtype=torch.bool) for name, param in params.items()})

    @classmethod
    def of(cls, params: Mapping[str, Tensor]) -> Masks:
        """Return the masks of the weights of `params` that are not zero."""
        return cls({name: param.detach() != 0 for name, param in params.items()})
