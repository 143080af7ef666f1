import json

import pytest

from openwork.errors import FormatError, StoreError
from openwork.report.reading import find_results, read_run
from tests.report.conftest import hostile, make


def _write(folder, value):
    path = folder / "results.json"
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def test_a_folder_its_file_and_another_file_lead_to_the_same_results(tmp_path):
    results = json.loads(json.dumps(make()))
    path = _write(tmp_path, results)
    other = tmp_path / "other.json"
    other.write_bytes(path.read_bytes())
    assert read_run(tmp_path) == read_run(path) == (path, results)
    assert read_run(str(other)) == (other, results)


def test_hostile_names_are_read_as_they_are(tmp_path):
    results = json.loads(json.dumps(hostile()))
    assert read_run(_write(tmp_path, results))[1] == results


def test_numbers_that_json_has_no_word_for_are_read(tmp_path):
    results = make()
    results["trials"][0]["metrics"] = {"accuracy": float("nan"), "loss": float("inf"), "found": True, "none": None}
    assert set(read_run(_write(tmp_path, results))[1]["trials"][0]["metrics"]) == {"accuracy", "loss", "found", "none"}


@pytest.mark.parametrize(
    ("where", "value", "words"),
    [
        (("rows",), {}, ["rows"]),
        (("rows",), [1], ["rows.0"]),
        (("rows", 0, "arm"), 3, ["rows.0.arm", "3", "string"]),
        (("rows", 1, "accuracy"), [1], ["rows.1.accuracy"]),
        (("rows", 1, "accuracy", "mean"), "high", ["rows.1.accuracy.mean", "high"]),
        (("rows", 0, "density"), 10**400, ["rows.0.density"]),
        (("trials",), "none", ["trials"]),
        (("trials", 0, "seed"), 1.5, ["trials.0.seed"]),
        (("trials", 0, "seed"), 2**70, ["trials.0.seed"]),
        (("trials", 0, "seed"), True, ["trials.0.seed"]),
        (("trials", 2, "metrics"), None, ["trials.2.metrics"]),
        (("trials", 2, "metrics", "accuracy"), {"a": 1}, ["trials.2.metrics.accuracy"]),
        (("trials", 0, "curves"), {"loss": [1, 2]}, ["trials.0.curves.loss"]),
        (("trials", 0, "layers"), {"w": {"kept": "all", "total": 3}}, ["kept"]),
        (("trials", 0, "key"), None, ["trials.0.key"]),
        (("arms", 0), "dense", ["arms.0"]),
        (("claims",), [{"text": "x"}], ["verdict"]),
        (("recipe",), [1], ["recipe"]),
        (("columns",), {"accuracy": 1}, ["columns"]),
        (("name",), None, ["name"]),
        (("format",), 2, ["format"]),
    ],
)
def test_a_field_of_another_type_is_named_in_one_sentence(where, value, words, tmp_path):
    results = json.loads(json.dumps(make()))
    place = results
    for step in where[:-1]:
        place = place[step]
    place[where[-1]] = value
    with pytest.raises(FormatError) as caught:
        read_run(_write(tmp_path, results))
    message = str(caught.value)
    assert all(word in message for word in (*words, "results.json"))
    assert len(message) < 600
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"format": 1}', "\x00\x01", "[" * 100_000, '{"format": 1, "rows": [], "name": 1}']
)
def test_a_file_that_is_no_results_file_is_one_sentence(text, tmp_path):
    with pytest.raises(FormatError) as caught:
        read_run(_write(tmp_path, text))
    assert len(str(caught.value).splitlines()) == 1


def test_what_is_missing_is_said_with_what_to_do(tmp_path):
    with pytest.raises(StoreError, match="no run folder or results file"):
        find_results(tmp_path / "nothing")
    with pytest.raises(StoreError, match=r"holds no results\.json"):
        find_results(tmp_path)
    (tmp_path / "granet.json").write_text("{}")
    with pytest.raises(StoreError, match=r"granet\.json"):
        find_results(tmp_path)
    (tmp_path / "trials").mkdir()
    with pytest.raises(StoreError, match="start the command that made it again"):
        find_results(tmp_path)
    with pytest.raises(StoreError) as caught:
        find_results("a\x00b\x1b[31m\n" + "x" * 10_000)
    assert str(caught.value).isprintable()
