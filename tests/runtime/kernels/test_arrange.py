from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openwork.runtime.kernels.arrange import Section, arrange, choose_block, dense, sections
from tests.runtime.kernels.sparse_tools import sparse

shapes = {
    "out": st.integers(0, 30),
    "width": st.integers(1, 25),
    "density": st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    "block": st.sampled_from([1, 2, 4, 8, 16]),
}


@given(**shapes)
@settings(max_examples=60, deadline=None)
def test_sections_hold_the_matrix(out: int, width: int, density: float, block: int) -> None:
    weight = sparse(0, out, width, density)
    cut = sections(weight, block)
    assert np.array_equal(dense(cut, weight.shape), weight)
    assert sum(section.groups * section.rows for section in cut) == out
    whole = out // block * block
    assert [section.first for section in cut] == [0] * (whole > 0) + [whole] * (whole < out or out == 0)
    assert [section.rows for section in cut] == [block] * (whole > 0) + [1] * (whole < out or out == 0)
    for section in cut:
        assert section.starts[-1] == len(section.columns) == len(section.values)
        assert section.nbytes == section.starts.nbytes + section.columns.nbytes + section.values.nbytes
        for group in range(section.groups):
            own = slice(section.starts[group], section.starts[group + 1])
            first = section.first + group * section.rows
            rows = weight[first : first + section.rows]
            assert section.columns[own].tolist() == np.flatnonzero(rows.any(axis=0)).tolist()
            assert np.array_equal(section.values[own], rows[:, section.columns[own]].T)


@given(**shapes, part=st.integers(1, 30), chunks=st.integers(1, 40))
@settings(max_examples=80, deadline=None)
def test_arrangements_hold_every_entry_once_in_the_order_of_the_loops(
    out: int, width: int, density: float, block: int, part: int, chunks: int
) -> None:
    weight = sparse(1, out, width, density)
    for section in sections(weight, block):
        made = arrange(section, np.arange(width) * 12 + 4, part, chunks)
        groups = section.groups
        assert (made.rows, made.groups, made.parts) == (section.rows, groups, -(-width // part))
        assert made.chunks == max(1, min(chunks, groups))
        assert made.bounds.tolist() == sorted(made.bounds.tolist())
        assert (made.bounds[0], made.bounds[-1]) == (0, groups)
        assert groups == 0 or (np.diff(made.bounds) > 0).all()
        assert made.starts.shape == (made.parts, groups + 1)
        found = np.zeros((groups * section.rows, width), np.float32)
        seen = 0
        for number in range(made.parts):
            assert made.starts[number, 0] == seen
            for chunk in range(made.chunks):
                own = made.order[number, made.bounds[chunk] : made.bounds[chunk + 1]]
                assert sorted(own) == list(range(made.bounds[chunk], made.bounds[chunk + 1]))
                counts = np.diff(made.starts[number, made.bounds[chunk] : made.bounds[chunk + 1] + 1])
                assert (np.diff(counts) >= 0).all()
            for place, group in enumerate(made.order[number]):
                entries = slice(made.starts[number, place], made.starts[number, place + 1])
                columns = (made.offsets[entries] - 4) // 12
                assert ((columns >= number * part) & (columns < (number + 1) * part)).all()
                assert (np.diff(columns) > 0).all()
                found[group * section.rows : (group + 1) * section.rows, columns] += made.values[entries].T
            seen = made.starts[number, -1]
        assert seen == len(section.columns)
        assert np.array_equal(found, weight[section.first : section.first + groups * section.rows])


def test_chunks_have_about_the_same_work() -> None:
    counts = np.concatenate((np.full(4, 100), np.full(60, 2)))
    starts = np.concatenate(([0], np.cumsum(counts)))
    columns = np.concatenate([np.arange(count) for count in counts]).astype(np.int32)
    section = Section(0, 1, starts, columns, np.ones((len(columns), 1), np.float32))
    made = arrange(section, np.arange(100), 100, 4)
    work = [int(starts[b] - starts[a]) + b - a for a, b in zip(made.bounds[:-1], made.bounds[1:], strict=True)]
    assert sum(work) == 4 * 101 + 60 * 3
    assert max(work) <= sum(work) / 4 + 101


@pytest.mark.parametrize(
    ("rows", "block"),
    [
        (["1111", "1111", "1111", "1111"], 4),
        (["1111", "1111", "1111", "1101"], 4),  # 15 of 16 are 90 %
        (["1100", "1100", "0011", "0011"], 2),
        (["1111", "1111", "1010", "0101"], 1),  # 12 of 16, and of blocks of 2 the same
        (["1000", "0100", "0010", "0001"], 1),
        (["0000", "0000", "0000", "0000"], 1),
        (["11", "11", "11"], 2),  # the row left over does not count
        (["11"], 1),
    ],
)
def test_blocks_are_the_largest_that_are_nine_tenths_full(rows: list[str], block: int) -> None:
    assert choose_block(np.array([[float(letter) for letter in row] for row in rows], np.float32)) == block


def test_nine_tenths_are_enough_and_less_is_not() -> None:
    weight = np.ones((2, 10), np.float32)
    weight[1, :2] = 0
    assert choose_block(weight, (2,)) == 2  # 18 of 20
    weight[1, 2] = 0
    assert choose_block(weight, (2,)) == 1  # 17 of 20
