from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from openwork.errors import ModelError
from openwork.runtime import timing
from openwork.runtime.timing import interleave, limited_threads, measure, run


class Clock:
    """A clock that only moves when a call says so."""

    def __init__(self) -> None:
        self.now = 0.0
        self.order: list[str] = []

    def call(self, name: str, *seconds: float) -> Any:
        durations = itertools.cycle(seconds)

        def work() -> None:
            self.order.append(name)
            self.now += next(durations)

        return work


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: made.now)
    return made


def test_medians_of_interleaved_rounds(clock: Clock) -> None:
    # two calls to start with, then five rounds that see 1, 2, 9, 1, 2 and 4, 4, 4, 4, 4
    calls = {"a": clock.call("a", 1.0, 2.0, 9.0), "b": clock.call("b", 4.0)}
    assert interleave(calls, repeats=5) == {"a": 2.0, "b": 4.0}
    rounds = clock.order[4:]
    assert Counter(rounds) == {"a": 5, "b": 5}
    assert rounds[:4] == ["a", "b", "b", "a"]  # each round starts with another one


def test_short_calls_are_timed_in_groups(clock: Clock) -> None:
    found = interleave({"a": clock.call("a", 1e-4), "b": clock.call("b", 1.0)}, repeats=3)
    assert found == pytest.approx({"a": 1e-4, "b": 1.0})
    assert Counter(clock.order) == {"a": 2 + 3 * 5, "b": 2 + 3}


def test_a_budget_cuts_the_rounds_but_leaves_five(clock: Clock) -> None:
    interleave({"a": clock.call("a", 1.0)}, repeats=100, seconds=10.0)
    assert len(clock.order) == 2 + 10
    clock.order.clear()
    interleave({"a": clock.call("a", 1.0)}, repeats=100, seconds=0.1)
    assert len(clock.order) == 2 + 5


class Keyed(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a - b


def test_examples_are_tensors_arguments_or_keywords() -> None:
    one, two = torch.ones(1), torch.full((1,), 3.0)
    assert run(nn.Identity(), one) is one
    assert run(Keyed(), (one, two)).item() == run(Keyed(), [one, two]).item() == -2
    assert run(Keyed(), {"b": one, "a": two}).item() == 2
    with pytest.raises(ModelError, match="the example is a int"):
        run(Keyed(), 3)


class Watch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Dropout()
        self.seen: set[tuple[bool, bool, bool]] = set()

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add((self.training, self.inner.training, torch.is_grad_enabled()))
        return x


def test_measure_runs_in_eval_mode_without_gradients_and_puts_modes_back() -> None:
    model = Watch()
    model.inner.eval()
    found = measure({"m": model, "other": nn.Identity()}, torch.ones(2), repeats=2)
    assert found.keys() == {"m", "other"}
    assert all(seconds > 0 for seconds in found.values())
    assert model.seen == {(False, False, False)}
    assert (model.training, model.inner.training) == (True, False)


def test_measure_names_the_model_that_refuses() -> None:
    bad = nn.Linear(3, 2)
    with pytest.raises(ModelError, match="bad refuses the example"):
        measure({"good": nn.Identity(), "bad": bad}, torch.ones(1, 5))
    assert bad.training


def test_threads_are_put_back() -> None:
    before = torch.get_num_threads()
    with limited_threads(1) as count:
        assert count == torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
    with limited_threads(None) as count:
        assert count == before
    for bad in (0, -1, 1.5, True):
        with pytest.raises(ModelError, match="threads is"), limited_threads(bad):  # type: ignore[arg-type]
            pass
    assert torch.get_num_threads() == before


def test_settled_calls_come_before_each_group_and_do_not_count(clock: Clock) -> None:
    # two calls to start with; then an untimed call of 9 s before each timed one of 1 s
    assert interleave({"a": clock.call("a", 1.0, 1.0, 9.0, 1.0, 9.0, 1.0)}, repeats=2, settled=True) == {"a": 1.0}
    assert len(clock.order) == 2 + 2 * 2
    clock.order.clear()
    interleave({"a": clock.call("a", 0.125)}, repeats=3, sample=1.0, settled=True)
    assert len(clock.order) == 2 + 3 * (1 + 8)
