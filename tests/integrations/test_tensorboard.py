"""The TensorBoard export, read back by TensorBoard's own reader."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

from openwork.errors import MissingExtra, StoreError
from openwork.integrations.tensorboard import FILE, export
from tests.report.conftest import hostile, make

if importlib.util.find_spec("tensorboard") is None:
    pytest.skip("tensorboard is not installed", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def read(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    found.Reload()
    return found


def scalars(found):
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def session(found, tag):
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    content = found.SummaryMetadata(f"_hparams_/{tag}").plugin_data.content
    return HParamsPluginData.FromString(content)


def test_curves_metrics_and_hyperparameters_are_read_back(tmp_path):
    from tensorboard.plugins.hparams import api_pb2

    results = make(methods=("set", "rigl"), densities=(0.1,), seeds=2, lost=[("set@0.1", 1, "failed")])
    for arm in results["arms"]:
        arm["settings"] = {"options": {"every": 20, "nesterov": True, "grow": None}}
    seen = []
    paths = export(results, tmp_path / "events", done=lambda *at: seen.append(at))
    assert len(paths) == 1 + len(results["trials"]) == 7
    assert seen[-1] == (6, 6)
    for trial in results["trials"]:
        found = read(tmp_path / "events" / trial["arm"] / f"seed-{trial['seed']}")
        expected = {f"curves/{name}": curve for name, curve in trial["curves"].items()}
        last = max((step for curve in trial["curves"].values() for step, _ in curve), default=0)
        expected |= {f"metrics/{name}": [[last, value]] for name, value in trial["metrics"].items()}
        told = scalars(found)
        assert set(told) == set(expected)
        for tag, points in expected.items():
            assert told[tag] == [(step, float(np.float32(value))) for step, value in points]
        start = session(found, "session_start_info").session_start_info
        assert start.group_name == trial["key"]
        assert start.hparams["arm"].string_value == trial["arm"]
        assert start.hparams["seed"].number_value == trial["seed"]
        assert start.hparams["settings.options.every"].number_value == 20
        assert start.hparams["settings.options.nesterov"].bool_value is True
        assert "settings.options.grow" not in start.hparams
        end = session(found, "session_end_info").session_end_info
        assert end.status == (api_pb2.STATUS_SUCCESS if trial["status"] == "ok" else api_pb2.STATUS_FAILURE)
        assert end.end_time_secs - start.start_time_secs == 41.5
    listed = session(read(tmp_path / "events"), "experiment").experiment
    assert {info.name.tag for info in listed.metric_infos} == {"metrics/accuracy", "metrics/kept", "metrics/steps"}
    assert {"arm", "seed", "method", "density"} <= {info.name for info in listed.hparam_infos}


def test_tensorboards_own_page_of_hyperparameters_lists_every_trial(tmp_path):
    from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
    from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
    from tensorboard.context import RequestContext
    from tensorboard.plugins.base_plugin import TBContext
    from tensorboard.plugins.hparams.api_pb2 import ListSessionGroupsRequest
    from tensorboard.plugins.hparams.backend_context import Context
    from tensorboard.plugins.hparams.list_session_groups import Handler

    results = make(methods=("set", "rigl"), densities=(0.1,), seeds=2)
    export(results, tmp_path)
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(tmp_path))
    multiplexer.Reload()
    provider = MultiplexerDataProvider(multiplexer, str(tmp_path))
    context = Context(TBContext(data_provider=provider, multiplexer=multiplexer, logdir=str(tmp_path)))
    request = ListSessionGroupsRequest(start_index=0, slice_size=100, include_metrics=True)
    request.allowed_statuses.extend([1, 2, 3, 0])
    experiment = context.experiment_from_metadata(
        RequestContext(), "", True, context.hparams_metadata(RequestContext(), ""), []
    )
    request.col_params.extend([])
    for info in experiment.metric_infos:
        request.col_params.add(metric=info.name)
    groups = Handler(RequestContext(), context, "", request).run().session_groups
    told = {
        (group.hparams["arm"].string_value, int(group.hparams["seed"].number_value)): {
            value.name.tag: value.value for value in group.metric_values
        }
        for group in groups
    }
    assert len(told) == len(results["trials"])
    for trial in results["trials"]:
        own = told[trial["arm"], trial["seed"]]
        assert own["metrics/accuracy"] == pytest.approx(trial["metrics"]["accuracy"], abs=1e-6)


def test_the_same_results_give_the_same_bytes_and_nothing_is_written_over(tmp_path):
    results = make(methods=("rigl",), densities=(0.1,), seeds=2)
    first = {path: path.read_bytes() for path in export(results, tmp_path)}
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(StoreError, match="--force"):
        export(results, tmp_path)
    assert {path: path.read_bytes() for path in export(results, tmp_path, force=True)} == first
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == sorted([*first, tmp_path / "mine.txt"])


def test_one_file_in_the_way_stops_all(tmp_path):
    results = make(methods=("rigl",), densities=(0.1,), seeds=2)
    (tmp_path / "rigl@0.1" / "seed-1").mkdir(parents=True)
    (tmp_path / "rigl@0.1" / "seed-1" / FILE).write_text("mine")
    with pytest.raises(StoreError, match="seed-1"):
        export(results, tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / "rigl@0.1" / "seed-1" / FILE]


def test_hostile_names_stay_in_the_folder_and_apart(tmp_path):
    results = hostile()
    for trial in results["trials"]:
        trial["metrics"] = {"../x": 0.5, "a\x00": 1.5, "big": 1e300, "none": None, "nan": float("nan")}
        trial["curves"] = {"=cmd": [[0, 1.0], [1e300, 2.0], [3, None]]}
    paths = export(results, tmp_path / "in")
    assert len(set(paths)) == 1 + len({(trial["arm"], trial["seed"]) for trial in results["trials"]})
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    for path in paths[1:3]:
        told = scalars(read(path.parent))
        assert told["metrics/../x"] == [(0, 0.5)]
        assert told["metrics/big"][0][1] == pytest.approx(3.4028234663852886e38)
        assert set(told) == {"metrics/../x", "metrics/a\\x00", "metrics/big", "curves/=cmd"}


def test_without_tensorboard_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"pip install 'openwork\[tensorboard\]'"):
        export(make(), tmp_path / "x")
    assert not (tmp_path / "x").exists()
