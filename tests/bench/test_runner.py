"""Rows are kept at once, a run goes on where it stopped, and a peer that kills its process costs its own arm only."""

from __future__ import annotations

import io
import json
import os
import signal
from typing import Any

import pytest

from openwork.bench import child, peers, runner, suite
from openwork.bench.operators import Cell
from openwork.bench.results import Arm, Row
from openwork.bench.runner import Bench, Job
from openwork.errors import FormatError, ModelError
from tests.bench import fixtures

CELLS = (Cell(4, 4, 3, 0.5, "unstructured"), Cell(4, 4, 3, 0.75, "unstructured"))


def row_of(task: dict[str, Any], at: int) -> dict[str, Any]:
    cell = Cell(**task["cells"][at])
    names = [name for name in task["peers"] if name not in task["skip"][at]]
    arms = {name: Arm("ok", ms=1.0, ratio=1.0, dense=name == "matmul") for name in names}
    return {"row": Row(f"{cell.key} {task['threads']}", "operator", {}, task["threads"], None, arms).to_json()}


def test_a_peer_that_kills_its_process_costs_its_own_arm_only(monkeypatch):
    tasks: list[dict[str, Any]] = []

    def children(task: dict[str, Any]) -> Any:
        tasks.append(json.loads(json.dumps(task)))
        yield {"limits": None}
        for at in range(len(task["cells"])):
            for name in task["peers"]:
                if name not in task["skip"][at]:
                    yield {"at": name}
                    if name == "scipy_csr" and len(tasks) == 1 and at == 1:
                        yield {"ended": "was ended by signal 11"}
                        return
            yield row_of(task, at)

    monkeypatch.setattr(runner, "_child", children)
    bench = Bench({})
    seen: list[str] = []
    job = Job("operator", CELLS, ("matmul", "scipy_csr"), 1, 0.1)
    assert runner.run(bench, [job], lambda row: seen.append(row.key)) == []
    assert seen == [f"{cell.key} 1" for cell in CELLS]
    assert [len(task["cells"]) for task in tasks] == [2, 1]
    first, second = bench.rows.values()
    assert first.arms["scipy_csr"].status == "ok"
    assert second.arms["matmul"].status == "ok"
    assert (second.arms["scipy_csr"].status, second.arms["scipy_csr"].ms) == ("crashed", None)
    assert "signal 11" in second.arms["scipy_csr"].reason


def test_a_process_that_dies_in_nobodys_name_costs_its_cell(monkeypatch):
    def children(task: dict[str, Any]) -> Any:
        if len(task["cells"]) == 2:
            yield {"at": ""}
            yield {"ended": "ended with status 1 (MemoryError)"}
        else:
            yield row_of(task, 0)

    monkeypatch.setattr(runner, "_child", children)
    bench = Bench({})
    trouble = runner.run(bench, [Job("operator", CELLS, ("matmul",), 1, 0.1)])
    assert len(trouble) == 1
    assert "MemoryError" in trouble[0]
    assert list(bench.rows) == [f"{CELLS[1].key} 1"]


def test_a_real_child_measures_and_a_second_run_finds_its_rows(tmp_path, monkeypatch):
    path = tmp_path / "bench.json"
    bench, words = suite.opened(path)
    assert words == ""
    jobs = runner.jobs("operator", CELLS, ["matmul", "scipy_csr", "deepsparse"], [1], 0.01)
    kept: list[int] = []

    def keep(_row: Row) -> None:
        runner.write(path, bench)
        kept.append(len(json.loads(path.read_text())["measured"]))

    assert runner.run(bench, jobs, keep) == []
    assert kept == [1, 2]  # each row is on the disk before the next is measured
    for row in bench.rows.values():
        assert row.arms["matmul"].status == row.arms["scipy_csr"].status == "ok"
        assert row.arms["deepsparse"].status == "unavailable"
        assert row.arms["scipy_csr"].ratio == pytest.approx(row.arms["matmul"].ms / row.arms["scipy_csr"].ms)
    again, words = suite.opened(path)
    assert words == ""
    assert again.rows == bench.rows
    assert again.limits == bench.limits
    assert runner.missing(again, jobs) == []
    more = runner.jobs("operator", CELLS, ["matmul", "scipy_csr", "linear"], [1], 0.01)
    assert [job.cells for job in runner.missing(again, more)] == [CELLS]  # a peer more: the cells are measured again
    del again.rows[f"{CELLS[0].key} 1"]
    assert [job.cells for job in runner.missing(again, jobs)] == [CELLS[:1]]
    monkeypatch.setattr(runner, "identity", lambda: {**bench.identity, "processor": "another"})
    other, words = suite.opened(path)
    assert not other.rows
    assert "another processor" in words


def test_a_child_writes_a_line_for_everything(monkeypatch):
    monkeypatch.setattr("openwork.bench.roofline.measure", lambda threads: None)
    lines = io.StringIO()
    task = {"kind": "operator", "cells": [vars(CELLS[0])], "peers": ["matmul"], "skip": [[]], "threads": 1, "seconds": 0.01}
    child.work(task, lines)
    events = [json.loads(line) for line in lines.getvalue().splitlines()]
    assert [next(iter(event)) for event in events] == ["limits", "at", "at", "row"]
    lines = io.StringIO()
    network = {"model": "no-such-model", "input": [1, 3], "density": None}
    child.work({**task, "kind": "network", "cells": [network]}, lines)
    assert "no-such-model" in json.loads(lines.getvalue().splitlines()[-1])["error"]


def test_a_child_that_is_killed_is_told_by_its_signal(monkeypatch):
    events = runner._child({"kind": "operator", "cells": [vars(CELLS[0])] * 50, "peers": ["compiled"], "skip": [[]] * 50,
                            "threads": 1, "seconds": 0.01})  # fmt: skip
    found: list[int] = []
    popen = runner.subprocess.Popen

    def spy(*words: Any, **options: Any) -> Any:
        process = popen(*words, **options)
        if "openwork.bench.child" in words[0]:
            found.append(process.pid)
        return process

    monkeypatch.setattr(runner.subprocess, "Popen", spy)
    next(events)
    os.kill(found[0], signal.SIGKILL)
    last = list(events)[-1]
    assert last["ended"].startswith("was ended by signal 9")


def test_with_more_threads_peers_with_a_pool_get_a_process_of_their_own(monkeypatch):
    monkeypatch.setattr(peers, "is_apart", lambda name: name in ("onnxruntime", "openvino"))
    names = ["openwork", "matmul", "onnxruntime", "openvino"]
    found = runner.jobs("operator", CELLS, names, [1, 2], 0.1)
    assert [(job.threads, job.group, job.peers) for job in found] == [
        (1, "", ("openwork", "matmul", "onnxruntime", "openvino")),
        (2, "", ("openwork", "matmul")),
        (2, "onnxruntime", ("matmul", "onnxruntime")),
        (2, "openvino", ("matmul", "openvino")),
    ]


def test_rows_of_one_cell_are_merged_each_arm_with_the_ratio_of_its_own_process():
    def made(**ratios: float) -> Row:
        arms = {name: Arm("ok", ms=1.0 / ratio, ratio=ratio, dense=name == "matmul") for name, ratio in ratios.items()}
        return Row("cell 2", "operator", {}, 2, 0.1, arms)

    bench = Bench({})
    bench.rows = {"cell 2 [onnxruntime]": made(matmul=2.0, onnxruntime=3.0), "cell 2": made(matmul=1.0, openwork=5.0)}
    (whole,) = bench.merged()
    assert {name: arm.ratio for name, arm in whole.arms.items()} == {"matmul": 1.0, "openwork": 5.0, "onnxruntime": 3.0}


def test_results_survive_the_file_and_a_foreign_file_is_one_sentence(tmp_path):
    path = tmp_path / "performance.json"
    bench = fixtures.bench()
    runner.write(path, bench)
    assert runner.read(path) == bench
    path.write_text('{"format": 1, "kind": "study"}')
    with pytest.raises(FormatError, match="delete it"):
        runner.read(path)
    path.write_text("not json")
    with pytest.raises(FormatError, match="delete it"):
        suite.opened(path)


def test_a_suite_names_what_it_does_not_know():
    for wrong in (suite.Suite(parts=("cells",)), suite.Suite(peers=("tensorrt",)), suite.Suite(threads=(0,))):
        with pytest.raises(ModelError):
            wrong.jobs()
    quick = suite.Suite(quick=True, threads=(1,)).jobs()
    whole = suite.Suite(threads=(1,)).jobs()
    assert sum(len(job.cells) for job in quick) < sum(len(job.cells) for job in whole) / 2
