import os
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep kernels and plans of all processes of this run in one folder of its own, not in the user's cache."""
    before = os.environ.get("OPENWORK_CACHE")
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base
    os.environ["OPENWORK_CACHE"] = str(shared / "cache")
    yield
    if before is None:
        del os.environ["OPENWORK_CACHE"]
    else:
        os.environ["OPENWORK_CACHE"] = before
