from __future__ import annotations

import subprocess
import sys

import pytest

from openwork import testing


def test_the_suites_are_there_by_name():
    for name in testing.__all__:
        assert callable(getattr(testing, name))
    assert testing.__all__ == sorted(testing.__all__)
    with pytest.raises(AttributeError, match="no attribute 'check_everything'; it has check_format"):
        testing.check_everything  # noqa: B018


def test_importing_the_room_imports_no_torch():
    code = "import sys, openwork.testing; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
