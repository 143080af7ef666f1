import csv
import io
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openwork.errors import StoreError
from openwork.report.export import cell, csv_files, markdown_text, points_of, slug, write_texts
from tests.report.conftest import HOSTILE, hostile, make

NUMBERS = {"seed", "density", "seconds", "n", "asked", "kept", "bytes", "steps", "latency"}


def _read(text):
    return list(csv.DictReader(io.StringIO(text, newline=""), strict=True))


def test_trials_and_table_are_read_back_with_every_digit():
    results = make(kind="study", lost=[("set@0.05", 2, "diverged")])
    for arm in results["arms"]:
        arm["settings"] = {"density": arm["density"], "options": {"every": 20, "layers": [1, 2]}}
    files = csv_files(results)
    assert set(files) == {"trials.csv", "table.csv", "claims.csv"}
    rows = _read(files["trials.csv"])
    assert len(rows) == len(results["trials"])
    for row, trial in zip(rows, results["trials"], strict=True):
        assert (row["key"], row["arm"], int(row["seed"])) == (trial["key"], trial["arm"], trial["seed"])
        assert (row["status"], float(row["seconds"])) == (trial["status"], trial["timings"]["seconds"])
        found = {name: float(row[f"metrics.{name}"]) for name in ("accuracy", "kept", "steps") if row[f"metrics.{name}"]}
        assert found == trial["metrics"]
        assert (row["settings.options.every"], row["settings.options.layers"]) == ("20", "1, 2")
    table = {row["arm"]: row for row in _read(files["table.csv"])}
    assert len(table) == len(results["rows"])
    for row in results["rows"]:
        own = table[row["arm"]]
        for part in ("mean", "low", "high"):
            assert float(own[f"accuracy.{part}"]) == row["accuracy"][part]
            if row["difference"]:
                assert float(own[f"difference.{part}"]) == row["difference"][part]
        assert (int(own["n"]), int(own["asked"])) == (row["n"], row["seeds"])
        assert own["latency"] == ("" if row["latency"] is None else repr(row["latency"]))
    claims = _read(files["claims.csv"])
    assert [claim["verdict"] for claim in claims] == [claim["verdict"] for claim in results["claims"]]


def test_lines_end_as_rfc_4180_says_and_every_row_has_the_same_number_of_cells():
    for results in (make(), hostile()):
        for text in csv_files(results).values():
            assert text.endswith("\r\n")
            assert "\n" not in text.replace("\r\n", "")
            assert len({len(row) for row in csv.reader(io.StringIO(text, newline=""), strict=True)}) == 1


def test_no_cell_and_no_title_of_hostile_results_is_a_formula():
    for text in csv_files(hostile()).values():
        for row in csv.reader(io.StringIO(text, newline=""), strict=True):
            for value in row:
                assert value.isprintable()
                if value.lstrip()[:1] in "=+-@\uff1d\uff0b\uff0d\uff20" and value.strip():
                    float(value)


@pytest.mark.parametrize(
    "text", ["=1+1", "+1", "-1", "@SUM(A1)", " =1", "\t=1", "\r=1", "\uff1d1", "\x00=1", '"=1"', "\n=1"]
)
def test_formulas_are_neutralised_and_numbers_are_not(text):
    shown = cell(text)
    assert isinstance(shown, str)
    assert shown[:1] not in "=+-@\uff1d\t\r\n "
    assert cell(-1.5) == -1.5
    assert cell(-3) == -3
    assert cell(None) is None
    assert cell(float("nan")) is None
    assert cell(True) == "True"


@given(st.text(max_size=60))
@settings(max_examples=200, deadline=None)
def test_any_text_survives_a_csv_reader(text):
    out = io.StringIO(newline="")
    csv.writer(out, lineterminator="\r\n").writerow(["a", cell(text), "b"])
    (row,) = csv.reader(io.StringIO(out.getvalue(), newline=""), strict=True)
    assert (row[0], row[2], len(row)) == ("a", "b", 3)
    assert row[1][:1] not in tuple("=+-@")


def test_nothing_is_written_over_and_nothing_is_written_at_all_where_one_file_is_there(tmp_path):
    (tmp_path / "b.txt").write_text("mine")
    with pytest.raises(StoreError, match="--force"):
        write_texts(tmp_path, {"a.txt": "new", "b.txt": "new"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.txt"]
    assert (tmp_path / "b.txt").read_text() == "mine"
    write_texts(tmp_path, {"a.txt": "new", "b.txt": "new \ud800"}, force=True)
    assert (tmp_path / "b.txt").read_bytes() == b"new \\ud800"
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    with pytest.raises(StoreError, match="is there"):
        write_texts(tmp_path, {"gone": "new"})


def test_markdown_has_headline_table_and_claims():
    text = markdown_text(make(kind="study"))
    assert text.count("\n| ---") + text.count("\n| :--") == 2
    assert "granet beats random" in text
    assert "<script" not in markdown_text(hostile())


def test_names_become_file_names_that_stay_apart():
    assert slug("granet(initial=1.0)@0.05") != slug("granet-initial=1.0-@0.05") == "granet-initial=1.0-@0.05"
    made = [slug(name) for name in [*HOSTILE.values(), "..", ".", "", "/", "x" * 300, "x" * 301]]
    assert len(set(made)) == len(made)
    for name in made:
        assert name.isascii()
        assert 0 < len(name) <= 80
        assert "/" not in name
        assert not name.startswith(".")


def test_points_leave_out_what_is_no_number():
    trial = {"curves": {"loss": [[0, 1.5], [1, None], [2.0, 3], [1], [float("nan"), 1.0], [1e300, 1.0]]}}
    assert list(points_of(trial)) == [("loss", 0, 1.5), ("loss", 2, 3.0)]


def test_real_result_files_are_exported(tmp_path):
    found = sorted((__import__("pathlib").Path(__file__).parents[2] / "docs" / "results").glob("*.json"))
    results = [value for path in found if (value := json.loads(path.read_text())).get("rows") and value.get("trials")]
    assert results
    for value in results:
        assert len(_read(csv_files(value)["trials.csv"])) == len(value["trials"])
