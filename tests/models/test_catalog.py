from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from openwork import models
from openwork.models import catalog
from tests.models.helpers import CIFAR, count, on_meta


def test_names_are_read_without_importing_torch() -> None:
    code = "import sys; from openwork import models; print(len(models.names())); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == len(models.names())


def test_every_family_file_is_listed() -> None:
    stems = {"mlp", "lenet", "cnn", "efficientnet", "resnet", "wrn", "mobilenet", "vit", "gpt"}
    assert {family.module for family in catalog.families()} == stems


def test_a_new_file_adds_its_names(tmp_path: Path) -> None:
    (tmp_path / "tiny.py").write_text('import nowhere\nNAMES = ("tiny-3",)\nFORM = r"tiny-[0-9]+"\n')
    (tmp_path / "helper.py").write_text('NAMES = ("no family without a form",)\n')
    assert catalog.families(tmp_path) == (catalog.Family("tiny", ("tiny-3",), "tiny-[0-9]+"),)


def test_numbers_sort_by_size_and_names_are_unique() -> None:
    names = models.names()
    depths = [int(name.removeprefix("resnet")) for name in names if name.startswith("resnet")]
    assert depths == [8, 14, 18, 20, 32, 34, 44, 50, 56, 110]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", models.names())
def test_each_name_belongs_to_one_family_and_builds(name: str) -> None:
    assert sum(bool(re.fullmatch(family.form, name)) for family in catalog.families()) == 1
    assert count(on_meta(name, (64,) if name.startswith("gpt") else CIFAR, 10)) > 0


@pytest.mark.parametrize("name", ["resnet", "resnet020", "mlp", "mlp-0", "mlp-10-", "wrn-28", "vit", "cnn2", "CNN", ""])
def test_other_names_belong_to_none(name: str) -> None:
    assert catalog.find(name) is None


def test_nearest_names_come_first() -> None:
    assert catalog.nearest("resent20")[0] == "resnet20"
    assert catalog.nearest("MobileNet-V2")[0] == "mobilenet-v2"
    assert catalog.nearest("xyzzy") == []


def test_unknown_attribute_of_the_package() -> None:
    with pytest.raises(AttributeError, match="no attribute 'train'"):
        models.train  # noqa: B018
