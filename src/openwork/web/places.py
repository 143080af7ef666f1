"""Where runs live: folders that are searched, run folders in them, and a list of those that commands wrote elsewhere.

A run folder is one that `openwork.lab.store` made: it holds `results.json`, or `trials/` with trials or a lock. Links are
never followed, so a folder that is found lies inside the folder that was searched.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from openwork.report.text import visible

DEEPEST = 5
MOST_FOLDERS = 50_000
LARGEST_LIST = 4 * 2**20
TRIAL = re.compile(r"[0-9a-f]{24}")
RUN = re.compile(r"[0-9a-f]{16}")
_SKIPPED = frozenset({"__pycache__", "node_modules", "site-packages"})


@dataclass
class Found:
    """Run folders, resolved, in the order of their paths; and a sentence for each place that could not be searched."""

    folders: list[Path] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)


def run_id(folder: Path) -> str:
    """Return the name of a run in addresses: 16 hexadecimal digits of a digest of its resolved folder."""
    return hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]


def search(roots: Iterable[Path]) -> Found:
    """Return the run folders at and below `roots`, each once; a root that is not there is left out."""
    found, seen = Found(), set[Path]()
    left = [MOST_FOLDERS]
    for root in roots:
        place = Path(os.path.realpath(root))
        for folder in _walk(place, found, left):
            if folder not in seen:
                seen.add(folder)
                found.folders.append(folder)
    if left[0] <= 0:
        found.complaints.append(
            f"Only the first {MOST_FOLDERS:,} folders were searched: give `openwork serve` a folder with fewer below it."
        )
    found.folders.sort()
    return found


def inside(folder: Path, roots: Iterable[Path]) -> bool:
    """Tell whether `folder` is a real folder (no link on the way) at or below one of `roots`."""
    real = Path(os.path.realpath(folder))
    return real == folder and any(real.is_relative_to(os.path.realpath(root)) for root in roots)


def cache() -> Path:
    """Return the folder of the index and of the list of runs: `$OPENWORK_CACHE/serve`, else below the user's cache."""
    base = os.environ.get("OPENWORK_CACHE")
    if base:
        return Path(base).expanduser() / "serve"
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "openwork" / "serve"


def remember(folder: Path | str) -> None:
    """Add a run folder to the list of those that the page finds by itself.

    The list is a convenience: where it cannot be written, nothing happens.
    """
    with contextlib.suppress(OSError):
        place = Path(os.path.realpath(folder))
        if place in known():
            return
        path = cache() / "runs.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps(os.fsencode(place).decode("utf-8", "surrogateescape")) + "\n"
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(line.encode("ascii"))


def known() -> list[Path]:
    """Return the run folders that commands wrote, those that are gone left out."""
    try:
        with (cache() / "runs.jsonl").open("rb") as stream:
            text = stream.read(LARGEST_LIST)
    except OSError:
        return []
    folders = dict.fromkeys(path for line in text.splitlines() if (path := _listed(line)) is not None)
    return [folder for folder in folders if folder.is_dir()]


def usual() -> list[Path]:
    """Return where runs are looked for if nothing is said: `runs/` of the working directory, and the known ones."""
    return [Path("runs").absolute(), *known()]


def fixed(folders: Iterable[Path | str]) -> Callable[[], list[Path]]:
    """Return a function that returns these folders, made absolute now."""
    places = [Path(os.path.abspath(folder)) for folder in folders]
    return lambda: places


def _listed(line: bytes) -> Path | None:
    try:
        value = json.loads(line)
        path = Path(os.fsdecode(value.encode("utf-8", "surrogateescape")))
    except (ValueError, AttributeError, RecursionError):
        return None
    return path if path.is_absolute() and "\0" not in value else None


def _walk(root: Path, found: Found, left: list[int]) -> Iterator[Path]:
    """Yield the run folders at and below `root`, not searching what lies inside a run."""
    todo = [(root, 0)]
    while todo and left[0] > 0:
        folder, depth = todo.pop()
        left[0] -= 1
        try:
            with os.scandir(folder) as entries:
                listed = list(entries)
        except FileNotFoundError:
            continue
        except OSError as error:
            found.complaints.append(f"{visible(folder, 200)} cannot be searched: {error.strerror or error}.")
            continue
        if _is_run(listed):
            yield folder
            continue
        for entry in listed:
            if entry.is_symlink():
                _mention_link(entry, root, found)
            elif depth < DEEPEST and not entry.name.startswith(".") and entry.name not in _SKIPPED and _is_folder(entry):
                todo.append((folder / entry.name, depth + 1))


def _is_run(listed: list[os.DirEntry[str]]) -> bool:
    names = {entry.name: entry for entry in listed}
    if "results.json" in names and not _is_folder(names["results.json"]):
        return True
    trials = names.get("trials")
    if trials is None or not _is_folder(trials):
        return False
    if ".lock" in names:
        return True
    try:
        with os.scandir(trials.path) as entries:
            return any(TRIAL.fullmatch(entry.name) for entry in entries)
    except OSError:
        return True


def _mention_link(entry: os.DirEntry[str], root: Path, found: Found) -> None:
    with contextlib.suppress(OSError):
        if entry.is_dir() and not Path(os.path.realpath(entry.path)).is_relative_to(root):
            found.complaints.append(
                f"{visible(entry.path, 200)} is a link that leads elsewhere and is not followed: give its target to "
                "`openwork serve` as a folder."
            )


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir(follow_symlinks=False)
    except OSError:
        return False
