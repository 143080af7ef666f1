"""Training steps of an MLP that is sparse all the time, beside the same net masked, dense, and in torch's compressed rows.

    python benchmarks/sparse_training.py [--threads 1 2] [--optimizers Adam SGD] [--densities 0.1 0.05 0.01] [--repeats 15]

784-1000-1000-1000-10 on batches of 128, all layers at one density, the arms timed in turn in one process:

    sparse  openwork.nn.SparseLinear
    masked  dense layers whose weights are multiplied by a mask after each step
    dense   dense layers without masks, what a mask could at best cost nothing over
    csr     values in torch.sparse_csr_tensor, torch's own way to keep gradient and optimizer state sparse

Forward, loss, backward and optimizer step are timed; optimizers are torch's fused ones for all arms. Prints milliseconds,
the ratio of each arm to `sparse`, and the bytes of parameters, gradients, optimizer state, buffers and masks.
"""

from __future__ import annotations

import argparse
import itertools
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from openwork.core.rng import generator
from openwork.lab import environment
from openwork.nn import SparseLinear
from openwork.runtime.timing import interleave, limited_threads

SIZES = (784, 1000, 1000, 1000, 10)
BATCH = 128
DENSITIES = (0.5, 0.2, 0.1, 0.05, 0.02, 0.01)
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "Adam": lambda params: torch.optim.Adam(params, fused=True),
    "SGD": lambda params: torch.optim.SGD(params, 0.05, momentum=0.9, fused=True),
}


class CSRLinear(nn.Module):
    """A linear layer whose values torch multiplies in compressed rows; gradients come at the entries only."""

    def __init__(self, layer: SparseLinear) -> None:
        super().__init__()
        self.shape = (layer.out_features, layer.in_features)
        self.values = nn.Parameter(layer.values.detach().clone())
        self.bias = nn.Parameter(layer.bias.detach().clone())
        self.register_buffer("rows", layer.starts.long())
        self.register_buffer("columns", layer.columns.long())

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.sparse_csr_tensor(self.rows, self.columns, self.values, self.shape, check_invariants=False)
        return torch.sparse.mm(weight, x.t()).t() + self.bias


def stack(layers: Sequence[nn.Module]) -> nn.Sequential:
    """Return the layers with ReLU between them."""
    return nn.Sequential(*itertools.chain.from_iterable((layer, nn.ReLU()) for layer in layers[:-1]), layers[-1])


def stepper(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, masks: Sequence[tuple[Tensor, Tensor]] = ()
) -> Callable[[], None]:
    """Return a function that takes one training step on fixed data, then multiplies weights by masks."""

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        with torch.no_grad():
            for weight, mask in masks:
                weight.mul_(mask)

    return step


def nbytes(model: nn.Module, optimizer: torch.optim.Optimizer, masks: Sequence[tuple[Tensor, Tensor]]) -> int:
    """Return the bytes of parameters, gradients, buffers, optimizer state and masks."""
    params = list(model.parameters())
    held = [*params, *(one.grad for one in params), *model.buffers(), *(mask for _, mask in masks)]
    held += [value for state in optimizer.state.values() for value in state.values()]
    return sum(one.numel() * one.element_size() for one in held if isinstance(one, Tensor))


def measure(
    densities: Sequence[float] = DENSITIES,
    optimizers: Sequence[str] = tuple(OPTIMIZERS),
    *,
    sizes: Sequence[int] = SIZES,
    batch: int = BATCH,
    threads: int | None = None,
    repeats: int = 15,
    csr: bool = True,
    seed: int = 0,
) -> list[dict[str, object]]:
    """Time the arms and return one row for each optimizer and density.

    Args:
        densities: of all layers.
        optimizers: of "Adam" and "SGD".
        sizes: inputs, hidden layers and outputs.
        batch: examples of a batch.
        threads: torch's, None leaves them.
        repeats: rounds of all arms in turn.
        csr: whether torch's compressed rows are timed too, which are slow.
        seed: of weights and data.

    Returns:
        rows of optimizer, density, threads, batch, and for each arm `<arm>_ms` (the median of a step), `<arm>_bytes` and
        but for `sparse` `<arm>_ratio` (that arm's time over that of `sparse`).
    """
    rows = []
    with limited_threads(threads) as count:
        for name, density in itertools.product(optimizers, densities):
            rows.append({"optimizer": name, "density": density, "threads": count, "batch": batch})
            rows[-1] |= _row(name, density, sizes, batch, repeats, csr, seed)
    return rows


def _row(
    name: str, density: float, sizes: Sequence[int], batch: int, repeats: int, csr: bool, seed: int
) -> dict[str, object]:
    source = generator(seed, "sparse training", str(density))
    x = torch.randn(batch, sizes[0], generator=source)
    y = torch.randint(sizes[-1], (batch,), generator=source)
    layers = [SparseLinear(width, out, density, generator=source) for width, out in itertools.pairwise(sizes)]
    models = {"sparse": stack(layers)}
    models |= {arm: stack([layer.to_dense() for layer in layers]) for arm in ("masked", "dense")}
    if csr:
        models["csr"] = stack([CSRLinear(layer) for layer in layers])
    dense = [layer for layer in models["masked"] if isinstance(layer, nn.Linear)]
    masks = {"masked": [(one.weight, layer.mask.float()) for one, layer in zip(dense, layers, strict=True)]}
    steppers = {arm: OPTIMIZERS[name](model.parameters()) for arm, model in models.items()}
    steps = {arm: stepper(models[arm], steppers[arm], x, y, masks.get(arm, ())) for arm in models}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        seconds = interleave(steps, repeats=repeats)
    found: dict[str, object] = {f"{arm}_ms": 1e3 * taken for arm, taken in seconds.items()}
    found |= {f"{arm}_bytes": nbytes(models[arm], steppers[arm], masks.get(arm, ())) for arm in models}
    return found | {f"{arm}_ratio": taken / seconds["sparse"] for arm, taken in seconds.items() if arm != "sparse"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--densities", type=float, nargs="+", default=DENSITIES)
    parser.add_argument("--optimizers", nargs="+", choices=list(OPTIMIZERS), default=list(OPTIMIZERS))
    parser.add_argument("--threads", type=int, nargs="+", default=[torch.get_num_threads()])
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--no-csr", action="store_true")
    given = parser.parse_args()
    print(f"{environment.processor()}, torch {torch.__version__}, batch {given.batch}, fused optimizers")
    print("threads optimizer density  sparse ms  masked ms  ratio   dense ms  ratio     csr ms  ratio   MB sparse / masked")
    for threads in given.threads:
        for row in measure(
            given.densities,
            given.optimizers,
            batch=given.batch,
            threads=threads,
            repeats=given.repeats,
            csr=not given.no_csr,
        ):
            arms = [arm for arm in ("masked", "dense", "csr") if f"{arm}_ms" in row]
            cells = "  ".join(f"{row[f'{arm}_ms']:9.2f} {row[f'{arm}_ratio']:6.2f}" for arm in arms)
            sizes = f"{row['sparse_bytes'] / 2**20:6.2f} / {row['masked_bytes'] / 2**20:.2f}"
            head = f"{row['threads']:7} {row['optimizer']:9} {row['density']:7} {row['sparse_ms']:10.2f}"
            print(f"{head}  {cells}  {sizes}", flush=True)


if __name__ == "__main__":
    main()
