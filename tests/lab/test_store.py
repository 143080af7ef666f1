"""The run folder: what is found again, what is damaged, what is locked."""

from __future__ import annotations

import json
import os

import pytest

from openwork.errors import StoreError
from openwork.lab.store import Store, read_result, write_result
from tests.lab.test_spec import trial

RESULT = {"status": "ok", "metrics": {"accuracy": 0.1 + 0.2}, "error": None, "arm": "good", "seed": 0}


def test_a_result_is_found_again_exactly(tmp_path):
    store, one = Store(tmp_path), trial()
    place = store.begin(one)
    write_result(place, {**RESULT, "key": one.key})
    assert store.finished(one) == {**RESULT, "key": one.key}
    assert store.finished(trial(seed=1)) is None


@pytest.mark.parametrize("status", ["failed", "killed", "timeout"])
def test_what_failed_is_run_again(tmp_path, status):
    store, one = Store(tmp_path), trial()
    write_result(store.begin(one), {**RESULT, "key": one.key, "status": status})
    assert store.finished(one) is None


def test_any_flipped_bit_of_a_result_is_noticed(tmp_path):
    store, one = Store(tmp_path), trial()
    place = store.begin(one)
    whole = {**RESULT, "key": one.key}
    write_result(place, whole)
    path = place / "result.json"
    good = path.read_bytes()
    for index in range(len(good)):
        for bit in range(8):
            path.write_bytes(good[:index] + bytes([good[index] ^ (1 << bit)]) + good[index + 1 :])
            assert read_result(place, one.key) in (None, whole)


def test_a_result_of_another_trial_is_not_taken(tmp_path):
    store, one = Store(tmp_path), trial()
    write_result(store.begin(one), {**RESULT, "key": "another"})
    assert store.finished(one) is None


def test_one_process_at_a_time(tmp_path):
    store = Store(tmp_path)
    with store.lock(), pytest.raises(StoreError, match=f"process {os.getpid()}"), Store(tmp_path).lock():
        pass
    with store.lock():
        pass


def test_a_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(StoreError, match="--out"):
        Store(tmp_path / "run")
    assert (tmp_path / "run").read_text() == "mine"


def test_other_conditions_of_the_same_question_are_found(tmp_path):
    store = Store(tmp_path)
    old = trial(identity={"torch": "2.12", "threads": 1})
    store.begin(old)
    assert store.others([trial()]) == {trial().key: [{"torch": "2.12", "threads": 1}]}
    (store.place(old) / "spec.json").write_text(json.dumps([1]))
    assert store.others([trial()]) == {}
