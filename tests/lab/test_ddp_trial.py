"""Trials of several processes: the result of one, and every way of ending told as for any other trial."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from openwork.core.masks import Masks
from openwork.errors import RecipeError, TrialError
from openwork.lab import compare, ddp_trial, sweep
from openwork.saving import load_state
from tests.lab.toys import STUDY

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals")


def ran(study: Any, folder: Path, engine: Any = None, **values: Any) -> sweep.Plan:
    made = sweep.plan(study, study.preset("smoke", **values), folder)
    sweep.run(made, workers=1, timeout=120, done=lambda *_: None, engine=engine)
    return made


def test_a_trial_of_two_processes_is_the_trial_of_one(tmp_path: Path) -> None:
    recipe = {"data": "digits", "model": "mlp-256", "methods": ("rigl",), "density": (0.3,), "seeds": 1}
    recipe |= {"steps": 30, "batch_size": 33}
    one = ran(compare.STUDY, tmp_path / "one", **recipe)
    two = ran(compare.STUDY, tmp_path / "two", partial(ddp_trial.run, processes=2), **recipe)
    for trial in one.trials:
        alone, shared = one.results[trial.key], two.results[trial.key]
        assert (alone["status"], shared["status"]) == ("ok", "ok"), shared["error"]
        assert shared["timings"]["processes"] == 2
        assert alone["layers"] == shared["layers"]
        assert shared["metrics"] == pytest.approx(alone["metrics"], rel=1e-4)
        places = [made.store.place(trial) for made in (one, two)]
        assert not (places[1] / "scratch").exists()
        masks = [Masks.of(load_state(place / compare.MODEL_FILE)) for place in places]
        assert all((masks[0][name] == masks[1][name]).all() for name in masks[0])


def test_every_way_of_ending_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "7", "MASTER_PORT": "1", "TORCHELASTIC_USE_AGENT_STORE": "True"}.items():
        monkeypatch.setenv(name, value)  # as under torchrun, whose words are for this process and not for its trials
    made = ran(STUDY, tmp_path, partial(ddp_trial.run, processes=2), ways=("fails", "killed"), seeds=1)
    found = {trial.arm.name: made.results[trial.key] for trial in made.trials}
    assert {name: result["status"] for name, result in found.items()} == {
        "fails": "failed",
        "killed": "killed",
    }
    assert "ValueError: a plain bug" in found["fails"]["error"]
    assert "SIGKILL" in found["killed"]["error"]


def test_what_cannot_be_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(TrialError, match="processes is 0"):
        ddp_trial.Launcher(0)
    with pytest.raises(SystemExit):
        ddp_trial.main([str(tmp_path)])
    assert "holds no spec.json" in capsys.readouterr().err


def test_the_first_of_torchruns_processes_runs_the_sweep() -> None:
    assert ddp_trial.asked_by_torchrun({}) is None
    assert ddp_trial.asked_by_torchrun({"RANK": "0", "WORLD_SIZE": "1"}) is None
    assert [ddp_trial.asked_by_torchrun({"RANK": rank, "WORLD_SIZE": "3"}) for rank in "012"] == [3, 0, 0]
    with pytest.raises(RecipeError, match="4 processes on several machines"):
        ddp_trial.asked_by_torchrun({"RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"})
