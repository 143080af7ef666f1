"""`openwork report`: a run's report and table again, or its results where a team already looks."""

from __future__ import annotations

import enum
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from openwork.errors import OpenworkError, RecipeError, StoreError

if TYPE_CHECKING:
    from openwork.report.summary import Results

REPORT = "report.html"
SIGNATURE = b"<footer><p>Made from results.json by openwork"


@dataclass(frozen=True)
class _Asked:
    """What was asked: the results, where they lie, and where to."""

    path: Path
    results: Results
    out: str | None
    uri: str | None
    experiment: str | None
    force: bool
    console: Console


class Export(enum.StrEnum):
    """What results can be exported to."""

    csv = "csv"
    latex = "latex"
    markdown = "markdown"
    mlflow = "mlflow"
    tensorboard = "tensorboard"


def report(
    run: Annotated[
        str, typer.Argument(metavar="RUN", help="A run folder, its results.json, or a results file of docs/results.")
    ],
    export: Annotated[Export | None, typer.Option(help="What to write; without it, the HTML report.")] = None,
    out: Annotated[
        str | None,
        typer.Option("--out", "-o", metavar="PATH", help="A file or folder; RUN/export if not given. - prints text."),
    ] = None,
    uri: Annotated[
        str | None, typer.Option(metavar="URI", help="MLflow: a folder, sqlite:///FILE or a server's address.")
    ] = None,
    experiment: Annotated[
        str | None, typer.Option(metavar="NAME", help="MLflow: the experiment; the run's title if not given.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over files that are there.")] = False,
) -> None:
    """Build a run's HTML report again and print its table, or export its results.

    csv: trials.csv with a row a trial, table.csv with a row an arm, claims.csv. latex: a booktabs table. markdown: the
    same as text. mlflow: a run a trial, found again and updated by the next export. tensorboard: an event file a trial.

    Examples:

      openwork report runs/compare-digits-cnn

      openwork report runs/compare-digits-cnn --export csv -o tables/

      openwork report docs/results/granet.json --export latex -o granet.tex

      openwork report runs/compare-digits-cnn --export mlflow --uri http://localhost:5000
    """
    if export is not Export.mlflow and (uri is not None or experiment is not None):
        raise RecipeError("--uri and --experiment belong to --export mlflow; use -o for files")
    if export is Export.mlflow and out is not None:
        raise RecipeError(f"-o {out!r}: MLflow's store is named by --uri, for example --uri {out}")
    console = Console(highlight=False)
    from openwork.report.reading import read_run

    path, results = read_run(run)
    asked = _Asked(path, results, out, uri, experiment, force, console)
    if export is None:
        _html(asked)
        return
    if not any(results.get(name) for name in ("rows", "trials", "claims")):
        raise StoreError(f"{str(path)!r} holds no rows, trials or claims: there is nothing to export")
    _EXPORTS[export](asked)


def _html(asked: _Asked) -> None:
    from openwork.report import html, tables
    from openwork.report.export import refuse_existing

    if asked.out == "-":
        raise RecipeError("-o -: the report is a page, name a file; --export markdown -o - prints text")
    target = _own(asked.path) if asked.out is None else _in(Path(asked.out), REPORT)
    if not (asked.out is None and _ours(target)):
        refuse_existing([target], force=asked.force)
    asked.console.print(tables.results_table(asked.results))
    if asked.results.get("claims"):
        asked.console.print(tables.claims_table(asked.results["claims"]))
    html.write_report(asked.results, target, dict(_masks(asked)))
    _say(asked.console, [target])


def _csv(asked: _Asked) -> None:
    from openwork.report.export import csv_files, write_texts

    files = csv_files(asked.results)
    if asked.out == "-":
        typer.echo(files["trials.csv" if asked.results.get("trials") else "table.csv"].replace("\r\n", "\n"), nl=False)
        return
    folder = _exports(asked.path) if asked.out is None else Path(asked.out)
    if folder.suffix and not folder.is_dir():
        first = folder
        files = {first.name if name == "trials.csv" else f"{first.stem}-{name}": text for name, text in files.items()}
        folder = first.parent
    _say(asked.console, write_texts(folder, files, force=asked.force))


def _latex(asked: _Asked) -> None:
    from openwork.report.latex import latex_tables

    _text(asked, latex_tables(asked.results), "table.tex")


def _markdown(asked: _Asked) -> None:
    from openwork.report.export import markdown_text

    _text(asked, markdown_text(asked.results), "table.md")


def _text(asked: _Asked, text: str, name: str) -> None:
    from openwork.report.export import write_texts

    if asked.out == "-":
        typer.echo(text, nl=False)
        return
    target = _exports(asked.path) / name if asked.out is None else _in(Path(asked.out), name)
    _say(asked.console, write_texts(target.parent, {target.name: text}, force=asked.force))


def _mlflow(asked: _Asked) -> None:
    from openwork.integrations import mlflow

    own = [asked.path.parent / name for name in (REPORT, "results.json", "recipe.yaml")]
    files = [file for file in own if file.is_file()] if asked.path.name == "results.json" else [asked.path]
    with _bar(asked.console, "runs") as done:
        made = mlflow.export(asked.results, uri=asked.uri, experiment=asked.experiment, files=files, done=done)
    told = f"{made.created} runs made, {made.updated} updated, {made.unchanged} unchanged"
    asked.console.print(f"MLflow experiment {made.experiment!r} at {made.uri}: {told}", markup=False, soft_wrap=True)


def _tensorboard(asked: _Asked) -> None:
    from openwork.integrations import tensorboard

    if asked.out == "-":
        raise RecipeError("-o -: event files need a folder, for example -o events/")
    folder = _exports(asked.path) / "tensorboard" if asked.out is None else Path(asked.out)
    with _bar(asked.console, "trials") as done:
        written = tensorboard.export(asked.results, folder, force=asked.force, done=done)
    where = shlex.quote(str(folder))
    asked.console.print(
        f"{len(written)} event files; look at them with: tensorboard --logdir {where}", markup=False, soft_wrap=True
    )


_EXPORTS: dict[Export, Callable[[_Asked], None]] = {
    Export.csv: _csv,
    Export.latex: _latex,
    Export.markdown: _markdown,
    Export.mlflow: _mlflow,
    Export.tensorboard: _tensorboard,
}


def _own(path: Path) -> Path:
    """Return where a run's report goes: into its folder, or beside another results file under that file's name."""
    return path.with_name(REPORT) if path.name == "results.json" else path.with_suffix(".html")


def _exports(path: Path) -> Path:
    """Return the folder of a run's exports."""
    return path.parent / "export" if path.name == "results.json" else path.parent / f"{path.stem}-export"


def _in(target: Path, name: str) -> Path:
    """Return the target where it names a file, or the file of this name in it where it is a folder."""
    return target if target.suffix and not target.is_dir() else target / name


def _ours(target: Path) -> bool:
    """Tell whether a file is a report that openwork wrote."""
    try:
        return target.is_file() and not target.is_symlink() and SIGNATURE in target.read_bytes()
    except OSError:
        return False


def _masks(asked: _Asked) -> Iterator[tuple[str, Any]]:
    """Yield arm and what its model keeps, for the arms whose model lies in the run folder; say which cannot be read."""
    folder = asked.path.parent / "models"
    if asked.path.name != "results.json" or not folder.is_dir():
        return
    from openwork import saving
    from openwork.cli._finish import file_name

    for row in asked.results.get("arms") or []:
        file = folder / f"{file_name(row['name'])}.safetensors"
        if not file.is_file():
            continue
        try:
            state = saving.load_state(file)
        except OpenworkError as error:
            asked.console.print(f"no picture of {row['name']}: {error}", style="yellow", markup=False, soft_wrap=True)
            continue
        yield row["name"], {name: (value != 0).numpy() for name, value in state.items() if value.dim() >= 2}


@contextmanager
def _bar(console: Console, what: str) -> Iterator[Callable[[int, int], None]]:
    """Yield what moves a progress bar, shown on a terminal only."""
    from rich.progress import Progress

    with Progress(console=console, disable=not console.is_terminal, transient=True) as bars:
        task = bars.add_task(what, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)


def _say(console: Console, paths: list[Path]) -> None:
    for path in paths:
        console.print(str(path), markup=False, soft_wrap=True)
