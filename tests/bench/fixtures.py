"""Results that never change, made by hand: two shapes, four sparsities, one and two threads, and a network."""

from __future__ import annotations

from dataclasses import asdict

from openwork.bench.networks import NETWORKS
from openwork.bench.operators import Cell, row
from openwork.bench.results import Arm
from openwork.bench.roofline import Limits
from openwork.bench.runner import Bench

LIMITS = Limits("avx2", 8, 1, 32e9, ((2**14, 1e11), (2**26, 1e10)), 8e9)
SPEED = {0.5: 0.5, 0.8: 2.0, 0.9: 6.5, 0.95: 12.0}
"""Our ratio on unstructured zeros; blocks of 4 are twice as fast, torch_csr half as fast."""


def bench() -> Bench:
    """Return the results: unstructured and blocks of 4 at 64 and more columns, one network, one peer that is not there."""
    made = Bench(
        {"processor": "Toy 1 (avx2)", "cores": 2, "code": "0", "packages": {"torch": "2.13"}},
        {1: LIMITS, 2: None},
        reasons={"faster than dense": "the toy is slow at 50 %"},
        environment={"openwork": "0.1.0", "processor": "Toy 1 (avx2)", "date": "2026-01-02 03:04 UTC", "threads": 2},
    )
    for threads in (1, 2):
        for shape in ((512, 512, 196), (256, 256, 784)):
            for pattern in ("unstructured", "blocks of 4"):
                for sparsity, speed in SPEED.items():
                    cell = Cell(*shape, sparsity, pattern)
                    fast = speed * (2.0 if pattern == "blocks of 4" else 1.0)
                    arms = {
                        "openwork": Arm("ok", error=0.1),
                        "matmul": Arm("ok", error=0.1, dense=True),
                        "torch_csr": Arm("ok", error=0.1),
                        "deepsparse": Arm("unavailable", reason="it is <gone> | for good"),
                    }
                    times = {"openwork": 1e-3 / fast, "matmul": 1e-3, "torch_csr": 2e-3 / speed}
                    found = row(cell.key, "operator", asdict(cell) | {"shape": cell.shape}, threads, 1e-4, arms, times)
                    made.rows[found.key] = found
    network = NETWORKS[0]
    arms = {"eager": Arm("ok", dense=True), "openwork": Arm("ok"), "litert": Arm("wrong", reason="the output differs")}
    found = row(network.key, "network", asdict(network), 1, 5e-3, arms, {"eager": 40e-3, "openwork": 10e-3})
    made.rows[found.key] = found
    return made
