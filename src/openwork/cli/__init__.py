"""The `openwork` command: one file a command, none of which imports torch before there is something to do with it."""

from __future__ import annotations

import os
import sys

import typer

from openwork.errors import OpenworkError, TrialError

app = typer.Typer(
    name="openwork",
    help="Make a network sparse, compare methods under one budget, run it faster, and see what it cost.",
    epilog="Start with: openwork compare",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _options(version: bool = typer.Option(False, "--version", help="Print the version.")) -> None:
    if version:
        import openwork

        print(openwork.__version__)
        raise typer.Exit


def _register() -> None:
    from openwork.cli import bench, compare, data, doctor, essential, methods, report, serve, sparsify, study

    app.command("compare")(compare.command())
    app.command("study")(study.study)
    app.command("sparsify")(sparsify.sparsify)
    app.command("essential")(essential.essential)
    app.command("bench")(bench.bench)
    app.command("list")(methods.list_methods)
    app.command("show")(methods.show)
    app.add_typer(data.app, name="data")
    app.command("report")(report.report)
    app.command("serve")(serve.serve)
    app.command("doctor")(doctor.doctor)


def main() -> None:
    """Run the command line; an openwork error is one sentence on standard error and exit status 2."""
    _register()
    try:
        app()
    except OpenworkError as error:
        _say(error)
        sys.exit(2)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


def _say(error: OpenworkError) -> None:
    from rich.console import Console

    kind = "warning" if isinstance(error, TrialError) else "error"
    text = "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in str(error))
    Console(stderr=True, soft_wrap=True, highlight=False).print(f"[bold red]{kind}:[/] ", end="")
    print(text, file=sys.stderr)
