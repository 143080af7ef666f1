"""The study of random search: its contract, its parts, and a sabotage that its verdict must notice."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import pytest
import torch
from scipy.stats import spearmanr

from openwork.lab import claims
from openwork.lab.study import Work, find
from openwork.methods.sparsify.random_search import NodeSpace, draw, search, untrained
from openwork.studies import _common
from openwork.studies.sparsify import random_search as study
from openwork.testing.studies import check_study
from openwork.train.evaluate import evaluate

STUDY = study.STUDY
SEEDS = 4
SMALL = {"network": "mlp-256-256", "nodes": (0.5,), "train": None, "epochs": 12, "batch_size": 64, "draws": 4,
         "scoring": 100, "ranked": (2,), "repeats": 3, "margin": 0.02, "loss_margin": 0.05, "every": 30,
         "seeds": SEEDS}  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _judge(tmp_path: Path, values: Mapping[str, object], arms: tuple[str, ...]) -> dict[str, str]:
    """Run some arms over all seeds; return metric -> verdict of the claims about them."""
    cfg = STUDY.preset("smoke", **values)
    trials = []
    for arm in STUDY.arms(cfg):
        if arm.name in arms:
            for seed in range(SEEDS):
                place = tmp_path / arm.name / str(seed)
                place.mkdir(parents=True)
                found = STUDY.run(cfg, arm, seed, Work(place, place))
                trials.append({"arm": arm.name, "seed": seed, "status": "ok", "metrics": found.metrics})
    chosen = [claim for claim in STUDY.claims(cfg) if set(claim.contrast) <= set(arms) and claim.metric != "rho_gain"]
    return {verdict.metric: verdict.verdict for verdict in claims.judge(chosen, claims.collect(trials))}


def test_contract(tmp_path: Path) -> None:
    assert find("random-search") is STUDY
    check_study(STUDY, tmp_path, seeds=(0,))


def test_equal_arms_hold(tmp_path: Path) -> None:
    verdicts = _judge(tmp_path, SMALL, ("found@0.5", "random@0.5"))
    assert verdicts == {"accuracy": "holds", "area": "holds", "initial_loss": "holds"}


def test_a_handicapped_found_arm_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = study._Setting.drawn

    def crippled(self: study._Setting, index: int) -> torch.nn.Module:
        net = whole(self, index)
        with torch.no_grad():
            net.layers[3].weight[:, 3:] = 0  # type: ignore[union-attr,index]
            net.layers[3].weight.requires_grad_(False)  # type: ignore[union-attr,index]
        return net

    monkeypatch.setattr(study._Setting, "drawn", crippled)
    verdicts = _judge(tmp_path, SMALL, ("found@0.5", "random@0.5"))
    assert verdicts["accuracy"] == "fails"
    assert verdicts["area"] == "fails"


def test_a_search_that_keeps_the_worst_draw_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "search", partial(search, keep="max"))
    verdicts = _judge(tmp_path, {**SMALL, "epochs": 1}, ("found@0.5", "random@0.5"))
    assert verdicts["initial_loss"] == "fails"


def test_the_small_networks_score_as_the_masked_ones_and_pair_with_the_method() -> None:
    cfg = STUDY.preset("smoke")
    source = _common.load_source(cfg)
    parent = _common.build_model(source, cfg.network, 3)
    space = NodeSpace(parent, node_density=0.2)
    setting = study._Setting(cfg, source, parent, space, 3)
    batches = list(study._first(source, cfg.scoring))
    assert sum(len(y) for _, y in batches) == cfg.scoring
    score = untrained(parent, lambda net: evaluate(net, batches).nll)
    masked = search(space, score, budget=cfg.draws, seed=3)
    found = setting.searched()
    assert found.best_index == masked.best_index
    assert found.scores == pytest.approx(masked.scores, abs=1e-6)
    net = setting.drawn(2)
    masks = draw(space, 3, 2)
    kept = sum(param.numel() for name, param in net.named_parameters() if name.endswith("weight"))
    assert kept == sum(int(mask.sum()) for name, mask in masks.items() if name.endswith("weight"))
    assert score(masks) == pytest.approx(setting.scorer()(net), abs=1e-6)


def test_fresh_draws_are_not_those_of_the_search() -> None:
    cfg = STUDY.preset("smoke")
    source = _common.load_source(cfg)
    parent = _common.build_model(source, cfg.network, 0)
    setting = study._Setting(cfg, source, parent, NodeSpace(parent, node_density=0.5), 0)
    looked_at = [setting.drawn(index).layers[1].bias.numel() for index in range(2)]  # type: ignore[union-attr,index]
    assert looked_at == [32, 32]
    searched = {bytes(setting.drawn(i).head.weight.detach().numpy()) for i in range(cfg.draws)}  # type: ignore[union-attr]
    fresh = {bytes(setting.fresh(i).head.weight.detach().numpy()) for i in range(cfg.draws)}  # type: ignore[union-attr]
    assert len(searched) == len(fresh) == cfg.draws
    assert not searched & fresh


def test_search_is_charged_to_the_found_arm(tmp_path: Path) -> None:
    cfg = STUDY.preset("smoke", nodes=(0.5,))
    metrics = {}
    for arm in STUDY.arms(cfg)[1:]:
        metrics[arm.name] = STUDY.run(cfg, arm, 0, Work(tmp_path, tmp_path / arm.name)).metrics
    source = _common.load_source(cfg)
    images = 3.0 * _common.total_steps(cfg, source) * cfg.batch_size
    share = metrics["random@0.5"]["inference_flops"]
    extra = metrics["found@0.5"]["training_flops"] - metrics["random@0.5"]["training_flops"]
    assert metrics["random@0.5"]["training_flops"] == pytest.approx(share)
    assert extra == pytest.approx(cfg.draws * cfg.scoring * share / images)


def test_a_resumed_watch_keeps_what_it_saw(tmp_path: Path) -> None:
    looks = []

    def measure() -> float:
        looks.append(1)
        return 0.25 * len(looks)

    first = study._Watch(tmp_path / "w.json", lambda done: done % 2 == 0, measure)
    for done in (1, 2, 3, 4):
        first(done)
    again = study._Watch(tmp_path / "w.json", lambda done: done % 2 == 0, measure)
    for done in (3, 4, 5, 6):
        again(done)
    assert again.seen == {2: 0.25, 4: 0.5, 6: 0.75}


def test_ranks_and_correlation() -> None:
    assert study.spread(40, 20)[0] == 0
    assert study.spread(40, 20)[-1] == 39
    assert 19 in study.spread(40, 20)
    assert study.spread(5, 99) == [0, 1, 2, 3, 4]
    assert study.correlation([1.0, 1.0], [1.0, 2.0]) is None
    assert study.correlation([1.0, 2.0, 3.0], [2.0, 9.0, 10.0]) == pytest.approx(1.0)
    a, b = [3.0, 1.0, 2.0, 2.0], [1.0, 2.0, 4.0, 3.0]
    assert study.correlation(a, b) == pytest.approx(spearmanr(a, b).statistic)
