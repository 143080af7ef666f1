"""Results as TensorBoard event files: a folder a trial with its curves and metrics, and the table of hyperparameters."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from openwork import atomic
from openwork.errors import MissingExtra
from openwork.report.export import made_at, points_of, refuse_existing, settings_of, slug
from openwork.report.html import title
from openwork.report.summary import Results
from openwork.report.text import finite, visible

FILE = "events.out.tfevents.0.openwork"
"""One name for all, so that a second export writes over the first and not beside it."""


def export(
    results: Results,
    folder: Path,
    *,
    force: bool = False,
    done: Callable[[int, int], None] = lambda _done, _all: None,
) -> list[Path]:
    """Write an event file a trial, and one that lists hyperparameters and metrics; return their paths.

    A trial's folder is ARM/seed-N. It holds `curves/NAME` over steps, `metrics/NAME` at the last of them, and the arm's
    settings for TensorBoard's page of hyperparameters. The same results give the same bytes.

    Args:
        results: What `results.json` holds, checked by `report.reading.read_run`.
        folder: Where to write; made if it is not there.
        force: Write over event files of an earlier export. Other files are left alone in any case.
        done: Called with the number of trials that are written and of all, as it goes on.

    Raises:
        MissingExtra: if TensorBoard is not installed.
        StoreError: if a file is there and `force` is not given, or the folder cannot be written.
    """
    if importlib.util.find_spec("tensorboard") is None:
        raise MissingExtra("exporting to TensorBoard needs tensorboard: pip install 'openwork[tensorboard]'")
    trials, settings = results.get("trials") or [], settings_of(results)
    places = {
        folder / slug(visible(trial["arm"], 10_000)) / f"seed-{trial['seed']}" / FILE: trial for trial in trials
    }  # fmt: skip
    refuse_existing([folder / FILE, *places], force=force)
    start = made_at(results) or 0.0
    known = {arm: dict(_hparams(values)) for arm, values in settings.items()}
    atomic.write_bytes(folder / FILE, _events([(start, 0, _experiment(results, trials, known))]))
    for index, (path, trial) in enumerate(places.items()):
        own = {"arm": visible(trial["arm"], 200), "seed": trial["seed"], **known.get(trial["arm"], {})}
        atomic.write_bytes(path, _events(_trial(trial, own, start)))
        done(index + 1, len(places))
    return [folder / FILE, *places]


def _trial(trial: Mapping[str, Any], hparams: Mapping[str, Any], start: float) -> Iterator[tuple[float, int, Any]]:
    """Yield wall time, step and summary of everything that a trial's file holds."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    seconds = min(max(finite((trial.get("timings") or {}).get("seconds")) or 0.0, 0.0), 1e9)
    yield start, 0, _session_start(hparams, visible(trial["key"], 100), start)
    points = sorted(points_of(trial), key=lambda point: (point[1], point[0]))
    last = max((step for _, step, _ in points), default=0)
    for name, step, value in points:
        when = start + (seconds * step / last if last > 0 else 0.0)
        yield when, step, Summary(value=[Summary.Value(tag=f"curves/{visible(name, 200)}", simple_value=_narrow(value))])
    for name, value in (trial.get("metrics") or {}).items():
        number = finite(value)
        if number is not None:
            scalar = Summary.Value(tag=f"metrics/{visible(name, 200)}", simple_value=_narrow(number))
            yield start + seconds, last, Summary(value=[scalar])
    yield start + seconds, last, _session_end(trial["status"] == "ok", start + seconds)


def _experiment(results: Results, trials: list[Mapping[str, Any]], known: Mapping[str, Mapping[str, Any]]) -> Any:
    """Return the summary that lists all hyperparameters and metrics."""
    from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

    kinds = {float: "DATA_TYPE_FLOAT64", bool: "DATA_TYPE_BOOL", str: "DATA_TYPE_STRING"}
    values: dict[str, object] = {"arm": "", "seed": 0.0}
    for own in known.values():
        for name, value in own.items():
            mixed = name in values and type(values[name]) is not type(value)
            values[name] = "" if mixed else value
    metrics = dict.fromkeys(visible(name, 200) for trial in trials for name in trial.get("metrics") or {})
    made = api_pb2.Experiment(
        name=visible(title(results), 200),
        time_created_secs=made_at(results) or 0.0,
        hparam_infos=[api_pb2.HParamInfo(name=name, type=kinds[type(value)]) for name, value in values.items()],
        metric_infos=[api_pb2.MetricInfo(name=api_pb2.MetricName(tag=f"metrics/{name}")) for name in metrics],
    )
    data = plugin_data_pb2.HParamsPluginData(experiment=made, version=metadata.PLUGIN_DATA_VERSION)
    return _plugin(metadata.EXPERIMENT_TAG, metadata.create_summary_metadata(data))


def _session_start(hparams: Mapping[str, Any], group: str, start: float) -> Any:
    from tensorboard.plugins.hparams import metadata, plugin_data_pb2

    made = plugin_data_pb2.SessionStartInfo(group_name=group, start_time_secs=start)
    for name, value in hparams.items():
        kind = "bool_value" if isinstance(value, bool) else "string_value" if isinstance(value, str) else "number_value"
        setattr(made.hparams[name], kind, value)
    data = plugin_data_pb2.HParamsPluginData(session_start_info=made, version=metadata.PLUGIN_DATA_VERSION)
    return _plugin(metadata.SESSION_START_INFO_TAG, metadata.create_summary_metadata(data))


def _session_end(good: bool, end: float) -> Any:
    from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

    status = api_pb2.STATUS_SUCCESS if good else api_pb2.STATUS_FAILURE
    made = plugin_data_pb2.SessionEndInfo(status=status, end_time_secs=end)
    data = plugin_data_pb2.HParamsPluginData(session_end_info=made, version=metadata.PLUGIN_DATA_VERSION)
    return _plugin(metadata.SESSION_END_INFO_TAG, metadata.create_summary_metadata(data))


def _plugin(tag: str, described: Any) -> Any:
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams import metadata

    return Summary(value=[Summary.Value(tag=tag, metadata=described, tensor=metadata.NULL_TENSOR)])


def _events(found: Any) -> bytes:
    """Return the bytes of an event file: its version, then the summaries."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    stream = io.BytesIO()
    writer = RecordWriter(stream)
    version = True
    for when, step, summary in found:
        if version:
            writer.write(Event(wall_time=when, file_version="brain.Event:2").SerializeToString())
            version = False
        writer.write(Event(wall_time=when, step=step, summary=summary).SerializeToString(deterministic=True))
    return stream.getvalue()


def _hparams(values: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    """Yield what makes an arm as numbers, truth values and text; what is None is left out."""
    for name, value in values.items():
        number = finite(value)
        if value is not None:
            yield (
                visible(name, 200),
                value if isinstance(value, bool) else number if number is not None else visible(value, 400),
            )


def _narrow(value: float) -> float:
    """Return the value within the range of float32, in which TensorBoard keeps scalars."""
    return min(max(value, -3.4028234663852886e38), 3.4028234663852886e38)
