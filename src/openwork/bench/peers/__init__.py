"""Peers: ways to multiply with a sparse weight, or to run a whole network. The folder is the registry: one file, one peer.

A peer has up to two functions. `operator(weight, bias, x)` gets a weight (out, in) with zeros, a bias (out) or None and
activations x (in, columns), all float32 and contiguous, and returns a function without arguments whose result is
`weight @ x + bias`, (out, columns). `network(model, example)` gets a module in eval mode and its input, and returns a
function without arguments whose result is the model's output. What can be done once (packing, compiling, laying the
activations out as the peer likes them) is done before that function is returned and is not timed.

Beside them stand three constants: `ABOUT`, one line for tables; `DENSE`, whether this is a mode of dense torch, the best
of which is what ratios are taken against; `APART`, whether it has a thread pool of its own, which with more than one
thread disturbs torch's in the same process; such a peer names the modules it cannot do without in `NEEDS`. A peer that
cannot run here raises `Unavailable`. Threads are torch's.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import pkgutil
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol, cast

from openwork.errors import MissingExtra, ModelError

if TYPE_CHECKING:
    from torch import Tensor, nn

OURS = "openwork"
PACKAGES = (
    "torch", "scipy", "mkl", "onnx", "onnxruntime", "onnxscript", "openvino", "ai-edge-litert", "deepsparse",
)  # fmt: skip
"""Packages whose versions matter to a peer's numbers."""


class Unavailable(MissingExtra):
    """A peer cannot run here; the message says what is missing and how to get it."""


class Operator(Protocol):
    """The operator half of a peer."""

    ABOUT: str
    DENSE: bool
    APART: bool

    def operator(self, weight: Tensor, bias: Tensor | None, x: Tensor) -> Callable[[], Tensor]:
        """Return what multiplies weight (out, in) with x (in, columns), plus bias (out): a tensor (out, columns)."""


class Network(Protocol):
    """The network half of a peer."""

    ABOUT: str
    DENSE: bool
    APART: bool

    def network(self, model: nn.Module, example: Any) -> Callable[[], Tensor]:
        """Return what runs `model`, a module in eval mode, on `example`, the input it is prepared for."""


def names() -> list[str]:
    """Return the names of all peers, openwork's own first; imports none of them."""
    found = (module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))
    return sorted(found, key=lambda name: (name != OURS, name))


def operators() -> dict[str, Operator]:
    """Return the peers that multiply with a weight, by name."""
    return {name: cast(Operator, peer) for name in names() if hasattr(peer := load(name), "operator")}


def networks() -> dict[str, Network]:
    """Return the peers that run networks, by name."""
    return {name: cast(Network, peer) for name in names() if hasattr(peer := load(name), "network")}


def load(name: str) -> ModuleType:
    """Return a peer's module by name.

    Raises:
        ModelError: if there is no such peer.
    """
    if name not in names():
        raise ModelError(f"there is no peer {name!r}: choose from {', '.join(names())}")
    return importlib.import_module(f"{__name__}.{name}")


def is_apart(name: str) -> bool:
    """Tell whether a peer wants a process of its own: it has a pool of its own, and what it needs is installed."""
    peer = load(name)
    return bool(peer.APART) and all(importlib.util.find_spec(module) is not None for module in peer.NEEDS)


def package(name: str, install: str | None = None) -> Any:
    """Import and return an optional package.

    Raises:
        Unavailable: if it is not installed or does not work here, with what to install.
    """
    try:
        return importlib.import_module(name)
    except (ImportError, OSError, AttributeError) as error:  # a package built for another numpy fails in any of them
        reason = " ".join(str(error).split())[:200]
        raise Unavailable(f"{name} cannot be imported ({reason}): pip install {install or name}") from error


@functools.cache
def versions() -> dict[str, str]:
    """Return the versions of the packages behind the peers, those that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
