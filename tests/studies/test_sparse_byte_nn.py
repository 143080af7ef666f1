from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from openwork.core.cost import count
from openwork.core.masks import Masks
from openwork.core.patterns import KernelGroup
from openwork.lab.claims import judge
from openwork.methods.runtime import sparse_byte_nn as method
from openwork.methods.runtime.fast_sparse_convnets import pointwise
from openwork.methods.runtime.sparse_byte_nn import rearrange
from openwork.sparsifier.physical import compact
from openwork.studies import _common
from openwork.studies.runtime import _saliency as saliency
from openwork.studies.runtime import fast_sparse_convnets as timing
from openwork.studies.runtime import sparse_byte_nn as study
from openwork.studies.runtime.sparse_byte_nn import FILTER, SINGLE, STUDY, Config, filter_masks, filter_share, prune, speed
from openwork.testing.studies import check_study
from tests.studies.judging import verdicts

# Small, yet its networks learn digits well enough to lose something.
TELLING = Config(
    epochs=3, batch_size=64, network="tests.studies.separable:net", multiplier=0.5, density=(0.5, 0.2), groups=(4, 8),
    group=4, timed=((0.5, 8),), repeats=1,
)  # fmt: skip
REARRANGED = "group4-rearranged"
SORTED = "Sorting channels keeps more than leaving them, at every size and density"
SEARCHED = "The search keeps more than sorting, at every size and density"
ORDERED = "In no layer do rearranged groups keep less than plain ones or more than single weights"
UNCHANGED = "Rearrangement alone changes outputs by less than 1e-5 of the largest"
FIFTH = "The search recovers more than a fifth of what groups of 4 lose"
HALF = "The search recovers less than a half of what groups of 4 lose"
BEFORE = "Before fine-tuning single weights are more accurate than rearranged groups"
AFTER = "After fine-tuning plain groups are more accurate than filters of equal products"
PLACE = "at width 0.5 on 8 pixels a side"
FAST = f"At 80% sparsity rearranged groups are more than 1.27 times as fast as dense {PLACE}"
FASTER = f"At 80% sparsity rearranged groups are faster than the unpruned network in the same runtime {PLACE}"


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
    """Times that depend on the weights alone."""
    monkeypatch.setattr(timing, "measure", by_weights)


@pytest.fixture
def untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "speed", lambda *given, **kind: ({"latency_ratio": 1.0}, {}))


@pytest.fixture
def untabled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "kept_shares", lambda *given: [])
    monkeypatch.setattr(study, "summary", lambda *tables: {})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    """A network trained on digits for three epochs."""
    torch.set_num_threads(1)
    source = _common.load_source(TELLING)
    folder = tmp_path_factory.mktemp("trained")
    return _common.train(TELLING, source, network(), None, 0, study.Work(folder, folder)).model


def network(width: float = 0.5, seed: int = 0) -> nn.Module:
    return timing.build(study._timing(TELLING, width, 8), _common.load_source(TELLING), width, seed)


def arm(name: str, cfg: Config = TELLING) -> Any:
    return next(one for one in STUDY.arms(cfg) if one.name == name)


def example() -> torch.Tensor:
    return next(iter(_common.load_source(TELLING).batches("test", 64)))[0]


def pruned(model: nn.Module, name: str, density: float, cfg: Config = TELLING) -> Masks:
    return prune(cfg, _common.load_source(cfg), model, arm(name, cfg), density, 0)


def test_conforms_but_for_its_times(tmp_path: Path, counted: None) -> None:
    small = {**STUDY.presets["smoke"], "network": "tests.studies.separable:net", "timed": ((0.0625, 8),)}
    check_study(replace(STUDY, presets={**STUDY.presets, "smoke": small}), tmp_path, seeds=(0,))


@pytest.mark.parametrize("name", [SINGLE, FILTER, "group4-timed"])
def test_the_smoke_preset_runs(name: str, tmp_path: Path) -> None:
    cfg = STUDY.preset("smoke")
    assert isinstance(cfg, Config)
    (tmp_path / "scratch").mkdir()
    found = STUDY.run(cfg, arm(name, cfg), 0, study.Work(tmp_path, tmp_path / "scratch")).metrics
    assert found.get("accuracy", 0.5) == found.get("accuracy_0.7", 0.5)
    assert found.get("latency_ratio", 1.0) > 0
    assert ("latency_ratio" in found) == (name != FILTER)


# ---- claims, with the method left alone and broken -----------------------------------------------------------------


def test_what_a_rearrangement_keeps(tmp_path: Path, untimed: None) -> None:
    cfg = TELLING.model_copy(update={"epochs": 1, "tuning": 0.1, "density": (0.5,)})
    found = verdicts(STUDY, cfg, ["dense"], tmp_path, seeds=3)
    assert found[SORTED] != "fails"
    assert found[SEARCHED] == found[ORDERED] == found[UNCHANGED] == "holds"


def test_no_rearrangement_recovers_nothing(tmp_path: Path, untimed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def left(model: nn.Module, *given: Any, **options: Any) -> Any:
        return rearrange(model, *given, **{**options, "search": "identity"})

    monkeypatch.setattr(saliency, "rearrange", left)
    found = verdicts(STUDY, short(), ["dense"], tmp_path, seeds=3)
    assert found[SORTED] == found[SEARCHED] == found[FIFTH] == "fails"
    assert found[ORDERED] == "holds"


def test_sorting_in_place_of_the_search_gains_nothing_over_it(
    tmp_path: Path, untimed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saliency, "rearrange", lambda *given, **o: rearrange(*given, **{**o, "search": "sort"}))
    assert verdicts(STUDY, short(), ["dense"], tmp_path, seeds=3)[SEARCHED] == "fails"


def test_a_rearrangement_that_changes_outputs_is_found(
    tmp_path: Path, untimed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def careless(model: nn.Module, *given: Any, **options: Any) -> Any:
        report = rearrange(model, *given, **{**options, "search": "sort"})
        with torch.no_grad():
            model[-1].bias.add_(1e-2)  # type: ignore[index]
        return report

    monkeypatch.setattr(saliency, "rearrange", careless)
    assert verdicts(STUDY, short(), ["dense"], tmp_path, seeds=3)[UNCHANGED] == "fails"


def test_single_weights_are_more_accurate_before_tuning(tmp_path: Path, untimed: None) -> None:
    sparse = TELLING.model_copy(update={"epochs": 6, "tuning": 0.1, "density": (0.4,)})
    assert verdicts(STUDY, sparse, [SINGLE, REARRANGED], tmp_path)[BEFORE] == "holds"


def test_the_smallest_single_weights_are_not(tmp_path: Path, untimed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = method.scores

    def scores(weight: torch.Tensor, grad: Any, criterion: Any, pattern: Any) -> torch.Tensor:
        score = whole(weight, grad, criterion, pattern)
        return 1.0 / (1.0 + score) if pattern.pointwise.out == 1 else score

    monkeypatch.setattr(method, "scores", scores)
    sparse = TELLING.model_copy(update={"epochs": 6, "tuning": 0.1, "density": (0.4,)})
    assert verdicts(STUDY, sparse, [SINGLE, REARRANGED], tmp_path)[BEFORE] == "fails"


def test_pruned_networks_are_fast_by_their_weights(tmp_path: Path, counted: None, untabled: None) -> None:
    found = verdicts(STUDY, few(), ["dense", REARRANGED], tmp_path, seeds=3)
    assert found[FAST] == found[FASTER] == "holds"


def test_masks_of_ones_are_not_fast(tmp_path: Path, counted: None, untabled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def dense(cfg: Config, source: Any, model: nn.Module, *given: Any) -> Masks:
        params = dict(model.named_parameters())
        return Masks.ones({name: params[name] for name in pointwise(model)})

    monkeypatch.setattr(study, "prune", dense)
    found = verdicts(STUDY, few(), ["dense", REARRANGED], tmp_path, seeds=3)
    assert found[FAST] == found[FASTER] == "fails"


@pytest.mark.parametrize(
    ("share", "fifth", "half"), [(0.1, "fails", "holds"), (0.35, "holds", "holds"), (0.6, "holds", "fails")]
)
def test_how_much_is_to_be_recovered(share: float, fifth: str, half: str) -> None:
    values = {"recovered_g4": {"dense": {seed: share + 1e-4 * seed for seed in range(5)}}}
    found = {one.text: one.verdict for one in judge(STUDY.claims(TELLING), values)}
    assert (found[FIFTH], found[HALF]) == (fifth, half)


@pytest.mark.parametrize(("loss", "verdict"), [(0.004, "holds"), (0.02, "fails"), (-0.02, "holds")])
def test_what_pruning_may_cost(loss: float, verdict: str) -> None:
    noise = (0.0, 3e-4, -3e-4, 1e-4, -1e-4)
    accuracy = {
        name: {seed: 0.9 - loss * place + (-1) ** place * one for seed, one in enumerate(noise)}
        for place, name in enumerate(("dense", REARRANGED))
    }
    found = {one.text: one.verdict for one in judge(STUDY.claims(TELLING), {"accuracy": accuracy})}
    assert found["At 50% sparsity rearranged groups lose less than a point to dense"] == verdict


@pytest.mark.parametrize(("gap", "verdict"), [(0.02, "holds"), (0.0, "fails"), (-0.02, "fails")])
def test_groups_must_beat_filters(gap: float, verdict: str) -> None:
    noise = (0.0, 3e-4, -3e-4, 1e-4, -1e-4)
    values = {"group4": {s: 0.8 + gap + one for s, one in enumerate(noise)}, FILTER: dict.fromkeys(range(5), 0.8)}
    found = {one.text: one.verdict for one in judge(STUDY.claims(TELLING), {"accuracy_mean": values})}
    assert found[AFTER] == verdict


def short() -> Config:
    return TELLING.model_copy(update={"epochs": 0.5, "tuning": 0.1})


def few() -> Config:
    """Return a configuration in which the pruned weights are most of all numbers, and most of them go."""
    return short().model_copy(update={"density": (0.2,)})


# ---- saliency -----------------------------------------------------------------------------------------------------


def test_shares_are_those_of_the_masks(trained: nn.Module) -> None:
    rows = saliency.kept_shares(trained, example(), (4, 16), (0.5, 0.2), 0)
    assert [(row["group"], row["density"]) for row in rows] == [(4, 0.5), (4, 0.2), (16, 0.5), (16, 0.2)]
    for row in rows:
        pattern, names = KernelGroup(row["group"]), pointwise(trained)
        for word, search in (("identity", "identity"), ("sort", "sort"), ("swap", "greedy+swap")):
            twin = network()
            twin.load_state_dict(trained.state_dict())
            rearrange(twin, pattern, row["density"], search=search, parameters=tuple(names))
            weights = [twin.get_parameter(name).detach().double().abs() for name in names]
            masks = [pattern.select(one, row["density"]) for one in weights]
            kept = sum(float((mask * one).sum()) for mask, one in zip(masks, weights, strict=True))
            assert row[word] == pytest.approx(kept / sum(float(one.sum()) for one in weights), rel=1e-5)
        counts = [int(mask.sum()) for mask in masks]
        best = sum(float(one.flatten().topk(n).values.sum()) for one, n in zip(weights, counts, strict=True))
        assert row["unstructured"] == pytest.approx(best / sum(float(one.sum()) for one in weights), rel=1e-5)
        assert row["identity"] <= row["sort"] <= row["swap"] <= row["unstructured"]
        assert row["misordered"] == 0
        assert row["drift"] < 1e-5


def test_the_table_leaves_the_network_as_it_is(trained: nn.Module) -> None:
    before, modes = {k: v.clone() for k, v in trained.state_dict().items()}, [m.training for m in trained.modules()]
    saliency.kept_shares(trained, example(), (4,), (0.5,), 0)
    assert all(torch.equal(value, before[name]) for name, value in trained.state_dict().items())
    assert modes == [m.training for m in trained.modules()]


@pytest.mark.parametrize(
    ("before", "after", "bound", "share"), [(0.2, 0.3, 0.6, 0.25), (0.2, 0.2, 0.6, 0.0), (0.2, 0.6, 0.6, 1.0), (1, 1, 1, 0)]
)
def test_the_share_of_a_gap(before: float, after: float, bound: float, share: float) -> None:
    assert saliency.recovered(before, after, bound) == pytest.approx(share, abs=1e-12)


def test_layers_out_of_order_are_counted() -> None:
    layers = [(5.0, 6.0, 8.0), (5.0, 4.0, 8.0), (5.0, 9.0, 8.0), (5.0, 5.0 - 1e-7, 5.0)]
    report: Any = SimpleNamespace(
        layers=[SimpleNamespace(before=b, after=a, bound=top, total=10.0) for b, a, top in layers]
    )  # fmt: skip
    assert saliency.misordered(report) == 2


def test_a_change_is_against_the_largest_output() -> None:
    assert saliency.change(torch.tensor([1.0, -4.0]), torch.tensor([1.5, -4.0])) == 0.125


def test_the_summary_is_of_means_and_extremes() -> None:
    def rows(shift: float) -> list[dict[str, Any]]:
        return [
            {"group": g, "density": d, "identity": 0.5, "sort": 0.5 + d, "swap": 0.75 + d, "unstructured": 2.0,
             "recovered": d / g + shift, "misordered": 1, "drift": d * g + shift}
            for g in (4, 8) for d in (0.25, 0.75)
        ]  # fmt: skip

    found = saliency.summary(rows(0.5), rows(0.25))
    assert found["kept_identity_g4"] == 0.5
    assert found["kept_sort_g8"] == 1.0
    assert found["kept_swap_g8"] == 1.25
    assert found["recovered_g4"] == found["recovered"] == 0.625
    assert found["random_recovered_g8"] == 0.3125
    assert found["trained_over_random_g8"] == 0.25
    assert found["recovered_fall"] == 0.0625
    assert (found["least_sort_gain"], found["least_swap_gain"]) == (0.25, 0.25)
    assert (found["misordered"], found["drift"]) == (8.0, 6.5)


# ---- what is compared ---------------------------------------------------------------------------------------------


def test_the_arms() -> None:
    names = [one.name for one in STUDY.arms(STUDY.preset("laptop"))]
    assert names == [
        "dense", SINGLE, "group8", "group8-rearranged", FILTER, "group4-timed", "group16-timed",
    ]  # fmt: skip


@pytest.mark.parametrize("density", [0.7, 0.3])
def test_patterns_of_the_arms_at_equal_density(trained: nn.Module, density: float) -> None:
    for name, pattern in ((SINGLE, KernelGroup(1, "point")), ("group4", KernelGroup(4)), (REARRANGED, KernelGroup(4))):
        twin = network()
        twin.load_state_dict(trained.state_dict())
        masks = pruned(twin, name, density)
        assert list(masks) == pointwise(twin)
        assert masks.density() == pytest.approx(density, abs=1e-3)
        for weight, mask in masks.items():
            pattern.check(mask)
            assert bool((twin.get_parameter(weight)[~mask] == 0).all())
            assert torch.equal(mask, pattern.select(trained.get_parameter(weight).abs(), density)) or name == REARRANGED


@pytest.mark.parametrize("density", [0.7, 0.5, 0.2])
def test_filters_have_the_products_of_the_groups(density: float) -> None:
    model = network()
    cost = count(model, example()[:1])
    wanted = cost.flops(pruned(network(), "group4", density))
    share = filter_share(model, cost, wanted)
    assert cost.flops(filter_masks(model, share - 0.01)) < wanted <= cost.flops(filter_masks(model, share))
    found = pruned(model, FILTER, density)
    assert cost.flops(found) == cost.flops(filter_masks(network(), share))


def test_filters_are_the_largest_and_go_with_all_that_reads_them() -> None:
    model = network()
    masks, weight = filter_masks(model, 0.5), model.get_parameter("0.weight")
    norms = weight.detach().abs().sum(dim=(1, 2, 3))
    alive = norms >= norms.sort(descending=True).values[len(norms) // 2 - 1]
    assert torch.equal(masks["0.weight"], alive[:, None, None, None].expand_as(weight))
    assert torch.equal(masks["1.bias"], alive)
    assert torch.equal(masks["3.weight"].flatten(1).all(dim=1), alive)
    assert torch.equal(masks["6.weight"].any(dim=0).flatten(), alive)
    assert int(masks["6.weight"].any(dim=1).sum()) == masks["6.weight"].shape[0] // 2


def test_a_filter_network_computes_what_the_smaller_one_does() -> None:
    model, x = network(), example()
    model(x)  # statistics
    masks = filter_masks(model, 0.4)
    kept = {name: masks[f"{name}.weight"].flatten(1).any(dim=1) for name in ("0", "6", "12")}
    small = compact(model.eval(), kept, example=x)
    assert count(small, x[:1]).flops() == count(model, x[:1]).flops(masks)


def test_metrics_of_a_pruned_arm(tmp_path: Path, untimed: None) -> None:
    place = tmp_path / "scratch"
    place.mkdir()
    found = STUDY.run(short(), arm("group4"), 0, study.Work(tmp_path, place)).metrics
    for name in ("one_shot", "accuracy"):
        assert found[name] == found[f"{name}_0.5"]
        assert found[f"{name}_mean"] == pytest.approx((found[f"{name}_0.5"] + found[f"{name}_0.2"]) / 2)
    assert found["density"] == pytest.approx(0.5)
    assert 0.5 < found["inference_flops"] < 1.0


def test_tuned_weights_stay_pruned(tmp_path: Path, untimed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[nn.Module, Masks]] = []
    tune = study._tune

    def watched(cfg: Any, source: Any, trainer: Any, model: Any, masks: Any, name: str) -> nn.Module:
        before = {key: value.clone() for key, value in model.state_dict().items()}
        seen.append((tune(cfg, source, trainer, model, masks, name), masks))
        assert not torch.equal(seen[-1][0].state_dict()["6.weight"], before["6.weight"])
        return seen[-1][0]

    monkeypatch.setattr(study, "_tune", watched)
    (tmp_path / "scratch").mkdir()
    STUDY.run(short(), arm(FILTER), 0, study.Work(tmp_path, tmp_path / "scratch"))
    assert len(seen) == 2
    for model, masks in seen:
        assert all(bool((model.get_parameter(name)[~mask] == 0).all()) for name, mask in masks.items())


# ---- what is timed ------------------------------------------------------------------------------------------------


def test_speed_is_of_the_trained_network_where_it_has_the_width(monkeypatch: pytest.MonkeyPatch, trained: nn.Module) -> None:
    cfg = TELLING.model_copy(update={"timed": ((0.5, 8), (0.25, 12))})
    source, seen = _common.load_source(cfg), []
    clocks = [{"dense eager": 6.0, "dense folded": 4.0, "dense channels last": 5.0, "own": 2.0},
              {"dense eager": 3.0, "dense folded": 8.0, "dense channels last": 5.0, "own": 4.0}]  # fmt: skip

    def measure(models: Mapping[str, nn.Module], x: torch.Tensor, *, repeats: int) -> dict[str, float]:
        seen.append((tuple(x.shape), models["own"].state_dict()))
        return {name: 1e-3 * clocks[len(seen) - 1][name] for name in models}

    monkeypatch.setattr(timing, "measure", measure)
    metrics, tables = speed(cfg, source, arm(REARRANGED), 0, trained)
    assert metrics == pytest.approx(
        {"latency_ratio_0.5_8": 2.0, "latency_ratio_0.25_12": 0.75, "latency_ratio": 0.75, "ms": 4.0, "dense_ms": 3.0}
    )
    assert [shape for shape, _ in seen] == [(1, 1, 8, 8), (1, 1, 12, 12)]
    assert [table["trained"] for table in tables.values()] == [True, False]
    first, second = (weights for _, weights in seen)
    assert all(torch.equal(value, first[name]) for name, value in trained.state_dict().items())
    fresh, names = network(0.25), pointwise(trained)
    masks = pruned(fresh, "group4", 0.5, cfg)
    assert all(torch.equal(second[name] != 0, masks[name]) for name in names)


def test_dense_in_the_runtime_has_all_its_weights(counted: None) -> None:
    metrics, _ = speed(TELLING, _common.load_source(TELLING), arm("dense"), 0, network())
    assert metrics["latency_ratio"] == pytest.approx(1.0, rel=0.1)  # but for numbers of the runtime's own


def test_trials_know_the_runtime_and_the_processor() -> None:
    assert {"data", "runtime", "processor"} <= set(TELLING.identity())
