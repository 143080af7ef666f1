"""Dense torch, compiled by inductor with frozen weights: weights are packed, and operations after them fused."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from openwork.bench.peers import Unavailable
from openwork.runtime.timing import run

ABOUT = "dense torch, compiled, weights frozen"
DENSE, APART = True, False


def operator(weight: Tensor, bias: Tensor | None, x: Tensor) -> Callable[[], Tensor]:
    """Return the product as a compiled linear layer on (columns, in).

    Raises:
        Unavailable: if there is no C++ compiler, or inductor fails.
    """
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    call = network(layer.eval(), x.t().contiguous())
    return lambda: call().t()


def network(model: nn.Module, example: Any) -> Callable[[], Tensor]:
    """Return the model compiled for the shape of the example.

    Raises:
        Unavailable: if there is no C++ compiler, or inductor fails.
    """
    if not any(shutil.which(name) for name in (os.environ.get("CXX") or "g++", "g++", "clang++")):
        raise Unavailable("torch.compile needs a C++ compiler: install g++ or clang++, or name one in CXX")
    import torch._dynamo
    import torch._inductor.config as inductor

    torch._dynamo.reset()  # else the layers before count against the limit of recompilations
    try:
        with warnings.catch_warnings(), inductor.patch(freezing=True), torch.no_grad():
            warnings.simplefilter("ignore")
            compiled = torch.compile(model, dynamic=False)
            run(compiled, example)  # type: ignore[arg-type]
    except Exception as error:  # the compiler's own, of many kinds
        reason = " ".join(str(error).split())[:200]
        raise Unavailable(f"torch.compile fails here ({type(error).__name__}: {reason}): check the C++ compiler") from error
    return lambda: run(compiled, example)  # type: ignore[arg-type]
