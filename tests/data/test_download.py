from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from openwork.data import download
from openwork.data.entry import File
from tests.data.servers import Answer, serving

BODY = bytes(range(256)) * 2000


def file(*homes: str, body: bytes = BODY) -> File:
    return File("set.gz", homes, hashlib.sha256(body).hexdigest(), hashlib.md5(body).hexdigest(), len(body))


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*")) if folder.exists() else []


def test_a_whole_file_is_kept_under_its_name(tmp_path: Path) -> None:
    with serving(Answer(body=BODY)) as site:
        path = download.fetch(file(site.address + "set.gz"), tmp_path / "set")
        assert path == (tmp_path / "set" / "set.gz").resolve()
        assert path.read_bytes() == BODY
        assert site.asked == ["/set.gz"]
    assert left(tmp_path / "set") == ["set.gz"]


def test_an_altered_file_is_refused_at_once(tmp_path: Path) -> None:
    with serving(Answer(body=BODY[:-1] + b"!")) as site, pytest.raises(download.Failure, match="another checksum"):
        download.fetch(file(site.address), tmp_path, pause=0)
    assert len(site.asked) == 1
    assert left(tmp_path) == []


def test_a_truncated_file_is_asked_for_again(tmp_path: Path) -> None:
    cut = Answer(body=BODY[:-1000], length=len(BODY))
    with serving(cut, cut, Answer(body=BODY)) as site:
        assert download.fetch(file(site.address), tmp_path, pause=0).read_bytes() == BODY
        assert len(site.asked) == 3
    assert left(tmp_path) == ["set.gz"]


def test_a_file_that_stays_truncated_leaves_nothing(tmp_path: Path) -> None:
    with serving(Answer(body=BODY[:-1000], length=len(BODY))) as site, pytest.raises(download.Failure):
        download.fetch(file(site.address), tmp_path, attempts=3, pause=0)
    assert len(site.asked) == 3
    assert left(tmp_path) == []


def test_a_missing_file_is_not_asked_for_again(tmp_path: Path) -> None:
    with serving(Answer(404)) as site, pytest.raises(download.Failure, match=r"127.0.0.1.*status 404"):
        download.fetch(file(site.address), tmp_path, pause=0)
    assert len(site.asked) == 1
    assert left(tmp_path) == []


def test_a_failing_server_gets_another_chance_after_growing_pauses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("openwork.data.download.time.sleep", pauses.append)
    with serving(Answer(500), Answer(503), Answer(429), Answer(body=BODY)) as site:
        assert download.fetch(file(site.address), tmp_path, pause=0.5).read_bytes() == BODY
    assert len(site.asked) == 4
    assert pauses == [0.5, 1.0, 2.0]


def test_the_second_home_is_asked_when_the_first_refuses(tmp_path: Path) -> None:
    with serving(Answer(404)) as first, serving(Answer(body=BODY)) as second:
        path = download.fetch(file(first.address, second.address), tmp_path, pause=0)
        assert path.read_bytes() == BODY
        assert (len(first.asked), len(second.asked)) == (1, 1)


def test_an_interrupted_download_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def interrupt(bar: object, amount: int) -> None:
        seen.extend(path.stat().st_size for path in tmp_path.iterdir())
        raise KeyboardInterrupt

    monkeypatch.setattr(download._Bar, "update", interrupt)
    with serving(Answer(body=BODY)) as site, pytest.raises(KeyboardInterrupt):
        download.fetch(file(site.address), tmp_path)
    assert seen == [download.CHUNK]  # a part was on the disk, under another name
    assert left(tmp_path) == []


def test_an_endless_file_is_stopped(tmp_path: Path) -> None:
    wanted = file("", body=BODY[:1000])
    with serving(Answer(body=BODY)) as site, pytest.raises(download.Failure, match="longer than 1,000 bytes"):
        download.fetch(File(wanted.name, (site.address,), wanted.sha256, "", 1000), tmp_path, pause=0)
    assert left(tmp_path) == []


def test_plain_http_is_refused_also_after_a_redirect(tmp_path: Path) -> None:
    with pytest.raises(download.Failure, match="not https"):
        download.fetch(file("http://example.org/set.gz"), tmp_path, pause=0)
    away = Answer(302, headers={"Location": "http://example.org/set.gz"})
    with serving(away) as site, pytest.raises(download.Failure, match="redirects to an address that is not https"):
        download.fetch(file(site.address), tmp_path, pause=0)
    assert len(site.asked) == 1
    with serving(Answer(302, headers={"Location": "/elsewhere"}), Answer(body=BODY)) as site:
        download.fetch(file(site.address), tmp_path, pause=0)
    assert site.asked == ["/", "/elsewhere"]


@pytest.mark.parametrize(
    ("address", "secure"),
    [
        ("https://example.org/x", True),
        ("http://127.0.0.1:8000/x", True),
        ("http://[::1]/x", True),
        ("http://example.org/x", False),
        ("http://127.0.0.1.example.org/x", False),
        ("ftp://127.0.0.1/x", False),
        ("file:///etc/passwd", False),
    ],
)
def test_secure_addresses(address: str, secure: bool) -> None:
    assert download.secure(address) is secure


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "set").write_text("in the way")
    with serving(Answer(body=BODY)) as site, pytest.raises(download.Failure, match="cannot write"):
        download.fetch(file(site.address), tmp_path / "set", pause=0)
