from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import nn

from openwork.core import criteria
from openwork.lab.study import Work
from openwork.methods.sparsify.rigl import RigL
from openwork.sparsifier import Leg
from openwork.studies import _common
from openwork.studies.sparsify.granet import METHODS, STUDY, Config, Explored, _checkpoints, _stretch, _summary
from openwork.testing.studies import check_study
from openwork.train import rates
from tests.studies.judging import verdicts

# Small, yet telling: at this density a static mask hardly trains in so few steps, the others do.
TELLING = Config(epochs=8, batch_size=64, network="mlp-64", conv=None, density=(0.03,), every=8)


def test_conforms(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    check_study(STUDY, tmp_path, seeds=(0,))


def test_claims_hold_while_the_methods_work(tmp_path: Path) -> None:
    found = verdicts(STUDY, TELLING, ["static@0.03", "rigl@0.03", "gmp@0.03", "granet@0.03"], tmp_path)
    for title in ("RigL", "GMP", "GraNet"):
        assert found[f"{title} is more accurate than a static random mask"] == "holds"


def test_frozen_masks_lose_rigls_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RigL, "revise", lambda self, params, grads, step: None)
    found = verdicts(STUDY, TELLING, ["static@0.03", "rigl@0.03"], tmp_path)
    assert found["RigL is more accurate than a static random mask"] != "holds"


def test_random_pruning_instead_of_magnitude_loses_gmps_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(criteria, "magnitude", criteria.random)
    found = verdicts(STUDY, TELLING, ["static@0.03", "gmp@0.03"], tmp_path)
    assert found["GMP is more accurate than a static random mask"] != "holds"


def test_growth_by_gradient_beats_random_growth_and_not_when_it_is_random(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arms, text = ["granet@0.03", "granet-random@0.03"], "Growth by gradient is more accurate than random growth"
    assert verdicts(STUDY, TELLING, arms, tmp_path / "sound")[text] == "holds"
    monkeypatch.setattr(criteria, "gradient", criteria.random)
    assert verdicts(STUDY, TELLING, arms, tmp_path / "broken")[text] == "fails"


def test_every_method_has_an_arm_at_every_density_and_conv_only_the_core_at_the_first() -> None:
    arms = {arm.name: arm for arm in STUDY.arms(STUDY.preset("laptop"))}
    assert set(arms) == {"dense", "plasticity"} | {f"{name}@{d}" for name in METHODS for d in ("0.05", "0.02")}
    conv = {name for name, arm in arms.items() if "cnn" in arm.settings.get("networks", [])}
    assert conv == {"dense", "static@0.05", "set@0.05", "rigl@0.05", "gmp@0.05", "granet@0.05"}
    assert arms["rigl-itop@0.02"].settings["options"] == {"drop": 0.5, "floor": 0.005, "stop": 1.0, "every": 20}
    assert arms["gmp-erk@0.05"].settings["options"]["scope"] == "layers"


def train_by_hand(method: Explored, model: nn.Module, steps: int, start: int = 0) -> list[torch.Tensor]:
    """Take steps on random data; return the first layer's mask after each."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    method.attach(model, optimizer)
    seen = [method.masks["0.weight"]]
    for step in range(start, start + steps):
        draw = torch.Generator().manual_seed(step)
        optimizer.zero_grad()
        model(torch.randn(16, 12, generator=draw)).square().mean().backward()
        optimizer.step()
        seen.append(method.masks["0.weight"])
    return seen


def small(seed: int = 0) -> nn.Sequential:
    draw = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 4))
    for param in model.parameters():
        nn.init.normal_(param, generator=draw)
    return model


def explored_rigl() -> Explored:
    made = _common.make_sparsifier("rigl", 0.2, 20, 0, mixin=Explored, every=3, stop=1.0)
    assert isinstance(made, Explored)
    return made


def test_ever_on_is_the_union_of_the_masks_over_time_and_survives_a_resume() -> None:
    method, model = explored_rigl(), small()
    seen = train_by_hand(method, model, 10)
    assert torch.equal(method.ever["0.weight"], torch.stack(seen).any(0))
    assert int(method.ever["0.weight"].sum()) > int(seen[0].sum())

    again, copy = explored_rigl(), small()
    again.load_state_dict(method.state_dict())
    copy.load_state_dict(model.state_dict())
    method.detach()
    more = train_by_hand(again, copy, 10, start=10)
    assert torch.equal(again.ever["0.weight"], torch.stack(seen + more).any(0))


def test_watching_a_method_does_not_change_it() -> None:
    watched = train_by_hand(explored_rigl(), small(), 10)
    plain = _common.make_sparsifier("rigl", 0.2, 20, 0, every=3, stop=1.0)
    alone = train_by_hand(plain, small(), 10)  # type: ignore[arg-type]
    assert all(torch.equal(one, other) for one, other in zip(watched, alone, strict=True))


def test_the_stretches_of_the_dense_run_follow_one_schedule() -> None:
    points = [0.0, 0.125, 0.375, 0.625, 1.0]
    for low, high in itertools.pairwise(points):
        for progress in (0.0, 0.3, 0.99):
            assert _stretch(low, high - low, progress) == rates.step(low + (high - low) * progress)


def test_checkpoints_lie_where_they_should_and_are_copies() -> None:
    cfg = Config(network="mlp-8", checkpoints=(0.25, 1.0), train=400, batch_size=64)
    legs: list[Leg] = []

    def train(model: nn.Module, held: None, leg: Leg) -> nn.Module:
        legs.append(leg)
        with torch.no_grad():
            next(model.parameters()).fill_(len(legs))
        return model

    found = _checkpoints(cfg, _common.load_source(cfg), 0, 40, train)
    assert [leg.steps for leg in legs] == [10, 30]
    assert [leg.stream for leg in legs] == [0, 1]
    assert [next(model.parameters()).mean().item() for model in found.values()] == [1.0, 2.0]


def test_summary_of_the_plasticity_table() -> None:
    table = [("0.25", False, 0.04), ("0.25", True, 0.05), ("1", False, -0.02), ("1", True, -0.04)]
    rows = [{"checkpoint": c, "rate": 0.9, "regenerated": g, "plasticity": p} for c, g, p in table]
    found = _summary(rows)
    assert found["regeneration_gain"] == pytest.approx(0.005 - 0.01)
    assert found["plasticity_fall"] == pytest.approx(0.06)
    assert found["plasticity_0.25_0.9_grown"] == 0.05


def test_a_dense_start_costs_more_training_flops(tmp_path: Path) -> None:
    """A dense start costs more than a half-dense one, that more than a sparse one, and all less than dense."""
    arms = {arm.name: arm for arm in STUDY.arms(TELLING)}
    cost = {}
    for name in ("dense", "static@0.03", "granet@0.03", "granet-dense@0.03"):
        place = tmp_path / name
        place.mkdir()
        outcome = STUDY.run(TELLING, arms[name], 0, Work(place, place / "scratch"))
        cost[name] = outcome.metrics["training_flops"]
    assert cost["dense"] == pytest.approx(1.0)
    assert cost["static@0.03"] == pytest.approx(0.03, abs=1e-3)
    assert cost["static@0.03"] < cost["granet@0.03"] < cost["granet-dense@0.03"] < 1.0
