"""The MLflow export, read back by MLflow's own client."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest

from openwork.errors import MissingExtra, RecipeError, StoreError
from tests.report.conftest import hostile, make

if importlib.util.find_spec("mlflow") is None:
    pytest.skip("mlflow-skinny is not installed", allow_module_level=True)

from openwork.integrations import mlflow as exporter
from openwork.integrations.mlflow import export

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::PendingDeprecationWarning"),
]


@pytest.fixture
def client(tmp_path, monkeypatch):
    """A client of a store in a folder of its own."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=str(tmp_path / "store"))


def small(**kind):
    results = make(methods=("set", "rigl"), densities=(0.1,), seeds=2, **kind)
    for arm in results["arms"]:
        arm["settings"] = {"method": arm["method"], "options": {"every": 20}}
    for trial in results["trials"]:
        trial["curves"] = {name: curve[::8] for name, curve in trial["curves"].items()}
    return results


def runs(client, experiment):
    found = client.get_experiment_by_name(experiment)
    return {
        (run.data.tags["openwork.key"], run.data.tags["openwork.arm"]): run
        for run in client.search_runs([found.experiment_id])
    }


def history(client, run, name):
    return [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, name)]


def test_everything_is_read_back_and_a_second_export_changes_nothing(client, tmp_path):
    results = small(lost=[("set@0.1", 1, "diverged")])
    report = tmp_path / "report.html"
    report.write_text("<p>report</p>")
    store = str(tmp_path / "store")
    steps = []
    done = export(results, uri=store, files=[report], done=lambda *at: steps.append(at))
    assert (done.created, done.updated, done.unchanged) == (7, 0, 0)
    assert steps == [(at, 6) for at in range(1, 7)]
    found = runs(client, done.experiment)
    assert len(found) == 7
    (parent,) = [run for (_, arm), run in found.items() if not arm]
    assert parent.data.params["data.name"] == "cifar10"
    assert parent.data.metrics["dense.mean"] == results["rows"][0]["accuracy"]["mean"]
    assert [file.path for file in client.list_artifacts(parent.info.run_id)] == ["report.html"]
    assert "rigl" in parent.data.tags["mlflow.note.content"]
    for trial in results["trials"]:
        run = found[trial["key"], trial["arm"]]
        good = trial["status"] == "ok"
        assert run.info.status == ("FINISHED" if good else "FAILED")
        assert run.info.end_time - run.info.start_time == 41_500
        assert run.data.params["arm"] == trial["arm"]
        assert run.data.params["seed"] == str(trial["seed"])
        assert run.data.params["settings.options.every"] == "20"
        assert {k: v for k, v in run.data.metrics.items() if not k.startswith("curves.")} == trial["metrics"]
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.data.tags["openwork.status"] == trial["status"]
        assert ("openwork.error" in run.data.tags) is not good
        for name, curve in trial["curves"].items():
            assert history(client, run, f"curves.{name}") == [tuple(point) for point in curve]
        if trial["layers"]:
            path = Path(client.download_artifacts(run.info.run_id, "layers.json", str(tmp_path)))
            assert json.loads(path.read_text()) == trial["layers"]
    before = {key: run.to_dictionary() for key, run in found.items()}
    done = export(results, uri=store, files=[report])
    assert (done.created, done.updated, done.unchanged) == (0, 0, 7)
    assert {key: run.to_dictionary() for key, run in runs(client, done.experiment).items()} == before


def test_what_changed_is_updated_and_what_is_new_is_added(client, tmp_path):
    store = str(tmp_path / "store")
    results = small()
    first = export(results, uri=store, experiment="one")
    results = small()
    trial = results["trials"][0]
    trial["metrics"]["accuracy"], trial["metrics"]["nll"] = 0.5, 1.25
    trial["curves"]["loss"].append([2000, 0.125])
    extra = {**results["trials"][1], "key": "another", "seed": 7}
    results["trials"].append(extra)
    done = export(results, uri=store, experiment="one")
    assert (done.created, done.updated, done.unchanged) == (1, 2, first.created - 2)  # the trial and the whole
    found = runs(client, "one")
    assert len(found) == 8
    run = found[trial["key"], trial["arm"]]
    assert (run.data.metrics["accuracy"], run.data.metrics["nll"]) == (0.5, 1.25)
    assert history(client, run, "curves.loss") == [tuple(point) for point in trial["curves"]["loss"]]
    trial["metrics"]["accuracy"] = 0.25
    export(results, uri=store, experiment="one")
    trial["metrics"]["accuracy"] = 0.5
    export(results, uri=store, experiment="one")
    assert runs(client, "one")[trial["key"], trial["arm"]].data.metrics["accuracy"] == 0.5
    assert len(runs(client, "one")) == 8


def test_more_seeds_stay_under_the_same_parent(client, tmp_path):
    store = str(tmp_path / "store")
    few, more = small(), make(methods=("set", "rigl"), densities=(0.1,), seeds=3)
    few["kind"] = more["kind"] = "study"
    export(few, uri=store, experiment="one")
    parents = {run.info.run_id for (_, arm), run in runs(client, "one").items() if not arm}
    export(more, uri=store, experiment="one")
    found = runs(client, "one")
    assert {run.info.run_id for (_, arm), run in found.items() if not arm} == parents
    assert len(found) == 1 + 9


def test_a_cut_off_export_is_completed(client, tmp_path, monkeypatch):
    store, results = str(tmp_path / "store"), small()

    def stop(done, _total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(results, uri=store, experiment="one", done=stop)
    whole = exporter._log

    def die(client, run, wanted, *rest):
        whole(client, run, wanted, *rest)
        raise OSError("no space left on device")

    monkeypatch.setattr(exporter, "_log", die)
    with pytest.raises(StoreError, match="no space left"):
        export(results, uri=store, experiment="one")
    monkeypatch.undo()
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    done = export(results, uri=store, experiment="one")
    assert (done.created, done.updated, done.unchanged) == (3, 1, 3)
    found = runs(client, "one")
    assert len(found) == 7
    for trial in results["trials"]:
        run = found[trial["key"], trial["arm"]]
        assert history(client, run, "curves.loss") == [tuple(point) for point in trial["curves"]["loss"]]


def test_two_arms_that_share_a_trial_stay_two_runs(client, tmp_path):
    results = small()
    results["trials"].append({**results["trials"][0], "arm": "rigl@0.1"})
    done = export(results, uri=str(tmp_path / "store"), experiment="one")
    assert done.created == 8
    assert len(runs(client, "one")) == 8


def test_a_run_whose_parameters_changed_is_replaced(client, tmp_path):
    store, results = str(tmp_path / "store"), small()
    export(results, uri=store, experiment="one")
    results["arms"][1]["settings"]["options"]["every"] = 40
    done = export(results, uri=store, experiment="one")
    assert done.created == 2
    assert len(runs(client, "one")) == 7


def test_hostile_names_stay_apart_and_leave_the_folder_alone(client, tmp_path):
    results = hostile()
    for trial in results["trials"]:
        trial["metrics"] = dict.fromkeys(("a b", "a/b", "a\\b", "../x", "..", ".", "", "x" * 400, "=1", "网络", "a\nb"), 0.5)
        trial["curves"] = {}
    done = export(results, uri=str(tmp_path / "store"), experiment="../../out\x00\n")
    found = runs(client, done.experiment)
    assert len(found) == 1 + len({(trial["key"], trial["arm"]) for trial in results["trials"]})
    assert {len(run.data.metrics) for (_, arm), run in found.items() if arm} == {11}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store"]
    again = export(results, uri=str(tmp_path / "store"), experiment="../../out\x00\n")
    assert again.unchanged == len(found)


def test_the_store_is_where_mlflow_looks_and_the_environment_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in exporter._SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    before = dict(os.environ)
    done = export(small(), experiment="one")
    assert dict(os.environ) == before
    assert (tmp_path / "mlruns").is_dir() or (tmp_path / "mlflow.db").is_file()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    assert export(small(), experiment="one").uri != done.uri
    assert (tmp_path / "elsewhere").is_dir()


def test_a_deleted_experiment_is_one_sentence(client, tmp_path):
    export(small(), uri=str(tmp_path / "store"), experiment="one")
    client.delete_experiment(client.get_experiment_by_name("one").experiment_id)
    with pytest.raises(StoreError, match="--experiment"):
        export(small(), uri=str(tmp_path / "store"), experiment="one")


def test_a_database_keeps_artifacts_beside_it(tmp_path):
    if importlib.util.find_spec("sqlalchemy") is None or importlib.util.find_spec("alembic") is None:
        with pytest.raises(MissingExtra, match="pip install mlflow"):
            export(small(), uri=f"sqlite:///{tmp_path}/m.db")
        return
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path}/m.db"
    (tmp_path / "report.html").write_text("x")
    assert export(small(), uri=uri, experiment="one", files=[tmp_path / "report.html"]).created == 7
    assert export(small(), uri=uri, experiment="one", files=[tmp_path / "report.html"]).unchanged == 7
    assert len(runs(MlflowClient(tracking_uri=uri), "one")) == 7
    assert list((tmp_path / "mlartifacts").rglob("report.html"))


@pytest.mark.parametrize(
    ("uri", "kind", "words"),
    [
        ("", RecipeError, ["--uri is empty"]),
        ("{tmp}/file", RecipeError, ["is a file", "sqlite:///"]),
        ("{tmp}/file/deeper", StoreError, ["cannot export to MLflow", "--uri"]),
        ("nonsense://user:secret@host/x", StoreError, ["cannot export to MLflow"]),
        ("http://user:secret@127.0.0.1:9/", StoreError, ["cannot export to MLflow", "127.0.0.1"]),
    ],
)
def test_an_address_that_does_not_work_is_one_sentence_without_the_password(uri, kind, words, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(kind) as caught:
        export(small(), uri=uri.format(tmp=tmp_path))
    message = str(caught.value)
    assert all(word in message for word in words)
    assert "secret" not in message
    assert len(message.splitlines()) == 1
    assert (tmp_path / "file").read_text() == "mine"


def test_without_mlflow_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"pip install 'openwork\[mlflow\]'"):
        export(small())
