"""Whole networks: what is built, how it is made sparse, and one of them measured end to end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from openwork.bench import checking, peers, roofline
from openwork.bench.operators import row
from openwork.bench.results import Arm, Row
from openwork.core.patterns import parse
from openwork.core.rng import generator
from openwork.errors import ModelError, OpenworkError
from openwork.runtime.timing import interleave, refusal, run

ENCODER = "encoder-base"
"""The name of twelve pre-norm blocks of width 768 with twelve heads, the size of BERT-base, on (batch, tokens, 768)."""
_STEADY: Any = {"sample": 0.02, "settled": True}
"""A network is timed as a server runs it, again and again: 20 ms in a row, after a call that is not timed."""
PARTS = ("1x1", "convolutions", "linear", "all")


@dataclass(frozen=True)
class Network:
    """A network to measure.

    Attributes:
        model: a file written by `openwork.save`, a reference model's name, `module:function`, or `encoder-base`.
        input: shape of the example, batch included.
        options: keywords of the model.
        density: share of weights kept in each layer that is pruned; None leaves the weights as they are.
        pattern: the pattern of what is kept, such as `unstructured`, `block4x1` or `group8`.
        part: which layers are pruned: `1x1`, `convolutions` (all but those that see the image), `linear` or `all`.
        select: `magnitude`, or `random`.
        classes: outputs of a model made by name.
    """

    model: str
    input: tuple[int, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    density: float | None = None
    pattern: str = "unstructured"
    part: str = "all"
    select: str = "magnitude"
    classes: int = 1000

    @property
    def key(self) -> str:
        """A name for the network, the same in every run."""
        given = "".join(f" {name}={value}" for name, value in self.options.items())
        sparse = "" if self.density is None else f" {self.pattern} {1.0 - self.density:g} of {self.part}"
        return f"{self.model}{given} @{'x'.join(map(str, self.input))}{sparse}"

    @staticmethod
    def from_json(found: Mapping[str, Any]) -> Network:
        """Return the network of `dataclasses.asdict`."""
        return Network(**{**found, "input": tuple(found["input"])})


def _mobilenet(width: float, side: int, **settings: Any) -> Network:
    return Network("mobilenet-v1", (1, 3, side, side), {"multiplier": width}, **{"density": 0.1, "part": "1x1", **settings})


NETWORKS = (
    _mobilenet(1.0, 224),
    _mobilenet(1.0, 128),
    _mobilenet(0.25, 64),
    _mobilenet(1.0, 224, density=0.7, pattern="group16"),
    Network("resnet18", (1, 3, 224, 224), {}, 0.1, part="convolutions"),
    Network(ENCODER, (1, 128, 768), {}, 0.1, part="linear"),
)
QUICK_NETWORKS = (NETWORKS[2], NETWORKS[1])


def build(network: Network) -> tuple[nn.Module, Any]:
    """Return the model in eval mode with its zeros in place, and its example.

    Raises:
        ModelError: if it cannot be built, pruned or run on an example of this shape.
        FormatError: if the file is none that holds a model.
    """
    if Path(network.model).suffix == ".safetensors":
        from openwork import saving

        model = saving.load(network.model)
    elif network.model == ENCODER:
        model = encoder(network.input[-1])
    else:
        from openwork import models

        shape = network.input[1:]
        model = models.build(network.model, input_shape=shape, classes=network.classes, seed=0, options=network.options)
    model.eval().requires_grad_(False)
    if network.density is not None:
        prune(model, network.density, network.pattern, network.part, network.select)
    return model, example(model, network.input)


def encoder(width: int = 768, depth: int = 12, heads: int = 12) -> nn.Module:
    """Return `depth` transformer blocks on (batch, tokens, width), drawn anew but always the same."""
    from openwork.models.transformer import Block, initialise

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return initialise(nn.Sequential(*(Block(width, heads, 0.0, causal=False) for _ in range(depth))), depth)


def example(model: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """Return an example of `shape`: normal noise, or for a model that wants tokens small whole numbers.

    Raises:
        ModelError: if the model refuses both.
    """
    noise = torch.randn(shape, generator=generator(0, "example"))
    with torch.no_grad():
        try:
            run(model, noise)
            return noise
        except Exception as error:  # the user's model, whatever it raises
            tokens = torch.randint(0, 100, shape, generator=generator(0, "tokens"))
            try:
                run(model, tokens)
            except Exception:
                raise refusal(type(model).__name__, error) from error
            return tokens


def prune(model: nn.Module, density: float, pattern: str, part: str, select: str = "magnitude") -> int:
    """Set weights to zero in place, the same share in every layer of the part; return how many layers were pruned.

    Raises:
        PatternError: for a pattern that does not exist.
        ModelError: for an unknown part or selection, or if no layer is of that part and divided by the pattern.
    """
    if part not in PARTS or select not in ("magnitude", "random"):
        raise ModelError(f"{part!r} and {select!r}: a part is one of {', '.join(PARTS)}, a selection magnitude or random")
    if not 0.0 < density <= 1.0:
        raise ModelError(f"a density of {density:g} is not in (0, 1]: 0.1 keeps a tenth of the weights")
    made, count = parse(pattern), 0
    first = next((layer for layer in model.modules() if isinstance(layer, nn.Conv2d)), None)
    for name, layer in model.named_modules():
        if not _is_of(layer, part, first) or not made.divides(layer.weight.shape):
            continue
        weight: Tensor = layer.weight.detach()
        score = weight.abs() if select == "magnitude" else torch.rand(weight.shape, generator=generator(0, "mask", name))
        weight.mul_(made.select(score, density))
        count += 1
    if not count:
        raise ModelError(f"no layer is of the part {part!r} and divided by {pattern!r}: choose another part or pattern")
    return count


def measure(
    network: Network,
    names: Iterable[str],
    limits: roofline.Limits | None,
    *,
    seconds: float,
    say: Callable[[str], None] = lambda _name: None,
) -> Row:
    """Prepare, check and time the peers of `names` on one network, with torch's number of threads.

    Arms are timed in interleaved rounds in one process; those that are `APART` one by one after the others where there
    is more than one thread.
    """
    say("build")
    model, given = build(network)
    say("reference")
    exact = checking.reference(model, given)
    least = None if limits is None else least_seconds(model, given, limits)
    arms: dict[str, Arm] = {}
    calls: dict[str, Callable[[], Any]] = {}
    known = {name: peer for name in names if hasattr(peer := peers.load(name), "network")}
    apart = [name for name in known if known[name].APART and torch.get_num_threads() > 1]
    with torch.no_grad():
        for name in (one for one in known if one not in apart):
            say(name)
            arms[name], call = prepared(known[name], model, given, exact)
            calls |= {name: call} if call is not None else {}
        say("")
        times = interleave(calls, seconds=seconds, **_STEADY) if calls else {}
        for name in apart:
            say(name)
            arms[name], call = prepared(known[name], model, given, exact)
            if call is not None:
                times |= interleave({name: call}, seconds=seconds / 4, **_STEADY)
    return row(network.key, "network", asdict(network), torch.get_num_threads(), least, arms, times)


def prepared(peer: peers.Network, model: nn.Module, given: Any, exact: Tensor) -> tuple[Arm, Callable[[], Any] | None]:
    """Return what became of a peer's preparation and its check, and what to time if it is right."""
    try:
        call = peer.network(model, given)
        error = checking.network_error(exact, call())
    except peers.Unavailable as problem:
        return Arm("unavailable", dense=peer.DENSE, reason=str(problem)), None
    except (OpenworkError, RuntimeError, ValueError, TypeError, MemoryError) as problem:
        reason = " ".join(f"{type(problem).__name__}: {problem}".split())[:300]
        return Arm("crashed", dense=peer.DENSE, reason=reason), None
    if not error <= 1.0:
        largest = error * checking.NETWORK_ERROR
        reason = f"the output differs by {largest:.2g} of its largest entry: not timed"
        return Arm("wrong", error=error, dense=peer.DENSE, reason=reason), None
    return Arm("ok", error=error, dense=peer.DENSE), call


def least_seconds(model: nn.Module, given: Any, limits: roofline.Limits) -> float:
    """Return the sum of the least times of all convolutions and linear layers on their non-zeros.

    Batch norm, activations, pooling and attention's own products are taken as free, so the true limit is higher.
    """
    total = 0.0

    def look(layer: nn.Module, _inputs: Any, output: Any) -> None:
        nonlocal total
        if isinstance(output, Tensor):
            total += roofline.least_seconds(limits, work_of(layer, output))

    layers = [layer for layer in model.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    handles = [layer.register_forward_hook(look) for layer in layers]
    try:
        with torch.no_grad():
            run(model, given)
    finally:
        for handle in handles:
            handle.remove()
    return total


def work_of(layer: nn.Module, output: Tensor) -> roofline.Work:
    """Return the work of a convolution or linear layer whose output is known, as a product on its non-zeros.

    A dense weight, and one with groups, is counted as loading each activation once for sixteen rows.
    """
    assert isinstance(layer, (nn.Conv2d, nn.Linear))
    weight = layer.weight.detach().flatten(1)
    out, kept = weight.shape[0], int(torch.count_nonzero(weight))
    columns = output.numel() // out
    block = 16 if kept > 0.8 * weight.numel() else roofline.block_of(weight)
    size = layer.in_channels if isinstance(layer, nn.Conv2d) else layer.in_features
    return roofline.Work(out, size, columns, kept, block)


def _is_of(layer: nn.Module, part: str, first: nn.Module | None) -> bool:
    if isinstance(layer, nn.Linear):
        return part in ("linear", "all")
    if not isinstance(layer, nn.Conv2d) or layer.groups != 1 or layer is first:
        return False
    return part in ("convolutions", "all") or (part == "1x1" and layer.kernel_size == (1, 1))
