"""Every page shows what the folders hold, lets no name out of its place, and goes on past what is broken."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import quote
from xml.etree import ElementTree

import pytest
from starlette.applications import Starlette

from openwork.report import plots
from openwork.web.places import run_id
from tests.report.conftest import HOSTILE
from tests.web.conftest import Answer, ask, hostile_run, id_of, ids, key_of, over, small, write_run

TRAVERSAL_TEXT = r"""
    /../etc/passwd /../../../../etc/passwd /..%2f..%2fetc%2fpasswd /%2e%2e/%2e%2e/etc/passwd /....//....//etc/passwd
    /..;/etc/passwd /..%5c..%5cetc%5cpasswd /%c0%ae%c0%ae/etc/passwd /..%252f..%252fetc%252fpasswd //etc/passwd
    /runs/../../etc/passwd /runs/..%2f..%2fetc%2fpasswd /runs/%2e%2e /runs/%2e%2e%2fresults.json /runs/. /runs/..
    /runs/{run}/.. /runs/{run}/../../results.json /runs/{run}%2f..%2fresults.json /runs/{run}/results.json
    /runs/{run}/trials/.. /runs/{run}/trials/../results.json /runs/{run}/trials/..%2f..%2fresults.json
    /runs/{run}/trials/%2e%2e%2f%2e%2e /runs/{run}/trials/{key}%00 /runs/{run}/trials/{key}%0a /runs/{run}/trials/{key}/..
    /runs/{run}/trials/{key}/../{key} /runs/{run}/trials/{key}/spec.json /runs/{run}/trials/{key}%2fspec.json
    /runs/{run}/trials/{key}/masks/../spec.json /runs/{run}/trials/{key}/masks/..%2fspec.svg
    /runs/{run}/trials/{key}/masks/-1.svg /runs/{run}/trials/{key}/masks/1e3.svg /runs/{run}/trials/{key}/masks/%2e%2e.svg
    /runs/{run}/trials/{key}/masks/9999.svg /runs/{run}%00 /runs/{run}%0a /runs/{run}%20 /runs/{RUN}
    /runs/0000000000000000 /runs/{run}0 /runs//etc/passwd /runs/file:%2f%2f%2fetc%2fpasswd /runs/%2fetc%2fpasswd
    /runs/C:%5cWindows%5cwin.ini /runs/%5c%5chost%5cshare /runs/~root /runs/$HOME /runs/{{7*7}} /style.css/../app.py
    /templates/web.css /static/../app.py /runs/%ff%fe
"""
TRAVERSAL = [*TRAVERSAL_TEXT.split(), "/runs/" + "a" * 20_000]
CONTROL = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
VOID = {"meta", "link", "input", "img", "br"}


class Page(HTMLParser):
    """A page whose elements must be closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag or tag == "option"

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def page(answer: Answer, status: int = 200) -> Page:
    assert answer.status == status, answer.text.split("<main")[1][:300]
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    made = Page(answer.text)
    for tag, attributes in made.elements:
        assert tag not in ("script", "iframe", "object", "embed", "base", "style")
        assert not any(name.startswith("on") or name == "style" for name in attributes)
        link = attributes.get("href") or attributes.get("src") or attributes.get("action") or "/"
        assert link.startswith(("/", "#", "?", "data:image/png;base64,"))
        assert not link.startswith("//")
    found = [attributes["id"] for _, attributes in made.elements if "id" in attributes]
    assert len(set(found)) == len(found)
    labelled = {attributes.get("for") for attributes in made.all("label")}
    for tag in ("input", "select"):
        assert all(one.get("aria-label") or one["id"] in labelled for one in made.all(tag))
    assert all(one.get("alt") for one in made.all("img"))
    assert len(made.all("h1")) == 1
    assert len(made.all("main")) == 1
    return made


def test_the_list_shows_every_run(app: Starlette, runs: Path) -> None:
    made = page(ask(app, "/"))
    assert ids(app) == [id_of(runs / "compare"), id_of(runs / "deep" / "study"), id_of(runs / "other")] or ids(app) == [
        id_of(runs / "deep" / "study"), id_of(runs / "compare"), id_of(runs / "other"),
    ]  # fmt: skip
    for words in ("3 runs", "resnet20 on cifar10", "mlp on digits", "2025-01-02 03:04", "14 of 15 trials", "with losses"):
        assert words in made.text


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("q=MLP", ["other"]),
        ("q=deep+study", ["deep/study"]),
        ("q=%25", []),
        ("q=re_net20", []),
        ("study=rigl", ["deep/study"]),
        ("study=compare&sort=oldest", ["other", "compare"]),
        ("method=rigl&status=losses", ["deep/study"]),
        ("status=complete&sort=oldest", ["other", "compare"]),
        ("verdict=fails", ["deep/study"]),
        ("verdict=untested", ["deep/study"]),
        ("verdict=holds", []),
        ("until=2025-01-02", ["other"]),
        ("until=2025-01-01", []),
        ("since=2025-01-03&study=compare", ["compare"]),
        ("sort=trials", ["other", "compare", "deep/study"]),
        ("sort=lost&method=rigl&since=2026-01-01", ["deep/study", "compare"]),
        ("q=" + quote("' OR 1=1 --"), []),
        ("q=" + quote('"; DROP TABLE runs'), []),
        ("method=nothing", []),
    ],
    ids=lambda _value: "asked",  # a test's name is part of its folder's name, which is searched
)
def test_questions(app: Starlette, runs: Path, asked: str, found: list[str]) -> None:
    ask(app, "/")
    text = ask(app, f"/?{asked}").text
    shown = re.findall(r'name="run" value="([0-9a-f]{16})"', text)
    assert sorted(shown) == sorted(id_of(runs / name) for name in found)
    if "sort=" in asked and len({len(name) for name in found}) > 1 and "trials" not in asked:
        assert shown == [id_of(runs / name) for name in found]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("since=yesterday", "'yesterday' is no date: write YYYY-MM-DD."),
        ("since=2026-02-30", "'2026-02-30' is no date"),
        ("until=9999999-01-01", "is no date"),
        ("status=good", "status 'good' is unknown: choose one of running"),
        ("sort=id;drop", "sort 'id;drop' is unknown"),
        ("page=-1", "'-1' is no page"),
        ("page=0", "'0' is no page"),
        ("page=1e9", "'1e9' is no page"),
        ("page=%D9%A1", "is no page"),
    ],
)
def test_a_question_without_sense_gets_one_sentence(app: Starlette, asked: str, said: str) -> None:
    made = page(ask(app, f"/?{asked}"))
    assert said in made.text
    assert "3 runs" in made.text


def test_a_page_beyond_the_last_is_the_last(app: Starlette) -> None:
    assert len(re.findall('name="run"', ask(app, "/?page=999999").text)) == 3


def test_a_run_shows_report_and_trials(app: Starlette, runs: Path) -> None:
    run = id_of(runs / "compare")
    made = page(ask(app, f"/runs/{run}"))
    assert "resnet20 on cifar10" in made.text
    assert "rigl is the most accurate" in made.text
    drawn = [str(one["src"]) for one in made.all("img")]
    assert drawn == [
        f"/runs/{run}/figures/{n}-{size}.svg" for n in ("accuracy", "cost", "layers", "loss") for size in ("wide", "narrow")
    ]
    for address in drawn[:2]:
        answer = ask(app, address)
        assert answer.headers["content-type"].startswith("image/svg+xml")
        assert "prefers-color-scheme:dark" in ElementTree.fromstring(answer.text)[0].text
    for address in ("figures/x-wide.svg", "figures/accuracy-x.svg", "figures/__class__-wide.svg", "figures/render-wide.svg"):
        assert ask(app, f"/runs/{run}/{address}").status == 404
    links = [one["href"] for one in made.all("a") if str(one["href"]).startswith(f"/runs/{run}/trials/")]
    assert len(links) == 15
    for link in links:
        assert ask(app, str(link)).status == 200


def test_a_trial_shows_everything(app: Starlette, runs: Path) -> None:
    key = key_of("rigl@0.05", 0)
    made = page(ask(app, f"/runs/{id_of(runs / 'compare')}/trials/{key}"))
    for words in ("rigl@0.05, seed 0", "accuracy", "stem.weight", "16 × 3 × 3 × 3", "step 1", "step 2", "resnet20", "2.13.0",
                  "Loss against the optimizer step: from"):  # fmt: skip
        assert words in made.text
    assert len([one for one in made.all("rect") if one.get("class") == "s0"]) == 5
    drawn = [str(one["src"]) for one in made.all("img")]
    assert drawn == [f"/runs/{id_of(runs / 'compare')}/trials/{key}/curves/0-{size}.svg" for size in ("wide", "narrow")]
    assert "optimizer step" in "".join(ElementTree.fromstring(ask(app, drawn[1]).text).itertext())
    for name in ("1-wide", "0-huge", "-1-wide", "x-wide", "0-"):
        assert ask(app, drawn[0].replace("0-wide", name)).status == 404


def test_a_trial_without_a_folder_comes_from_the_results(app: Starlette, runs: Path) -> None:
    made = page(ask(app, f"/runs/{id_of(runs / 'other')}/trials/{key_of('rigl@0.05', 3)}"))
    assert "rigl@0.05, seed 3" in made.text
    assert "The trial wrote nothing." in made.text


def test_masks_are_drawn_where_weights_are_kept(app: Starlette, runs: Path) -> None:
    torch = pytest.importorskip("torch")
    from openwork.runtime import files

    run, key = id_of(runs / "compare"), key_of("rigl@0.05", 0)
    weight = torch.zeros(16, 3, 3, 3)
    weight[0] = 1.0
    path = runs / "compare" / "trials" / key / "model.safetensors"
    files.write_state(
        runs / "compare" / "trials" / key / "model.safetensors", {"stem.weight": weight, "fc.bias": torch.ones(3)}
    )
    made = page(ask(app, f"/runs/{run}/trials/{key}"))
    pictures = [str(one["src"]) for one in made.all("img") if one.get("class") == "mask"]
    assert pictures[0] == f"/runs/{run}/trials/{key}/masks/0.svg"
    answer = ask(app, pictures[0])
    assert answer.headers["content-type"].startswith("image/svg+xml")
    assert "Mask of stem.weight: shape 16 x 3 x 3 x 3, 6.25" in answer.text
    assert ask(app, pictures[1]).status == 404  # the file has no such weight
    path.write_bytes(b"\x80\x04 a pickle")
    answer = ask(app, pictures[0])
    assert answer.status == 404
    assert "pickle" in answer.text


def test_all_trials_by_status(app: Starlette, runs: Path) -> None:
    run = id_of(runs / "deep" / "study")
    made = page(ask(app, f"/runs/{run}/trials"))
    assert "15 trials" in made.text
    made = page(ask(app, f"/runs/{run}/trials?status=diverged"))
    assert "1 trial " in made.text
    assert "loss is nan at step 312" in made.text
    assert "15 trials" in page(ask(app, f"/runs/{run}/trials?status=%3Cscript%3E")).text


def test_side_by_side(app: Starlette, runs: Path) -> None:
    run, other, study = (id_of(runs / name) for name in ("compare", "other", "deep/study"))
    made = page(ask(app, f"/compare?run={run}&run={other}&run={study}&run={run}"))
    for words in (
        "resnet20 on cifar10",
        "mlp on digits",
        "Where they differ",
        "model",
        "seeds",
        "settings are the same",
        "rigl",
    ):
        assert words in made.text
    drawn = [str(one["src"]) for one in made.all("img")]
    assert [address.split("?")[0] for address in drawn] == ["/compare/0.svg", "/compare/1.svg"]
    assert ElementTree.fromstring(ask(app, drawn[1]).text).tag.endswith("svg")
    for number in ("2", "-1", "x", "1e1", "%D9%A1", "9999"):
        assert ask(app, f"/compare/{number}.svg?run={run}").status == 404
    assert ask(app, "/compare/0.svg").status == 404
    assert "rigl 10 % " in made.text
    cells = [row for row in re.findall("<tr>(.*?)</tr>", ask(app, f"/compare?run={run}&run={other}").text) if "model" in row]
    assert "resnet20" in cells[0]
    assert "mlp" in cells[0]


@pytest.mark.parametrize(
    "asked", ["", "?run=", "?run=../../etc", "?run=0000000000000000", "?run=%00&run=x" + "&run=y" * 2000]
)
def test_side_by_side_of_nothing(app: Starlette, asked: str) -> None:
    page(ask(app, f"/compare{asked}"))


def test_the_table_as_csv(app: Starlette, runs: Path) -> None:
    answer = ask(app, f"/runs/{id_of(runs / 'compare')}/table.csv")
    assert answer.headers["content-disposition"].startswith("attachment")
    assert [row["arm"] for row in csv.DictReader(io.StringIO(answer.text))][:2] == ["dense", "rigl@0.1"]


@pytest.mark.parametrize("address", TRAVERSAL)
def test_no_address_leads_to_a_file(app: Starlette, runs: Path, address: str) -> None:
    run = id_of(runs / "compare")
    for name, value in (("{run}", run), ("{RUN}", run.upper()), ("{key}", key_of("rigl@0.05", 0))):
        address = address.replace(name, value)
    answer = ask(app, address)
    assert answer.status == 404
    assert "root:" not in answer.text
    page(answer, 404)


def test_enough_traversal_strings() -> None:
    assert len(set(TRAVERSAL)) >= 50


@pytest.mark.parametrize("kind", ["study", "compare"])
def test_hostile_names_stay_in_their_places(tmp_path: Path, kind: str) -> None:
    results = hostile_run(kind)
    log = "\n".join(HOSTILE.values())
    name = "".join(c for c in HOSTILE["script"] + HOSTILE["template"] + HOSTILE["right-to-left"] if c != "/")
    folder = write_run(tmp_path / name, results, trials=len(results["trials"]), log=log)
    app = over(tmp_path)
    run = id_of(folder)
    keys = list(dict.fromkeys(trial["key"] for trial in results["trials"]))
    addresses = [
        "/",
        f"/runs/{run}",
        f"/runs/{run}/trials",
        f"/compare?run={run}",
        *(f"/runs/{run}/trials/{k}" for k in keys[:2]),
    ]
    for address in addresses:
        answer = ask(app, address)
        made = page(answer)
        assert "<script" not in answer.text.lower()
        assert not CONTROL.search(answer.text), address
        assert "{{7*7}}" in made.text or "trials/" in address
        assert len(answer.text) < 3_000_000
    assert "49{%" not in ask(app, f"/runs/{run}").text
    for cell in csv.reader(io.StringIO(ask(app, f"/runs/{run}/table.csv").text)):
        assert not any(value.startswith(("=", "+", "@")) for value in cell)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_questions_are_only_shown(app: Starlette, name: str) -> None:
    asked = quote(HOSTILE[name].encode("utf-8", "surrogatepass"))
    if len(asked) > 60_000:
        asked = asked[:60_000]
    for field in ("q", "study", "method", "status", "verdict", "since", "until", "sort", "page", "run", "live"):
        for address in (f"/?{field}={asked}", f"/compare?{field}={asked}"):
            answer = ask(app, address)
            page(answer)
            assert "<script" not in answer.text.lower()


def test_what_is_damaged_is_one_sentence_and_costs_no_other(tmp_path: Path) -> None:
    good = write_run(tmp_path / "good", small())
    broken = {
        "empty": b"", "text": b"hello", "list": b"[1, 2]", "cut": json.dumps(small()).encode()[:5000], "nul": b"\x00" * 100,
        "latin": b'{"format": 1, "rows": [], "name": "\xff"}', "deep": b"[" * 100_000, "other": b'{"format": 2, "rows": []}',
        "digits": b'{"format": 1, "rows": [], "x": ' + b"9" * 10_000 + b"}",
    }  # fmt: skip
    for name, content in broken.items():
        write_run(tmp_path / name, None)
        (tmp_path / name / "results.json").write_bytes(content)
    app = over(tmp_path)
    made = page(ask(app, "/"))
    assert "10 runs" in made.text
    assert made.text.count("unreadable") >= len(broken) - 1
    for name in broken:
        folder = tmp_path / name
        made = page(ask(app, f"/runs/{id_of(folder)}"))
        if name != "digits":
            assert len([one for one in made.all("p") if one.get("class") == "trouble"]) == 1, name
        assert ask(app, f"/runs/{id_of(folder)}/trials").status == 200
    assert "resnet20" in page(ask(app, f"/runs/{id_of(good)}")).text
    made = page(ask(app, f"/compare?run={id_of(tmp_path / 'cut')}&run={id_of(good)}"))
    assert "damaged" in made.text


@pytest.mark.parametrize("field", sorted({*small(), "recipe_text", "about", "columns"}))
@pytest.mark.parametrize("value", [None, "text", [[1]], {"a": [1]}, [{"a": {"b": [1]}}], 1e308])
def test_a_field_of_another_kind_costs_only_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str, value: object
) -> None:
    monkeypatch.setattr(plots, "render", lambda *_, **__: "<svg></svg>")  # drawing takes most of the time
    results = small(seeds=2, methods=("rigl",), densities=(0.1,))
    folder = write_run(tmp_path / "run", results, trials=1)
    (folder / "results.json").write_text(json.dumps({**results, field: value}))
    app = over(tmp_path)
    for address in ("/", f"/runs/{id_of(folder)}", f"/runs/{id_of(folder)}/trials", f"/compare?run={id_of(folder)}"):
        page(ask(app, address))


def test_half_written_runs(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "half", small(), trials=4)
    (folder / "results.json").unlink()
    keys = sorted(os.listdir(folder / "trials"))
    (folder / "trials" / keys[0] / "result.json").unlink()
    (folder / "trials" / keys[1] / "result.json").write_text('{"key": "')
    (folder / "trials" / keys[2] / "spec.json").write_text("")
    (folder / "trials" / keys[2] / "result.json").unlink()
    (folder / "trials" / "not-a-key").mkdir()
    app = over(tmp_path)
    assert "stopped" in page(ask(app, "/")).text
    made = page(ask(app, f"/runs/{id_of(folder)}"))
    assert "3 of 4 begun trials ended" in made.text or "2 of 4 begun trials ended" in made.text
    made = page(ask(app, f"/runs/{id_of(folder)}/trials"))
    assert "result.json is damaged" in made.text
    for key in keys:
        answer = ask(app, f"/runs/{id_of(folder)}/trials/{key}")
        page(answer, answer.status)
        assert answer.status in (200, 404)
    shutil.rmtree(folder)
    assert "0 runs" in page(ask(app, "/")).text
    assert ask(app, f"/runs/{run_id(folder)}").status == 404


def test_a_run_at_work_is_loaded_again_until_told_to_stop(tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    folder = write_run(tmp_path / "live", small(), trials=2)
    (folder / "results.json").unlink()
    key = sorted(os.listdir(folder / "trials"))[0]
    (folder / "trials" / key / "result.json").unlink()
    (folder / "trials" / key / "progress.json").write_text("0.4200")
    app = over(tmp_path)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write(str(os.getpid()))
        lock.flush()
        assert "running" in page(ask(app, "/")).text
        made = page(ask(app, f"/runs/{id_of(folder)}"))
        assert {"http-equiv": "refresh", "content": "5"} in made.all("meta")
        made = page(ask(app, f"/runs/{id_of(folder)}?live=0"))
        assert not any("http-equiv" in one for one in made.all("meta"))
        made = page(ask(app, f"/runs/{id_of(folder)}/trials/{key}"))
        assert [one["value"] for one in made.all("progress")] == ["42.0"]
        write_run(folder, small(), trials=2)
        assert "running" in page(ask(app, "/")).text
    assert "running" not in page(ask(app, "/?status=complete")).text.replace("running with", "").replace("any running", "")
    assert "complete" in page(ask(app, f"/?q={folder.name}")).text


def test_what_cannot_be_made_is_one_line(
    app: Starlette, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object) -> None:
        raise ValueError("<b>\x1b[31mred</b>")

    monkeypatch.setattr(app.state.index, "page", fails)
    answer = ask(app, "/")
    made = page(answer, 500)
    assert "ValueError: <b>red</b>" in made.text
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "\x1b" not in said


def test_the_style_is_the_reports_and_the_pages_own(app: Starlette) -> None:
    made = page(ask(app, "/"))
    (link,) = [one["href"] for one in made.all("link") if one["rel"] == "stylesheet"]
    answer = ask(app, str(link))
    assert answer.headers["content-type"].startswith("text/css")
    assert "prefers-color-scheme:dark" in answer.text
    assert "/*" not in answer.text
    assert not re.search(r"https?:|@import|url\(", answer.text)
    assert ask(app, "/icon.svg").headers["content-type"].startswith("image/svg+xml")
