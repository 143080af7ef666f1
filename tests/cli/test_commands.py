from __future__ import annotations

import subprocess
import sys

import typer

from openwork import cli


def test_the_first_sentences_are_those_of_the_commands() -> None:
    before = list(cli.app.registered_commands), list(cli.app.registered_groups)
    try:
        cli.register(None)
        made = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    finally:
        cli.app.registered_commands, cli.app.registered_groups = before
    assert set(made) == set(cli.COMMANDS)
    for name, (_, line) in cli.COMMANDS.items():
        first = " ".join((made[name].help or "").split("\n\n")[0].split())
        assert first == line, name


def test_help_imports_no_command() -> None:
    code = (
        "import sys; sys.argv = ['openwork', '--help']\n"
        "import openwork.cli\n"
        "try: openwork.cli.main()\n"
        "except SystemExit as end: assert not end.code\n"
        "assert not {'torch', 'pydantic', 'numpy', 'openwork.cli.compare'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in cli.COMMANDS)


def test_an_unknown_command_is_named() -> None:
    done = subprocess.run([sys.executable, "-m", "openwork", "prune"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "prune" in done.stderr
