"""`openwork bench`: a sparse network, or the products it is made of, beside every way to run them that can be had here."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from openwork.errors import RecipeError, TrialError

if TYPE_CHECKING:
    from openwork.bench.results import Arm, Row
    from openwork.bench.runner import Bench, Job
    from openwork.bench.suite import Suite

WORDS = ("operators", "networks", "tasks", "page")
BUSY = 0.5
"""Processes a core, on average over the last minute, from which numbers are not to be trusted."""


def bench(
    model: Annotated[
        str,
        typer.Argument(
            help="A .safetensors file that openwork.save wrote, a model's name, module:function, or one of operators, "
            "networks, tasks, page.",
            metavar="MODEL",
        ),
    ],
    input_shape: Annotated[
        str | None, typer.Option("--input", help="Shape of the example, batch included.", metavar="1x3x224x224")
    ] = None,
    density: Annotated[float | None, typer.Option(help="Prune to this share of weights, the same in each layer.")] = None,
    pattern: Annotated[str, typer.Option(help="unstructured, block4x1, group8, 2:4 ...")] = "unstructured",
    part: Annotated[str, typer.Option(help="What is pruned: 1x1, convolutions, linear or all.")] = "all",
    select: Annotated[str, typer.Option(help="How: magnitude or random.")] = "magnitude",
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="An option of the model: --set multiplier=0.25", metavar="KEY=VALUE")
    ] = None,
    threads: Annotated[str | None, typer.Option(help="Numbers of threads, such as 1,4; one and all if not given.")] = None,
    peers: Annotated[str | None, typer.Option(help="Only these, by name: openwork,eager,onnxruntime.")] = None,
    seconds: Annotated[
        float | None, typer.Option(help="For the timed rounds of one product; of a network ten times.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer shapes, sparsities and rounds.")] = False,
    out: Annotated[str | None, typer.Option(help="Folder of the page; docs/results if not given.")] = None,
    rewrite: Annotated[bool, typer.Option("--rewrite", help="page: write it again without measuring.")] = False,
    json_file: Annotated[
        str | None, typer.Option("--json", help="Keep what is measured in this file, and go on from it.", metavar="FILE")
    ] = None,
) -> None:
    """Time dense torch (eager, channels last, compiled), the peers and openwork side by side; check every output first.

    Ratios are against the best dense mode: above 1 is faster. The roofline's share says how far the machine goes.

    Examples:

      openwork bench model.safetensors --input 1x3x224x224

      openwork bench mobilenet-v1 --input 1x3x128x128 --set multiplier=0.5 --density 0.1 --part 1x1 --threads 1

      openwork bench my_package:make_model --input 1x3x64x64 --density 0.1 --pattern block4x1

      openwork bench operators --quick

      openwork bench page --out docs/results

    A run that is stopped goes on from its file (--json, or the page's folder) with the same command.
    """
    from openwork.bench import suite

    console = Console()
    names = tuple(word.strip() for word in (peers or "").split(",") if word.strip())
    suite.chosen(names)
    counts = _counts(threads)
    if model == "page":
        _page(console, suite.Suite(suite.PARTS, names, counts, quick, seconds), out, rewrite)
        return
    if model in WORDS:
        _run(console, suite.Suite((model,), names, counts, quick, seconds).jobs(), json_file)
        return
    from openwork.bench import runner
    from openwork.bench.networks import Network
    from openwork.lab.spec import read_recipe

    if density is None and (pattern, part, select) != ("unstructured", "all", "magnitude"):
        raise RecipeError("--pattern, --part and --select say how to prune: give --density too, for example --density 0.1")
    shape = _shape(input_shape) if input_shape else _stored_shape(model)
    options = read_recipe("\n".join(one.replace("=", ": ", 1) for one in settings or []), "--set")
    network = Network(model, shape, options, density, pattern, part, select)
    whole = 10.0 * (seconds if seconds is not None else 0.1 if quick else 0.3)
    jobs = runner.jobs("network", [network], suite.chosen(names), list(counts) or suite.default_threads(), whole)
    _run(console, jobs, json_file)


def _run(console: Console, jobs: list[Job], json_file: str | None) -> None:
    """Measure what the file has not, with a bar, and show it; Ctrl-C says how to go on and ends with status 130."""
    from openwork.bench import runner, suite

    path = None if json_file is None else Path(json_file)
    found, words = suite.opened(path) if path is not None else (runner.Bench(runner.identity()), "")
    if words:
        console.print(words, style="yellow", highlight=False)
    trouble = _measure(console, found, runner.missing(found, jobs), path)
    if found.rows:
        _show(console, found)
    if trouble:
        raise TrialError("; ".join(trouble))


def _measure(console: Console, found: Bench, left: list[Job], path: Path | None) -> list[str]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from openwork.bench import runner

    if left:
        _warn_of_load(console)
    bars = Progress(
        BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
        TextColumn("{task.description}"), console=console, disable=not console.is_terminal, transient=True,
    )  # fmt: skip
    with bars:
        task = bars.add_task("starting", total=sum(len(job.cells) for job in left))

        def done(_row: Row) -> None:
            if path is not None:
                runner.write(path, found)
            bars.advance(task)

        try:
            return runner.run(found, left, done, lambda words: bars.update(task, description=escape(words)))
        except KeyboardInterrupt:
            bars.stop()
            go_on = "the same command goes on from here" if path is not None else "--json FILE keeps them"
            console.print(f"stopped with {len(found.rows)} rows measured; {go_on}")
            raise typer.Exit(130) from None


def _warn_of_load(console: Console) -> None:
    """Say so if other processes want the cores: every arm with more than one thread then waits for them."""
    import os

    load, cores = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0, os.cpu_count() or 1
    if load > BUSY * cores:
        words = f"this machine is busy (load {load:.1f} on {cores} cores): numbers with more than one thread mean little"
        console.print(words, style="yellow", highlight=False)


def _page(console: Console, made: Suite, out: str | None, rewrite: bool) -> None:
    from openwork.bench import page, runner, suite

    folder = Path(out or ("runs/performance-quick" if made.quick else "docs/results"))
    if not rewrite:
        found, words = suite.opened(folder / suite.FILE)
        if words:
            console.print(words, style="yellow", highlight=False)
        trouble = _measure(console, found, runner.missing(found, made.jobs()), folder / suite.FILE)
        written = page.write(found, folder)
    else:
        written, trouble = suite.write(folder), []
    console.print(str(written), highlight=False, markup=False)
    if trouble:
        raise TrialError("; ".join(trouble))


def _show(console: Console, found: Bench) -> None:
    """Print products as one table, networks and tasks as one each, and below what could not run, with reasons."""
    rows = found.merged()
    operators = [row for row in rows if row.kind == "operator"]
    for threads in sorted({row.threads for row in operators}):
        console.print(_products(operators, threads))
    for row in rows:
        if row.kind != "operator":
            console.print(f"[bold]{escape(row.key.removesuffix(f' {row.threads}'))}[/], {_threads(row.threads)}")
            console.print(_arms(row))
    reasons = {
        (name, arm.status): arm.reason for row in rows for name, arm in row.arms.items() if arm.status != "ok"
    }  # fmt: skip
    for (name, status), reason in reasons.items():
        console.print(f"{name} ({status}): {reason}", style="dim", markup=False, highlight=False)
    for threads, limits in sorted(found.limits.items()):
        if limits is not None:
            console.print(
                f"roofline, {_threads(threads)}: {limits.flops / 1e9:.0f} GFLOP/s, first cache "
                f"{limits.first_cache / 1e9:.0f} GB/s, memory {limits.triad / 1e9:.0f} GB/s ({limits.target})",
                style="dim", highlight=False,
            )  # fmt: skip
    console.print(str(found.identity.get("processor", "")), style="dim", markup=False, highlight=False)


def _products(rows: Iterable[Row], threads: int) -> Table:
    from openwork.bench.peers import OURS

    chosen = [row for row in rows if row.threads == threads]
    names = dict.fromkeys(name for row in chosen for name, arm in row.arms.items() if arm.ratio and not arm.dense)
    ordered = sorted(names, key=lambda name: (name != OURS, name))
    table = _table(_threads(threads), "zeros", "dense ms", "least ms", *ordered, "roofline")
    shape = ""
    for row in chosen:
        if row.cell["shape"] != shape and shape:
            table.add_section()
        shape = str(row.cell["shape"])
        zeros = f"{100 * float(row.cell['sparsity']):g} % {row.cell['pattern']}"
        cells = (_number(row.arms[name].ratio) if name in row.arms else "-" for name in ordered)
        share = row.arms[OURS].share if OURS in row.arms else None
        table.add_row(shape, zeros, _ms(row.dense_ms), _ms(row.least_ms), *cells, _percent(share))
    return table


def _arms(row: Row) -> Table:
    table = _table("arm", "ms", "ratio", "error", "roofline")
    timed = {name: arm for name, arm in row.arms.items() if arm.ms is not None}
    best = min((arm.ms for arm in timed.values() if arm.dense and arm.ms is not None), default=None)
    for name, arm in sorted(timed.items(), key=lambda item: item[1].ms or 0.0):
        style = "bold" if arm.dense and arm.ms == best else ""
        table.add_row(name, _ms(arm.ms), _number(arm.ratio), _error(arm), _percent(arm.share), style=style)
    return table


def _table(first: str, *titles: str) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0), collapse_padding=True)
    table.add_column(first, no_wrap=True)
    for title in titles:
        table.add_column(title, justify="left" if title == "zeros" else "right", no_wrap=title == "zeros", overflow="fold")
    return table


def _counts(text: str | None) -> tuple[int, ...]:
    if text is None:
        return ()
    if not re.fullmatch(r"\d+(,\d+)*", text.strip()) or "0" in text.split(","):
        raise RecipeError(f"--threads {text!r}: give whole numbers of at least 1, for example 1,4")
    return tuple(int(word) for word in text.split(","))


def _shape(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)+", text.strip()):
        raise RecipeError(f"--input {text!r}: give the example's shape with its batch, for example 1x3x224x224")
    return tuple(int(word) for word in text.strip().split("x"))


def _stored_shape(model: str) -> tuple[int, ...]:
    """Return the shape that the file's recipe names, one example."""
    if not model.endswith(".safetensors"):
        raise RecipeError(f"--input is missing: say what {model!r} gets, for example --input 1x3x224x224")
    from openwork import saving
    from openwork.runtime import files

    recipe: Any = files.read_state(model)[1].get(saving.RECIPE)
    try:
        return (1, *map(int, recipe["input_shape"]))
    except (TypeError, KeyError, ValueError):
        raise RecipeError(f"{model!r} does not say what it gets: give --input, for example 1x3x224x224") from None


def _threads(count: int) -> str:
    return f"{count} thread{'s' if count != 1 else ''}"


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}" if value < 10.0 else f"{value:.1f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100.0 * value:.0f} %"


def _error(arm: Arm) -> str:
    return "-" if arm.error is None else f"{arm.error:.2g}"
