"""Graphs of a module's forward by torch.fx, with the parts that cannot be traced left whole, and shapes of an example."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from openwork.errors import ModelError

_CONCRETE = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class Traced:
    """What is known of a module's forward.

    Attributes:
        root: the module.
        graph: its operations in order; None if its own forward cannot be traced.
        opaque: submodules that stand in the graph as one node because their forward cannot be traced, with the cause;
            the root itself if `graph` is None.
        shapes: shape of every tensor in the graph on the example; empty without one.
    """

    root: nn.Module
    graph: fx.Graph | None
    opaque: dict[nn.Module, str]
    shapes: dict[fx.Node, tuple[int, ...]]


def trace(root: nn.Module, example: Any = None) -> Traced:
    """Trace the forward of `root`; layers of torch.nn are single nodes, arguments with a default take it.

    Args:
        root: any module; not changed.
        example: what the module is called with: a tuple gives positional arguments, a mapping keyword arguments,
            anything else is the only argument. Optional arguments that it names are then given.

    Raises:
        ModelError: if the example does not fit the forward, or the forward fails on it.
    """
    given = _bound(root, example)
    opaque: dict[nn.Module, str] = {}
    if "forward" in vars(root):
        return Traced(root, None, {root: "its forward was replaced on the instance"}, {})
    while True:
        tracer = _Tracer(opaque, given)
        try:
            graph = tracer.trace(root)
        except Exception as error:  # a user's forward may fail on symbols in any way
            cause = f"{type(error).__name__}: {' '.join(str(error).split())}"
            part = root if tracer.failed is None or tracer.failed in opaque else tracer.failed
            opaque[part] = cause
            if part is root:
                return Traced(root, None, opaque, {})
        else:
            return Traced(root, graph, opaque, {} if example is None else _shapes(root, graph, given))


class _Tracer(fx.Tracer):
    """Traces through user modules down to torch.nn's; remembers the innermost module that fails."""

    def __init__(self, opaque: Mapping[nn.Module, str], given: Mapping[str, Any]) -> None:
        super().__init__()
        self._opaque, self._given = opaque, given
        self.failed: nn.Module | None = None

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Tell whether a module is one node."""
        return m in self._opaque or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Record or trace the call of a submodule."""
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self.failed = self.failed or m
            raise

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """Give the root symbols for tensors, and plain values and defaults as they are, so that its branches resolve."""
        args: list[Any] = [self.root]
        kwargs: dict[str, Any] = {}
        for name, parameter in list(inspect.signature(root_fn).parameters.items())[1:]:
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                continue
            value = self._given.get(name, parameter.default)
            if name in self._given or value is parameter.empty:
                is_plain = name in self._given and isinstance(value, _CONCRETE)
                value = value if is_plain else self.create_proxy("placeholder", name, (), {})
            if parameter.kind is parameter.KEYWORD_ONLY:
                kwargs[name] = value
            else:
                args.append(value)
        return lambda: root_fn(*args, **kwargs), []


class _Run(fx.Interpreter):
    """Runs a graph and notes the shape of every tensor."""

    def __init__(self, root: nn.Module, graph: fx.Graph) -> None:
        super().__init__(root, graph=graph)
        self.extra_traceback = False
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run one operation."""
        return self.note(n, super().run_node(n))

    def note(self, node: fx.Node, value: Any) -> Any:
        """Remember the shape of a tensor, and return it."""
        if isinstance(value, Tensor):
            self.shapes[node] = tuple(value.shape)
        return value


def call_arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the positional and keyword arguments that `example` stands for."""
    if isinstance(example, Mapping):
        return (), dict(example)
    return (example if type(example) is tuple else (example,)), {}


@contextmanager
def quietly(model: nn.Module) -> Iterator[None]:
    """Run a block with `model` in eval mode and without gradients; its modes are afterwards what they were."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _bound(root: nn.Module, example: Any) -> dict[str, Any]:
    if example is None:
        return {}
    args, kwargs = call_arguments(example)
    try:
        return dict(inspect.signature(root.forward).bind(*args, **kwargs).arguments)
    except TypeError as error:
        raise ModelError(f"the example does not fit the forward of {type(root).__name__}: {error}") from error


def _shapes(root: nn.Module, graph: fx.Graph, given: Mapping[str, Any]) -> dict[fx.Node, tuple[int, ...]]:
    run = _Run(root, graph)
    inputs = {node: given[str(node.target)] for node in graph.nodes if node.op == "placeholder"}
    for node, value in inputs.items():
        run.note(node, value)
    try:
        with quietly(root):
            run.run(initial_env=dict(inputs), enable_io_processing=False)
    except Exception as error:
        raise ModelError(
            f"{type(root).__name__} fails on the example ({type(error).__name__}: {' '.join(str(error).split())}); "
            "give one that it accepts"
        ) from error
    return run.shapes
