"""A pytest plugin: tests in an order drawn from the number in OPENWORK_ORDER, hypothesis with a seed of it."""

from __future__ import annotations

import os
import random
from typing import Any

from openwork.core.rng import derive


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Shuffle the tests, the same way in every worker process."""
    order = os.environ.get("OPENWORK_ORDER")
    if order is not None:
        items.sort(key=lambda item: item.nodeid)
        random.Random(derive(int(order), "reliability", "order of tests")).shuffle(items)


def pytest_configure(config: Any) -> None:
    """Seed hypothesis, where it is a plugin of this run and was not given a seed."""
    order = os.environ.get("OPENWORK_ORDER")
    if order is not None and getattr(config.option, "hypothesis_seed", "absent") is None:
        config.option.hypothesis_seed = order
