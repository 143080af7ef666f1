"""The page says what the results hold, judges every target, and is the same text for the same results."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET

import pytest

from openwork.bench import curves, page, plot, runner, suite, targets
from openwork.bench.operators import row
from openwork.bench.results import Arm
from openwork.bench.roofline import Limits
from openwork.errors import ModelError
from openwork.report import pages
from tests.bench import fixtures


@pytest.fixture
def bench() -> runner.Bench:
    return fixtures.bench()


def judged(bench: runner.Bench) -> dict[str, targets.Judged]:
    return {one.target.name: one for one in targets.judge(bench.merged(), bench.reasons)}


def test_targets_are_judged_by_their_worst_cell(bench):
    found = judged(bench)
    dense = found["faster than dense"]
    assert (dense.reached, dense.worst.value, dense.cells) == (False, 0.5, 32)
    assert dense.reason == "the toy is slow at 50 %"
    assert found["80 % unstructured"].reached is False
    assert found["80 % unstructured"].reason == "the kernel runs at 20 % of the roofline there"
    assert found["90 % unstructured"].reached is True
    assert found["90 % unstructured"].worst.value == pytest.approx(6.5)
    assert found["95 % blocks of 4"].reached is True
    assert found["95 % unstructured, few columns"].reached is None
    assert found["roofline"].worst.value == pytest.approx(0.2)
    assert found["every peer"].worst.value == pytest.approx(0.5)  # at 50 % dense is the fastest other arm
    assert found["MobileNet-v1 @224"].reached is True
    assert found["MobileNet-v1 @224"].worst.value == pytest.approx(4.0)
    assert found["kernel groups"].reached is None
    assert found["accelerate, first"].reason == "not measured"


def test_a_target_beyond_the_roofline_says_so(bench):
    cell = {"shape": "8x8@64", "columns": 64, "sparsity": 0.9, "pattern": "unstructured"}
    arms = {"matmul": Arm("ok", dense=True), "openwork": Arm("ok")}
    made = row("8x8@64 unstructured 0.9", "operator", cell, 1, 0.25, arms, {"matmul": 1.0, "openwork": 0.3})
    bench.rows = {made.key: made}
    assert judged(bench)["90 % unstructured"].reason == "beyond this machine: its roofline allows 4x there"


def test_a_missed_target_says_what_its_time_goes_into(bench):
    cell = {"shape": "8x8@64", "out": 8, "size": 8, "columns": 64, "sparsity": 0.5, "pattern": "blocks of 2"}
    arms = {"matmul": Arm("ok", dense=True), "openwork": Arm("ok")}
    made = row("8x8@64 blocks of 2 0.5", "operator", cell, 1, 1e-3, arms, {"matmul": 1e-3, "openwork": 2e-3})
    limits = Limits("avx2", 8, 1, 2 * 32 * 64 * 1e3, ((2**14, 4 * 64 * 16 * 2e3), (2**18, 1e6)), 1.0, 2**15)
    assert targets.profile(made, {1: limits}) == pytest.approx({
        "multiply-adds": 0.5, "loads from the first cache": 0.25, "memory": (160 + 4096) / (4 * 64 * 16 * 2e3) / 2e-3,
        "refills of it from the second": (160 + 2048) / 1e6 / 2e-3,
    })  # fmt: skip
    assert targets.profile(made, {2: limits}) == targets.profile(made, {1: None}) == {}
    bench.rows = {made.key: made}
    found = {one.target.name: one for one in targets.judge(bench.merged(), {}, {1: limits})}["faster than dense"]
    words = "the kernel runs at 50 % of the roofline there; by themselves, of its time: multiply-adds 50 %, loads"
    assert found.reason.startswith(words)


def test_seconds_must_be_at_most_what_is_wanted(bench):
    made = row("accelerate", "task", {"name": "accelerate"}, 2, None, {"first": Arm("ok"), "warm": Arm("ok")},
               {"first": 19.0, "warm": 3.0})  # fmt: skip
    bench.rows[made.key] = made
    found = judged(bench)
    assert found["accelerate, first"].reached is True
    assert found["accelerate, warm"].reached is False
    assert found["accelerate, warm"].worst.value == pytest.approx(3.0)


def test_every_target_is_on_the_page_with_its_number(bench, tmp_path):
    text = page.write(bench, tmp_path).read_text().replace("\N{NO-BREAK SPACE}", " ")
    for one in targets.targets():
        assert page.escape_markdown(one.text) in text
    assert "Toy 1 (avx2)" in text
    assert "2026-01-02 03:04 UTC" in text
    assert "| ≥ 6.00x | 6.50x | 512x512@196, 90 % unstructured, 1 thread | **yes** |  |" in text
    assert "| 512x512@196 | 60 % | ≤ 50 % | 80 % |" in text  # ours crosses 1 between 0.5 and 2.0; blocks begin at 1
    assert "it is &#60;gone&#62; \\| for good" in text
    assert "wrong: the output differs" in text
    assert "python benchmarks/performance.py" in text
    for threads in (1, 2):
        assert f"figures/performance-{threads}.svg" in text
        ET.fromstring((tmp_path / "figures" / f"performance-{threads}.svg").read_text())


def test_the_page_is_written_again_without_measuring(bench, tmp_path):
    page.write(bench, tmp_path)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    suite.write(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files
    with pytest.raises(ModelError, match="measure first"):
        suite.write(tmp_path / "elsewhere")


def test_reasons_written_by_hand_stay(bench, tmp_path):
    page.write(bench, tmp_path)
    path = tmp_path / "performance.json"
    found = json.loads(path.read_text())
    found["reasons"]["80 % unstructured"] = "no toy does that"
    path.write_text(json.dumps(found))
    assert "no toy does that" in suite.write(tmp_path).read_text()
    opened, _ = suite.opened(path)  # of another machine: measured anew, with the reasons
    assert not opened.rows
    assert opened.reasons["80 % unstructured"] == "no toy does that"


def test_the_results_stand_in_the_index_of_all_results(bench, tmp_path):
    page.write(bench, tmp_path)
    text = pages.write_index(tmp_path).read_text()
    judged_all = list(judged(bench).values())
    holds, fails = sum(one.reached is True for one in judged_all), sum(one.reached is False for one in judged_all)
    assert f"[performance](performance.md) | {holds} holds" in text
    assert f"{fails} fails" in text


def test_lines_are_ours_by_pattern_and_peers_on_unstructured_zeros(bench):
    rows = bench.merged()
    assert curves.shapes(rows, 1) == ["512x512@196", "256x256@784"]
    found = {one.name: one for one in curves.curves(rows, "512x512@196", 1)}
    assert list(found) == ["openwork, unstructured", "openwork, blocks of 4", "torch_csr"]
    assert found["openwork, unstructured"].crossover == pytest.approx(0.6)
    assert found["openwork, blocks of 4"].crossover == 0.5
    assert found["torch_csr"].crossover == pytest.approx(0.8)
    spans = curves.spans(rows, 1, {"low": 64, "high": 1000})
    assert spans[0.9, "openwork, blocks of 4"] == (pytest.approx(13.0), pytest.approx(13.0), 2)
    assert not curves.spans(rows, 1, {"low": 1, "high": 1})


@pytest.mark.parametrize("width", [720.0, 360.0])
def test_the_plot_shows_every_line_and_marks_crossings(bench, width):
    svg = plot.speedups(bench.merged(), 1, width)
    root = ET.fromstring(svg)
    texts = [element.text for element in root.iter() if element.tag.endswith("text")]
    for words in ("512x512@196", "256x256@784", "openwork, unstructured", "torch_csr", "sparsity (%)"):
        assert words in texts
    assert "faster from 60\N{NO-BREAK SPACE}% on" in root.get("aria-label", "")
    rings = [one for one in root.iter() if one.tag.endswith("use") and one.get("fill") in (None, "none")]
    assert rings
    assert svg == plot.speedups(bench.merged(), 1, width)


def test_nothing_to_show_is_the_empty_string():
    assert plot.speedups([], 1) == ""
    assert page.text(runner.Bench({}), [], targets.judge([])).startswith("# Performance")
