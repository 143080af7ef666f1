"""The code blocks of a page: read, and run in order in the current folder.

Every block in python, bash or sh is run: python blocks of a page share their names, shell blocks stop at the first error.
A comment above a block says otherwise: `<!-- not-run: why -->`; `<!-- output -->` for lines that the block before it prints,
which is checked; or `<!-- needs: package -->` for what is run where the package is installed.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RUN = {"python", "bash", "sh"}
SHOWN = {"text", "yaml", "toml", "latex", "json"}
_MARK = re.compile(r"\s*<!--\s*([a-z-]+)(?::\s*(.*?))?\s*-->\s*")


@dataclass(frozen=True)
class Block:
    """A code block: language, text, the line it begins at, and the word and reason of the comment above it."""

    language: str
    text: str
    line: int
    mark: str = ""
    reason: str = ""

    @property
    def runs(self) -> bool:
        """Whether it is to be run here."""
        return self.language in RUN and self.mark not in ("not-run", "output") and not self.lacks

    @property
    def lacks(self) -> str:
        """The package that it needs and that is not installed, if there is one."""
        missing = self.mark == "needs" and importlib.util.find_spec(self.reason) is None
        return self.reason if missing else ""


def blocks(text: str) -> Iterator[Block]:
    """Yield the fenced blocks of a page in order.

    Raises:
        ValueError: for a language or a comment that nobody knows, a comment without its reason, or an open fence.
    """
    lines = text.split("\n")
    mark, at = ("", ""), 0
    while at < len(lines):
        line = lines[at]
        fence = re.fullmatch(r"(\s*)(`{3,}|~{3,})\s*(.*)", line)
        if fence:
            indent, ticks, language = fence[1], fence[2], fence[3].strip()
            end = next((n for n in range(at + 1, len(lines)) if lines[n].strip() == ticks), None)
            if end is None:
                raise ValueError(f"line {at + 1}: the fence is never closed")
            body = [one.removeprefix(indent) for one in lines[at + 1 : end]]
            if language not in RUN | SHOWN:
                raise ValueError(f"line {at + 1}: a block in {language!r}; known are {sorted(RUN | SHOWN)}")
            yield Block(language, "\n".join(body) + "\n", at + 2, *mark)
            mark, at = ("", ""), end
        elif found := _MARK.fullmatch(line):
            if found[1] not in ("not-run", "output", "needs"):
                raise ValueError(f"line {at + 1}: nobody knows the comment {line.strip()!r}")
            if found[1] != "output" and not found[2]:
                raise ValueError(f"line {at + 1}: {found[1]} needs a reason after a colon")
            mark = (found[1], found[2] or "")
        elif line.strip():
            mark = ("", "")
        at += 1


def run(page: Path) -> None:
    """Run a page's blocks in the current folder; what fails names its line.

    Raises:
        RuntimeError: if a shell block fails, or a block of output has a line that the block before it did not print.
    """
    names: dict[str, Any] = {"__name__": "__main__"}
    printed: str | None = None
    for block in blocks(page.read_text(encoding="utf-8")):
        where = f"{page.name}:{block.line}"
        if block.mark == "output":
            missing = [] if printed is None else [one for one in block.text.splitlines() if one not in printed]
            if missing:
                raise RuntimeError(f"{where}: the block before it did not print {missing[0]!r} but:\n{printed}")
        elif not block.runs:
            printed = None
        elif block.language == "python":
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                # leading newlines make a traceback name the page's own lines
                exec(compile("\n" * (block.line - 1) + block.text, str(page), "exec"), names)
            printed = out.getvalue()
        else:
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", block.text], stdout=subprocess.PIPE, text=True, check=False
            )
            printed = done.stdout
            if done.returncode:
                raise RuntimeError(f"{where}: the block ended with status {done.returncode}:\n{block.text}\n{printed}")
        if block.runs:
            print(f"--- {where}\n{printed}", flush=True)


if __name__ == "__main__":
    run(Path(sys.argv[1]))
