"""Every reliability figure in its short form; `openwork doctor --long` measures the long ones."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from openwork.core.rng import generator
from openwork.errors import RecipeError
from openwork.testing.reliability import record, surface, verdicts
from openwork.testing.reliability._rows import Measured, Row
from openwork.testing.reliability.matrix import ROWS, TIMED, chosen

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("key", [key for key in ROWS if key not in TIMED and key != "R26"])
def test_the_short_form_reaches_the_target(key: str) -> None:
    found = ROWS[key].measure("short")
    assert found.passed, f"{ROWS[key].figure}: {found.value}; target: {ROWS[key].target}. {found.detail}"


@pytest.mark.parametrize("key", [*sorted(TIMED), "R26"])
def test_figures_that_no_test_may_require_are_measured(key: str) -> None:
    """Times depend on the machine; the power of a test at five seeds is what it is."""
    found = ROWS[key].measure("short")
    assert any(char.isdigit() for char in found.value)


def test_all_figures_are_there() -> None:
    assert list(ROWS) == [f"R{number}" for number in range(1, 37)]
    for key, row in ROWS.items():
        assert row.key == key
        assert min(map(len, (row.figure, row.target, row.how))) > 3
        long, short = row.parts("long"), row.parts("short")
        assert long
        assert short
        assert len(long) >= len(short) or key == "R32"


def test_rows_are_chosen_by_name_in_their_order() -> None:
    assert [row.key for row in chosen(["r5", "R2"])] == ["R2", "R5"]
    assert len(chosen([])) == 36
    with pytest.raises(RecipeError, match="there is no reliability figure 'R37'; there are R1 to R36"):
        chosen(["R37"])


def toy(work: dict[str, object]) -> Row:
    def judge(found: dict[str, dict[str, int]]) -> Measured:
        return Measured(f"{sum(part['n'] for part in found.values())} of 3", sum(part["n"] for part in found.values()) == 3)

    return Row("R1", "a figure | with a bar", "3", "by adding", lambda _scale: work, judge)  # type: ignore[arg-type]


def test_parts_are_stored_as_they_come_and_found_again(tmp_path: Path) -> None:
    place, done = tmp_path / "reliability.json", []

    def stop() -> dict[str, int]:
        raise KeyboardInterrupt

    def good(n: int) -> object:
        return lambda: (done.append(n), {"n": n})[1]

    def tell(*_: object) -> None:
        pass

    with pytest.raises(KeyboardInterrupt):
        record.measure(toy({"a": good(1), "b": stop}), "long", place, tell)
    entry = record.measure(toy({"a": good(1), "b": good(2)}), "long", place, tell)
    assert done == [1, 2]
    assert (entry["value"], entry["passed"], entry["done"], entry["of"]) == ("3 of 3", True, 2, 2)
    record.measure(toy({"a": good(1), "b": good(2)}), "long", place, tell, again=True)
    assert done == [1, 2, 1, 2]


def test_a_part_that_cannot_be_done_is_a_target_not_reached(tmp_path: Path) -> None:
    def broken() -> dict[str, int]:
        raise ValueError("no such | thing")

    row = toy({"a": lambda: {"n": 3}, "b": broken})
    entry = record.measure(row, "long", tmp_path / "r.json", lambda *_: None)
    assert not entry["passed"]
    assert "b: ValueError: no such | thing" in entry["detail"]
    page = record.page({"rows": {"R1": entry}}, {"R1": row, "R2": ROWS["R2"]})
    assert "0 of 2 targets reached, 1 measured" in page
    assert "| R1 | a figure \\| with a bar | 3 | 3 of 3 | no |" in page
    assert "* **R1, a figure | with a bar**: b: ValueError: no such \\| thing." in page
    assert "not measured yet" in page


def test_public_names_change_on_purpose_only() -> None:
    """After a deliberate change of a public name or signature, and a line in CHANGELOG.md:

    python -c "from openwork.testing.reliability.surface import write_snapshot as w; w('tests/reliability/api.json')"
    """
    if "OPENWORK_WRITE_API" in os.environ:
        surface.write_snapshot(ROOT / surface.SNAPSHOT)
    found = surface.compared(ROOT / surface.SNAPSHOT)
    assert found["wrong"] == [], test_public_names_change_on_purpose_only.__doc__


def test_the_strongest_test_is_what_simulation_finds() -> None:
    assert verdicts.strongest(5, 0.0) == pytest.approx(0.05)
    draws = 1.0 + torch.randn(20_000, 5, generator=generator(0, "power"), dtype=torch.float64)
    t = draws.mean(1) / (draws.std(1) / 5**0.5)
    found = float((t > 2.1318).double().mean())  # the 95 % quantile of t with 4 degrees of freedom
    assert verdicts.strongest(5, 1.0) == pytest.approx(found, abs=0.015)
