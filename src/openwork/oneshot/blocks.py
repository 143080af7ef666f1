"""Finding the list of blocks of a model: the longest stretch that can be pruned one piece after the other."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from openwork.oneshot.layers import Layer, all_layers


@dataclass(frozen=True)
class Stack:
    """A list of blocks of one class.

    Attributes:
        name: the list's name in the model.
        blocks: (name, module) in order.
    """

    name: str
    blocks: tuple[tuple[str, nn.Module], ...]

    def place(self, name: str) -> int | None:
        """Return the index of the block that holds the module or parameter `name`, None outside."""
        if not name.startswith(f"{self.name}."):
            return None
        head = name.removeprefix(f"{self.name}.").partition(".")[0]
        return next((i for i, (block, _) in enumerate(self.blocks) if block == f"{self.name}.{head}"), None)


def find_stack(model: nn.Module) -> Stack | None:
    """Return the ModuleList or Sequential of same-class blocks that holds the most prunable weights.

    It must hold at least half of those of the model; among equals the outermost is taken. A list of bare layers, or a
    Sequential of one module, is none.
    """
    layers = [layer for layer in all_layers(model) if layer.kind != "embedding"]
    total = sum(layer.weight.numel() for layer in layers)
    best: tuple[int, Stack] | None = None
    for name, module in model.named_modules():
        children = list(module.named_children())
        if not name or not isinstance(module, nn.ModuleList | nn.Sequential) or len(children) < len(module):
            continue
        if not children or (isinstance(module, nn.Sequential) and len(children) < 2):
            continue
        if len({type(child) for _, child in children}) > 1 or any(_bare(child, layers) for _, child in children):
            continue
        weight = sum(layer.weight.numel() for layer in layers if layer.name.startswith(f"{name}."))
        if 2 * weight >= max(1, total) and (best is None or weight > best[0]):
            best = weight, Stack(name, tuple((f"{name}.{local}", child) for local, child in children))
    return best[1] if best else None


def shares_weights(model: nn.Module, stack: Stack) -> bool:
    """Tell whether two blocks, or a block and the rest of the model, hold the same parameter or module."""
    owner: dict[int, int] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        place = stack.place(name)
        if owner.setdefault(id(param), -1 if place is None else place) != (-1 if place is None else place):
            return True
    return False


def _bare(child: nn.Module, layers: list[Layer]) -> bool:
    return any(layer.module is child for layer in layers)
