"""The Ray engine over a real Ray, started once: the same results as the local engine, whatever happens to workers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from openwork.errors import TrialError
from openwork.lab import environment, sweep
from openwork.lab.engines import catalog, cluster
from openwork.lab.engines import ray as engine
from tests.lab import engine_toys, toys

ROOT = Path(__file__).parents[2]
ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'openwork[ray]'")
pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the trials find their worker through /proc"),
    pytest.mark.timeout(280),
    pytest.mark.filterwarnings("ignore:.*:ResourceWarning:ray"),
]


@pytest.fixture(scope="module", autouse=True)
def two_places():
    """A Ray with room for two trials of one thread."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        cluster._init(ray, address="local", num_cpus=2, include_dashboard=False)
        yield
        ray.shutdown()


def ran(study, folder, name="ray", threads=1, **values):
    made = sweep.plan(study, study.preset("smoke", **values), folder, threads=threads)
    ended: list[tuple[str, int]] = []
    sweep.run(made, engine=catalog.find(name), timeout=120, done=lambda trial, _: ended.append((trial.arm.name, trial.seed)))
    return made, ended


def left(made):
    """Return everything that a sweep stored, times excluded."""
    found = {key: {k: v for k, v in result.items() if k != "timings"} for key, result in made.results.items()}
    names = [p for p in made.store.trials.rglob("*") if p.is_file() and p.name not in ("result.json", "log.txt")]
    return found, {str(path.relative_to(made.store.trials)): path.read_bytes() for path in names}


def test_fifty_trials_with_two_workers_killed_equal_those_of_the_local_engine(tmp_path, monkeypatch):
    marks = tmp_path / "marks"
    marks.mkdir()
    away, ended = ran(engine_toys.STUDY, tmp_path / "ray", seeds=25, marks=str(marks), kills={"one-6": 1, "two-17": 1})
    assert len(ended) == len(set(ended)) == 50
    assert sorted(path.name for path in marks.glob("*.1")) == ["one-6.1", "two-17.1"], "two were run again"
    assert len(list(marks.iterdir())) == 52, "and nothing else was run twice"
    here, _ = ran(engine_toys.STUDY, tmp_path / "local", "local", seeds=25)
    assert all(result["status"] == "ok" for result in away.results.values())
    results, files = left(away)
    assert len(results) == 50
    assert results == left(here)[0]
    specs = {name for name in files if name.endswith("spec.json")}
    assert {n: b for n, b in files.items() if n not in specs} == {n: b for n, b in left(here)[1].items() if n not in specs}
    assert sum(name.endswith("deep/weights.bin") for name in files) == 50

    def never(*_):
        raise AssertionError("a second call has nothing to do in the cluster")

    monkeypatch.setattr(cluster, "joined", never)
    again, ended = ran(engine_toys.STUDY, tmp_path / "ray", seeds=25)
    assert ended == []
    assert again.results == away.results
    assert ran(engine_toys.STUDY, tmp_path / "ray", "local", seeds=25)[1] == [], "the engines share their keys"


def test_each_trial_is_labelled_as_locally(tmp_path):
    ways = ("dense", "fails", "diverges", "killed", "exits")
    away, _ = ran(toys.STUDY, tmp_path / "ray", ways=ways, seeds=1)
    here, _ = ran(toys.STUDY, tmp_path / "local", "local", ways=ways, seeds=1)
    assert left(away)[0] == left(here)[0]
    assert sorted(result["status"] for result in away.results.values()) == ["diverged", "failed", "failed", "killed", "ok"]


def test_a_trial_that_costs_every_worker_is_given_up_and_the_others_are_kept(tmp_path, monkeypatch):
    marks = tmp_path / "marks"
    marks.mkdir()
    monkeypatch.setattr(engine, "ATTEMPTS", 2)
    made, _ = ran(engine_toys.STUDY, tmp_path / "run", seeds=1, marks=str(marks), kills={"one-0": 100})
    assert {result["arm"]: result["status"] for result in made.results.values()} == {"one": "killed", "two": "ok"}
    assert len(list(marks.glob("one-0.*"))) == 2
    assert "its worker was lost 2 times" in str(sweep.complaints(made))


def test_threads_of_a_trial_are_its_own_and_not_those_that_ray_sets(tmp_path):
    away, _ = ran(engine_toys.STUDY, tmp_path / "ray", threads=2, seeds=1)
    here, _ = ran(engine_toys.STUDY, tmp_path / "local", "local", threads=2, seeds=1)
    assert left(away) == left(here)
    assert {result["metrics"]["threads"] for result in away.results.values()} == {2.0}


def test_a_comparison_of_the_users_own_code_from_the_command_line(tmp_path):
    """Joined by its address from another process, whose working folder the workers are told."""
    (tmp_path / "mine.py").write_text((ROOT / "tests" / "cli" / "users.py").read_text())
    words = ["compare", "--data", "mine:loaders", "--model", "mine.py:model", "--methods", "dense,rigl", "--density", "0.2"]
    words += ["--steps", "20", "--seeds", "2", "--no-latency", "--quiet"]
    address = ray.get_runtime_context().gcs_address
    found = {}
    for name, more in {"ray": ["--engine", "ray", "--address", address], "local": []}.items():
        done = subprocess.run(
            [sys.executable, "-m", "openwork", *words, "--out", name, *more], cwd=tmp_path, capture_output=True, text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT / "src")}, check=False, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        trials = json.loads((tmp_path / name / "results.json").read_text())["trials"]
        found[name] = [{key: value for key, value in trial.items() if key != "timings"} for trial in trials]
    assert len(found["ray"]) == 4
    assert found["ray"] == found["local"]
    models = {name: sorted((tmp_path / name).glob("trials/*/model.safetensors")) for name in found}
    assert [path.parent.name for path in models["ray"]] == [path.parent.name for path in models["local"]]
    assert [path.read_bytes() for path in models["ray"]] == [path.read_bytes() for path in models["local"]]


def test_more_threads_than_any_machine_has_are_refused(tmp_path):
    with pytest.raises(TrialError, match=r"64 threads and no machine of the cluster has them \(at most 2 CPUs\)"):
        ran(engine_toys.STUDY, tmp_path, threads=64, seeds=1)


def test_other_code_on_a_worker_is_named_and_nothing_is_stored(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "code_digest", lambda: "the code of the driver")
    with pytest.raises(TrialError, match=r"cannot run trials of this sweep.* code [0-9a-f]{12} instead of the code of") as e:
        ran(engine_toys.STUDY, tmp_path, seeds=1)
    assert len(str(e.value).splitlines()) == 1
    assert list(tmp_path.glob("trials/*")) == []


def test_ctrl_c_ends_what_runs_and_a_second_call_goes_on(tmp_path):
    marks = tmp_path / "marks"
    marks.mkdir()
    values = {"seeds": 3, "marks": str(marks), "seconds": 20.0}

    def interrupt():
        while len(list(marks.iterdir())) < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        ran(engine_toys.STUDY, tmp_path / "run", **values)
    thread.join()
    children = [int(path.read_text()) for path in marks.iterdir()]
    deadline = time.monotonic() + 15
    while any(map(alive, children)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, children))
    made, ended = ran(engine_toys.STUDY, tmp_path / "run", seeds=3)
    assert len(ended) == 6
    assert left(made)[0] == left(ran(engine_toys.STUDY, tmp_path / "local", "local", seeds=3)[0])[0]


def alive(pid: int) -> bool:
    try:
        return "zombie" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
