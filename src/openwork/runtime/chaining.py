"""Finding linear layers that follow one another in a model, with activations between them, and running each row as one.

Only a module's own forward is read, with all its children as they are: the feedforward part of a transformer, the layers
of an `nn.Sequential`, a linear layer and the activation after it. A module whose forward torch.fx cannot trace stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from openwork.errors import ModelError
from openwork.runtime.chain import Chain, Link, apart
from openwork.runtime.graph import read
from openwork.runtime.graph.island import Runner
from openwork.runtime.modules import PackedConv1D, PackedLayer, PackedLinear
from openwork.runtime.timing import interleave

FORMAT = "spmm"
SECONDS = 0.5
"""What the measurement of one chain may take, unless five rounds take longer."""


class ChainedLinear(nn.Module):
    """A chain in the place of its first layer; the layers stay where they are in the model, and hold the weights."""

    def __init__(self, chain: Chain) -> None:
        super().__init__()
        self.chain = chain

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., out) for x (..., in), without gradients."""
        return self.chain.run(x)


@dataclass
class Found:
    """A traced forward and its chains.

    Attributes:
        runner: takes the place of the module's forward.
        chains: name of each chain's first layer, as seen from the module -> the chain.
    """

    runner: Runner
    chains: dict[str, Chain]


def find(module: nn.Module) -> Found | None:
    """Return the forward of a module with its chains, None if it has none or cannot be traced.

    A chain has at least one packed linear layer in the format `spmm` and something that follows: an activation, or a
    further layer. Nothing else may read what is between.

    Args:
        module: in eval mode; its children do the rest of the graph.
    """
    if "forward" in module.__dict__ or not any(map(_is_packed, module.children())):
        return None
    try:
        graph = _Flat().trace(module)
        made = fx.GraphModule(module, graph)
    except Exception:  # whatever the user's forward does with proxies
        return None
    modules = dict(made.named_modules())
    chains: dict[str, Chain] = {}
    for node in list(made.graph.nodes):
        row = _row(node, modules) if _layer(node, modules) is not None else []
        if len(row) < 2 or node not in made.graph.nodes:
            continue
        chain = Chain(_links(row, modules))
        name = f"openwork_chain_{len(chains)}"
        made.add_submodule(name, ChainedLinear(chain))
        with made.graph.inserting_after(row[-1]):
            call = made.graph.call_module(name, (node.args[0],))
        row[-1].replace_all_uses_with(call)
        for one in reversed(row):
            made.graph.erase_node(one)
        chains[str(node.target)] = chain
    if not chains:
        return None
    made.recompile()
    return Found(Runner(made), chains)


def put(model: nn.Module, inputs: Mapping[str, Tensor], margin: float) -> list[str]:
    """Put chains into a model where they are faster, in place; return the names of the modules that got them.

    Args:
        model: with packed layers in it.
        inputs: by name of a packed layer, what it gets, or something of its shape.
        margin: how many times as fast as its layers by themselves a chain must be.
    """
    names = []
    for name, module in model.named_modules():
        found = find(module)
        if found is None:
            continue
        prefix = f"{name}." if name else ""
        rows = [(chain, inputs.get(prefix + first)) for first, chain in found.chains.items()]
        if all(x is not None and _pays(chain, x, margin) for chain, x in rows):
            object.__setattr__(module, "forward", found.runner)
            names.append(name)
    return names


def restore(model: nn.Module, names: list[str]) -> None:
    """Put the chains into the modules of these names.

    Raises:
        ModelError: if one of them has none.
    """
    for name in names:
        module = model.get_submodule(name)
        found = find(module)
        if found is None:
            raise ModelError(f"there is no chain of linear layers in {name!r}: accelerate the model again")
        object.__setattr__(module, "forward", found.runner)


class _Flat(fx.Tracer):
    """Traces a module's own forward only."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Return that every child is one."""
        return True


def _is_packed(layer: nn.Module) -> bool:
    kinds = (PackedLinear, PackedConv1D)
    return isinstance(layer, kinds) and layer.format == FORMAT and not (layer._forward_hooks or layer._forward_pre_hooks)


def _layer(node: fx.Node, modules: Mapping[str, nn.Module]) -> PackedLayer | None:
    """Return the packed layer that a node calls with one input, None if it does something else."""
    if node.op != "call_module" or len(node.args) != 1 or node.kwargs or not isinstance(node.args[0], fx.Node):
        return None
    layer = modules[str(node.target)]
    return (
        layer if isinstance(layer, PackedLayer) and _is_packed(layer) and layer.act == "none" and not layer.clamp else None
    )


def _row(node: fx.Node, modules: Mapping[str, nn.Module]) -> list[fx.Node]:
    """Return the nodes of a chain from its first layer on."""
    row, last, free = [node], node, True  # free: the sum has no activation yet
    while len(last.users) == 1:
        following = next(iter(last.users))
        if _layer(following, modules) is not None:
            free = True
        elif free and read.activation(following, modules) is not None:
            free = False
        elif not read.is_nothing(following, modules):
            break
        row.append(following)
        last = following
    return row


def _links(row: list[fx.Node], modules: Mapping[str, nn.Module]) -> list[Link]:
    links: list[Link] = []
    for node in row:
        layer, tail = _layer(node, modules), read.activation(node, modules)
        if layer is not None:
            links.append(Link(layer.packed))
        elif tail is not None:
            clamp = (tail.low, tail.high) if tail.act == "clamp" else None
            links[-1] = Link(links[-1].packed, "none" if clamp else tail.act, clamp)
    return links


def _pays(chain: Chain, x: Tensor, margin: float) -> bool:
    """Tell whether a chain gives what its layers give, and faster."""
    if x.dtype != torch.float32 or x.shape[-1:] != (chain.width,) or x.numel() == 0:
        return False
    chain.tune(x)
    expected, found = apart(chain.links, x), chain.run(x)
    if not torch.allclose(expected, found, rtol=1e-4, atol=1e-5 * float(expected.abs().max())):
        return False
    calls: dict[str, Any] = {"apart": lambda: apart(chain.links, x), "chain": lambda: chain.run(x)}
    times = interleave(calls, seconds=SECONDS)
    return times["apart"] >= margin * times["chain"]
