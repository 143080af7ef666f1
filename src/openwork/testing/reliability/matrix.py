"""The matrix: every reliability figure with its target, how it is measured, and the functions that do it."""

from __future__ import annotations

from collections.abc import Mapping

from openwork.errors import RecipeError
from openwork.testing.reliability import (
    costs,
    downloads,
    intrusion,
    keeping,
    masks,
    parallel,
    products,
    resuming,
    suite,
    surface,
    sweeps,
    verdicts,
    web,
)  # fmt: skip
from openwork.testing.reliability._rows import Row

_TABLE = (
    ("R1", "unreadable checkpoints after SIGKILL", "0 of 500",
     "writers of checkpoints and of model files killed at random moments; what is left is read", keeping.KILLS),
    ("R2", "kill and resume", "100 % bit-equal",
     "every sparsifier x SGD, AdamW, RMSprop killed at a random step and continued in a new process; every tensor",
     resuming.RESUMES),
    ("R3", "repeat exactness", "100 % equal metrics",
     "each study's smoke preset, every arm twice in fresh processes, the global generators seeded differently",
     resuming.REPEATS),
    ("R4", "independence of order and workers", "identical results",
     "one sweep with 1 and 4 workers, each in a shuffled order", resuming.ORDERS),
    ("R5", "exact density", "kept = round(d n), always; N:M by definition",
     "random shapes, four dtypes, ties, densities 0, 1/n, .01 ... 1; every sparsifier trained to its end", masks.DENSITIES),
    ("R6", "masked weights stay zero", "0 violations",
     "200 steps of every stepping optimizer of torch under every sparsifier, random gradients", masks.ZEROS),
    ("R7", "optimizers", "all stepping ones; LBFGS and SparseAdam refused clearly",
     "every optimizer that torch.optim has", masks.OPTIMIZERS),
    ("R8", "non-intrusive", "5 of 5 for 20 architectures",
     "keys, deepcopy, safetensors, graphs of torch.compile while masks change, hooks left after detach",
     intrusion.INTRUSION),
    ("R9", "agreement of data-parallel ranks", "masks identical; weights within 1e-6 of one process",
     "2 and 4 gloo ranks, unequal global seeds, batches that no rank count divides", parallel.AGREEMENT),
    ("R10", "a disagreement is detected", "within one revision, rank and layer named",
     "one bit of one rank's mask flipped between two revisions", parallel.DISAGREEMENT),
    ("R11", "gradients", "100 %, empty rows and batch 0 included",
     "finite differences in float64 for every backward of our own and for the layer", products.GRADIENTS),
    ("R12", "sparse against dense products", "0 outside the stated bound",
     "every format x 1,000 random shapes, densities, dtypes and strides", products.PRODUCTS),
    ("R13", "fidelity of exported models", "within 1e-5 of the scale, same winners",
     "every reference model, accelerated against masked; a trained one over its test set", products.EXPORT),
    ("R14", "never slower than dense", ">= 0.97x in every case; >= 2x at 95 % on 2048 x 2048",
     "accelerated and dense in interleaved rounds, batch 1 and 64, every reference model", products.SPEED),
    ("R15", "file size", "<= 25 % of dense at 90 %, <= 15 % at 95 %",
     "bytes on disk of every reference model, pruned at random", products.SIZE),
    ("R16", "malformed input", "own error or equal content; 0 crashes, <= 1 s, <= 200 MB",
     "100,000 mutants of each format; those without a digest may hold another sound value", keeping.MUTANTS),
    ("R17", "a flipped bit is detected", "100 %",
     "random single bits of every file with a digest", keeping.FLIPS),
    ("R18", "code from files", "0 runs; no unpickler in the source",
     "pickles and tags under every file name that is read; imports and calls in the whole source tree", keeping.PICKLES),
    ("R19", "page: host, paths, escaping", "400, 404, no hostile text as it is",
     "foreign Host headers, 50 traversals, 12 hostile names on every page and in the report", web.PAGES),
    ("R20", "page: address", "loopback only by default; a token elsewhere",
     "the sockets of `openwork serve` as the system lists them", web.BIND),
    ("R21", "a sweep survives its trials", "78 ok and 22 labelled correctly; then only the missing",
     "100 trials: 10 killed, 5 hang, 5 raise, 2 out of memory; the same call again", sweeps.SURVIVALS),
    ("R22", "stale runs", "recovered at the next start, no manual step",
     "the parent of a sweep killed at a random moment", sweeps.ORPHANS),
    ("R23", "full disk", "earlier results readable, one sentence, exit status 2",
     "a disk of its own that fills up in the middle of a sweep, then gets room", sweeps.DISKS),
    ("R24", "divergence", "noticed within 1 step, tensor named, 0 bad masks",
     "NaN and infinities in input, weight, gradient, loss and score at random steps", masks.DIVERGENCE),
    ("R25", "false positives of verdicts", "<= 7 % at nominal 5 %",
     "1,000 simulated null comparisons of 5 seeds for each kind of claim", verdicts.NULLS),
    ("R26", "power of verdicts", ">= 60 % supported at 1 sd with 5 seeds",
     "1,000 simulated comparisons with a planted effect, paired seeds", verdicts.POWER),
    ("R27", "sabotage", "0 studies still supported",
     "each study with its method broken on purpose, by the tests that require its claim to fall", verdicts.SABOTAGE),
    ("R28", "flaky tests", "0 failures",
     "the whole suite 50 times in random orders, with random hash and hypothesis seeds", suite.FLAKY),
    ("R29", "coverage and mutation", ">= 95 % lines and branches; >= 85 % of mutants noticed",
     "core, sparsifier, runtime, bench by their own tests; a sample of mutants of every module of core", suite.COVERAGE),
    ("R30", "stability of public names", "no silent change",
     "signatures against a snapshot that is changed on purpose only", surface.NAMES),
    ("R31", "offline", "everything but fetching works",
     "commands run while every connection is refused, in their children too", surface.OFFLINE),
    ("R32", "fresh installation", "doctor green in <= 60 s on Python 3.11 to 3.13",
     "pip into a new virtual environment (short form: this one)", surface.INSTALL),
    ("R33", "start-up", "<= 0.3 s, torch not imported",
     "`openwork --help` and `openwork list` in a fresh process, median", surface.START_UP),
    ("R34", "memory of masks", "packed <= 3.2 %, live <= 26 % of float32 weights",
     "every tensor that a sparsifier holds after three steps", costs.MEMORY),
    ("R35", "time of masks", "<= 3 % a step between revisions",
     "ResNet-20, batch 128, RigL and dense in turn, median of pairs", costs.OVERHEAD),
    ("R36", "downloads", "refused or resumed; no part under the final name",
     "a server that cuts, alters, drips, hangs up, refuses and leads to plain http; killed clients", downloads.DOWNLOADS),
)  # fmt: skip
TIMED = frozenset({"R14", "R33", "R35"})

ROWS: Mapping[str, Row] = {
    key: Row(key, figure, target, how, parts, judge, key in TIMED) for key, figure, target, how, (parts, judge) in _TABLE
}


def chosen(keys: list[str]) -> list[Row]:
    """Return the rows of these keys in the matrix' order, all of them for none.

    Raises:
        RecipeError: if there is no such row.
    """
    wanted = [key.upper() for key in keys]
    for key in wanted:
        if key not in ROWS:
            raise RecipeError(f"there is no reliability figure {key!r}; there are R1 to R{len(ROWS)}")
    return [row for key, row in ROWS.items() if not wanted or key in wanted]
