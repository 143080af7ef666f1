"""Work that is neither one product nor inference: a step of sparse training, decoding sparse codes, accelerating a model.

The arms of a task do the same work; each is checked against the dense one in float64 or against its training, and only
then timed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from openwork.bench.operators import row
from openwork.bench.peers import OURS
from openwork.bench.results import Arm, Row
from openwork.core.patterns import Unstructured
from openwork.core.rng import generator
from openwork.errors import TrialError
from openwork.runtime.decode import decode
from openwork.runtime.positions import from_mask
from openwork.runtime.sparse_products import Products, multiply
from openwork.runtime.timing import interleave

NAMES = ("training 95 %", "training 99 %", "decode", "accelerate")
QUICK_NAMES = ("training 95 %", "training 99 %")
WIDTHS = (784, 1000, 1000, 1000)
CLASSES, BATCH = 10, 128
CODES = (2048, 32, 32768, 768)
"""Samples, atoms a sample, atoms, features."""
_DRIFT = 1e-3
"""Most that losses and weights may differ after `_STEPS` steps, against the largest of them."""
_STEPS = 3


def measure(name: str, names: Iterable[str], *, seconds: float, say: Callable[[str], None] = lambda _name: None) -> Row:
    """Time the arms of a task with torch's number of threads; `names` without openwork leaves its own arm out."""
    ours = OURS in set(names)
    if ours:
        say(OURS)
    if name.startswith("training"):
        arms, calls = _training(1.0 - float(name.split()[1]) / 100.0, ours)
    elif name == "decode":
        arms, calls = _decoding(*CODES, ours)
    else:
        return row(name, "task", {"name": name}, torch.get_num_threads(), None, *_accelerating())
    say("")
    times = interleave(calls, seconds=seconds)
    return row(name, "task", {"name": name}, torch.get_num_threads(), None, arms, times)


@dataclass
class Masked:
    """A multilayer perceptron trained by SGD with momentum whose masked weights are set to zero after each step."""

    weights: list[Tensor]
    biases: list[Tensor]
    masks: list[Tensor]

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.SGD([*self.weights, *self.biases], lr=0.01, momentum=0.9)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (batch, classes)."""
        for weight, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
            x = functional.relu(functional.linear(x, weight, bias))
        return functional.linear(x, self.weights[-1], self.biases[-1])

    def finish(self) -> None:
        """Hold the masks."""
        with torch.no_grad():
            for weight, mask in zip(self.weights, self.masks, strict=False):
                weight.mul_(mask)

    def dense(self) -> list[Tensor]:
        """Return the weights as matrices."""
        return [weight.detach() for weight in self.weights]


class Truly:
    """The same perceptron with the values of kept positions as its only parameters; the readout is dense in both."""

    def __init__(self, weights: list[Tensor], biases: list[Tensor], masks: list[Tensor]) -> None:
        self.masks, self.biases, self.readout = masks, biases, weights[-1]
        self.products = [Products(from_mask(mask)) for mask in masks]
        pairs = zip(weights, masks, strict=False)
        self.values = [weight.detach()[mask].clone().requires_grad_() for weight, mask in pairs]
        self.optimizer = torch.optim.SGD([*self.values, self.readout, *self.biases], lr=0.01, momentum=0.9)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (batch, classes)."""
        for values, bias, products in zip(self.values, self.biases, self.products, strict=False):
            x = functional.relu(multiply(x, values, bias, products))
        return functional.linear(x, self.readout, self.biases[-1])

    def finish(self) -> None:
        """Do nothing: there is nothing to hold to zero."""

    def dense(self) -> list[Tensor]:
        """Return the weights as matrices."""
        pairs = zip(self.masks, self.values, strict=True)
        return [*(torch.zeros(mask.shape).masked_scatter_(mask, v.detach()) for mask, v in pairs), self.readout.detach()]


def step(model: Masked | Truly, x: Tensor, y: Tensor) -> Tensor:
    """Take one training step on images (batch, features) and labels (batch); return the loss before it."""
    model.optimizer.zero_grad(set_to_none=True)
    loss = functional.cross_entropy(model.forward(x), y)
    loss.backward()  # type: ignore[no-untyped-call]
    model.optimizer.step()
    model.finish()
    return loss.detach()


def start(density: float) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor, Tensor]:
    """Return weights and biases as parameters, masks of all layers but the last, a batch of images and its labels."""
    sizes = [*zip(WIDTHS, [*WIDTHS[1:], CLASSES], strict=True)]
    weights, masks = [], []
    for place, (size, out) in enumerate(sizes):
        weight = torch.randn(out, size, generator=generator(0, "weight", place)) * (2.0 / size) ** 0.5
        if place < len(sizes) - 1:
            score = torch.rand(out, size, generator=generator(0, "mask", place))
            masks.append(Unstructured().select(score, density))
            weight *= masks[-1] / density**0.5
        weights.append(nn.Parameter(weight))
    biases = [nn.Parameter(torch.zeros(out)) for _, out in sizes]
    x = torch.rand(BATCH, WIDTHS[0], generator=generator(0, "images"))
    y = torch.randint(0, CLASSES, (BATCH,), generator=generator(0, "labels"))
    return [*weights], [*biases], masks, x, y


def _training(density: float, ours: bool) -> tuple[dict[str, Arm], dict[str, Callable[[], object]]]:
    weights, biases, masks, x, y = start(density)
    dense = Masked(weights, biases, masks)
    arms, calls = {"masked dense": Arm("ok", dense=True)}, {"masked dense": lambda: step(dense, x, y)}
    if not ours:
        return arms, {**calls}
    other = start(density)
    sparse = Truly(*other[:3])
    losses = [(step(dense, x, y), step(sparse, x, y)) for _ in range(_STEPS)]
    error = max(_relative(one, two) for one, two in [*losses, *zip(dense.dense(), sparse.dense(), strict=True)]) / _DRIFT
    reason = f"after {_STEPS} steps it differs by {error * _DRIFT:.2g}: not timed"
    arms[OURS] = Arm("ok", error=error) if error <= 1.0 else Arm("wrong", error=error, reason=reason)
    if error <= 1.0:
        calls[OURS] = lambda: step(sparse, x, y)
    return arms, {**calls}


def _relative(exact: Tensor, found: Tensor) -> float:
    return float((exact - found).abs().max() / exact.abs().max().clamp_min(1e-12))


def _decoding(
    samples: int, kept: int, atoms: int, features: int, ours: bool
) -> tuple[dict[str, Arm], dict[str, Callable[[], object]]]:
    """Return the arms of decoding: dense codes times the dictionary, torch's weighted bag of embeddings, and ours."""
    dictionary = torch.randn(atoms, features, generator=generator(0, "dictionary"))
    values = torch.rand(samples, kept, generator=generator(0, "values"))
    draws = torch.rand(samples, atoms, generator=generator(0, "indices"))
    indices = draws.topk(kept).indices
    codes = draws.zero_().scatter_(1, indices, values)
    calls: dict[str, Callable[[], Tensor]] = {
        "dense": lambda: codes @ dictionary,
        "embedding_bag": lambda: functional.embedding_bag(indices, dictionary, per_sample_weights=values, mode="sum"),
    }
    if ours:
        calls[OURS] = lambda: decode(values, indices, dictionary)
    exact = functional.embedding_bag(indices, dictionary.double(), per_sample_weights=values.double(), mode="sum")
    size = functional.embedding_bag(indices, dictionary.abs(), per_sample_weights=values.abs(), mode="sum")
    allowed = 2.0 * (kept + 1) * torch.finfo(torch.float32).eps * size
    arms: dict[str, Arm] = {}
    with torch.no_grad():
        for name, call in calls.items():
            error = float(((call().double() - exact).abs() / allowed).max())
            reason = f"the largest error is {error:.3g} times what rounding explains: not timed"
            right = error <= 1.0
            arms[name] = Arm("ok" if right else "wrong", error=error, dense=name == "dense", reason="" if right else reason)
    return arms, {name: call for name, call in calls.items() if arms[name].status == "ok"}


_ACCELERATE = """
import sys, time, torch
from openwork.bench.networks import Network, build
from openwork.runtime.plan import accelerate
torch.set_num_threads(int(sys.argv[1]))
model, example = build(Network("resnet50", (1, 3, 224, 224), {}, 0.1, part="convolutions"))
started = time.perf_counter()
accelerate(model, example, verbose=False)
print(time.perf_counter() - started)
"""


def _accelerating() -> tuple[dict[str, Arm], dict[str, float]]:
    """Return the seconds of `accelerate` on ResNet-50 with an empty cache, and in a second process after that."""
    arms, times = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("first", "warm"):
            paths = os.pathsep.join(path for path in sys.path if path)
            done = subprocess.run(
                [sys.executable, "-c", _ACCELERATE, str(torch.get_num_threads())], capture_output=True, text=True,
                env={**os.environ, "OPENWORK_CACHE": folder, "PYTHONPATH": paths}, check=False,
            )  # fmt: skip
            if done.returncode:
                last = (done.stderr.strip().splitlines() or ["no word"])[-1]
                raise TrialError(f"accelerating ResNet-50 failed ({last[:200]}): run openwork.accelerate on it to see more")
            arms[name], times[name] = Arm("ok"), float(done.stdout.split()[-1])
    return arms, times
