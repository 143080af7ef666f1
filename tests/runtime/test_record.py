from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from openwork import saving
from openwork.errors import ModelError
from openwork.runtime import plan, record
from openwork.runtime.kernels import target
from openwork.runtime.kernels.target import VARIABLE, host, targets
from openwork.runtime.plan import accelerate
from openwork.runtime.record import Record
from tests.runtime.graph.nets import Residual, Squeeze, thinned

pytestmark = pytest.mark.skipif(not targets(), reason="there is no LLVM on this machine")


@pytest.fixture(autouse=True)
def settled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let the candidate win by a fixed measurement, count the measurements, and keep plans in a folder of the test."""
    asked: list[str] = []

    def measure(models: dict[str, Any], example: Any, repeats: int) -> dict[str, float]:
        asked.extend(models)
        return {name: 1.0 + (name == "dense") for name in models}

    monkeypatch.setattr(plan, "measure", measure)
    monkeypatch.setattr(record, "_place", lambda key: tmp_path / "plans" / f"{key}.json")
    return asked


def model() -> nn.Module:
    return thinned(Squeeze(), 0.2)


def images(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, 12, 12, generator=torch.Generator().manual_seed(batch))


def test_a_plan_is_found_again_for_the_same_model_example_and_machine(settled: list[str]) -> None:
    net, x = model(), images()
    first = accelerate(net, x, verbose=False)
    count = len(settled)
    again = accelerate(net, x, verbose=False)
    assert len(settled) == count > 0
    assert again.plan == first.plan
    assert torch.equal(again(x), first(x))
    accelerate(net, images(3), verbose=False)
    assert len(settled) > count
    count = len(settled)
    other = copy.deepcopy(net)
    other.first.weight.data[0] = 0.0
    accelerate(other, x, verbose=False)
    assert len(settled) > count


@pytest.mark.parametrize("damage", ["cut", "flip", "foreign", "empty", "list", "deep"])
def test_a_damaged_plan_is_measured_again(damage: str, settled: list[str], tmp_path: Path) -> None:
    net, x = model(), images()
    first = accelerate(net, x, verbose=False)
    (place,) = (tmp_path / "plans").iterdir()
    text = place.read_text()
    place.write_text({
        "cut": text[: len(text) // 2], "flip": text.replace('"block', '"blocc').replace('"graph"', '"layers"'),
        "foreign": text.replace(record.machine()["processor"], "another"), "empty": "", "list": "[]", "deep": "[" * 10**5,
    }[damage])  # fmt: skip
    count = len(settled)
    again = accelerate(net, x, verbose=False)
    assert len(settled) > count
    assert torch.equal(again(x), first(x))
    assert record.find(place.stem) == again.plan.record  # type: ignore[union-attr]


@pytest.mark.parametrize(("dense_ms", "anew"), [(200.0, True), (1e-4, False)])
def test_a_plan_from_a_busy_moment_is_measured_again(
    dense_ms: float, anew: bool, settled: list[str], tmp_path: Path
) -> None:  # fmt: skip
    net, x = model(), images()
    first = accelerate(net, x, verbose=False).plan.record  # type: ignore[union-attr]
    (place,) = (tmp_path / "plans").iterdir()
    record.keep(place.stem, replace(first, dense_ms=dense_ms))
    count = len(settled)
    again = accelerate(net, x, verbose=False).plan.record  # type: ignore[union-attr]
    assert (len(settled) > count) == anew
    assert again.dense_ms == (first.dense_ms if anew else dense_ms)


def test_a_plan_of_another_model_is_not_followed(settled: list[str]) -> None:
    net, x = model(), images()
    made = accelerate(net, x, verbose=False).plan.record  # type: ignore[union-attr]
    for wrong in (
        replace(made, mode="layers", formats={"nowhere": "spmm"}),
        replace(made, ways=[[9, "x", 1, 1, 1, 1, 1, 1, 1]]),
        replace(made, ways=[[0, 5]]),
        replace(made, mode="layers", formats={"first": "no such format"}),
    ):
        assert plan._rebuilt(net, x, wrong) is None


def test_saved_and_loaded_it_gives_the_same_bits_without_measuring(tmp_path: Path, settled: list[str]) -> None:
    net, x = model(), images()
    fast = accelerate(net, x, verbose=False)
    saving.save(fast, tmp_path / "fast.safetensors")
    count = len(settled)
    loaded = saving.load(tmp_path / "fast.safetensors", Squeeze())
    assert len(settled) == count
    assert loaded.plan.record.mode == "graph"  # type: ignore[union-attr]
    assert torch.equal(loaded(x), fast(x))
    plain = saving.load(tmp_path / "fast.safetensors", Squeeze(), plan=False)
    assert not hasattr(plain, "plan")
    assert all(
        torch.equal(one, two) for one, two in zip(plain.state_dict().values(), net.state_dict().values(), strict=True)
    )


def test_saved_under_other_vector_instructions_it_is_measured_again(
    tmp_path: Path, settled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if len(targets()) < 2:
        pytest.skip("this machine has one kind of kernels only")
    net, x = model(), images()
    monkeypatch.setenv(VARIABLE, list(targets())[-1])
    fast = accelerate(net, x, verbose=False)
    saving.save(fast, tmp_path / "fast.safetensors")
    monkeypatch.delenv(VARIABLE)
    count = len(settled)
    loaded = saving.load(tmp_path / "fast.safetensors", Squeeze())
    assert len(settled) > count
    assert record.machine()["target"] == next(iter(targets()))
    torch.testing.assert_close(loaded(x), fast(x))


def test_a_plan_in_a_file_that_was_tampered_with_is_measured_again(tmp_path: Path, settled: list[str]) -> None:
    net, x = model(), images()
    fast = accelerate(net, x, verbose=False)
    written = record.write(fast.plan.record)  # type: ignore[union-attr]
    written["record"] = {**written["record"], "mode": "layers", "formats": {"first": "spmm"}}
    saving.save(net, tmp_path / "file.safetensors", metadata={"plan": written})
    shutil.rmtree(tmp_path / "plans")
    count = len(settled)
    loaded = saving.load(tmp_path / "file.safetensors", Squeeze())
    assert len(settled) > count
    torch.testing.assert_close(loaded(x), fast(x))


@pytest.mark.parametrize("example", [[], [[[1, 3, 10**9, 10**9], [1, 1, 1, 1], "torch.float32"]], [["int"]], "x", None])
def test_an_example_that_makes_no_sense_is_one_clear_sentence(tmp_path: Path, example: Any) -> None:
    net = thinned(Residual())
    written = record.write(
        Record("graph", example=example, tree='[1, {"type": null, "context": null, "children_spec": []}]')
    )
    saving.save(net, tmp_path / "file.safetensors", metadata={"plan": written})
    with pytest.raises(ModelError):
        saving.load(tmp_path / "file.safetensors", Residual())


def test_records_survive_json_and_name_the_machine() -> None:
    made = Record("graph", {"a": "spmm"}, [[0, "b", 1, 2, 3, 4, 1, 5, 6]], [], 2.0, 1.0, 2, "", [], "")
    assert record.read(json.loads(json.dumps(record.write(made, "key"))), "key") == made
    assert record.read(record.write(made, "key"), "other") is None
    assert record.machine()["target"] == host().name  # type: ignore[union-attr]
    assert target.processor()
