from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openwork.runtime import tuning
from openwork.runtime.kernels.target import Target
from openwork.runtime.tuning import Tiling, candidates, default_tiling, keep, key_of, recall, useful_threads

WIDE, NARROW, SMALL = Target("avx512", "", "", 16, 32), Target("avx2", "", "", 8, 16), Target("generic", "", "", 4, 16)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OPENWORK_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning, "first_cache", lambda: 48 * 1024)
    monkeypatch.setattr(tuning, "_KNOWN", {})
    return tmp_path / "tilings.json"


@given(
    rows=st.sampled_from([1, 2, 4, 8, 16]),
    share=st.sampled_from([0.0, 0.001, 0.05, 0.3, 1.0]),
    out=st.integers(0, 5000),
    width=st.integers(0, 5000),
    columns=st.integers(1, 3000),
    target=st.sampled_from([WIDE, NARROW, SMALL]),
    threads=st.integers(1, 64),
    images=st.integers(1, 40),
)
@settings(max_examples=200, deadline=None)
def test_tilings_fit_the_registers_the_cache_and_the_threads(
    rows: int, share: float, out: int, width: int, columns: int, target: Target, threads: int, images: int
) -> None:
    entries = int(share * (out // rows) * width)
    sizes = (rows, entries, (out, width), columns, target, threads, images)
    for tiling in candidates(*sizes):
        total = -(-columns // target.lanes)
        assert 1 <= tiling.vectors <= total
        assert rows * tiling.vectors <= max(rows, 3 * target.registers // 4)
        assert 1 <= tiling.part <= max(1, width)
        assert 1 <= tiling.chunks <= max(1, out // rows)
        tiles = -(-total // tiling.vectors)
        assert total - (tiles - 1) * tiling.vectors > 0
        reach = max(48 * 1024, tuning.SUMS) // (4 * target.lanes * tiling.vectors)
        assert tiling.part <= 2 * reach + 1
    assert candidates(*sizes)[0] == default_tiling(*sizes)
    assert len(set(candidates(*sizes))) == len(candidates(*sizes)) <= 19


@pytest.mark.parametrize(
    ("rows", "share", "shape", "columns", "target", "expected"),
    [
        (1, 0.1, (512, 512), 196, WIDE, (5, 171)),  # 13 vectors in tiles of 5, 5, 3
        (1, 0.5, (512, 512), 196, WIDE, (7, 64)),
        (1, 0.1, (1024, 1024), 64, WIDE, (4, 171)),
        (1, 0.05, (1024, 1024), 49, WIDE, (4, 205)),
        (4, 0.1, (512, 512), 196, WIDE, (5, 512)),
        (2, 0.1, (256, 256), 784, WIDE, (5, 256)),
        (1, 0.1, (3072, 768), 16, WIDE, (1, 384)),
        (1, 0.1, (512, 512), 196, NARROW, (5, 171)),
        (4, 0.1, (512, 512), 196, NARROW, (3, 512)),
    ],
)
def test_known_sizes(rows: int, share: float, shape: tuple[int, int], columns: int, target: Target, expected: Any) -> None:
    entries = round(share * shape[0] * shape[1] / rows)
    tiling = default_tiling(rows, entries, shape, columns, target, 1)
    assert (tiling.vectors, tiling.part) == expected


def test_threads_get_units_enough_and_one_thread_as_few_as_can_be() -> None:
    for columns, images, threads in itertools.product((16, 64, 784), (1, 8), (2, 4, 16)):
        for entries, enough in ((2**21, tuning.UNITS * threads), (2**14, threads)):  # few entries do not pay for copies
            tiling = default_tiling(1, entries, (2048, 1024), columns, WIDE, threads, images)
            tiles = -(-columns // (16 * tiling.vectors))
            assert images * tiles * tiling.chunks >= enough
        alone = default_tiling(1, 104858, (1024, 1024), columns, WIDE, 1, images)
        assert alone.chunks == 1
    assert default_tiling(1, 2**20, (8192, 1024), 80, WIDE, 1).chunks >= 8192 * 80 * 4 // tuning.SUMS


def test_small_products_run_on_one_thread() -> None:
    assert useful_threads(1000, WIDE, 8) == 1
    assert useful_threads(10**8, WIDE, 8) == 8
    assert useful_threads(10**8, WIDE, 1) == 1
    assert useful_threads(10**6, SMALL, 8) == 8


def test_keys_tell_sizes_apart_and_near_densities_together() -> None:
    def key(
        rows: int = 1, entries: int = 1000, shape: tuple[int, int] = (100, 100), columns: int = 7, threads: int = 1
    ) -> str:
        return key_of("columns", rows, entries, shape, columns, WIDE, threads)

    assert key() == key(entries=1010)
    others = [key(2), key(entries=2000), key(shape=(100, 101)), key(columns=8), key(threads=2), key(entries=0)]
    assert len({key(), *others, key_of("tokens", 1, 1000, (100, 100), 7, WIDE, 1)}) == len(others) + 2


def test_what_is_kept_is_found_by_this_process_and_the_next(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert recall("a") is None
    keep("a", Tiling(4, 100, 2))
    assert recall("a") == Tiling(4, 100, 2)
    keep("b", Tiling(1, 7))
    monkeypatch.setattr(tuning, "_KNOWN", {})
    assert (recall("a"), recall("b"), recall("c")) == (Tiling(4, 100, 2), Tiling(1, 7, 1), None)
    assert json.loads(cache.read_text())["tilings"] == {"a": [4, 100, 2], "b": [1, 7, 1]}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "[" * 100_000,
        '{"format": 99, "tilings": {"a": [1, 1, 1]}}',
        '{"format": 1, "tilings": []}',
        '{"format": 1}',
        '{"format": 1, "tilings": {"a": [0, 1, 1]}}',
        '{"format": 1, "tilings": {"a": [1, 1]}}',
        '{"format": 1, "tilings": {"a": [1, 1, true]}}',
        '{"format": 1, "tilings": {"a": [1, 1.5, 1]}}',
        '{"format": 1, "tilings": {"a": [17, 1, 1]}}',
        '{"format": 1, "tilings": {"a": [1, 9999999999999, 1]}}',
        '{"format": 1, "tilings": {"a": "111"}}',
    ],
)
def test_a_file_that_makes_no_sense_is_ignored_and_written_over(
    text: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.write_text(text)
    assert recall("a") is None
    keep("b", Tiling(2, 3, 4))
    monkeypatch.setattr(tuning, "_KNOWN", {})
    assert (recall("a"), recall("b")) == (None, Tiling(2, 3, 4))


def test_good_entries_survive_bad_ones_and_bytes_that_are_no_text(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.write_text('{"format": 2, "tilings": {"good": [1, 2, 3], "bad": [-1, 2, 3]}}')
    assert (recall("good"), recall("bad")) == (Tiling(1, 2, 3), None)
    monkeypatch.setattr(tuning, "_KNOWN", {})
    cache.write_bytes(b"\xff\xfe\x00")
    assert recall("good") is None
    monkeypatch.setattr(tuning, "_KNOWN", {})
    monkeypatch.setattr(tuning, "_MOST", 10)
    cache.write_text('{"format": 2, "tilings": {"good": [1, 2, 3]}}')
    assert recall("good") is None


def test_a_folder_that_cannot_be_written_costs_the_next_process_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("OPENWORK_CACHE", str(blocked))
    keep("a", Tiling(1, 2, 3))
    assert recall("a") == Tiling(1, 2, 3)


def test_another_process_adds_and_loses_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep("mine", Tiling(1, 1, 1))
    code = "from openwork.runtime.tuning import Tiling, keep\nfor i in range(20): keep(f'theirs {i % 5}', Tiling(2, 2, 2))"
    running = [subprocess.Popen([sys.executable, "-c", code], env=dict(os.environ)) for _ in range(2)]
    for turn in range(20):
        assert tuning._read(cache)["mine"] == Tiling(1, 1, 1)
        keep(f"mine {turn}", Tiling(3, 3, 3))
    assert [one.wait(120) for one in running] == [0, 0]
    monkeypatch.setattr(tuning, "_KNOWN", {})
    assert recall("mine") == Tiling(1, 1, 1)
    assert recall("theirs 4") == Tiling(2, 2, 2)
