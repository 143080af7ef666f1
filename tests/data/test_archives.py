from __future__ import annotations

import contextlib
import io
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openwork.data import archives
from openwork.errors import DataError


def everything(_: str) -> bool:
    return True


def archive(path: Path, *members: tuple[tarfile.TarInfo, bytes]) -> Path:
    mode = {".gz": "w:gz", ".xz": "w:xz", ".bz2": "w:bz2"}[path.suffix]
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for info, data in members:
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".bz2"])
def test_wanted_files_come_in_their_order(tmp_path: Path, suffix: str) -> None:
    path = archive(
        tmp_path / f"some.tar{suffix}",
        (member("folder", tarfile.DIRTYPE), b""),
        (member("folder/b"), b"two"),
        (member("folder/skipped"), b"x" * 5000),
        (member("a"), b"one"),
    )
    assert list(archives.members(path, lambda name: "skipped" not in name)) == [("folder/b", b"two"), ("a", b"one")]


@pytest.mark.parametrize(
    "bad",
    [
        member("/etc/passwd"),
        member("../up"),
        member("a/../../up"),
        member("c:\\up"),
        member("link", tarfile.SYMTYPE, "a"),
        member("hard", tarfile.LNKTYPE, "a"),
        member("device", tarfile.CHRTYPE),
        member("pipe", tarfile.FIFOTYPE),
    ],
    ids=lambda info: info.name,
)
def test_what_leads_out_or_is_no_file_is_refused_even_if_unwanted(tmp_path: Path, bad: tarfile.TarInfo) -> None:
    path = archive(tmp_path / "bad.tar.gz", (member("a"), b"one"), (bad, b""))
    with pytest.raises(DataError, match="do not trust it"):
        list(archives.members(path, lambda name: name == "a"))


def test_an_archive_that_grows_too_large_is_refused(tmp_path: Path) -> None:
    path = archive(tmp_path / "bomb.tar.gz", (member("zeros"), bytes(1 << 20)))
    assert path.stat().st_size < 5000
    with pytest.raises(DataError, match="more than 100,000 bytes"):
        list(archives.members(path, lambda _: False, limit=100_000))
    assert len(dict(archives.members(path, everything, limit=2 << 20))["zeros"]) == 1 << 20


def test_damage_and_unknown_forms_are_data_errors(tmp_path: Path) -> None:
    path = archive(tmp_path / "cut.tar.gz", (member("a"), bytes(range(256)) * 100))
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(DataError, match="cannot be unpacked"):
        list(archives.members(path, everything))
    other = tmp_path / "some.zip"
    other.write_bytes(b"")
    with pytest.raises(DataError, match="no archive"):
        list(archives.members(other, everything))


@settings(max_examples=60, deadline=None)
@given(places=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=5))
def test_any_change_gives_members_or_a_data_error(
    tmp_path_factory: pytest.TempPathFactory, places: list[tuple[int, int]]
) -> None:
    path = archive(tmp_path_factory.mktemp("t") / "a.tar.gz", (member("a"), b"one"), (member("b"), bytes(300)))
    data = bytearray(path.read_bytes())
    for place, value in places:
        data[place % len(data)] = value
    path.write_bytes(data)
    with contextlib.suppress(DataError):
        assert all(isinstance(content, bytes) for _, content in archives.members(path, everything))
