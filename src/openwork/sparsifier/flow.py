"""Following channels through a traced forward: which rows, columns and per-channel parameters stand for the same channel.

What is known to act on every channel by itself is followed; anything else ends the group, with the reason.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor, fx, nn
from torch.nn.modules.lazy import LazyModuleMixin

from openwork.sparsifier import operations
from openwork.sparsifier.operations import PLAIN, Flow, Sizes, Value
from openwork.sparsifier.tracing import Traced, trace


class Sets:
    """Disjoint sets of channels: joined where they must stay or go together, blocked where they must all stay."""

    def __init__(self) -> None:
        self._parents: list[int] = []
        self._sizes: list[int] = []
        self._keys: dict[Hashable, int] = {}
        self.blocked: dict[int, str] = {}

    def of(self, key: Hashable, size: int) -> int:
        """Return the set that `key` stands for, a new one of `size` channels if there is none."""
        if key not in self._keys:
            self._keys[key] = len(self._parents)
            self._parents.append(len(self._parents))
            self._sizes.append(size)
        return self._keys[key]

    def has(self, key: Hashable) -> int | None:
        """Return the set that `key` stands for, or None."""
        return self._keys.get(key)

    def find(self, one: int) -> int:
        """Return the representative of a set."""
        while self._parents[one] != one:
            self._parents[one] = one = self._parents[self._parents[one]]
        return one

    def size(self, one: int) -> int:
        """Return the number of channels."""
        return self._sizes[self.find(one)]

    def block(self, one: int, why: str) -> None:
        """Keep a set whole; the first reason stays."""
        self.blocked.setdefault(self.find(one), why)

    def join(self, one: int, other: int, where: str) -> None:
        """Make two sets one; if their sizes differ, block both."""
        one, other = self.find(one), self.find(other)
        if one == other:
            return
        if self._sizes[one] != self._sizes[other]:
            for each in (one, other):
                self.block(each, f"{where} joins {self._sizes[one]} channels with {self._sizes[other]}")
            return
        self._parents[other] = one
        why = self.blocked.pop(other, None)
        if why is not None:
            self.block(one, why)


@dataclass(frozen=True)
class _Slot:
    """What a weight's columns read: a set of channels with its multiplicity, or (None) something not followed."""

    channels: int | None
    repeat: int = 1


class Walk:
    """Follows the channels of a whole model.

    Attributes:
        sets: the sets of channels.
        producers: layer -> the set of its rows.
        norms: layer -> the set, and the parameters per channel, of its per-channel parameters.
        consumers: layer -> the set, and the columns per channel, of its columns.
        causes: modules whose forward cannot be traced, by name, with the cause.
    """

    kind: ClassVar[type[Sets]] = Sets

    def __init__(self, model: nn.Module, example: Any = None) -> None:
        self.sets = self.kind()
        self.producers: dict[str, int] = {}
        self.norms: dict[str, tuple[int, int]] = {}
        self.consumers: dict[str, tuple[int, int]] = {}
        self.causes: dict[str, str] = {}
        self._names = {module: name for name, module in model.named_modules()}
        self._slots: dict[int, _Slot] = {}
        self._foreign: dict[int, str] = {}
        self._entered: set[nn.Module] = set()
        self._follow(trace(model, example))
        self._close()

    def _follow(self, traced: Traced) -> None:
        """Walk along the operations of a graph."""
        self.causes |= {self._names[module]: cause for module, cause in traced.opaque.items()}
        if traced.graph is None:
            self._enter(traced.root)
            return
        values: dict[fx.Node, Value] = {}
        for node in traced.graph.nodes:
            inputs = [values[other] for other in node.all_input_nodes]
            if node.op == "output":
                self._block(inputs, "its channels are the output of the network")
            elif node.op == "get_attr":
                values[node] = self._attribute(traced.root, node)
            elif node.op == "placeholder":
                values[node] = self._input(traced.shapes.get(node))
            elif node.op == "call_module":
                module = traced.root.get_submodule(str(node.target))
                value = self._module(node, module, inputs, module in traced.opaque)
                values[node] = self._seen(value, traced.shapes.get(node))
            else:
                values[node] = self._seen(self._function(node, values), traced.shapes.get(node))

    # ---- layers ---------------------------------------------------------------------------------------------------

    def _module(self, node: fx.Node, module: nn.Module, inputs: list[Value], is_opaque: bool) -> Value:
        name = self._names[module]
        if not is_opaque and len(inputs) == 1 and _is_untouched(module):
            x, kind = inputs[0], type(module)
            if isinstance(module, nn.Linear):
                self._read(name, module, x, axis=-1)
                ndim = x.ndim if isinstance(x, Flow) and x.axis == -1 else None
                return self._write(name, module, module.out_features, -1, ndim)
            if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
                return self._convolution(name, module, x)
            if not isinstance(x, Flow):
                if kind not in operations.NORMS and not any(True for _ in module.parameters()):
                    return x
            elif kind in operations.NORMS or isinstance(module, nn.PReLU):
                return self._norm(name, module, x, kind in operations.BATCH_NORMS)
            else:
                value = operations.of_module(module, x)
                if value is not None:
                    return value
        self._block(inputs, f"{name!r} ({type(module).__name__}) mixes them, moves them or cannot be followed")
        self._disown(module, f"{name!r} ({type(module).__name__}) uses its weights", recurse=not is_opaque)
        if is_opaque:
            self._enter(module)
        return None

    def _convolution(self, name: str, module: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Value) -> Value:
        axis = -1 - len(module.kernel_size)
        if module.groups == 1:
            self._read(name, module, x, axis)
            ndim = x.ndim if isinstance(x, Flow) and x.axis == axis else 1 - axis
            return self._write(name, module, module.out_channels, axis, ndim)
        depthwise = module.groups == module.in_channels == module.out_channels
        if depthwise and isinstance(x, Flow) and x.axis == axis and x.repeat == 1 and x.size == module.groups:
            return self._per_channel(name, module, x)
        self._block([x], f"the grouped convolution {name!r} ties them to their groups")
        self._disown(module, f"{name!r} is a grouped convolution")
        return None

    def _norm(self, name: str, module: Any, x: Flow, is_batch: bool) -> Value:
        """Follow a layer with one parameter a channel, on axis 1 (instance norm: the axis before the pixels)."""
        if isinstance(module, nn.PReLU) and module.num_parameters == 1:
            return x
        if x.axis == -1 and x.ndim is None:
            x = replace(x, ndim=2)  # a vector layer's rank is unknown without an example: taken to be (batch, features)
        count = module.num_parameters if isinstance(module, nn.PReLU) else module.num_features
        if isinstance(module, nn.PReLU) or is_batch:
            fits = x.ndim is not None and x.axis == 1 - x.ndim
        else:
            fits = x.axis == operations.NORMS[type(module)]
        if fits and count % x.size == 0 and x.repeat in (None, count // x.size):
            return self._per_channel(name, module, replace(x, repeat=count // x.size))
        self._block([x], f"{name!r} normalises another axis")
        self._disown(module, f"{name!r} normalises another axis")
        return None

    def _per_channel(self, name: str, module: nn.Module, x: Flow) -> Flow:
        assert x.repeat is not None
        self.norms[name] = x.channels, x.repeat
        for thing in (module, *module.parameters()):
            self.sets.join(x.channels, self.sets.of(("rows", id(thing)), x.size), name)
        return x

    def _write(self, name: str, module: nn.Module, size: int, axis: int, ndim: int | None) -> Flow:
        """Return the channels that the rows of a weight make."""
        rows = [self.sets.of(("rows", id(param)), size) for param in module.parameters()]
        for other in rows[1:]:
            self.sets.join(rows[0], other, name)
        self.producers[name] = rows[0]
        return Flow(rows[0], size, axis, ndim)

    def _read(self, name: str, module: nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Value, axis: int) -> None:
        """Tie the columns of a weight to the channels that they read."""
        columns = module.weight.shape[1]
        now = _Slot(None)
        if isinstance(x, Flow):
            repeat = columns // x.size if x.repeat is None else x.repeat
            if x.axis != axis or columns != x.size * repeat:
                self._block([x], f"{name!r} reads them along another axis, or rearranged")
            else:
                now = _Slot(x.channels, repeat)
                self.consumers[name] = x.channels, repeat
        elif x is not None:
            self._block([x], f"{name!r} computes with their number")
        before = self._slots.setdefault(id(module.weight), now)
        if before.channels is not None and now.channels is not None and before.repeat == now.repeat:
            self.sets.join(before.channels, now.channels, name)
        elif before != now:
            for slot in (before, now):
                if slot.channels is not None:
                    self.sets.block(slot.channels, f"{name!r} or a layer tied to it reads something else as well")

    # ---- everything else ------------------------------------------------------------------------------------------

    def _function(self, node: fx.Node, values: dict[fx.Node, Value]) -> Value:
        """Follow a function or method."""
        inputs = [values[other] for other in node.all_input_nodes]
        outcome = operations.of_function(node, values)
        if outcome.is_followed:
            for one, other in outcome.joins:
                self.sets.join(one, other, f"the operation {_label(node)}")
            return outcome.value
        if any(isinstance(x, Flow | Sizes) for x in inputs):
            self._block(inputs, outcome.why or f"the operation {_label(node)} mixes them, moves them or is not known")
        return None

    def _input(self, shape: tuple[int, ...] | None) -> Value:
        """Take an input of the network: its channels belong to nobody here."""
        return None

    def _attribute(self, root: nn.Module, node: fx.Node) -> Value:
        """Take a parameter or buffer that the forward uses itself: a single number is harmless."""
        thing = attribute(root, str(node.target))
        if isinstance(thing, nn.Parameter):
            self._foreign.setdefault(id(thing), f"the forward of {type(root).__name__} uses {node.target!r} by itself")
        return PLAIN if isinstance(thing, Tensor) and thing.numel() == 1 and thing.dim() < 2 else None

    def _enter(self, module: nn.Module) -> None:
        """Follow the parts of a module whose own forward cannot be traced, each by itself."""
        if module in self._entered:
            return
        self._entered.add(module)
        self._disown(module, f"the forward of {type(module).__name__} cannot be traced", recurse=False)
        for child in module.children():
            if type(child).forward is nn.Module.forward:  # a list or mapping of modules
                self._enter(child)
            elif _is_leaf(child):
                self._disown(child, f"{self._names[child]!r} is called by {type(module).__name__}, which cannot be traced")
            else:
                self._follow(trace(child))

    def _block(self, values: Iterable[Value], why: str) -> None:
        for value in values:
            flow = value.flow if isinstance(value, Sizes) else value
            if isinstance(flow, Flow):
                self.sets.block(flow.channels, why)

    def _disown(self, module: nn.Module, why: str, recurse: bool = True) -> None:
        """Remember that parameters are used in a way that is not followed."""
        for thing in (module, *module.parameters(recurse)):
            self._foreign.setdefault(id(thing), why)

    def _seen(self, value: Value, shape: tuple[int, ...] | None) -> Value:
        """Hold what is believed of a value against its shape on the example."""
        if not isinstance(value, Flow) or shape is None:
            return value
        width = shape[value.axis] if len(shape) >= -value.axis else 0
        if width == 0 or width % value.size or value.repeat not in (None, width // value.size):
            self._block([value], "its shape on the example is not what was expected")
            return None
        return replace(value, ndim=len(shape), repeat=width // value.size)

    def _close(self) -> None:
        """Block what a parameter that is used elsewhere takes part in."""
        for key, why in self._foreign.items():
            rows, slot = self.sets.has(("rows", key)), self._slots.get(key)
            if rows is not None:
                self.sets.block(rows, why)
            if slot is not None and slot.channels is not None:
                self.sets.block(slot.channels, why)


def attribute(root: nn.Module, target: str) -> Any:
    """Return what `target`, a path with dots, names in `root`."""
    thing: Any = root
    for part in target.split("."):
        thing = getattr(thing, part)
    return thing


def _is_untouched(module: nn.Module) -> bool:
    """Tell whether a layer is torch's own, without hooks or parametrisations."""
    is_torch = type(module).__module__.startswith("torch.nn.modules") and not isinstance(module, LazyModuleMixin)
    return is_torch and not (module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def _is_leaf(module: nn.Module) -> bool:
    return fx.Tracer().is_leaf_module(module, "")


def _label(node: fx.Node) -> str:
    target = node.target
    return repr(target if isinstance(target, str) else getattr(target, "__name__", str(target)))
