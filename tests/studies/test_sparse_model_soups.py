"""The study of sparse model soups: its contract, its parts, and sabotages that its verdicts must notice."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from openwork.core.masks import Masks
from openwork.core.rng import generator
from openwork.lab import claims
from openwork.lab.study import Work, find
from openwork.methods.sparsify import sparse_model_soups as method
from openwork.sparsifier.averaging import average_state
from openwork.sparsifier.parameters import maskable
from openwork.studies import _common
from openwork.studies.sparsify import sparse_model_soups as study
from openwork.testing.studies import check_study
from openwork.train.loop import fit

STUDY = study.STUDY
SMALL = {"data": f"{Path(__file__).parent / 'noisy.py'}:make", "train": None, "network": "mlp-128-64", "conv": None,
         "density": (0.2,), "epochs": 16, "batch_size": 16, "lr": 0.05}  # fmt: skip

MANY = {"members": 5, "density": (0.3,), "epochs": 24, "no_barrier": 0.02}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _judge(folder: Path, arms: Sequence[str], metrics: Sequence[str], seeds: int, **values: Any) -> dict[str, str]:
    """Run some arms; return "metric of arm" -> verdict of the claims about one of them."""
    cfg = STUDY.preset("smoke", **{**SMALL, **values})
    trials = []
    for arm in STUDY.arms(cfg):
        for seed in range(seeds):
            if arm.name in arms:
                place = folder / arm.name / str(seed)
                place.mkdir(parents=True)
                found = STUDY.run(cfg, arm, seed, Work(place, place))
                trials.append({"arm": arm.name, "seed": seed, "status": "ok", "metrics": found.metrics})
    chosen = [c for c in STUDY.claims(cfg) if set(c.contrast) <= set(arms) and c.metric in metrics]
    verdicts = claims.judge(chosen, claims.collect(trials))
    return {f"{v.metric} of {next(iter(c.contrast))}": v.verdict for c, v in zip(chosen, verdicts, strict=True)}


def test_contract(tmp_path: Path) -> None:
    assert find("sparse-model-soups") is STUDY
    check_study(STUDY, tmp_path, seeds=(0,))


def test_soups_hold(tmp_path: Path) -> None:
    found = _judge(tmp_path, ["sms@0.3"], ["gain", "extra", "barrier"], 5, **MANY)
    assert found == {"gain of sms@0.3": "holds", "extra of sms@0.3": "holds", "barrier of sms@0.3": "holds"}


def test_soups_of_permuted_members_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def permuted(states: Sequence[Mapping[str, Any]], weights: Any = None, masks: Any = None) -> dict[str, Any]:
        return average_state([_permute(state, place) for place, state in enumerate(states)], weights, masks)

    monkeypatch.setattr(method, "average_state", permuted)
    found = _judge(tmp_path, ["sms@0.3"], ["gain", "barrier"], 3, **MANY)
    assert found == {"gain of sms@0.3": "fails", "barrier of sms@0.3": "holds"}


def test_what_independent_runs_show_and_copies_do_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = {"barrier of apart@0.2", "extra of naive@0.2"}
    arms = ["naive@0.2", "apart@0.2"]
    healthy = _judge(tmp_path / "healthy", arms, ["barrier", "extra"], 3, epochs=6)
    monkeypatch.setattr(study, "derive", lambda seed, *_purpose: seed)
    copies = _judge(tmp_path / "copies", arms, ["barrier", "extra"], 3, epochs=6)
    assert healthy == dict.fromkeys(wanted, "holds")
    assert copies == dict.fromkeys(wanted, "fails")


def test_soup_keeps_its_density_and_beside_is_right(tmp_path: Path) -> None:
    cfg = STUDY.preset("smoke", **SMALL, members=2)
    arm = next(arm for arm in STUDY.arms(cfg) if arm.name == "sms@0.2")
    found = STUDY.run(cfg, arm, 0, Work(tmp_path, tmp_path))
    total = 64 * 128 + 128 * 64 + 64 * 8
    assert found.metrics["density"] == round(0.2 * total) / total
    assert found.metrics["extra"] == 0
    assert found.metrics["steps"] == pytest.approx(1.5, abs=0.01)
    last = found.details["phases"][-1]
    assert found.metrics["gain_phase3"] == pytest.approx(last["accuracy"] - sum(last["members"]) / 2)
    assert found.metrics["gain"] == pytest.approx(found.metrics["accuracy"] - found.metrics["member_mean"])
    kinds = [found.metrics[f"accuracy_{kind}"] for kind in study.KINDS]
    assert found.metrics["corrupted"] == pytest.approx(sum(kinds) / 4)


def test_weights_beyond_the_members_are_counted() -> None:
    path = _path()
    members = [path.model() for _ in range(2)]
    for place, member in enumerate(members):
        keep = {n: torch.rand(p.shape, generator=generator(place, n)) < 0.5 for n, p in maskable(member).items()}
        Masks(keep).apply(member)
    dense = path.model()
    union = [(a != 0) | (b != 0) for a, b in zip(*(maskable(m).values() for m in members), strict=True)]
    outside = sum(int((~mask).sum()) for mask in union)
    found = study._beside(path, dense, members, {"accuracy": 0.5})
    assert found["extra"] == outside / sum(mask.numel() for mask in union)


def test_barrier_of_a_model_with_itself_is_none_and_of_its_permutation_is_some() -> None:
    path = _path()
    model = path.model()
    fit(model, path.source, _common.settings(path.cfg, 300), seed=0)
    other = path.model()
    other.load_state_dict(_permute(model.state_dict(), 1))
    assert study._barrier(path, [model, model]) == 0
    assert study._barrier(path, [model, other]) > 0.05


def test_pruning_keeps_the_largest_over_all_layers() -> None:
    path = _path()
    model = path.model()
    sizes = torch.cat([p.detach().abs().reshape(-1) for p in maskable(model).values()])
    study._prune(model, 0.1)
    kept = torch.cat([p.detach().abs().reshape(-1) for p in maskable(model).values()])
    count = round(0.1 * len(sizes))
    assert torch.equal(kept.nonzero().squeeze(1), sizes.topk(count).indices.sort().values)


def _path(**values: Any) -> study._Path:
    cfg = STUDY.preset("smoke", **{**SMALL, **values})
    return study._Path(cfg, _common.load_source(cfg), cfg.network, 0.2, 0)


def _permute(state: Mapping[str, Any], place: int) -> dict[str, Any]:
    """Return the state with the units of the first hidden layer shuffled: the same function, another place."""
    if not place:
        return dict(state)
    order = torch.randperm(len(state["layers.1.bias"]), generator=generator(place, "permute"))
    moved = {"layers.1.weight": state["layers.1.weight"][order], "layers.1.bias": state["layers.1.bias"][order]}
    return {**state, **moved, "layers.3.weight": state["layers.3.weight"][:, order]}
