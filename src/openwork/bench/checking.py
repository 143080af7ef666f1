"""Whether a peer's output is right: no time of a wrong one is ever shown."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from openwork.errors import ModelError
from openwork.runtime.bounds import bound
from openwork.runtime.timing import run

NETWORK_ERROR = 1e-4
"""Most that a network's output may differ from the float64 one, against the largest entry of it."""


def product_error(weight: Tensor, bias: Tensor | None, x: Tensor, y: Tensor) -> float:
    """Return the largest error of y (out, columns) over what is allowed for weight @ x + bias; up to 1 is right.

    The reference is computed in float64; what is allowed is `runtime.bounds.bound`, which grows with sum |w| |x|.
    """
    if y.shape != (weight.shape[0], x.shape[1]):
        return float("inf")
    exact = weight.double() @ x.double() + (0.0 if bias is None else bias.double()[:, None])
    return _largest((y.detach().double() - exact).abs() / bound(weight, bias, x.t()).t())


def reference(model: nn.Module, example: Any) -> Tensor:
    """Return the output of a float32 model computed in float64; the model is put back as it was.

    Raises:
        ModelError: if the output is no tensor.
    """
    with torch.no_grad():
        try:
            exact = run(model.double(), _wide(example))
        finally:
            model.float()
    return first_tensor(exact)


def network_error(exact: Tensor, y: Any) -> float:
    """Return the largest difference of a network's output from the float64 one over what is allowed; up to 1 is right."""
    found = first_tensor(y).detach()
    if found.shape != exact.shape:
        return float("inf")
    return _largest((found.double() - exact).abs()) / (NETWORK_ERROR * max(float(exact.abs().max()), 1e-30))


def first_tensor(output: Any) -> Tensor:
    """Return the first tensor of an output: itself, of a tuple or list, or of a mapping.

    Raises:
        ModelError: if there is none.
    """
    from torch.utils import _pytree as pytree

    for leaf in pytree.tree_leaves(output):
        if isinstance(leaf, Tensor):
            return leaf
    raise ModelError(f"the output is a {type(output).__name__} without a tensor: the bench compares tensors")


def _largest(errors: Tensor) -> float:
    """Return the largest entry; a NaN counts as infinite."""
    return float(errors.nan_to_num(nan=float("inf")).max()) if errors.numel() else 0.0


def _wide(example: Any) -> Any:
    from torch.utils import _pytree as pytree

    def one(leaf: Any) -> Any:
        return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    return pytree.tree_map(one, example)
