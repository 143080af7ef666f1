"""What keeps training apart from the process around it: noise of its own, and Ctrl-C only between two steps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self

import torch


@contextmanager
def own_noise(device: torch.device) -> Iterator[Callable[[int], None]]:
    """Yield a function that seeds torch's global generators, which are given back as they were at the end.

    Modules such as dropout draw from the global generators and from nothing else, so they are lent to the block.
    """
    if device.type == "cpu":
        # torch.manual_seed would also queue a call for every accelerator that is not in use.
        with torch.random.fork_rng(devices=[]):
            yield lambda seed: _seed_host(seed)
        return
    module = torch.get_device_module(device)
    index = module.current_device() if device.index is None else device.index
    with torch.random.fork_rng(devices=[index], device_type=device.type), module.device(index):

        def reseed(seed: int) -> None:
            _seed_host(seed)
            module.manual_seed(seed)

        yield reseed


class Stop:
    """A context in which Ctrl-C waits for `check`, so that it never falls in the middle of a step.

    A second Ctrl-C is obeyed at once. Does nothing outside the main thread, or where somebody handles Ctrl-C already.
    """

    def __init__(self, wanted: bool) -> None:
        self.wanted = wanted
        self.asked = False

    def __enter__(self) -> Self:
        mine = threading.current_thread() is threading.main_thread()
        self.wanted = self.wanted and mine and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if self.wanted:
            signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.wanted:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if kind is None:
            self.check()

    def check(self, asked: bool | None = None) -> None:
        """Raise the KeyboardInterrupt that was asked for since, if any; `asked` is what several processes agreed on."""
        if self.asked if asked is None else asked:
            self.asked = False
            raise KeyboardInterrupt

    def _ask(self, _number: int, _frame: FrameType | None) -> Any:
        if self.asked:
            self.check()
        self.asked = True


def _seed_host(seed: int) -> None:
    torch.default_generator.manual_seed(seed)
