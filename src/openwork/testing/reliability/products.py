"""R11 to R15: gradients, products, exported models and their files against exact or dense references."""

from __future__ import annotations

import copy
import random
import statistics
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from openwork import saving
from openwork.core.rng import derive, generator
from openwork.errors import ModelError
from openwork.lab.store import read_json
from openwork.models import building, catalog
from openwork.runtime import formats
from openwork.runtime.bounds import bound
from openwork.runtime.decode import decode
from openwork.runtime.kernels.target import host, processor
from openwork.runtime.plan import accelerate
from openwork.runtime.positions import from_mask
from openwork.runtime.sparse_products import Products, multiply
from openwork.runtime.timing import interleave
from openwork.testing.reliability import _children
from openwork.testing.reliability._rows import Measured, Part, Parts, Scale, complaints, none_wrong, total

LEAST, TWICE, CLOSE = 0.97, 2.0, 1e-5
SIZES = {0.10: 0.25, 0.05: 0.15}
SMALL = ("mlp-256", "lenet5", "cnn")


def product_gradients(density: float, columns: int, block: int) -> Part:
    """Check the gradients of the sparse product, in float64 against finite differences; rows may be empty."""
    draw = generator(0, "reliability", "gradients", str(density), columns, block)
    mask = (torch.rand(8 // block, 5, generator=draw) < density).repeat_interleave(block, 0)
    mask[:block] = False  # an empty row
    found = from_mask(mask, block)
    values, bias = torch.randn(found.nnz, generator=draw), torch.randn(8, generator=draw)
    leaves = [one.double().requires_grad_() for one in (torch.randn(columns, 5, generator=draw), values, bias)]
    products = Products(found)
    return _checked(lambda x, v, b: multiply(x, v, b, products), leaves)


def decode_gradients(samples: int, k: int) -> Part:
    """Check the gradients of the sparse decode, in float64 against finite differences."""
    draw = generator(0, "reliability", "decode", samples, k)
    indices = torch.randint(6, (samples, k), generator=draw)
    shapes = ((samples, k), (6, 4), (4,))
    leaves = [torch.randn(shape, generator=draw, dtype=torch.float64).requires_grad_() for shape in shapes]
    return _checked(lambda v, d, b: decode(v, indices, d, b), leaves)


def layer_gradients(density: float, batch: int) -> Part:
    """Check the gradients of `nn.SparseLinear` as a layer, in float64 against finite differences."""
    from openwork.nn import SparseLinear

    layer = SparseLinear(6, 8, density, dtype=torch.float64, generator=generator(0, "reliability", "layer"))
    x = torch.randn(batch, 6, dtype=torch.float64, generator=generator(1, "reliability", "layer")).requires_grad_()

    def apply(x: Tensor, values: Tensor, bias: Tensor) -> Any:
        return torch.func.functional_call(layer, {"values": values, "bias": bias}, (x,))

    assert layer.bias is not None
    return _checked(apply, [x, layer.values.detach().requires_grad_(), layer.bias.detach().requires_grad_()])


def _checked(function: Callable[..., Any], leaves: list[Tensor]) -> Part:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # gradcheck warns of empty inputs
        try:
            good = not leaves[0].numel() or torch.autograd.gradcheck(function, leaves)
            y = function(*leaves)
            y.sum().backward()
        except RuntimeError as error:
            return {"cases": 1, "wrong": [str(error)[:300]]}
    missing = [k for k, one in enumerate(leaves) if one.grad is None or one.grad.shape != one.shape]
    return {"cases": 1, "wrong": [] if good and not missing else [f"no gradient of operand {missing}"]}


def _gradients(_scale: Scale) -> Parts:
    cases: Parts = {
        **{f"product, density {d}, batch {n}, block {b}": partial(product_gradients, d, n, b)
           for d in (0.0, 0.3, 1.0) for n in (0, 1, 4) for b in (1, 2)},
        **{f"decode, {n} x {k}": partial(decode_gradients, n, k) for n in (0, 1, 4) for k in (1, 3)},
        **{f"layer, density {d}, batch {n}": partial(layer_gradients, d, n) for d in (0.0, 0.2, 1.0) for n in (0, 3)},
    }  # fmt: skip
    return cases


def _judge_gradients(found: Mapping[str, Part]) -> Measured:
    bad = sum(bool(part["wrong"]) for part in found.values())
    return Measured(
        f"{len(found) - bad} of {len(found)} cases, empty rows and batch 0 included", bad == 0, complaints(found)
    )


def multiplied(name: str, first: int, cases: int) -> Part:
    """Multiply with a format over random shapes, densities, dtypes and strides; compare with float64 and the bound."""
    tested, wrong, done = formats.load(name), list[str](), 0
    for case in range(first, first + 20 * cases):
        weight, bias, x, told = _operands(name, case)
        try:
            packed = tested.pack(weight, bias)
        except ModelError:  # no format takes every weight; what it takes it must multiply
            continue
        done += 1
        y = tested.matmul(packed, x)
        exact = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
        good = y.shape == exact.shape and bool(((y.double() - exact).abs() <= bound(weight, bias, x)).all())
        wrong += [] if good else [f"case {case}, {told}, is outside the bound"]
        if done == cases:
            break
    return {"cases": done, "wrong": wrong + ([f"only {done} weights were taken"] if done < cases else [])}


def _operands(name: str, case: int) -> tuple[Tensor, Tensor | None, Tensor, str]:
    choose, draw = random.Random(derive(0, "reliability", "product", case)), generator(case, "reliability", "product")
    out, inputs = (choose.choice([1, 2, 7, 16, 33, 64, choose.randint(1, 150)]) for _ in range(2))
    batch, density = choose.choice([0, 1, 2, 5, 17, 64]), choose.choice([0.0, 0.05, 0.3, 1.0, choose.random()])
    dtype = choose.choice([torch.float32, torch.float32, torch.float64])
    weight = torch.randn(out, inputs, generator=draw, dtype=dtype)
    weight[torch.rand(out, inputs, generator=draw) >= density] = 0
    if name == "block":  # such weights as the format is for: columns in blocks of four rows
        kept = torch.rand(-(-out // 4), inputs, generator=draw) < density
        weight = torch.randn(out, inputs, generator=draw, dtype=dtype) * kept.repeat_interleave(4, 0)[:out]
    elif name == "nm":  # two of four
        scores = torch.rand(out, -(-inputs // 4), 4, generator=draw)
        weight *= (scores.argsort(-1).argsort(-1) < 2).reshape(out, -1)[:, :inputs]
    elif choose.random() < 0.3:
        weight[:: choose.randint(1, 3)] = 0
        weight[:, :: choose.randint(2, 4)] = 0
    bias = torch.randn(out, generator=draw, dtype=dtype) if choose.random() < 0.5 else None
    x = torch.randn(batch, 2 * inputs, generator=draw, dtype=dtype)
    x = x[:, ::2] if choose.random() < 0.3 else x[:, :inputs].contiguous()
    return weight, bias, x, f"{out}x{inputs} at {density:.2f}, batch {batch}, {str(dtype).removeprefix('torch.')}"


def _multiplications(scale: Scale) -> Parts:
    count, rounds = (200, 5) if scale == "long" else (4, 1)
    return {f"{name} {k}": partial(multiplied, name, 100_000 * k, count) for name in formats.names() for k in range(rounds)}


def _judge_multiplications(found: Mapping[str, Part]) -> Measured:
    bad = none_wrong(found, f"products of {len(formats.names())} formats are outside the bound")
    return Measured(bad.value, bad.passed, bad.detail)


def masked(name: str, density: float, batch: int) -> tuple[nn.Module, Tensor]:
    """Return a reference model in eval mode, pruned at random, and a batch of inputs for it."""
    draw = generator(0, "reliability", "masked", name)
    if name.startswith("gpt"):
        model = building.build(name, input_shape=(64,), classes=256, seed=0)
        x = torch.randint(0, 256, (batch, 64), generator=draw)
    else:
        shape = (1, 28, 28) if name.startswith("lenet") else (3, 32, 32)
        model = building.build(name, input_shape=shape, classes=10, seed=0)
        x = torch.randn(batch, *shape, generator=draw)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(torch.rand(weight.shape, generator=draw) < density)
    return model.eval(), x


def exported(name: str, density: float) -> Part:
    """Compare an accelerated model with the masked one: every output, and the class that wins."""
    model, x = masked(name, density, 16)
    dense = copy.deepcopy(model)
    fast = accelerate(model, x[:4], verbose=False, repeats=3)
    with torch.no_grad():
        expected, found = dense(x), fast(x)
    apart = float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
    winners = float((found.argmax(-1) != expected.argmax(-1)).double().sum())
    wrong = [] if apart <= CLOSE else [f"outputs are {apart:.1e} of the scale apart"]
    wrong += [f"{winners:.0f} winners of {expected[..., 0].numel()} differ"] if winners else []
    return {"cases": expected[..., 0].numel(), "wrong": wrong, "apart": apart, "mode": fast.plan.record.mode}  # type: ignore[union-attr]


def trained_export() -> Part:
    """Train a small network on digits with RigL, accelerate it, and compare the winners over the whole test set."""
    from openwork import data
    from openwork.methods.sparsify.rigl import RigL
    from openwork.train.loop import fit
    from openwork.train.settings import Settings

    source = data.load("digits")
    model = building.build("mlp-256", input_shape=(1, 8, 8), classes=10, seed=0)
    fit(model, source, Settings(steps=60, batch_size=64), seed=0, sparsifier=RigL(0.1, total_steps=60, every=10))
    x = torch.cat([inputs for inputs, _ in source.batches("test")])
    dense = copy.deepcopy(model).eval()
    fast = accelerate(model.eval(), x, verbose=False, repeats=3)
    with torch.no_grad():
        expected, found = dense(x), fast(x)
    apart = float((found - expected).abs().max() / expected.abs().max())
    differ = int((found.argmax(1) != expected.argmax(1)).sum())
    wrong = [f"{differ} of {len(x)} winners differ"] if differ else []
    return {"cases": len(x), "wrong": wrong + ([] if apart <= CLOSE else [f"{apart:.1e} apart"]), "apart": apart}


def _exports(scale: Scale) -> Parts:
    names = catalog.names() if scale == "long" else SMALL[:1]
    parts: Parts = {name: partial(exported, name, 0.1) for name in names}
    return {**parts, "trained on digits": trained_export}


def _judge_exports(found: Mapping[str, Part]) -> Measured:
    apart = max(part.get("apart", 0.0) for part in found.values())
    bad = sum(bool(part["wrong"]) for part in found.values())
    value = f"within {apart:.1e} of the scale, {len(found) - bad} of {len(found)} models ({total(found, 'cases'):,} outputs)"
    return Measured(value, bad == 0, complaints(found))


def raced(name: str, batch: int, density: float, repeats: int) -> Part:
    """Time an accelerated reference model and the dense one in interleaved rounds."""
    model, x = masked(name, density, batch)
    return _race(model, x, f"{name}, batch {batch}, density {density:g}", repeats)


def raced_layer(batch: int, repeats: int) -> Part:
    """Time a linear layer of 2,048 x 2,048 at 95 % sparsity and the dense one in interleaved rounds."""
    draw = generator(0, "reliability", "layer", batch)
    layer = nn.Linear(2048, 2048)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(2048, 2048, generator=draw) * (torch.rand(2048, 2048, generator=draw) < 0.05))
    return _race(layer.eval(), torch.randn(batch, 2048, generator=draw), f"2048x2048 at 95 %, batch {batch}", repeats)


def _race(model: nn.Module, x: Tensor, told: str, repeats: int) -> Part:
    dense = copy.deepcopy(model)
    fast = accelerate(model, x, verbose=False, repeats=repeats)
    with torch.no_grad():
        times = interleave({"dense": lambda: dense(x), "fast": lambda: fast(x)}, repeats=repeats, seconds=20.0)
    return {"cells": [[told, times["dense"] / times["fast"]]]}


def recorded() -> Part | None:
    """Return the cells of `benchmarks/never_slower.py` if they were measured on this machine, else None."""
    root = _children.checkout()
    known = read_json(root / "docs" / "results" / "never-slower.json") if root else None
    target = host()
    here = [f"{processor()}, {target.name if target else 'no kernels'}", torch.get_num_threads(), torch.__version__]
    if not known or known.get("identity") != here:
        return None
    rows = known["rows"]
    return {
        "cells": [[f"{r['model']}, batch {r['batch']}, density {r['density']:g}", r["dense_ms"] / r["ms"]] for r in rows],
        "models": sorted({row["model"] for row in rows}),
    }


def _races(scale: Scale) -> Parts:
    repeats = 15 if scale == "long" else 3
    layers: Parts = {
        f"layer, batch {batch}": partial(raced_layer, batch, repeats) for batch in ((1, 64) if scale == "long" else (1,))
    }
    found = recorded()
    if found is not None:
        return {"recorded": lambda: found, **layers}
    names = ("mlp-300-100", "lenet5", "cnn", "resnet20", "mobilenet-v1", "vit-tiny") if scale == "long" else ("mlp-256",)
    densities = (1.0, 0.5, 0.1) if scale == "long" else (0.1,)
    cells: Parts = {
        f"{n}, {b}, {d}": partial(raced, n, b, d, repeats)
        for n in names for b in ((1, 64) if scale == "long" else (1,)) for d in densities
    }  # fmt: skip
    return {**cells, **layers}


def _judge_races(found: Mapping[str, Part]) -> Measured:
    cells = [cell for name, part in found.items() if not name.startswith("layer") for cell in part["cells"]]
    layers = [cell for name, part in found.items() if name.startswith("layer") for cell in part["cells"]]
    worst, slow = min(cells, key=lambda cell: cell[1]), [cell for cell in cells + layers if cell[1] < LEAST]
    thin: list[Any] = min(layers, key=lambda cell: cell[1]) if layers else ["no layer", 0.0]
    value = (
        f"{worst[1]:.2f}x at worst ({worst[0]}; median {statistics.median(c[1] for c in cells):.2f}x of {len(cells)}); "
        f"{thin[1]:.2f}x at least for {thin[0]}"
    )
    models = {cell[0].partition(",")[0] for cell in cells}
    missing = [name for name in catalog.names() if name not in models]
    remains = [f"{told} is {ratio:.2f}x" for told, ratio in slow[:3]]
    remains += [f"not measured: {', '.join(missing)} (python benchmarks/never_slower.py)"] if missing else []
    return Measured(value, not slow and thin[1] >= TWICE and not missing, "; ".join(remains))


def weighed(name: str) -> Part:
    """Save a pruned reference model and compare the file with the plain safetensors file of the same tensors."""
    wrong: list[str] = []
    ratios: dict[str, float] = {}
    for density, most in SIZES.items():
        model, _ = masked(name, density, 1)
        with _children.folder() as folder:
            saved = saving.save(model, folder / "model.safetensors")
            size: float = Path(saved.path).stat().st_size / saved.dense_bytes
        ratios[f"{1 - density:.0%}"] = size
        wrong += [] if size <= most else [f"{size:.1%} of dense at {1 - density:.0%}"]
    return {"cases": len(SIZES), "wrong": wrong, "ratios": ratios}


def _weights(scale: Scale) -> Parts:
    return {name: partial(weighed, name) for name in (catalog.names() if scale == "long" else SMALL)}


def _judge_weights(found: Mapping[str, Part]) -> Measured:
    worst = {share: max(found, key=lambda name: found[name]["ratios"][share]) for share in ("90%", "95%")}
    told = ", ".join(f"{found[name]['ratios'][share]:.1%} at {share} ({name})" for share, name in worst.items())
    return Measured(f"at most {told}, of {len(found)} models", not complaints(found), complaints(found))


GRADIENTS = _gradients, _judge_gradients
PRODUCTS = _multiplications, _judge_multiplications
EXPORT = _exports, _judge_exports
SPEED = _races, _judge_races
SIZE = _weights, _judge_weights
