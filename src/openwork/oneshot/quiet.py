"""Running a model without leaving a trace: evaluation mode, no caches, no gradients, and everything back as it was."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


@contextlib.contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Put `model` into evaluation mode with caches off; modes, settings, random state and gradients come back at the end."""
    modes = [(module, module.training) for module in model.modules()]
    configs = [config for config in _configs(model) if getattr(config, "use_cache", None)]
    fast = torch.backends.mha.get_fastpath_enabled()  # the fused encoder layer never calls its linear layers
    devices = [param.device for param in model.parameters() if param.device.type == "cuda"]
    try:
        model.eval()
        for config in configs:
            config.use_cache = False
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.random.fork_rng(devices=sorted({device.index for device in devices})), torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for config in configs:
            config.use_cache = True
        for module, mode in modes:
            module.training = mode


def _configs(model: nn.Module) -> list[Any]:
    found = {id(config): config for module in model.modules() if (config := getattr(module, "config", None)) is not None}
    for config in list(found.values()):
        nested = vars(config).values() if hasattr(config, "__dict__") else ()
        found |= {id(one): one for one in nested if hasattr(one, "use_cache") and not inspect.isclass(one)}
    return list(found.values())
