from __future__ import annotations

import signal
import threading

import pytest
import torch

from openwork.train.isolation import Stop, own_noise


def test_noise_is_lent_and_given_back() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    with own_noise(torch.device("cpu")) as reseed:
        reseed(5)
        lent = torch.rand(4)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(lent, torch.rand(4, generator=torch.Generator().manual_seed(5)))


def test_noise_comes_back_after_an_error() -> None:
    def fail() -> None:
        with own_noise(torch.device("cpu")) as reseed:
            reseed(5)
            raise ZeroDivisionError

    before = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError):
        fail()
    assert torch.equal(torch.get_rng_state(), before)


def test_the_first_interrupt_waits_and_the_second_does_not() -> None:
    reached = False
    with Stop(True) as stop:
        stop.check()
        signal.raise_signal(signal.SIGINT)
        reached = True
        with pytest.raises(KeyboardInterrupt):
            stop.check()
        stop.check()
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert reached
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_that_nobody_checked_is_not_swallowed() -> None:
    with pytest.raises(KeyboardInterrupt), Stop(True):
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_error_is_not_replaced_by_the_interrupt() -> None:
    def fail() -> None:
        with Stop(True):
            signal.raise_signal(signal.SIGINT)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()


def test_somebody_elses_handler_and_thread_are_left_alone() -> None:
    def mine(_number: int, _frame: object) -> None: ...

    found: list[object] = []

    def elsewhere() -> None:
        with Stop(True) as stop:
            stop.check()
        found.append(signal.getsignal(signal.SIGINT))

    before = signal.signal(signal.SIGINT, mine)
    try:
        with Stop(True):
            assert signal.getsignal(signal.SIGINT) is mine
    finally:
        signal.signal(signal.SIGINT, before)
    with Stop(False):
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert found == [signal.default_int_handler]
