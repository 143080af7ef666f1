"""One run as a line of the list: what it is, how far it is, how it ended, and one sentence on what it shows."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from openwork.errors import OpenworkError
from openwork.report.html import title
from openwork.report.summary import headline
from openwork.report.text import count, visible
from openwork.web import live, reading
from openwork.web.places import TRIAL, run_id

STATUSES = {
    "running": "running",
    "complete": "complete",
    "losses": "with losses",
    "stopped": "stopped",
    "damaged": "unreadable",
}
VERDICTS = {"holds": "holds", "leans": "leans", "fails": "fails", "untested": "not testable here"}


@dataclass(frozen=True)
class Entry:
    """A run as the index keeps it; text is ready to be shown, `methods` and `study` as the run names them."""

    id: str
    folder: Path
    place: str
    stamp: str
    title: str
    kind: str
    study: str
    preset: str
    status: str
    date: float
    trials: int
    ended: int
    lost: int
    verdicts: Mapping[str, int]
    methods: tuple[str, ...]
    sentence: str

    @property
    def day(self) -> str:
        """The date as a reader sees it."""
        return datetime.fromtimestamp(self.date, UTC).strftime("%Y-%m-%d %H:%M") if self.date else ""


def stamp(folder: Path, locks: live.Held | None) -> str:
    """Return what changes when a run's entry has to be made again; of a run at work it is never the same."""
    parts = [str(facts.st_mtime_ns) + ":" + str(facts.st_size) if (facts := _facts(folder / name)) else "-"
             for name in ("results.json", "trials")]  # fmt: skip
    if live.running(folder, locks):
        parts.append("running")
    return " ".join(parts)


def make(folder: Path, mark: str) -> Entry:
    """Return the entry of a run folder; whatever is wrong with the run is said in its sentence."""
    if mark.endswith("running"):
        return _unfinished(folder, mark, "running")
    try:
        if not os.path.lexists(folder / "results.json"):
            return _unfinished(folder, mark, "stopped")
        found = reading.results(folder, curves=False)
        return _finished(folder, mark, found)
    except OpenworkError as error:
        return _entry(folder, mark, status="damaged", sentence=sentence(error))
    except Exception as error:  # of a file that nobody has seen yet; the list goes on without it
        said = f"results.json does not have the form that openwork writes ({type(error).__name__})."
        return _entry(folder, mark, status="damaged", sentence=said)


def sentence(error: Exception) -> str:
    """Return what an error says as a sentence; a file's name at its beginning stays as it is."""
    text = str(error)
    first = text.split(" ", 1)[0]
    return (text if "." in first or "/" in first else text[:1].upper() + text[1:]) + "."


def trials_of(folder: Path) -> Iterator[str]:
    """Yield the keys of the trials that were begun in a run folder, by name."""
    with contextlib.suppress(OSError), os.scandir(folder / "trials") as entries:
        yield from sorted(e.name for e in entries if TRIAL.fullmatch(e.name) and e.is_dir(follow_symlinks=False))


def _finished(folder: Path, mark: str, found: Mapping[str, Any]) -> Entry:
    statuses = Counter(trial["status"] for trial in found["trials"])
    total = sum(statuses.values())
    verdicts = Counter(str(claim.get("verdict")) for claim in found["claims"])
    methods = dict.fromkeys(visible(arm.get("method") or arm.get("name"), 60) for arm in found["arms"])
    return _entry(
        folder,
        mark,
        title=title(found),
        kind="study" if found.get("kind") == "study" else "compare",
        study=visible(found["name"], 60) if found.get("kind") == "study" else "compare",
        preset=visible(found.get("preset") or "", 40),
        status="complete" if statuses["ok"] == total else "losses",
        date=_date(found["environment"].get("date")) or _modified(folder / "results.json"),
        trials=total,
        ended=total,
        lost=total - statuses["ok"],
        verdicts={name: verdicts[word] for name, word in VERDICTS.items()},
        methods=tuple(methods),
        sentence=headline(found),
    )


def _unfinished(folder: Path, mark: str, status: str) -> Entry:
    """Return the entry of a run that has no results yet, from the specifications of its trials."""
    keys = list(trials_of(folder))
    ended = sum(os.path.lexists(folder / "trials" / key / "result.json") for key in keys)
    spec: dict[str, Any] = {}
    for key in keys[:3]:
        with contextlib.suppress(OpenworkError):
            spec = reading.read_object(folder, "trials", key, "spec.json", limit=reading.LARGEST_TRIAL)
            break
    study = visible(spec.get("study") or "compare", 60)
    config = spec.get("config") if isinstance(spec.get("config"), dict) else {}
    kind = "compare" if study == "compare" else "study"
    if not keys:
        said = "No trial was begun."
    else:
        said = f"{ended} of {count(len(keys), 'begun trial')} ended" + (
            "; the same command goes on from here." if status == "stopped" else " so far."
        )
    return _entry(
        folder,
        mark,
        title=title({"kind": kind, "name": study, "recipe": config}) if spec else "",
        kind=kind,
        study=study,
        status=status,
        date=max((_modified(folder / "trials" / key) for key in keys), default=_modified(folder)),
        trials=len(keys),
        ended=ended,
        sentence=said,
    )


def _entry(folder: Path, mark: str, **values: Any) -> Entry:
    place = visible(folder, 300)
    blank: dict[str, Any] = {
        "kind": "compare",
        "study": "",
        "preset": "",
        "trials": 0,
        "ended": 0,
        "lost": 0,
        "methods": (),
        "verdicts": dict.fromkeys(VERDICTS, 0),
        "date": _modified(folder),
    }
    made = blank | values
    made["title"] = made.get("title") or visible(folder.name, 120) or place
    return Entry(id=run_id(folder), folder=folder, place=place, stamp=mark, **made)


def _date(text: object) -> float | None:
    try:
        return datetime.strptime(str(text), "%Y-%m-%d %H:%M UTC").replace(tzinfo=UTC).timestamp()
    except (ValueError, OverflowError):
        return None


def _modified(path: Path) -> float:
    facts = _facts(path)
    return facts.st_mtime if facts else 0.0


def _facts(path: Path) -> os.stat_result | None:
    try:
        return os.lstat(path)
    except OSError:
        return None
