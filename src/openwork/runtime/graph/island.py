"""An island in place of its layers: tensors in, tensors out, one native call between."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, fx, nn

from openwork.errors import ModelError
from openwork.runtime.graph import read
from openwork.runtime.graph.compile import Chain, Plot, bind, plot
from openwork.runtime.graph.ops import Conv, Depthwise, Way
from openwork.runtime.kernels.target import host
from openwork.runtime.launching import Pool, Ready

RUN_BYTES = 2 * 2**20
"""Memory that the images of one run take at most, one image aside: larger batches run in pieces that stay in the cache."""

Shapes = tuple[tuple[int, ...], ...]


class Island(nn.Module):
    """Runs a chain of operations on images. Inference only; float32 on the CPU; any batch and image size.

    Attributes:
        chain: the operations.
        layers: names of the modules whose work it does.
        ways: how products are run where that was measured, by `Conv.spot`.
    """

    def __init__(
        self, chain: Chain, flat: Sequence[bool], layers: Sequence[str], ways: Mapping[Any, Way] | None = None
    ) -> None:
        super().__init__()
        self.chain, self.flat, self.layers, self.ways = chain, tuple(flat), tuple(layers), dict(ways or {})
        self._start()

    def _start(self) -> None:
        self._arranged: dict[Any, Any] = {}
        self._pool: Pool[Any] = Pool(functools.partial(_make, self.chain, self._arranged, self.ways))
        self._sizes: dict[Shapes, tuple[Shapes, int]] = {}

    def forward(self, *inputs: Tensor) -> Any:
        """Return the outputs of the chain: one tensor, or a tuple of them."""
        for x in inputs:
            if x.dtype != torch.float32 or x.device.type != "cpu" or x.ndim != 4:
                raise _unfit(x)
        shapes, images = self.sizes(tuple(tuple(x.shape) for x in inputs))
        made = [torch.empty(shape) for shape in shapes]
        if all(x.numel() for x in (*inputs, *made)):
            threads = torch.get_num_threads()
            total = inputs[0].shape[0]
            steps = [4 * x.stride(0) for x in (*inputs, *made)]
            starts = [x.data_ptr() for x in (*inputs, *made)]
            strides = tuple((tuple(x.shape[1:]), x.stride()) for x in inputs)
            for first in range(0, total, images):
                key = (min(images, total - first), strides, threads)
                addresses = [start + first * step for start, step in zip(starts, steps, strict=True)]
                self._pool.run(key, addresses, threads)
        outputs = tuple(y.flatten(1) if flat else y for y, flat in zip(made, self.flat, strict=True))
        return outputs[0] if len(outputs) == 1 else outputs

    def sizes(self, shapes: Shapes) -> tuple[Shapes, int]:
        """Return the shapes of the outputs for inputs of these shapes, and how many images one run takes."""
        found = self._sizes.get(shapes)
        if found is None:
            full: list[Any] = list(shapes)
            for op in self.chain.ops:
                full.append(op.shape([full[i] for i in op.inputs]))
            batch = shapes[0][0]
            one = plot(self.chain, [(1, *shape[1:]) for shape in shapes]).nbytes  # type: ignore[misc]
            images = max(1, min(batch, RUN_BYTES // max(1, one)))
            images = -(-batch // max(1, -(-batch // images)))  # pieces of about the same size
            found = self._sizes[shapes] = (tuple(tuple(full[i]) for i in self.chain.outputs), images)
        return found

    def set_ways(self, ways: Mapping[Any, Way]) -> None:
        """Run products as `ways` says; programs are made anew."""
        self.ways = dict(ways)
        self._start()

    def piece(self, shapes: Shapes) -> Plot:
        """Return the layout of one run for inputs of these shapes."""
        images = self.sizes(shapes)[1]
        return plot(self.chain, [(images, *shape[1:]) for shape in shapes], self._arranged, self.ways)  # type: ignore[misc]

    def extra_repr(self) -> str:
        """Return what `print` shows."""
        products = [op for op in self.chain.ops if isinstance(op, Conv)]
        return f"{len(self.chain.ops)} operations, {len(products)} of them products, for {len(self.layers)} layers"

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return a twin that shares the packed weights, which never change."""
        return type(self)(self.chain, self.flat, self.layers, self.ways)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the programs."""
        return {key: value for key, value in self.__dict__.items() if key not in ("_pool", "_arranged", "_sizes")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Make room for programs again."""
        self.__dict__.update(state)
        self._start()


def _make(chain: Chain, arranged: dict[Any, Any], ways: Mapping[Any, Way], key: Any) -> Ready:
    """Return a program for the batch, the shapes and strides, and the threads of `key`."""
    batch, inputs, threads = key
    target = host()
    if target is None:
        raise ModelError(
            "accelerated layers need kernels, which OPENWORK_KERNELS=none turned off: accelerate the model again"
        )
    made = plot(chain, [(batch, *shape) for shape, _ in inputs], arranged, ways)
    return bind(made, target, threads, [strides for _, strides in inputs])


def _unfit(x: Tensor) -> Exception:
    return ModelError(
        f"the accelerated layers take float32 images (batch, channels, height, width) on the CPU, not {tuple(x.shape)} of "
        f"{x.dtype} on {x.device}: convert the input, or run the dense model"
    )


# -- from a model to islands --------------------------------------------------------------------------------------


@dataclass
class Runner:
    """A traced forward with islands, to take the place of a module's own `forward`."""

    graph: fx.GraphModule

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph."""
        return self.graph(*args, **kwargs)

    @property
    def islands(self) -> list[Island]:
        """The islands, in the order of the graph."""
        return [module for module in self.graph.modules() if isinstance(module, Island)]


def traced(model: nn.Module, arguments: tuple[Any, ...], prefix: str = "") -> Runner | None:
    """Return the forward of `model` with islands, None where it cannot be traced or has nothing for them.

    Args:
        model: in eval mode; its modules are used by what stays torch's.
        arguments: positional arguments; the graph is run once on them for the shapes.
        prefix: of the names of the layers.
    """
    found = _read(model, arguments, narrow=False) or _read(model, arguments, narrow=True)
    if found is None:
        return None
    module, seen = found
    modules = dict(module.named_modules())
    known = {node: op for node in module.graph.nodes if (op := read.operation(node, modules, seen)) is not None}
    nothings = {node for node in module.graph.nodes if read.is_nothing(node, modules)}
    known = {node: op for node, op in known.items() if node not in nothings}
    levels = _levels(module.graph, known)
    count = max(levels.values(), default=0)
    made = _rebuilt(module, known, levels, count, seen, prefix)
    return Runner(made) if any(isinstance(one, Island) for one in made.modules()) else None


class _Tracer(fx.Tracer):
    """Goes into the user's modules, not into packed layers and chains of them; a narrow one only where convolutions are."""

    def __init__(self, narrow: bool) -> None:
        super().__init__()
        self.narrow = narrow

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Tell whether a module stays whole."""
        own = type(m).__module__.startswith("openwork.runtime.") or isinstance(m.__dict__.get("forward"), Runner)
        bare = self.narrow and not any(isinstance(one, nn.Conv2d) for one in m.modules())
        return own or bare or super().is_leaf_module(m, module_qualified_name)


def _read(
    model: nn.Module, arguments: tuple[Any, ...], *, narrow: bool
) -> tuple[fx.GraphModule, dict[fx.Node, read.Seen]] | None:
    """Return the graph of a forward and the shapes in it, None where it cannot be traced so."""
    try:
        module = fx.GraphModule(model, _Tracer(narrow).trace(model))
        _settle(module)
        return module, read.shapes(module, arguments)
    except Exception:  # whatever the user's forward does with proxies
        return None


def _settle(module: fx.GraphModule) -> None:
    """Let readers of a tensor that a node changes in place read that node; take out nodes that do nothing."""
    modules = dict(module.named_modules())
    order = {node: place for place, node in enumerate(module.graph.nodes)}
    for node in list(module.graph.nodes):
        if read.is_nothing(node, modules) and node.all_input_nodes:
            node.replace_all_uses_with(node.all_input_nodes[0])
            module.graph.erase_node(node)
        elif node.all_input_nodes and _is_in_place(node, modules):
            changed = node.all_input_nodes[0]
            for user in list(changed.users):
                if order[user] > order[node]:
                    user.replace_input_with(changed, node)
    module.recompile()


def _is_in_place(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return bool(getattr(modules[str(node.target)], "inplace", False))
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    name = getattr(node.target, "__name__", "")
    return bool(node.kwargs.get("inplace", False)) or name in ("iadd", "imul", "relu_")


def _levels(graph: fx.Graph, known: dict[fx.Node, Any]) -> dict[fx.Node, int]:
    """Number the nodes so that known nodes of one number have no path between them through an unknown one."""
    levels: dict[fx.Node, int] = {}
    for node in graph.nodes:
        levels[node] = max((levels[one] + (node in known and one not in known) for one in node.all_input_nodes), default=0)
    return levels


def _rebuilt(
    module: fx.GraphModule, known: dict[fx.Node, Any], levels: dict[fx.Node, int], count: int,
    seen: dict[fx.Node, read.Seen], prefix: str,
) -> fx.GraphModule:  # fmt: skip
    """Return the graph with the known nodes of each number as one island, where it has a product."""
    graph = fx.Graph()
    held: dict[str, Island] = {}
    values: dict[fx.Node, fx.Node] = {}
    for level in range(count + 1):
        members = [node for node in module.graph.nodes if node in known and levels[node] == level]
        if members and any(isinstance(known[node], (Conv, Depthwise)) for node in members):
            inside = set(members)
            outs = [node for node in members if any(user not in inside for user in node.users)]
            ins = list(dict.fromkeys(one for node in members for one in node.all_input_nodes if one not in inside))
            numbers = {node: i for i, node in enumerate([*ins, *members])}
            ops = tuple(_numbered(known[node], [numbers[one] for one in node.all_input_nodes]) for node in members)
            chain = read.fuse(Chain(len(ins), ops, tuple(numbers[node] for node in outs)))
            flat = [len(seen[node].shape or ()) == 2 for node in outs]
            layers = [prefix + str(node.target) for node in members if node.op == "call_module"]
            name = f"island{level}"
            held[name] = Island(chain, flat, layers)
            call = graph.call_module(name, tuple(values[one] for one in ins))
            for i, node in enumerate(outs):
                values[node] = call if len(outs) == 1 else graph.call_function(_item, (call, i))
        else:
            for node in members:
                values[node] = graph.node_copy(node, lambda one: values[one])
        for node in module.graph.nodes:
            if node not in known and levels[node] == level and node.op != "output":
                values[node] = graph.node_copy(node, lambda one: values[one])
    end = next(node for node in module.graph.nodes if node.op == "output")
    graph.node_copy(end, lambda one: values[one])
    root: dict[str, Any] = {}
    for node in graph.nodes:
        if node.op == "call_module" and node.target not in held:
            root[node.target] = module.get_submodule(node.target)
        elif node.op == "get_attr":
            root[node.target] = functools.reduce(getattr, node.target.split("."), module)
    return fx.GraphModule(root | held, graph)


def _numbered(op: Any, inputs: list[int]) -> Any:
    return replace(op, inputs=tuple(inputs[i] for i in op.inputs))


def _item(values: Sequence[Any], index: int) -> Any:
    return values[index]
