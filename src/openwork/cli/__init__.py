"""The `openwork` command: one file a command, none of which imports torch before there is something to do with it."""

from __future__ import annotations

import importlib
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


COMMANDS = {
    "compare": ("compare", "Train methods under one budget and show what each keeps, costs and gains."),
    "study": ("study", "Test a paper's claim: run its study, judge it, and write results and report."),
    "sparsify": (
        "sparsify",
        "Prune a pretrained transformer in one shot and save it: transformers opens the folder, openwork its small file.",
    ),
    "essential": (
        "essential",
        "Prune a pretrained model once at every sparsity of a grid and show where its quality drops.",
    ),
    "bench": (
        "bench",
        "Time dense torch (eager, channels last, compiled), the peers and openwork side by side; check every output first.",
    ),
    "list": ("methods:list_methods", "List the methods with what they claim."),
    "show": ("methods:show", "Show a method: paper, claim, departures, and how to use it."),
    "data": ("data", "Named data sets: what there is, where it lies, and fetching it ahead of time."),
    "report": ("report", "Build a run's HTML report again and print its table, or export its results."),
    "serve": ("serve", "Show every run on this machine in one local page, which only reads."),
    "doctor": (
        "doctor",
        "Check the installation; with --long or --short, measure how reliable openwork is on this machine.",
    ),
}
"""Where each command is and its first sentence, so that `openwork --help` imports none of them."""


def register(asked: str | None) -> None:
    """Add the commands to the app: `asked` as it is, or all if it is None; the others by their first sentence only."""
    for name, (home, line) in COMMANDS.items():
        if asked not in (name, None):
            app.command(name, help=line)(_elsewhere)
            continue
        module, _, function = home.partition(":")
        found = importlib.import_module(f"openwork.cli.{module}")
        if isinstance(group := getattr(found, "app", None), typer.Typer):
            app.add_typer(group, name=name)
        else:
            app.command(name)(found.command() if hasattr(found, "command") else getattr(found, function or module))


def _elsewhere() -> None:
    """Stand for a command that was not asked for."""


def main() -> None:
    """Run the command line; an openwork error is one sentence on standard error and exit status 2."""
    completing = any(name.startswith("_OPENWORK_") for name in os.environ)  # a shell asks for words
    register(None if completing else next((word for word in sys.argv[1:] if not word.startswith("-")), ""))
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
