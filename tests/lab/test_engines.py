"""Engines without a cluster: names and addresses, what travels, a trial's needs, what is said without Ray."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openwork.errors import FormatError, MissingExtra, OpenworkError, RecipeError, TrialError
from openwork.lab import elsewhere, environment, sweep
from openwork.lab.engines import catalog, cluster, local, needs, parcel, remote
from openwork.lab.recipe import Recipe
from openwork.lab.spec import Arm, Trial
from tests.lab import toys

ROOT = Path(__file__).parents[2]


def test_engines_by_name():
    assert catalog.names() == ["local", "ray"]
    assert catalog.find() is local.run
    assert catalog.find("ray", "auto").keywords == {"address": "auto"}
    with pytest.raises(RecipeError, match="there is no engine 'dask'; known are local, ray"):
        catalog.find("dask")
    with pytest.raises(RecipeError, match="takes no address 'auto': add --engine ray"):
        catalog.find("local", "auto")


@pytest.mark.parametrize(
    "address", ["auto", "local", "10.0.0.5:6379", "head-node.example:1", "ray://head:10001", "[::1]:6379"]
)
def test_addresses(address):
    assert catalog.checked(address) == address


@pytest.mark.parametrize(
    "address", ["", "head", "head:0", "head:65536", "http://head:80", "head:12:13", "he ad:6379", "auto\n"]
)
def test_what_is_no_address_is_refused(address):
    with pytest.raises(RecipeError, match="write auto"):
        catalog.checked(address)


def test_engine_and_address_are_no_part_of_a_trials_content():
    assert Recipe.read({"engine": "ray", "address": "auto"}).content() == Recipe.read({}).content()


@given(files=st.dictionaries(st.sampled_from(["log.txt", "deep/model.safetensors", "é a", "..b"]), st.binary(max_size=99)))
@settings(max_examples=40, deadline=None)
def test_a_parcel_brings_home_what_was_packed(files):
    note, found = parcel.unpack(parcel.pack({"node": "here", "result": None}, files))
    assert note == {"node": "here", "result": None}
    assert {name: bytes(content) for name, content in found.items()} == files


@given(st.data())
@settings(max_examples=120, deadline=None)
def test_a_damaged_parcel_is_noticed(data):
    whole = parcel.pack({"node": "here"}, {"a": b"1234", "b": b""})
    place = data.draw(st.integers(0, len(whole) - 1))
    cut = whole[:place]
    flipped = cut + bytes([whole[place] ^ data.draw(st.integers(1, 255))]) + whole[place + 1 :]
    for damaged in (cut, flipped, whole + b"x"):
        with pytest.raises(FormatError, match="from a worker"):
            parcel.unpack(damaged)


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../../x", "", ".", "a\\..\\x", "a\0"])
def test_a_parcel_does_not_write_outside_its_folder(name):
    with pytest.raises(FormatError, match="leads out of the trial's folder"):
        parcel.unpack(parcel.pack({}, {name: b"x"}))


@pytest.mark.parametrize(
    "header", [b"[]", b"{}", b'{"note": 3, "files": []}', b'{"note": {}, "files": [["a", 9]]}', b"\xff"]
)
def test_a_hostile_header_is_an_error_of_its_own_kind(header):
    import hashlib

    body = len(header).to_bytes(8, "little") + header
    with pytest.raises(FormatError):
        parcel.unpack(b"openwork-parcel-1\n" + hashlib.sha256(body).digest() + body)


def trial(**identity) -> Trial:
    config = toys.STUDY.preset("smoke")
    whole = {**environment.identity(1, toys.STUDY), **config.identity(), **identity}
    return Trial(toys.NAME, config.model_dump(mode="json"), config.content(), Arm("dense", {"way": "dense"}), 0, whole)


def test_an_order_is_run_in_a_folder_of_the_worker_and_brought_home(tmp_path, monkeypatch):
    monkeypatch.setattr(remote.tempfile, "gettempdir", lambda: str(tmp_path))
    asked = trial()
    try:
        note, files = parcel.unpack(remote.run(remote.order(asked, "sweep", 60.0, elsewhere.baggage())))
        assert (note["result"]["key"], note["result"]["status"], note["node"]) == (asked.key, "ok", socket.gethostname())
        assert bytes(files["log.txt"]) == b""
        assert list(tmp_path.glob("openwork-*/sweep/*")) == [], "a finished trial leaves nothing on its worker"

        other = trial(torch="1.0")
        note, files = parcel.unpack(remote.run(remote.order(other, "sweep", 60.0, elsewhere.baggage())))
        assert "torch" in note["trouble"]
        assert "instead of 1.0; install the same versions" in note["trouble"]
        assert not note["store"]
        assert files == {}
    finally:
        remote._nursery().close()
        remote._nursery.cache_clear()


def test_a_folder_of_somebody_else_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setattr(remote.tempfile, "gettempdir", lambda: str(tmp_path))
    (tmp_path / "elsewhere").mkdir()
    remote._base().symlink_to(tmp_path / "elsewhere")
    note, _ = parcel.unpack(remote.run(remote.order(trial(), "sweep", None, elsewhere.baggage())))
    assert "belongs to another user" in note["trouble"]
    assert note["store"]


def test_a_machines_own_folders_win_over_those_of_the_driver(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENWORK_DATA", str(tmp_path))
    monkeypatch.setenv("OPENWORK_OFFLINE", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    given = elsewhere.baggage()
    assert given["folder"] == os.getcwd()
    assert not any(Path(path).is_relative_to(sys.prefix) for path in given["paths"])
    assert given["variables"]["OPENWORK_DATA"] == str(tmp_path)
    assert "CUDA_VISIBLE_DEVICES" not in given["variables"]
    monkeypatch.setenv("OPENWORK_DATA", "/data/of/the/worker")
    monkeypatch.delenv("OPENWORK_OFFLINE")
    assert elsewhere.unpacked(given)["variables"] == {"OPENWORK_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "3"} | {
        name: value for name, value in given["variables"].items() if not os.environ.get(name)
    }
    monkeypatch.delenv("OPENWORK_DATA")
    assert elsewhere.unpacked(given)["variables"]["OPENWORK_DATA"] == str(tmp_path)
    gone = {**given, "variables": {"OPENWORK_DATA": str(tmp_path / "not here")}}
    assert "OPENWORK_DATA" not in elsewhere.unpacked(gone)["variables"], "it is downloaded then"


def test_nodes_and_what_they_hold():
    small, large = cluster.Node(2, 4e9, 0), cluster.Node(8, 6e9, 1)
    need = needs.Needs(2, 2 << 30)
    assert [node.holds(need) for node in (small, large)] == [1, 2]
    assert [node.holds(needs.Needs(1, 1, 1)) for node in (small, large)] == [0, 1]
    assert cluster.fitting(need, [small, large]) == need
    assert cluster.fitting(needs.Needs(1, int(9e9)), [small, large]).memory == int(6e9), "a whole machine, not never"
    assert cluster.fitting(needs.Needs(1, int(9e9)), [small]).memory == int(4e9)
    with pytest.raises(TrialError, match=r"16 threads and no machine .* \(at most 8 CPUs\): lower --threads"):
        cluster.fitting(needs.Needs(16, 1), [small, large])
    with pytest.raises(TrialError, match=r"and a GPU .* --device cpu"):
        cluster.fitting(needs.Needs(1, 1, 1), [small])
    with pytest.raises(TrialError, match="at most 0 CPUs"):
        cluster.fitting(needs.Needs(1, 1), [])


def test_ray_that_is_not_installed_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    made = sweep.plan(toys.STUDY, toys.STUDY.preset("smoke"), tmp_path)
    with pytest.raises(MissingExtra, match=r"pip install 'openwork\[ray\]'"):
        sweep.run(made, engine=catalog.find("ray"), done=lambda *_: None)


def openwork(*words: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    return subprocess.run(
        [sys.executable, "-m", "openwork", *words], cwd=cwd, env={**os.environ, "PYTHONPATH": paths, **env},
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip


@pytest.mark.parametrize("address", ["auto", "closed"])
def test_no_cluster_at_the_address_is_one_sentence_that_says_how_to_start_one(address, tmp_path):
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'openwork[ray]'")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: nobody else takes the port, and nobody answers
        if address == "closed":
            address = f"127.0.0.1:{taken.getsockname()[1]}"
        words = ["compare", "--methods", "dense", "--model", "mlp-8", "--steps", "3", "--seeds", "1"]
        found = openwork(*words, "--engine", "ray", "--address", address, cwd=tmp_path, RAY_TMPDIR=str(tmp_path))
    assert found.returncode == 2
    assert f"there is no Ray cluster at the address '{address}'" in found.stderr
    assert "ray start --head" in found.stderr
    assert "Traceback" not in found.stderr
    assert len(found.stderr.strip().splitlines()) == 1
    assert list(tmp_path.glob("runs/*/trials/*")) == []


@pytest.mark.parametrize(
    ("words", "said"), [(["--engine", "dask"], "no engine 'dask'"), (["--address", "auto"], "--engine ray")]
)
def test_a_wrong_engine_is_said_before_anything_else(words, said, tmp_path):
    from openwork.cli import compare

    with pytest.raises(OpenworkError, match=said):
        compare.run(Recipe.read({"out": str(tmp_path / "run"), **dict([[words[0][2:], words[1]]])}))
    assert list(tmp_path.iterdir()) == []


def test_a_study_with_a_wrong_engine_says_so_once(tmp_path):
    from openwork.cli.study import study

    with pytest.raises(RecipeError, match="there is no engine 'dask'"):
        study(every=True, engine="dask", out=str(tmp_path / "run"))
    assert list(tmp_path.iterdir()) == []


def test_what_listens_and_is_no_ray_is_told_apart_at_once():
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'openwork[ray]'")
    with socket.create_server(("127.0.0.1", 0)) as other:

        def answer():
            line, _ = other.accept()
            with line:
                line.recv(100)
                line.sendall(b"HTTP/1.0 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(TrialError, match=r"no Ray cluster at the address .* \(what listens there is no Ray\)"):
            cluster._join(ray, f"127.0.0.1:{other.getsockname()[1]}")
        thread.join()


def test_results_are_json_whatever_they_hold(tmp_path):
    made = sweep.plan(toys.STUDY, toys.STUDY.preset("smoke"), tmp_path)
    odd = {"text": "é\udc80\n", "deep": {"x": [1.5, float("nan")]}, "path": Path("a")}
    found = {**sweep.results(made), "trials": [odd, {"fine": 1}], "latency": {"x": float("inf")}, "rows": []}
    text = sweep.write(made, found).read_bytes().decode()
    read = json.loads(text)
    assert read["trials"] == [{"text": "é\udc80\n", "deep": {"x": [1.5, None]}, "path": "a"}, {"fine": 1}]
    assert read["latency"] == {"x": None}
    assert read["rows"] == []
    assert len(text.splitlines()) == len(found) + 2 + sum(1 + len(v) for v in found.values() if isinstance(v, list) and v)


def test_a_folder_that_another_process_still_uses_is_waited_for(tmp_path):
    """The child of a sweep that was just killed may live for a moment longer than the next sweep takes to begin."""
    import fcntl

    made = sweep.plan(toys.STUDY, toys.STUDY.preset("smoke", ways=("good",), seeds=1), tmp_path)
    scratch = made.store.begin(made.trials[0]) / "scratch"
    scratch.mkdir()
    ended = []
    with (scratch / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        thread = threading.Thread(target=lambda: sweep.run(made, workers=1, done=lambda *_: ended.append(time.monotonic())))
        thread.start()
        while not (scratch.parent / "log.txt").exists():
            time.sleep(0.05)
        time.sleep(0.5)
        assert not ended
        freed = time.monotonic()
    thread.join()
    assert [result["status"] for result in made.results.values()] == ["ok"]
    assert ended[0] > freed


MEASURED = """
import json, resource, sys
from pathlib import Path
from openwork.lab import child
spec = json.loads(Path(sys.argv[1], "spec.json").read_text())
assert child.run(spec, Path(sys.argv[1]))["status"] == "ok"
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss has other units elsewhere")
@pytest.mark.parametrize(
    "values",
    [
        {"model": "mlp-1024-2048-1024", "optimizer": "adamw", "lr": 1e-3, "batch_size": 32},
        {"model": "cnn", "options": {"multiplier": 4}, "batch_size": 1024},
    ],
    ids=["weights", "activations"],
)
def test_the_memory_estimate_covers_what_a_trial_takes_and_is_no_more_than_a_few_times_that(values, tmp_path):
    from openwork.lab import compare

    recipe = Recipe.read({"methods": "rigl", "density": 0.1, "steps": 3, "seeds": 1, **values})
    (arm,) = compare.arms(recipe)
    one = Trial("compare", recipe.model_dump(mode="json"), recipe.content(), arm, 0, {"threads": 1})
    (tmp_path / "spec.json").write_text(json.dumps(one.to_json()))
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(tmp_path)], env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = needs.reader()(one)
    assert found.cpus == 1
    assert int(done.stdout) <= found.memory <= 3 * int(done.stdout)


def test_needs_of_a_trial_that_names_no_model_and_of_one_on_a_gpu():
    assert needs.reader()(trial()).memory == needs.UNKNOWN
    asked = Trial("compare", {}, {"device": "cuda:1"}, Arm("dense"), 0, {"threads": 3})
    assert needs.reader()(asked) == needs.Needs(3, needs.UNKNOWN, 1)


def test_the_estimate_leaves_the_model_as_it_was_and_draws_nothing():
    import torch

    from openwork import data, models

    source = data.load("digits")
    model = models.build("resnet20", input_shape=source.input_shape, classes=10, seed=0, options={"width": 4}).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    noise = torch.random.get_rng_state()
    assert needs.estimate(model, source, batch_size=8) > needs.PROCESS
    assert not model.training
    assert torch.equal(noise, torch.random.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
