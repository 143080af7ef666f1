"""Sweeps: every way a trial can end, and going on after all of them."""

from __future__ import annotations

import pytest

from openwork.errors import StoreError
from openwork.lab import sweep
from tests.lab.toys import STUDY


def ran(folder, timeout=None, **values):
    made = sweep.plan(STUDY, STUDY.preset("smoke", **values), folder)
    ended = []
    sweep.run(made, workers=2, timeout=timeout, done=lambda trial, result: ended.append((trial.arm.name, trial.seed)))
    return made, ended


def statuses(made):
    return {(r["arm"], r["seed"]): r["status"] for r in made.results.values()}


def test_each_trial_ends_in_its_own_way_and_costs_no_other(tmp_path):
    ways = ("dense", "good", "fails", "diverges", "killed", "exits")
    made, ended = ran(tmp_path, ways=ways, seeds=1)
    assert statuses(made) == {
        ("dense", 0): "ok", ("good", 0): "ok", ("fails", 0): "failed", ("diverges", 0): "diverged",
        ("killed", 0): "killed", ("exits", 0): "failed",
    }  # fmt: skip
    assert len(ended) == 6
    said = str(sweep.complaints(made))
    assert said.startswith("4 of 6 trials did not end well")
    for words in ("ValueError: a plain bug", "loss is nan at step 3", "SIGKILL", "status 3"):
        assert words in said

    _, ended = ran(tmp_path, ways=ways, seeds=1)
    assert sorted(ended) == [("exits", 0), ("fails", 0), ("killed", 0)]  # those that ended for good are kept


def test_a_hang_is_ended_by_the_timeout(tmp_path):
    made, _ = ran(tmp_path, ways=("good", "hangs"), seeds=1, timeout=12)
    assert statuses(made) == {("good", 0): "ok", ("hangs", 0): "timeout"}
    assert "--timeout" in str(sweep.complaints(made))


def test_a_killed_trial_goes_on_from_its_scratch(tmp_path):
    assert statuses(ran(tmp_path, ways=("once",), seeds=1)[0]) == {("once", 0): "killed"}
    made, _ = ran(tmp_path, ways=("once",), seeds=1)
    assert statuses(made) == {("once", 0): "ok"}
    assert not (made.store.place(made.trials[0]) / "scratch").exists()


def test_a_full_disk_stops_the_sweep_and_keeps_what_is_finished(tmp_path):
    ran(tmp_path, ways=("dense",), seeds=1)
    made = sweep.plan(STUDY, STUDY.preset("smoke", ways=("dense", "full"), seeds=1), tmp_path)
    with pytest.raises(StoreError, match=r"no space left \(1 of 2 trials are finished and kept\)"):
        sweep.run(made, workers=1, timeout=None, done=lambda *_: None)


def test_too_little_space_is_said_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "free_megabytes", lambda _folder: 3.0)
    with pytest.raises(StoreError, match="only 3 MB are free"):
        ran(tmp_path)


def test_more_seeds_and_arms_find_the_finished_trials(tmp_path):
    first, _ = ran(tmp_path, ways=("dense", "good"), seeds=1)
    more, ended = ran(tmp_path, ways=("dense", "good"), seeds=2)
    assert sorted(ended) == [("dense", 1), ("good", 1)]
    assert {k: more.results[k] for k in first.results} == first.results
    third, ended = ran(tmp_path, ways=("dense", "good"), seeds=2)
    assert ended == []
    assert third.results == more.results


def test_arms_of_the_same_settings_are_run_once_and_stand_under_both_names(tmp_path):
    made, ended = ran(tmp_path, ways=("dense", "dense-again"), seeds=2)
    assert len(ended) == 2
    one, two = sweep.results(made)["rows"]
    assert (one["n"], two["n"]) == (2, 2)
    assert one["accuracy"] == two["accuracy"]
    renamed, ended = ran(tmp_path, ways=("dense-again",), seeds=2)
    assert ended == []
    assert sweep.results(renamed)["rows"][0]["n"] == 2


def test_another_version_is_run_again_and_says_why(tmp_path, monkeypatch):
    ran(tmp_path, ways=("dense",), seeds=1)
    monkeypatch.setattr(sweep.environment, "code_digest", lambda: "other")
    made = sweep.plan(STUDY, STUDY.preset("smoke", ways=("dense",), seeds=1), tmp_path)
    assert len(made.missing) == 1
    assert made.stale == "1 trials were run before under other conditions (code) and are run again"


def test_results_hold_rows_pairs_and_verdicts(tmp_path):
    made, _ = ran(tmp_path, ways=("dense", "good", "fails"), seeds=3)
    found = sweep.results(made, preset="smoke")
    dense, good, fails = found["rows"]
    assert (dense["n"], good["n"], fails["n"], fails["seeds"]) == (3, 3, 0, 3)
    values = {(t["arm"], t["seed"]): t["metrics"].get("accuracy") for t in found["trials"]}
    expected = sum(values["good", s] - values["dense", s] for s in range(3)) / 3
    assert good["difference"]["mean"] == pytest.approx(expected, abs=1e-12)
    assert good["difference"]["low"] < expected < good["difference"]["high"]
    assert dense["difference"] is None
    assert found["claims"][0]["verdict"] == "holds"
    assert sweep.write(made, found).is_file()
    assert "scale: 1.0" in (tmp_path / "recipe.yaml").read_text()


def test_one_and_two_workers_find_the_same(tmp_path):
    one = sweep.plan(STUDY, STUDY.preset("smoke"), tmp_path / "a")
    sweep.run(one, workers=1, timeout=None, done=lambda *_: None)
    two, _ = ran(tmp_path / "b")
    metrics = [{r["arm"] + str(r["seed"]): r["metrics"] for r in made.results.values()} for made in (one, two)]
    assert metrics[0] == metrics[1]
