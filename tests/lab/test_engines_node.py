"""A cluster of two machines, both here, one of which goes away in the middle of a sweep."""

from __future__ import annotations

import sys

import pytest

from openwork.errors import TrialError
from openwork.lab import sweep
from openwork.lab.engines import catalog
from openwork.lab.engines import ray as engine
from tests.lab import engine_toys

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'openwork[ray]'")
pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="several machines on one are for Linux"),
    pytest.mark.timeout(280),
    pytest.mark.filterwarnings("ignore:.*:ResourceWarning:ray"),
]


def test_a_sweep_survives_the_loss_of_a_machine_and_says_so_when_none_is_left(tmp_path, monkeypatch):
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_health_check_timeout_ms", "2000")
    monkeypatch.setattr(engine, "_PATIENCE", 2)
    marks = tmp_path / "marks"
    marks.mkdir()
    machines = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        one, two = (machines.add_node(num_cpus=1) for _ in range(2))
        address = machines.address.replace("localhost", "127.0.0.1")
        config = engine_toys.STUDY.preset("smoke", seeds=4, marks=str(marks), seconds=0.5)
        made = sweep.plan(engine_toys.STUDY, config, tmp_path / "run")
        ended = []

        def done(trial, result):
            ended.append(trial.key)
            if len(ended) == 2:
                machines.remove_node(one, allow_graceful=False)

        sweep.run(made, engine=catalog.find("ray", address), done=done)
        assert len(ended) == len(set(ended)) == 8
        assert {result["status"] for result in made.results.values()} == {"ok"}

        more = sweep.plan(engine_toys.STUDY, engine_toys.STUDY.preset("smoke", seeds=8, seconds=0.5), tmp_path / "run")
        assert len(more.missing) == 8

        def last(trial, result):
            if len(more.missing) == 6:
                machines.remove_node(two, allow_graceful=False)

        with pytest.raises(TrialError, match="add a machine and run the same command again"):
            sweep.run(more, engine=catalog.find("ray", address), done=last)
        assert len(more.missing) <= 6, "what came home is kept"
        assert len(sweep.plan(engine_toys.STUDY, more.config, tmp_path / "run").missing) == len(more.missing)
    finally:
        machines.shutdown()
