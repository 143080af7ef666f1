"""The index of runs: one SQLite file in the cache that can be thrown away at any time and is made again from the folders.

A run is read again when its files' times change, and while it is at work. Reading can be stopped after a moment and goes
on at the next call, so that no page waits for a thousand folders.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sqlite3
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from openwork.errors import StoreError
from openwork.report.text import visible
from openwork.web import live
from openwork.web.entry import VERDICTS, Entry, make, stamp
from openwork.web.places import RUN, cache, inside, search
from openwork.web.query import Query

VERSION = 1
WAIT = 5.0
"""Seconds that one page waits for another that writes."""
TOGETHER = 50
"""So many runs are written to the index at once."""
_SCHEMA = """
CREATE TABLE IF NOT EXISTS runs (
  id TEXT PRIMARY KEY, folder BLOB, place TEXT, stamp TEXT, title TEXT, words TEXT, kind TEXT, study TEXT, preset TEXT,
  status TEXT, date REAL, trials INTEGER, ended INTEGER, lost INTEGER, holds INTEGER, leans INTEGER, fails INTEGER,
  untested INTEGER, methods TEXT, sentence TEXT);
CREATE INDEX IF NOT EXISTS by_date ON runs (date);
CREATE INDEX IF NOT EXISTS by_words ON runs (words);
CREATE TABLE IF NOT EXISTS methods (run TEXT, method TEXT, UNIQUE (method, run));
CREATE INDEX IF NOT EXISTS by_run ON methods (run);
"""
_COLUMNS = (
    *("id", "folder", "place", "stamp", "title", "words", "kind", "study", "preset", "status", "date", "trials", "ended"),
    *("lost", *VERDICTS, "methods", "sentence"),
)
_INSERT = f"INSERT OR REPLACE INTO runs ({', '.join(_COLUMNS)}) VALUES ({', '.join('?' * len(_COLUMNS))})"


@dataclass(frozen=True)
class State:
    """How far the index is: run folders found, those of them that are read, and what could not be searched."""

    found: int = 0
    read: int = 0
    complaints: tuple[str, ...] = ()

    @property
    def whole(self) -> bool:
        """Whether every folder is read."""
        return self.read == self.found


class Index:
    """The runs below some folders.

    Args:
        roots: returns the folders; asked at every look.
        name: tells this index from others in the cache.

    Attributes:
        fresh: seconds for which a whole look at the folders is not repeated.
        trace: called with every SQL statement, if set.
    """

    def __init__(self, roots: Callable[[], Sequence[Path]], name: str) -> None:
        self.roots, self.fresh = roots, 1.0
        self.trace: Callable[[str], None] | None = None
        self.state = State()
        self._looked, self._looking = -1e9, threading.Lock()
        self._behind: threading.Thread | None = None
        self._path = self._file(hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:16])

    def refresh(self, seconds: float | None = None) -> State:
        """Look at the folders and read what is new, for about `seconds` or to the end; return how far it is.

        While another thread looks, or when one looked just now, this returns at once.
        """
        if not self._looking.acquire(blocking=seconds is None):
            return self.state
        try:
            if not self.state.whole or time.monotonic() - self._looked >= self.fresh:
                self._look(None if seconds is None else time.monotonic() + seconds)
            return self.state
        finally:
            self._looking.release()

    def go_on(self) -> None:
        """Read what is new to the end in a thread of its own, unless one does already."""
        if self._behind is None or not self._behind.is_alive():
            self._behind = threading.Thread(target=self._read_on, daemon=True)
            self._behind.start()

    def page(self, query: Query, size: int) -> tuple[list[Entry], int]:
        """Return the runs of a page, numbered from 1, and how many runs there are on all pages; two statements."""
        where, values = query.where()
        with self._open() as base:
            total = int(base.execute(f"SELECT count(*) FROM runs WHERE {where}", values).fetchone()[0])
            last = max(1, -(-total // size))
            page = [size, size * (min(query.page, last) - 1)]
            rows = base.execute(
                f"SELECT {', '.join(_COLUMNS)} FROM runs WHERE {where} ORDER BY {query.order()} LIMIT ? OFFSET ?",
                [*values, *page],
            ).fetchall()
        return [_entry(row) for row in rows], total

    def choices(self) -> dict[str, list[str]]:
        """Return the studies, methods and statuses that there are, sorted; one statement."""
        with self._open() as base:
            rows = base.execute(
                "SELECT DISTINCT 'study', study FROM runs WHERE study <> '' UNION ALL "
                "SELECT DISTINCT 'method', method FROM methods UNION ALL SELECT DISTINCT 'status', status FROM runs"
            ).fetchall()
        return {kind: sorted(value for name, value in rows if name == kind) for kind in ("study", "method", "status")}

    def get(self, run: str) -> Entry | None:
        """Return a run by its id, made anew if it changed; None if there is none below the folders."""
        if not RUN.fullmatch(run):
            return None
        with self._open() as base:
            row = base.execute(f"SELECT {', '.join(_COLUMNS)} FROM runs WHERE id = ?", (run,)).fetchone()
        entry = None if row is None else _entry(row)
        if entry is None or not entry.folder.is_dir() or not inside(entry.folder, self.roots()):
            return None
        mark = stamp(entry.folder, live.held())
        return entry if mark == entry.stamp and not mark.endswith("running") else make(entry.folder, mark)

    def _read_on(self) -> None:
        with contextlib.suppress(StoreError):  # the next page tries again and says it
            self.refresh()

    def _look(self, until: float | None) -> None:
        roots, locks = self.roots(), live.held()
        found = search(roots)
        with self._open() as base:
            kept = {bytes(folder): mark for folder, mark in base.execute("SELECT folder, stamp FROM runs")}
            marks = {folder: stamp(folder, locks) for folder in found.folders}
            here = {os.fsencode(folder) for folder in marks}
            gone = [(folder,) for folder in kept if folder not in here]
            base.executemany("DELETE FROM methods WHERE run IN (SELECT id FROM runs WHERE folder = ?)", gone)
            base.executemany("DELETE FROM runs WHERE folder = ?", gone)
            base.commit()
            old = [folder for folder, mark in marks.items() if kept.get(os.fsencode(folder)) != mark or "running" in mark]
            old.sort(key=lambda folder: marks[folder].partition(":")[0].zfill(24), reverse=True)  # the newest results first
            told = tuple(found.complaints)
            self.state = State(len(marks), len(marks) - len(old), told)
            made: list[Entry] = []
            for folder in old:
                made.append(make(folder, marks[folder]))
                late = until is not None and time.monotonic() > until
                if late or len(made) == TOGETHER or folder == old[-1]:  # nobody waits while files are read
                    _put(base, made)
                    self.state = State(len(marks), self.state.read + len(made), told)
                    made = []
                if late:
                    break
        if self.state.whole:
            self._looked = time.monotonic()

    def _file(self, name: str) -> Path:
        """Return the index's file: in the cache, or where that cannot be written in a folder that goes with the process."""
        place = cache()
        try:
            place.mkdir(parents=True, exist_ok=True)
            path = place / f"{name}.sqlite"
            with closing(sqlite3.connect(path, timeout=WAIT)) as base:
                if _whole(base):
                    return path
            path.unlink()
            return _begin(path)
        except sqlite3.DatabaseError:
            with contextlib.suppress(OSError, sqlite3.DatabaseError):
                path.unlink()
                return _begin(path)
        except OSError:
            pass
        own = tempfile.mkdtemp(prefix="openwork-serve-")
        weakref.finalize(self, shutil.rmtree, own, ignore_errors=True)
        return _begin(Path(own) / "runs.sqlite")

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        try:
            with closing(sqlite3.connect(self._path, timeout=WAIT)) as base:
                base.execute("PRAGMA synchronous = OFF")
                base.executescript(_SCHEMA)
                base.set_trace_callback(self.trace)
                yield base
        except sqlite3.DatabaseError as error:
            if "locked" in str(error):
                raise StoreError("another page is writing the index of runs: load the page again in a moment") from error
            self.state, self._looked = State(found=1), -1e9
            with contextlib.suppress(OSError):
                self._path.unlink()
            raise StoreError(
                f"the index of runs was damaged and is made anew ({visible(error)}): load the page again"
            ) from error


def _begin(path: Path) -> Path:
    with closing(sqlite3.connect(path, timeout=WAIT)) as base:
        base.executescript(f"PRAGMA user_version = {VERSION};{_SCHEMA}")
    return path


def _whole(base: sqlite3.Connection) -> bool:
    """Tell whether a file is an index of this version, complete and undamaged."""
    version = base.execute("PRAGMA user_version").fetchone()[0]
    names = {name for (name,) in base.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    return version == VERSION and names == {"runs", "methods"} and base.execute("PRAGMA quick_check").fetchone()[0] == "ok"


def _put(base: sqlite3.Connection, entries: Sequence[Entry]) -> None:
    """Write entries over the old ones of the same runs."""
    base.executemany(_INSERT, [_row(entry) for entry in entries])
    base.executemany("DELETE FROM methods WHERE run = ?", [(entry.id,) for entry in entries])
    base.executemany(
        "INSERT OR IGNORE INTO methods (run, method) VALUES (?, ?)",
        [(e.id, method) for e in entries for method in e.methods],
    )
    base.commit()


def _row(entry: Entry) -> list[object]:
    found = {
        **vars(entry),
        **entry.verdicts,
        "folder": os.fsencode(entry.folder),
        "words": f"{entry.title} {entry.study} {entry.place}".lower(),
        "methods": json.dumps(entry.methods),
    }
    return [found[name] for name in _COLUMNS]


def _entry(row: Sequence[object]) -> Entry:
    found = dict(zip(_COLUMNS, row, strict=True))
    found["verdicts"] = {name: int(str(found.pop(name))) for name in VERDICTS}
    found["methods"] = tuple(json.loads(str(found["methods"])))
    found["folder"] = Path(os.fsdecode(bytes(found["folder"])))  # type: ignore[call-overload]
    del found["words"]
    return Entry(**found)  # type: ignore[arg-type]
