from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openwork.train import rates

progress = st.floats(0, 1)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("constant", [1.0, 1.0, 1.0, 1.0, 1.0]),
        ("cosine", [1.0, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125), 0.0]),
        ("linear", [1.0, 0.75, 0.5, 0.25, 0.0]),
        ("step", [1.0, 1.0, 0.1, 0.01, 0.01]),
    ],
)
def test_values_at_quarters(name: str, values: list[float]) -> None:
    assert [rates.RATES[name](quarter / 4) for quarter in range(5)] == pytest.approx(values, abs=1e-15)


@given(name=st.sampled_from(sorted(rates.RATES)), one=progress, other=progress)
def test_rates_stay_in_the_unit_interval_and_never_rise(name: str, one: float, other: float) -> None:
    early, late = rates.RATES[name](min(one, other)), rates.RATES[name](max(one, other))
    assert 0 <= late <= early <= 1


@given(name=st.sampled_from(sorted(rates.RATES)), warmup=st.floats(0.01, 0.99), t=progress)
def test_warm_up_rises_in_a_line_and_then_runs_the_whole_schedule(name: str, warmup: float, t: float) -> None:
    warmed = rates.warmed(rates.RATES[name], warmup)
    assert warmed(t * warmup * 0.999) == pytest.approx(t * 0.999)
    assert warmed(warmup) == 1
    assert warmed(1.0) == pytest.approx(rates.RATES[name](1.0), abs=1e-12)


def test_no_warm_up_is_the_schedule_itself() -> None:
    assert rates.warmed(rates.cosine, 0.0) is rates.cosine
