from __future__ import annotations

import hashlib
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from openwork.cli.data import app
from openwork.data import catalog
from openwork.data.entry import Entry
from openwork.errors import DataError
from tests.data.servers import Answer, serving

BODY = bytes(range(256)) * 8000


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENWORK_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("OPENWORK_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("OPENWORK_OFFLINE", raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "data").mkdir()


def entry(home: str, body: bytes = BODY) -> Entry:
    known = catalog.entry("cifar100")
    file = replace(known.files[0], homes=(home,), sha256=hashlib.sha256(body).hexdigest(), size=len(body))
    return replace(known, files=(file,))


def test_list_shows_every_set_with_place_size_and_terms(tmp_path: Path) -> None:
    for file in catalog.entry("mnist").files:
        path = tmp_path / "data/mnist" / file.name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    done = CliRunner().invoke(app, ["list"], catch_exceptions=False)
    assert done.exit_code == 0
    lines = {line.split()[0]: line for line in done.stdout.splitlines()}
    assert list(lines) == ["name", *catalog.entries()]
    for name, parts in {
        "digits": ["1x8x8, 10 classes", "1,437 + 360", "embedded", "CC BY 4.0"],
        "mnist": ["60,000 + 10,000", "11.6 MB", "OPENWORK_DATA"],
        "kmnist": ["21.2 MB", "to download", "CC BY-SA 4.0"],
        "cifar100": ["3x32x32, 100 classes", "168.5 MB", "to download"],
        "photographs": ["embedded", "CC BY 2.0"],
    }.items():
        assert all(part in lines[name] for part in parts), lines[name]


def test_a_narrow_terminal_cuts_no_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    done = CliRunner().invoke(app, ["list"], catch_exceptions=False)
    assert "…" not in done.stdout
    assert all(name in done.stdout for name in catalog.entries())


def test_list_imports_no_torch() -> None:
    code = (
        "import sys\nfrom openwork.cli.data import app\n"
        "try:\n    app(['list'])\nexcept SystemExit:\n    pass\n"
        "print('loaded', [m for m in ('torch', 'sklearn', 'scipy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "loaded []"


def test_get_downloads_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(Answer(body=BODY)) as site:
        made = entry(site.address)
        monkeypatch.setattr(catalog, "entries", lambda: {"cifar100": made})
        for _ in range(2):
            done = CliRunner().invoke(app, ["get", "cifar100"], catch_exceptions=False)
            assert done.exit_code == 0
            assert done.stdout == f"cifar100: 2.0 MB in {(tmp_path / 'cache/cifar100').resolve()}\n"
    assert len(site.asked) == 1
    assert (tmp_path / "cache/cifar100" / made.files[0].name).read_bytes() == BODY


def test_get_takes_several_and_leaves_what_is_embedded(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(Answer(body=BODY)) as site:
        made = {"cifar100": entry(site.address), "digits": catalog.entry("digits")}
        monkeypatch.setattr(catalog, "entries", lambda: made)
        done = CliRunner().invoke(app, ["get", "digits", "cifar100"], catch_exceptions=False)
    assert done.stdout.startswith("digits: comes with scikit-learn, nothing to download\ncifar100: 2.0 MB in ")


def test_get_tells_what_is_wrong_before_it_downloads(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(Answer(body=BODY)) as site:
        made = entry(site.address)
        monkeypatch.setattr(catalog, "entries", lambda: {"cifar100": made})
        with pytest.raises(DataError, match="no data set 'cifar'; known: cifar100"):
            CliRunner().invoke(app, ["get", "cifar100", "cifar"], catch_exceptions=False)
    assert site.asked == []


def test_get_obeys_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENWORK_OFFLINE", "1")
    with pytest.raises(DataError, match="OPENWORK_OFFLINE forbids"):
        CliRunner().invoke(app, ["get", "kmnist"], catch_exceptions=False)


@pytest.mark.parametrize("command", ["list", "get"])
def test_help_has_an_example(command: str) -> None:
    done = CliRunner().invoke(app, [command, "--help"])
    assert done.exit_code == 0
    assert f"openwork data {command}" in done.stdout
