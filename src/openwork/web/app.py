"""The page as an application: its addresses, each of which only reads.

    /                                   all runs: filter, sort, page
    /compare?run=ID&run=ID              several runs side by side
    /compare/N.svg?run=ID&run=ID        the plot of a method
    /runs/ID                            a run: its report and its trials
    /runs/ID/trials                     all its trials
    /runs/ID/trials/KEY                 a trial: curves, layers, masks, log, settings
    /runs/ID/trials/KEY/curves/N-SIZE.svg   a curve
    /runs/ID/trials/KEY/masks/N.svg     the picture of a mask
    /runs/ID/figures/NAME-SIZE.svg      a plot of the report
    /runs/ID/table.csv                  the table with every digit

An ID is a digest that is looked up in the index, a KEY 24 hexadecimal digits: no text of an address becomes a path.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterable
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

import openwork
from openwork.errors import OpenworkError, StoreError
from openwork.report import html, tables
from openwork.report.summary import main_metric
from openwork.report.text import count, visible
from openwork.web import figures, reading, side_by_side, views
from openwork.web.entry import STATUSES, VERDICTS, Entry, sentence
from openwork.web.guard import LOOPBACK, Guard
from openwork.web.index import Index
from openwork.web.places import fixed, usual
from openwork.web.query import ORDERS, Query

PAGE = 50
TRIALS = 100
AT_ONCE = 0.2
"""Seconds that a page waits for folders to be read; the rest is read behind it."""
LIVE = 5
"""Seconds after which a page of something at work is loaded again."""


def create(
    folders: Iterable[Path | str] | None = None, *, token: str | None = None, hosts: Iterable[str] = LOOPBACK
) -> Starlette:
    """Return the application.

    Args:
        folders: run folders, or folders with runs below them; by default `runs/` of the working directory and the run
            folders that commands wrote on this machine.
        token: what a reader has to give once in the address (`?token=...`); None for a page on loopback.
        hosts: host names, without port, that a request may name; IPv6 addresses in brackets.
    """
    given = None if folders is None else list(folders)
    name = f"usual {Path.cwd()}" if given is None else "\0".join(str(Path(folder).absolute()) for folder in given)
    app = Starlette(
        routes=[
            Route("/", _endpoint(_runs)),
            Route("/compare", _endpoint(_compare)),
            Route("/compare/{number}.svg", _endpoint(_side)),
            Route("/runs/{run}", _endpoint(_run)),
            Route("/runs/{run}/figures/{name}-{size}.svg", _endpoint(_figure)),
            Route("/runs/{run}/table.csv", _endpoint(_table)),
            Route("/runs/{run}/trials", _endpoint(_trials)),
            Route("/runs/{run}/trials/{key}", _endpoint(_trial)),
            Route("/runs/{run}/trials/{key}/curves/{number}-{size}.svg", _endpoint(_curve)),
            Route("/runs/{run}/trials/{key}/masks/{number}.svg", _endpoint(_mask)),
            Route("/style.css", _endpoint(_style)),
            Route("/icon.svg", _endpoint(_icon)),
        ],
        middleware=[Middleware(Guard, hosts=tuple(hosts), token=token)],
        exception_handlers={HTTPException: _refused},
    )
    app.router.redirect_slashes = False
    app.state.index = Index(usual if given is None else fixed(given), name)
    app.state.kept, app.state.pictures, app.state.trials = views.Kept(3), views.Kept(64), views.Kept(10_000)
    return app


def _endpoint(make: Callable[[Request], Response]) -> Callable[[Request], Any]:
    """Return the handler of an address: an error of ours is a page; another is one line there and on standard error."""

    async def handle(request: Request) -> Response:
        try:
            return await run_in_threadpool(make, request)
        except HTTPException:
            raise
        except OpenworkError as error:
            return _message(request, 404, "Not here", sentence(error))
        except Exception as error:
            said = f"{type(error).__name__}: {visible(error, 300)}"
            print(f"openwork serve: {visible(request.url.path, 100)}: {said}", file=sys.stderr)
            return _message(request, 500, "This page could not be made", f"{said}. The other pages are not concerned.")

    return handle


def _runs(request: Request) -> Response:
    index: Index = request.app.state.index
    state = index.refresh(AT_ONCE)
    if not state.whole:
        index.go_on()
    query = Query.read(request.query_params)
    entries, total = index.page(query, PAGE)
    last = max(1, -(-total // PAGE))
    return _html(
        request,
        "runs.html.j2",
        heading="Runs",
        entries=entries,
        total=total,
        page=min(query.page, last),
        last=last,
        query=query,
        state=state,
        choices=index.choices(),
        statuses=STATUSES,
        verdicts=VERDICTS,
        pairs=lambda names: [("", "any"), *((name, name) for name in names)],
        orders={name: told for name, (told, _) in ORDERS.items()},
        refresh=None if state.whole or query.asks else 2,
        most=len(side_by_side.LETTERS),
    )


def _run(request: Request) -> Response:
    entry = _entry(request)
    found, trouble = _results(request, entry)
    parts = None
    if found is not None:
        try:
            parts = views.report(found, f"/runs/{entry.id}/figures")
        except StoreError as error:
            trouble = sentence(error)
    trials = views.trials(entry, found, request.app.state.trials)
    shown = views.by_arm(trials)
    return _html(
        request,
        "run.html.j2",
        heading=entry.title,
        entry=entry,
        trouble=trouble,
        arms=shown[:TRIALS],
        more_arms=max(0, len(shown) - TRIALS),
        told=_told(trials),
        refresh=_live(request, entry.status == "running"),
        live=entry.status == "running",
        **{"statuses": STATUSES, "report": parts is not None, **(parts or {})},
    )


def _trials(request: Request) -> Response:
    entry = _entry(request)
    found, trouble = _results(request, entry)
    trials = views.trials(entry, found, request.app.state.trials)
    states = sorted({trial.status for trial in trials})
    status = request.query_params.get("status", "")
    same = {"status": status} if status in states else {}
    shown = [trial for trial in trials if trial.status == status] if same else trials
    last = max(1, -(-len(shown) // TRIALS))
    page = min(Query.read({"page": request.query_params.get("page", "")}).page, last)
    return _html(
        request,
        "trials.html.j2",
        heading=f"Trials of {entry.title}",
        entry=entry,
        trouble=trouble,
        trials=shown[TRIALS * (page - 1) : TRIALS * page],
        told=_told(shown),
        metric=visible(main_metric(found or {}).heading, 30),
        states=states,
        status=same.get("status", ""),
        page=page,
        last=last,
        address=lambda number: f"/runs/{entry.id}/trials?{urlencode({'page': number, **same})}",
        refresh=_live(request, entry.status == "running"),
        live=entry.status == "running",
    )


def _trial(request: Request) -> Response:
    entry, key = _entry(request), _key(request)
    found, _ = _results(request, entry)
    shown = views.trial(entry, key, found)
    return _html(
        request,
        "trial.html.j2",
        heading=f"{shown['arm']}, seed {shown['seed']}",
        entry=entry,
        trial=shown,
        refresh=_live(request, shown["running"]),
        live=shown["running"],
    )


def _curve(request: Request) -> Response:
    entry, key, number = _entry(request), _key(request), _number(request)
    size = request.path_params["size"]
    kept = views.result(entry, key, _results(request, entry)[0]).get("curves", {})
    if size not in figures.WIDTHS:
        raise StoreError("there is no such picture")
    return _svg(figures.draw_curve(kept, number, size))


def _mask(request: Request) -> Response:
    entry, key, number = _entry(request), _key(request), _number(request)
    path = views.model_file(entry.folder, key)
    result = reading.read_object(entry.folder, "trials", key, "result.json", limit=reading.LARGEST_TRIAL)
    names = list(reading.trial(result)["layers"])[: views.SHOWN_PICTURES]
    if path is None or number >= len(names):
        raise StoreError("there is no such picture")
    facts = path.stat()
    made = request.app.state.pictures.get((str(path), facts.st_mtime_ns, facts.st_size), lambda: views.masks(path, names))
    return _svg(made.get(names[number], ""))


def _figure(request: Request) -> Response:
    name, size = request.path_params["name"], request.path_params["size"]
    entry = _entry(request)
    found, trouble = _results(request, entry)
    if found is None or name not in html.captions(found) or size not in figures.WIDTHS:
        raise StoreError(trouble.rstrip(".") or "there is no such picture")
    key = ("figure", entry.id, entry.stamp, name, size)
    return _svg(request.app.state.pictures.get(key, lambda: figures.draw(found, name, size)))


def _side(request: Request) -> Response:
    number = _number(request)
    runs, _ = _chosen(request)
    if not runs:
        raise StoreError("there is no such picture")
    key = ("side", *((entry.id, entry.stamp) for entry, _ in runs), number)
    return _svg(request.app.state.pictures.get(key, lambda: side_by_side.draw([found for _, found in runs], number)))


def _compare(request: Request) -> Response:
    runs, troubles = _chosen(request)
    asked = urlencode([("run", entry.id) for entry, _ in runs])
    try:
        shown = side_by_side.side_by_side(runs)
    except Exception as error:  # of files that nobody has seen yet
        raise StoreError(f"these runs cannot be compared ({type(error).__name__}: {visible(error, 120)})") from error
    return _html(request, "compare.html.j2", heading="Side by side", troubles=troubles, asked=asked, **shown)


def _chosen(request: Request) -> tuple[list[tuple[Entry, dict[str, Any]]], list[str]]:
    """Return the runs that an address names, with their results, and what is to be said of those that are left out."""
    asked = list(dict.fromkeys(request.query_params.getlist("run")))
    most = len(side_by_side.LETTERS)
    entries = _find(request, asked[:most])
    runs, troubles = [], []
    for entry in entries:
        found, trouble = _results(request, entry)
        if found is not None:
            runs.append((entry, found))
        else:
            troubles.append(f"{entry.title}: {trouble or 'no results yet.'}")
    if len(asked) > most:
        troubles.append(f"Only the first {most} runs are shown.")
    if len(entries) < len(asked[:most]):
        troubles.append("Some of the runs are not here any more.")
    return runs, troubles


def _table(request: Request) -> Response:
    entry = _entry(request)
    text = tables.csv_text(reading.results(entry.folder, curves=False))
    headers = {"content-disposition": f'attachment; filename="{entry.id}.csv"'}
    return Response(text.encode("utf-8", "backslashreplace"), media_type="text/csv; charset=utf-8", headers=headers)


def _style(request: Request) -> Response:
    return Response(style()[0], media_type="text/css; charset=utf-8", headers={"cache-control": "max-age=86400"})


def _icon(request: Request) -> Response:
    data = resources.files("openwork.web").joinpath("templates", "icon.svg").read_bytes()
    return Response(data, media_type="image/svg+xml", headers={"cache-control": "max-age=86400"})


@cache
def style() -> tuple[bytes, str]:
    """Return the style of report and page, and its address, which changes with it."""
    own = resources.files("openwork.web").joinpath("templates", "web.css").read_text(encoding="utf-8")
    text = (html.stylesheet() + own).encode()
    return text, f"/style.css?v={hashlib.sha256(text).hexdigest()[:12]}"


def _entry(request: Request) -> Entry:
    entries = _find(request, [request.path_params["run"]])
    if not entries:
        raise StoreError("there is no such run below the folders of this page")
    return entries[0]


def _find(request: Request, runs: list[str]) -> list[Entry]:
    """Return the runs of some ids; where one is not in the index, the folders are looked at first."""
    index: Index = request.app.state.index
    found = [index.get(run) for run in runs]
    if None in found:
        index.refresh(AT_ONCE)
        found = [index.get(run) for run in runs]
    return [entry for entry in found if entry is not None]


def _key(request: Request) -> str:
    key = str(request.path_params["key"])
    if not reading.is_key(key):
        raise StoreError("there is no such trial in this run")
    return key


def _number(request: Request) -> int:
    number = str(request.path_params["number"])
    if not (number.isascii() and number.isdigit() and len(number) < 4):
        raise StoreError("there is no such picture")
    return int(number)


def _results(request: Request, entry: Entry) -> tuple[dict[str, Any] | None, str]:
    """Return a run's results, or None and why they are not there; nothing is said of a run without results."""
    if not (entry.folder / "results.json").exists():
        return None, ""
    try:
        made = request.app.state.kept.get(("results", entry.id, entry.stamp), lambda: reading.results(entry.folder))
        return made, ""
    except OpenworkError as error:
        return None, sentence(error)


def _svg(text: str) -> Response:
    if not text:
        raise StoreError("there is no such picture")
    return Response(text.encode("utf-8", "backslashreplace"), media_type="image/svg+xml")


def _told(trials: list[views.Trial]) -> str:
    return count(len(trials), "trial")


def _live(request: Request, running: bool) -> int | None:
    return LIVE if running and request.query_params.get("live") != "0" else None


async def _refused(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    return _message(request, status, "Not here" if status == 404 else "Refused", "There is no page at this address.")


def _message(request: Request, status: int, heading: str, text: str) -> Response:
    return _html(request, "message.html.j2", status, heading=heading, text=visible(text, 600))


def _html(request: Request, template: str, code: int = 200, /, **values: Any) -> Response:
    made = html.environment("openwork.web").get_template(template)
    common = {"style": style()[1], "installed": openwork.__version__, "refresh": None, "path": request.url.path}
    text = made.render({**common, **values})
    return Response(text.encode("utf-8", "backslashreplace"), code, media_type="text/html; charset=utf-8")
