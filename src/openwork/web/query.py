"""What a reader asks of the list of runs: words, study, method, status, verdict, dates, order and page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from urllib.parse import urlencode

from openwork.report.text import visible
from openwork.web.entry import STATUSES, VERDICTS

LONGEST = 200
LAST_PAGE = 1_000_000
ORDERS = {
    "newest": ("newest first", "date DESC, id"),
    "oldest": ("oldest first", "date, id"),
    "name": ("name", "title COLLATE NOCASE, date DESC, id"),
    "study": ("study", "study, date DESC, id"),
    "status": ("status", "status, date DESC, id"),
    "trials": ("most trials", "trials DESC, id"),
    "lost": ("most losses", "lost DESC, date DESC, id"),
}


@dataclass(frozen=True)
class Query:
    """A question; empty text asks nothing. `trouble` says what of it makes no sense and was left out."""

    q: str = ""
    study: str = ""
    method: str = ""
    status: str = ""
    verdict: str = ""
    since: str = ""
    until: str = ""
    sort: str = "newest"
    page: int = 1
    trouble: tuple[str, ...] = ()

    @classmethod
    def read(cls, asked: Mapping[str, str]) -> Query:
        """Return the question of an address; what makes no sense is left out and said."""
        names = [field.name for field in fields(cls) if field.name != "trouble"]
        known = {name: asked.get(name, "").encode("utf-8", "replace").decode().strip()[:LONGEST] for name in names}
        trouble = []
        for name, allowed in (("status", STATUSES), ("verdict", VERDICTS), ("sort", ORDERS)):
            if known[name] and known[name] not in allowed:
                trouble.append(f"{name} {visible(known[name], 40)!r} is unknown: choose one of {', '.join(allowed)}.")
                known[name] = ""
        for name in ("since", "until"):
            if known[name] and _day(known[name]) is None:
                trouble.append(f"{visible(known[name], 40)!r} is no date: write YYYY-MM-DD.")
                known[name] = ""
        page = known.pop("page")
        if page and not (page.isascii() and page.isdigit() and 1 <= int(page[:9]) <= LAST_PAGE):
            trouble.append(f"{visible(page, 40)!r} is no page: give a whole number from 1 on.")
            page = ""
        known["sort"] = known["sort"] or "newest"
        return cls(**known, page=int(page[:9] or 1), trouble=tuple(trouble))

    @property
    def asks(self) -> bool:
        """Whether anything but order and page is asked."""
        return bool(self.q) or self.narrow

    @property
    def narrow(self) -> bool:
        """Whether anything but words is asked."""
        return bool(self.study or self.method or self.status or self.verdict or self.since or self.until)

    def where(self) -> tuple[str, list[object]]:
        """Return the condition on the table `runs` and its values."""
        parts: list[str] = []
        values: list[object] = []
        for word in self.q.lower().split():
            parts.append("words LIKE ? ESCAPE '!'")
            values.append("%" + word.replace("!", "!!").replace("%", "!%").replace("_", "!_") + "%")
        for name, text in (("study", self.study), ("status", self.status)):
            if text:
                parts.append(f"{name} = ?")
                values.append(text)
        if self.method:
            parts.append("id IN (SELECT run FROM methods WHERE method = ?)")
            values.append(self.method)
        if self.verdict:
            parts.append(f"{self.verdict} > 0")
        if (first := _day(self.since)) is not None:
            parts.append("date >= ?")
            values.append(first)
        if (last := _day(self.until)) is not None:
            parts.append("date < ?")
            values.append(last + 86_400.0)
        return " AND ".join(parts) or "1", values

    def order(self) -> str:
        """Return the order of the table `runs`; it is total, so that pages do not overlap."""
        return ORDERS[self.sort][1]

    def address(self, page: int) -> str:
        """Return the address of another page of the same question."""
        asked = replace(self, page=page)
        names = [field.name for field in fields(self) if field.name != "trouble"]
        given = {name: getattr(asked, name) for name in names if getattr(asked, name) != getattr(Query(), name)}
        return f"/?{urlencode(given, errors='replace')}" if given else "/"


def _day(text: str) -> float | None:
    try:
        return datetime.strptime(text, "%Y-%m-%d").replace(tzinfo=UTC).timestamp()
    except ValueError:
        return None
