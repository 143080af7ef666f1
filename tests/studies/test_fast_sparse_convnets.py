from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from openwork import models
from openwork.core import criteria
from openwork.core.cost import count
from openwork.lab.claims import judge
from openwork.methods.runtime.fast_sparse_convnets import FastSparseConvNets, pointwise, sparsify_pointwise
from openwork.runtime.bounds import bound
from openwork.studies import _common
from openwork.studies.runtime import fast_sparse_convnets as study
from openwork.studies.runtime.fast_sparse_convnets import NARROW, STUDY, Config, build, narrowed, speed
from openwork.testing.studies import check_study
from tests.studies.judging import verdicts

# Small, yet telling on digits: the narrow network has too few channels, the sparse one enough weights.
TELLING = Config(
    epochs=6, batch_size=64, network="tests.studies.separable:net", multiplier=1.0, sides=(8,), repeats=1
)  # fmt: skip
SPARSE = "Single weights beat the dense network of as many products"
FAST = "more than 1.3 times as fast as dense on images of 8 pixels a side"


def by_weights(models: Mapping[str, nn.Module], example: Any, *, repeats: int) -> dict[str, float]:
    """Stand in for a clock: a microsecond for each weight that is not zero."""
    return {
        name: 1e-6 * sum(int(torch.count_nonzero(value)) for value in model.state_dict().values())
        for name, model in models.items()
    }


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times that depend on the weights alone, and networks that are not tuned for them."""
    monkeypatch.setattr(study, "measure", by_weights)


@pytest.fixture
def untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "speed", lambda *given, **kind: ({"latency_ratio": 1.0}, {}))


def test_conforms_but_for_its_times(tmp_path: Path, counted: None) -> None:
    check_study(STUDY, tmp_path, seeds=(0,))


# ---- claims, with the method left alone and broken -----------------------------------------------------------------


def test_sparse_beats_narrow(tmp_path: Path, untimed: None) -> None:
    assert verdicts(STUDY, TELLING, ["block1@0.1", NARROW], tmp_path)[SPARSE] == "holds"


def test_the_smallest_weights_kept_lose_to_narrow(tmp_path: Path, untimed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(criteria, "magnitude", lambda weight, context: 1.0 / (1.0 + weight.detach().abs()))
    assert verdicts(STUDY, TELLING, ["block1@0.1", NARROW], tmp_path)[SPARSE] != "holds"


def test_a_sparse_network_is_fast_by_its_weights(tmp_path: Path, counted: None) -> None:
    cfg = TELLING.model_copy(update={"epochs": 0.5})
    found = verdicts(STUDY, cfg, ["block1@0.1", "block4@0.1"], tmp_path, seeds=3)
    assert found[f"Single weights are {FAST}"] == found[f"Blocks of 4 are {FAST}"] == "holds"


def test_masks_that_never_change_are_not_fast(tmp_path: Path, counted: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FastSparseConvNets, "revise", lambda self, params, grads, step: None)
    cfg = TELLING.model_copy(update={"epochs": 0.5})
    found = verdicts(STUDY, cfg, ["block1@0.1", "block4@0.1"], tmp_path, seeds=3)
    assert found[f"Single weights are {FAST}"] == found[f"Blocks of 4 are {FAST}"] == "fails"


@pytest.mark.parametrize(
    ("loss", "verdict"), [(0.004, "holds"), (0.02, "fails"), (-0.02, "fails")], ids=["little", "much", "a gain"]
)
def test_what_a_block_may_cost(loss: float, verdict: str) -> None:
    noise = (0.0, 3e-4, -3e-4, 1e-4, -1e-4)
    accuracy = {
        f"block{rows}@0.1": {seed: 0.9 - place * loss + (-1) ** place * one for seed, one in enumerate(noise)}
        for place, rows in enumerate((1, 2, 4))
    }
    found = {one.text: one.verdict for one in judge(STUDY.claims(TELLING), {"accuracy": accuracy})}
    assert found["Blocks of 2 cost less than a point"] == verdict
    assert found["Blocks of 4 cost less than a point against 2"] == verdict
    assert found["Single weights are more accurate than blocks of 4"] == ("holds" if loss > 0 else "fails")


# ---- what is compared ---------------------------------------------------------------------------------------------


def test_the_arms() -> None:
    arms = {arm.name: arm for arm in STUDY.arms(STUDY.preset("laptop"))}
    assert list(arms) == ["dense", NARROW, "block1@0.1", "block2@0.1", "block4@0.1", "gmp@0.1"]
    assert [arms[f"block{rows}@0.1"].settings["options"]["block"] for rows in (1, 2, 4)] == [1, 2, 4]


@pytest.mark.parametrize("density", [0.05, 0.1, 0.3])
def test_the_narrow_network_has_the_products_of_the_sparse_one(density: float) -> None:
    cfg = STUDY.preset("laptop", data="digits", train=None, density=density)
    assert isinstance(cfg, Config)
    source = _common.load_source(cfg)
    width, example = narrowed(cfg, source), torch.zeros(1, *source.input_shape)
    full = build(cfg, source, cfg.multiplier, 0)
    sparse = count(full, example).flops(sparsify_pointwise(full, density))
    narrow, narrower = (count(build(cfg, source, w, 0), example).flops() for w in (width, width - 0.01))
    assert narrower < sparse <= narrow


def test_strides_follow_the_side_and_weights_fit_every_side() -> None:
    cfg = STUDY.preset("laptop", data="digits", train=None, multiplier=0.125)
    assert isinstance(cfg, Config)
    source = _common.load_source(cfg)
    trained = build(cfg, source, 0.125, 0)
    for side, halvings in ((None, 5), (8, 1), (64, 4), (224, 5)):
        model = build(cfg, source, 0.125, 1, side)
        assert sum(m.stride == (2, 2) for m in model.modules() if isinstance(m, nn.Conv2d)) == halvings
        model.load_state_dict(trained.state_dict())


def test_flops_are_shares_of_the_full_dense_network(tmp_path: Path, untimed: None) -> None:
    cfg = TELLING.model_copy(update={"epochs": 0.5})
    found = metrics_of(cfg, ["dense", NARROW, "block1@0.1", "gmp@0.1"], tmp_path)
    assert found["dense"]["inference_flops"] == found["dense"]["training_flops"] == 1.0
    assert found[NARROW]["inference_flops"] == pytest.approx(found[NARROW]["training_flops"])
    assert 0 < found["block1@0.1"]["inference_flops"] <= found[NARROW]["inference_flops"] < 1.0
    assert found["block1@0.1"]["inference_flops"] < found["block1@0.1"]["training_flops"] < 1.0
    assert found["block1@0.1"]["pointwise_density"] == pytest.approx(0.1, abs=1e-3)
    assert found["block1@0.1"]["density"] == pytest.approx(0.1, abs=1e-3)
    assert found["gmp@0.1"]["density"] == pytest.approx(0.1, abs=1e-3)


def metrics_of(cfg: Config, names: list[str], folder: Path) -> dict[str, dict[str, float]]:
    """Run arms with one seed and return their metrics."""
    arms = {arm.name: arm for arm in STUDY.arms(cfg)}
    found = {}
    for name in names:
        place = folder / name
        (place / "scratch").mkdir(parents=True)
        found[name] = STUDY.run(cfg, arms[name], 0, study.Work(place, place / "scratch")).metrics
    return found


# ---- what is timed ------------------------------------------------------------------------------------------------


def test_speed_is_the_fastest_dense_mode_over_the_own_one(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = TELLING.model_copy(update={"sides": (8, 12)})
    source = _common.load_source(cfg)
    model = build(cfg, source, 1.0, 0)
    sparsify_pointwise(model, 0.1)
    seen: list[tuple[tuple[int, ...], list[str]]] = []
    clocks = [{"dense eager": 6.0, "dense folded": 4.0, "dense channels last": 5.0, "own": 2.0},
              {"dense eager": 3.0, "dense folded": 8.0, "dense channels last": 5.0, "own": 4.0}]  # fmt: skip

    def measure(models: Mapping[str, nn.Module], example: torch.Tensor, *, repeats: int) -> dict[str, float]:
        seen.append((tuple(example.shape), list(models)))
        weights = models["own"].state_dict()
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
        return {name: 1e-3 * clocks[len(seen) - 1][name] for name in models}

    monkeypatch.setattr(study, "measure", measure)
    metrics, table = speed(cfg, source, model, 1.0, sparse=True)
    assert [shape for shape, _ in seen] == [(1, 1, 8, 8), (1, 1, 12, 12)]
    assert metrics == pytest.approx(
        {"latency_ratio_8": 2.0, "latency_ratio_12": 0.75, "latency_ratio": 0.75, "ms": 4.0, "dense_ms": 3.0}
    )
    assert {row["layer"] for row in table["8"]["layers"]} >= {name.removesuffix(".weight") for name in pointwise(model)}


def test_dense_is_as_fast_as_itself(counted: None) -> None:
    source = _common.load_source(TELLING)
    metrics, table = speed(TELLING, source, build(TELLING, source, 1.0, 0), 1.0, sparse=False)
    assert metrics["latency_ratio"] == 1.0
    assert list(table["8"]["ms"]) == ["dense eager", "dense folded", "dense channels last"]


def test_the_narrow_network_is_timed_in_every_mode(counted: None) -> None:
    source = _common.load_source(TELLING)
    metrics, table = speed(TELLING, source, build(TELLING, source, 0.5, 0), 0.5, sparse=False)
    assert sum(name.startswith("own") for name in table["8"]["ms"]) == 3
    assert metrics["latency_ratio"] > 2.0  # by weights


@pytest.mark.parametrize(("compiler", "asked"), [(True, True), (False, True), (True, False)])
def test_the_compiled_mode_is_there_if_asked_for_and_possible(
    compiler: bool, asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study.shutil, "which", lambda name: "/bin/c++" if compiler else None)
    monkeypatch.setattr(torch, "compile", lambda model, options: model if options == {"freezing": True} else None)
    cfg = TELLING.model_copy(update={"compiled": asked})
    modes = study._modes(cfg, build(cfg, _common.load_source(cfg), 1.0, 0), "dense")
    assert ("dense compiled" in modes) == (compiler and asked)


@pytest.mark.parametrize("ref", ["mobilenet-v1", "mobilenet-v2", "efficientnet-b0"])
def test_folding_norms_changes_no_output(ref: str) -> None:
    model = models.build(ref, input_shape=(3, 16, 16), classes=5, seed=0, options={"multiplier": 0.125})
    x = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    model(x)  # statistics
    folded = study._folded(model)
    assert not [module for module in folded.modules() if isinstance(module, nn.BatchNorm2d)]
    with torch.no_grad():
        torch.testing.assert_close(folded.double()(x.double()), model.eval().double()(x.double()), rtol=1e-3, atol=1e-6)


def test_a_folded_layer_is_right_to_its_bound() -> None:
    conv, norm = nn.Conv2d(6, 4, 1, bias=False), nn.BatchNorm2d(4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for value in (conv.weight, norm.weight, norm.bias, norm.running_mean):
            nn.init.normal_(value)
        nn.init.uniform_(norm.running_var, 0.5, 2.0)
        x = torch.randn(50, 6)
    folded = study._folded(nn.Sequential(conv, norm))
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    weight = scale[:, None] * conv.weight.flatten(1).double()
    bias = norm.bias.double() - scale * norm.running_mean.double()
    expected = x.double() @ weight.T + bias
    error = (folded(x[:, :, None, None])[:, :, 0, 0].double() - expected).abs()
    assert bool((error <= 4 * bound(weight.float(), bias.float(), x)).all())
