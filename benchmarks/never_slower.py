"""Is an accelerated model ever slower than the dense one? Every reference model, batch 1 and 64, three densities.

    python benchmarks/never_slower.py [--quick] [MODEL ...]

Each pair is timed anew after `accelerate` has chosen, in interleaved rounds; where the accelerated one seems slower, five
times as many rounds decide. Rows are kept in docs/results as they come,
so a stopped run goes on; the page is written after each.
"""

from __future__ import annotations

import argparse
import copy
import datetime
from pathlib import Path

import torch

from openwork import atomic, models
from openwork.core.rng import generator
from openwork.lab.store import read_json
from openwork.models import catalog
from openwork.runtime.kernels.target import host, processor
from openwork.runtime.plan import accelerate
from openwork.runtime.timing import interleave

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "results"
DENSITIES, BATCHES = (1.0, 0.5, 0.1), (1, 64)
ALLOWED = 1.03
SIDE, VOCABULARY, TOKENS = 32, 256, 64


def example(name: str, batch: int) -> tuple[torch.nn.Module, torch.Tensor]:
    """Return a reference model and a batch for it: tokens for language models, images for the others."""
    draw = generator(0, "never slower", name)
    if name.startswith("gpt"):
        model = models.build(name, input_shape=(TOKENS,), classes=VOCABULARY, seed=0)
        return model.eval(), torch.randint(0, VOCABULARY, (batch, TOKENS), generator=draw)
    channels = 1 if name.startswith("lenet") else 3
    side = 28 if name.startswith("lenet") else SIDE
    model = models.build(name, input_shape=(channels, side, side), classes=10, seed=0)
    return model.eval(), torch.randn(batch, channels, side, side, generator=draw)


def measured(name: str, batch: int, density: float, repeats: int) -> dict[str, object]:
    """Return one row: milliseconds of both and how many times as long the accelerated one takes."""
    model, x = example(name, batch)
    draw = generator(1, "never slower", name)
    for weight in model.parameters():
        if weight.ndim > 1:
            weight.data *= torch.rand(weight.shape, generator=draw) < density
    dense = copy.deepcopy(model)
    fast = accelerate(model, x, verbose=False, repeats=repeats)
    with torch.no_grad():
        times = interleave({"dense": lambda: dense(x), "fast": lambda: fast(x)}, repeats=repeats, seconds=20.0)
        if times["fast"] > ALLOWED * times["dense"]:  # or was it another program? more rounds tell, whatever they say
            times = interleave({"dense": lambda: dense(x), "fast": lambda: fast(x)}, repeats=5 * repeats, seconds=60.0)
    return {
        "model": name, "batch": batch, "density": density, "dense_ms": 1e3 * times["dense"], "ms": 1e3 * times["fast"],
        "slower": times["fast"] / times["dense"], "mode": fast.plan.record.mode,  # type: ignore[union-attr]
    }  # fmt: skip


def page(rows: list[dict[str, object]], machine: str, threads: int) -> str:
    """Return the table as Markdown."""
    worst = max(rows, key=lambda row: float(row["slower"]))  # type: ignore[arg-type]
    over = [row for row in rows if float(row["slower"]) > ALLOWED]  # type: ignore[arg-type]
    lines = [
        "# Never slower than dense", "",
        f"Every reference model, accelerated and dense, timed anew in interleaved rounds ({machine}, {threads} threads, "
        f"torch {torch.__version__}, {datetime.date.today()}). Above 1.03 would be slower than promised: {len(over)} of "
        f"{len(rows)} cells; the worst is {worst['slower']:.3f} ({worst['model']}, batch {worst['batch']}, density "
        f"{worst['density']}). Written by `python benchmarks/never_slower.py`.", "",
        "| model | batch | density | dense ms | accelerated ms | times as fast | how |", "|---|--:|--:|--:|--:|--:|---|",
    ]  # fmt: skip
    lines += [
        f"| {row['model']} | {row['batch']} | {row['density']} | {row['dense_ms']:.3f} | {row['ms']:.3f} | "
        f"{1 / float(row['slower']):.2f} | {row['mode']} |"  # type: ignore[arg-type]
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="names; all reference models if none is given")
    parser.add_argument("--quick", action="store_true", help="five rounds instead of fifteen")
    chosen = parser.parse_args()
    place = FOLDER / "never-slower.json"
    target = host()
    machine = f"{processor()}, {target.name if target else 'no kernels'}"
    known = read_json(place) or {}
    identity = [machine, torch.get_num_threads(), torch.__version__]
    rows = known.get("rows", []) if known.get("identity") == identity else []
    for name in chosen.models or catalog.names():
        for batch in BATCHES:
            for density in DENSITIES:
                if any((row["model"], row["batch"], row["density"]) == (name, batch, density) for row in rows):
                    continue
                row = measured(name, batch, density, 5 if chosen.quick else 15)
                print(f"{name:16s} batch {batch:2d} density {density:.1f}: {1 / float(row['slower']):.2f}x", flush=True)  # type: ignore[arg-type]
                rows.append(row)
                atomic.write_json(place, {"identity": identity, "rows": rows})
                atomic.write_bytes(FOLDER / "never-slower.md", page(rows, machine, torch.get_num_threads()).encode())


if __name__ == "__main__":
    main()
