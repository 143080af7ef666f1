"""Results in MLflow: a run a trial below one run for the whole, found again by their keys at the next export.

Nothing is sent anywhere but to the tracking store that was named: MLflow's own usage statistics are off meanwhile.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openwork.errors import MissingExtra, RecipeError, StoreError
from openwork.lab.recipe import Recipe
from openwork.lab.spec import Config
from openwork.report.export import flat, made_at, markdown_text, points_of, settings_of
from openwork.report.html import title
from openwork.report.summary import Results
from openwork.report.text import finite, visible

KEY, ARM, DIGEST = "openwork.key", "openwork.arm", "openwork.digest"
_NAME, _VALUE = 240, 4000
_SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ALLOW_FILE_STORE": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "GIT_PYTHON_REFRESH": "quiet",
}


@dataclass(frozen=True)
class Exported:
    """What an export did: where it went, and how many runs it made, brought up to date, and found unchanged."""

    uri: str
    experiment: str
    created: int
    updated: int
    unchanged: int


@dataclass(frozen=True)
class _Wanted:
    """One MLflow run as it should be: `points` are (metric, step, value)."""

    key: str
    arm: str
    name: str
    params: Mapping[str, str]
    points: Sequence[tuple[str, int, float]]
    tags: Mapping[str, str] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)
    files: Sequence[Path] = ()
    good: bool = True
    seconds: float = 0.0

    def digest(self) -> str:
        """Return a digest of everything that is logged; a run that carries it is complete."""
        files = [(path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in self.files]
        plain = [self.name, dict(self.params), list(self.points), dict(self.tags), dict(self.texts), files, self.good]
        return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:32]


def export(
    results: Results,
    *,
    uri: str | None = None,
    experiment: str | None = None,
    files: Sequence[Path] = (),
    done: Callable[[int, int], None] = lambda _done, _all: None,
) -> Exported:
    """Write results into an MLflow tracking store; what is there already is brought up to date, never doubled.

    A trial's run has the arm's settings as parameters, its metrics and curves as metrics, its status as tags, and its
    layers as an artifact. They are the children of one run with the recipe, the table and `files`. A second export,
    also after one that was cut off, completes and updates: runs are known by the tags `openwork.key` and
    `openwork.arm`. A run whose parameters have changed is deleted and made anew, as MLflow cannot change parameters.

    Args:
        results: What `results.json` holds, checked by `report.reading.read_run`.
        uri: The tracking store: a folder, `sqlite:///FILE` (needs all of MLflow), or a server's address. None for
            MLFLOW_TRACKING_URI, or else what MLflow itself would use here: `mlflow.db`, or the folder `mlruns` where
            only mlflow-skinny is installed.
        experiment: The experiment's name; None for the title of the results.
        files: Artifacts of the run for the whole, the report for example.
        done: Called with the number of runs that are done and of all, as it goes on.

    Raises:
        MissingExtra: if MLflow is not installed.
        StoreError: if the store cannot be reached, read or written.
        RecipeError: if the address makes no sense.
    """
    with _settings():
        place = _place(uri)
        name = visible(experiment or title(results), 400)
        try:
            return _export(results, place, name, files, done)
        except _errors() as error:
            why = _shown(_first_line(error))
            raise StoreError(
                f"cannot export to MLflow at {_shown(place)!r}: {why}; check --uri and --experiment, then run it again"
            ) from error


def _export(
    results: Results, uri: str, name: str, files: Sequence[Path], done: Callable[[int, int], None]
) -> Exported:  # fmt: skip
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    experiment = _experiment(client, uri, name)
    known = {_identity(run.data.tags): run for run in _runs(client, experiment)}
    start = int(1000 * (made_at(results) or time.time()))
    counts = dict.fromkeys(("created", "updated", "unchanged"), 0)
    whole = _whole(results, files)
    trials = list({(one.key, one.arm): one for one in _trials(results)}.values())
    parent, how = _sync(client, experiment, known, whole, start, None)
    counts[how] += 1
    for index, wanted in enumerate(trials):
        _, how = _sync(client, experiment, known, wanted, start, parent)
        counts[how] += 1
        done(index + 1, len(trials))
    return Exported(_shown(uri), name, **counts)


def _whole(results: Results, files: Sequence[Path]) -> _Wanted:
    """Return the run of the whole: recipe, main metric of every arm, table, files."""
    recipe = _content(results)
    kind = [results.get("kind"), results.get("name"), results.get("preset"), recipe]
    key = hashlib.sha256(json.dumps(kind, sort_keys=True, default=str).encode()).hexdigest()[:24]
    points = []
    for row in results.get("rows") or []:
        for part in ("mean", "low", "high"):
            value = finite((row.get("accuracy") or {}).get(part))
            if value is not None:
                points.append((f"{row['arm']}.{part}", 0, value))
    params = _params({"kind": results.get("kind"), "preset": results.get("preset"), **dict(flat(recipe))})
    machine = {f"openwork.environment.{k}": v for k, v in (results.get("environment") or {}).items()}
    note = markdown_text(results)
    tags = {"mlflow.note.content": note if len(note) < _VALUE else note[:_VALUE].rpartition("\n")[0], **_params(machine)}
    return _Wanted(key, "", visible(title(results), 200), params, _named(points), tags, {}, [*files])


def _trials(results: Results) -> Iterator[_Wanted]:
    known = settings_of(results)
    for trial in results.get("trials") or []:
        settings = {"arm": trial["arm"], "seed": trial["seed"], **known.get(trial["arm"], {})}
        metrics = trial.get("metrics") or {}
        points = [(name, 0, float(value)) for name, value in metrics.items() if finite(value) is not None]
        points += [(f"curves.{name}", step, value) for name, step, value in points_of(trial)]
        seconds = finite((trial.get("timings") or {}).get("seconds")) or 0.0
        tags = {"openwork.status": visible(trial["status"], 100), "openwork.version": _version(results)}
        texts = {}
        if trial.get("error"):
            tags["openwork.error"] = visible(trial["error"], _VALUE)
        if trial.get("layers"):
            texts["layers.json"] = json.dumps(trial["layers"], indent=1) + "\n"
        yield _Wanted(
            trial["key"], trial["arm"], visible(f"{trial['arm']} seed {trial['seed']}", 200), _params(settings),
            _named(points), tags, texts, (), trial["status"] == "ok", min(max(seconds, 0.0), 1e9),
        )  # fmt: skip


def _sync(
    client: Any, experiment: str, known: Mapping[tuple[str, str], Any], wanted: _Wanted, start: int, parent: str | None
) -> tuple[str, str]:
    """Make a run as it should be; return its id and "created", "updated" or "unchanged"."""
    tags = {KEY: visible(wanted.key, 200), ARM: visible(wanted.arm, _VALUE), **wanted.tags}
    tags |= {} if parent is None else {"mlflow.parentRunId": parent}
    digest = wanted.digest()
    run, how = known.get(_identity(tags)), "updated"
    if run is not None and any(run.data.params.get(k, v) != v for k, v in wanted.params.items()):
        client.delete_run(run.info.run_id)
        run = None
    if run is None:
        run, how = client.create_run(experiment, start_time=start, tags=tags, run_name=wanted.name), "created"
    elif run.data.tags.get(DIGEST) == digest and run.data.tags.get("mlflow.parentRunId") == parent:
        return run.info.run_id, "unchanged"
    run_id = run.info.run_id
    if how == "updated":
        client.update_run(run_id, name=wanted.name)
    _log(client, run, wanted, tags, start)
    for name, text in wanted.texts.items():
        client.log_text(run_id, text, name)
    for path in wanted.files:
        client.log_artifact(run_id, str(path))
    status = "FINISHED" if wanted.good else "FAILED"
    client.set_terminated(run_id, status=status, end_time=start + int(1000 * wanted.seconds))
    client.set_tag(run_id, DIGEST, digest)  # last, so that what was cut off is done again
    return run_id, how


def _log(client: Any, run: Any, wanted: _Wanted, tags: Mapping[str, str], start: int) -> None:
    """Log the parameters, tags and points that the run lacks, in batches that a server takes."""
    from mlflow.entities import Metric, Param, RunTag

    run_id = run.info.run_id
    latest = _latest(client, run)
    stamp = int(time.time() * 1000) if latest else start
    missing = [point for point in wanted.points if latest.get(point[:2]) != point[2]]
    params = [Param(k, v) for k, v in wanted.params.items() if k not in run.data.params]
    for part in _batches([Metric(name, value, stamp, step) for name, step, value in missing], 900):
        client.log_batch(run_id, metrics=part)
    for part in _batches(params, 90):
        client.log_batch(run_id, params=part)
    for part in _batches([RunTag(k, v) for k, v in tags.items() if run.data.tags.get(k) != v], 90):
        client.log_batch(run_id, tags=part)


def _latest(client: Any, run: Any) -> dict[tuple[str, int], float]:
    """Return (metric, step) -> the value that was logged last."""
    found: dict[tuple[str, int], tuple[int, float]] = {}
    for name in run.data.metrics:
        for one in client.get_metric_history(run.info.run_id, name):
            at = (name, one.step)
            if at not in found or one.timestamp >= found[at][0]:
                found[at] = (one.timestamp, one.value)
    return {at: value for at, (_, value) in found.items()}


def _experiment(client: Any, uri: str, name: str) -> str:
    """Return the id of an experiment by name, made if it is not there; a database gets its artifacts beside it."""
    found = client.get_experiment_by_name(name)
    if found is None:
        database = re.fullmatch(r"sqlite:///(.+)", uri)
        where = None
        if database:
            digest = hashlib.sha256(name.encode("utf-8", "replace")).hexdigest()[:12]
            where = (Path(database[1]).absolute().parent / "mlartifacts" / digest).as_uri()
        return str(client.create_experiment(name, artifact_location=where))
    if found.lifecycle_stage != "active":
        raise StoreError(f"the MLflow experiment {name!r} is deleted: restore it there or choose another by --experiment")
    return str(found.experiment_id)


def _runs(client: Any, experiment: str) -> Iterator[Any]:
    """Yield the experiment's runs, page by page, oldest last so that it wins where a key stands twice."""
    token: str | None = None
    while True:
        page = client.search_runs([experiment], max_results=1000, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _identity(tags: Mapping[str, str]) -> tuple[str, str]:
    return tags.get(KEY, ""), tags.get(ARM, "")


def _content(results: Results) -> dict[str, Any]:
    """Return what of the recipe a trial depends on."""
    plan = Recipe.plan if results.get("kind") == "compare" else Config.plan
    return {k: v for k, v in (results.get("recipe") or {}).items() if k not in plan}


def _params(values: Mapping[str, object]) -> dict[str, str]:
    """Return names that MLflow takes and values as one line of text; what is None is left out."""
    kept = {name: value for name, value in values.items() if value is not None}
    names = _distinct(kept)
    return {names[name]: visible(value, _VALUE) for name, value in kept.items()}


def _named(points: Sequence[tuple[str, int, float]]) -> list[tuple[str, int, float]]:
    """Return the points under names that MLflow takes, the last of a name and step, in order."""
    names = _distinct(name for name, _, _ in points)
    return [(*at, value) for at, value in {(names[name], step): value for name, step, value in points}.items()]


def _distinct(names: Iterable[str]) -> dict[str, str]:
    """Return name -> what MLflow takes: letters, digits, `_`, `-`, `.` and spaces; two that would meet stay apart."""
    found: dict[str, str] = {}
    taken: set[str] = set()
    for name in dict.fromkeys(names):
        plain = re.sub(r"[^\w.\- ]", "_", name, flags=re.ASCII)[:_NAME].strip()
        plain = re.sub(r"^\.+", "_", plain) or "_"  # dots at the start would be read as folders above
        if plain in taken:
            plain = f"{plain[: _NAME - 9]}-{hashlib.sha256(name.encode('utf-8', 'replace')).hexdigest()[:8]}"
        taken.add(plain)
        found[name] = plain
    return found


def _batches(values: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(values), size):
        yield values[start : start + size]


def _version(results: Results) -> str:
    return visible((results.get("environment") or {}).get("openwork", "unknown"), 40)


def _place(uri: str | None) -> str:
    """Return the tracking store's address; a folder's path is made absolute.

    Raises:
        MissingExtra: if MLflow is not installed, or a database is named and SQLAlchemy is not.
        RecipeError: if it is empty or a file stands where a folder should.
    """
    if importlib.util.find_spec("mlflow") is None:
        raise MissingExtra("exporting to MLflow needs mlflow-skinny: pip install 'openwork[mlflow]'")
    database = importlib.util.find_spec("sqlalchemy") is not None and importlib.util.find_spec("alembic") is not None
    given = uri if uri is not None else os.environ.get("MLFLOW_TRACKING_URI")
    if given is None:
        return f"sqlite:///{Path('mlflow.db').absolute()}" if database else str(Path("mlruns").absolute())
    if not given.strip():
        raise RecipeError("--uri is empty: give a folder, sqlite:///FILE or a server's address")
    if re.match(r"(sqlite|postgresql|mysql|mssql)(\+\w+)?:", given):
        if not database:
            raise MissingExtra(
                f"the MLflow database {_shown(given)!r} needs all of MLflow: pip install mlflow; a folder or a server "
                f"works without"
            )
        return given
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", given):
        return given
    if Path(given).is_file():
        raise RecipeError(f"--uri {visible(given, 200)!r} is a file: for a database write sqlite:///{visible(given, 200)}")
    return str(Path(given).absolute())


def _shown(uri: str) -> str:
    """Return an address, or a text that holds it, without the password in it."""
    return visible(re.sub(r"(?<=://)[^/@\s]*@", "", uri), 300)


@contextlib.contextmanager
def _settings() -> Iterator[None]:
    """Set what MLflow reads from the environment, where the user has not, and take it back."""
    mine = {name: value for name, value in _SETTINGS.items() if name not in os.environ}
    os.environ.update(mine)
    try:
        yield
    finally:
        for name in mine:
            os.environ.pop(name, None)


def _errors() -> tuple[type[Exception], ...]:
    from mlflow.exceptions import MlflowException

    return (MlflowException, OSError)


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
