"""The study of essential sparsity: its contract, its networks, and sabotages that its verdicts must notice."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from openwork.core.masks import Masks
from openwork.data import texts
from openwork.errors import DivergedError, RecipeError
from openwork.lab.study import Work, find
from openwork.methods.sparsify import essential_sparsity as method
from openwork.methods.sparsify.essential_sparsity import one_shot
from openwork.studies.sparsify import _essential_models as made
from openwork.studies.sparsify import essential_sparsity as study
from openwork.testing.studies import check_study
from tests.studies.judging import verdicts

STUDY = study.STUDY
# Small, yet telling: a text of eight symbols is learnt well in a hundred steps, and pruning at random undoes it.
TELLING = STUDY.preset("smoke", lm_steps=120, blocks=24)
GAIN = "lm: pruning by magnitude keeps more than pruning at random"


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def test_conforms(tmp_path: Path) -> None:
    assert find("essential-sparsity") is STUDY
    check_study(STUDY, tmp_path, seeds=(0,))


def test_magnitude_keeps_more_than_chance_and_not_when_it_is_chance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert verdicts(STUDY, TELLING, ["lm-more"], tmp_path / "sound", seeds=3)[GAIN] == "holds"
    whole = method.one_shot

    def blind(
        model: nn.Module, sparsity: float | None, scope: object = "global", *, seed: int = 0, **options: object
    ) -> Masks:
        return whole(model, sparsity, "random", seed=seed + 100 * (scope == "random"), **options)  # type: ignore[arg-type]

    monkeypatch.setattr(method, "one_shot", blind)
    assert verdicts(STUDY, TELLING, ["lm-more"], tmp_path / "broken", seeds=3)[GAIN] != "holds"


def test_weights_that_stay_pruned_from_point_to_point_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    subject, _ = made.reader(study._reader(TELLING), 1.0, 0, 3, lambda share: None)
    monkeypatch.setattr(made.Subject, "fresh", lambda self: self.model)
    with pytest.raises(method.MethodError, match="fresh copy"):
        study._curve(subject, (0.0, 0.2, 0.4, 0.6), "global", 0)


def test_every_claim_of_the_pretrained_models_stands_with_them_and_only_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(made, "available", lambda: {"tiny-lm": "a", "minilm": "b"})
    cfg = STUDY.preset("laptop")
    arms = {arm.name for arm in STUDY.arms(cfg)}
    assert {"tiny-lm/global", "tiny-lm/2:4", "minilm/layer", "vit-ssl", "lm-less"} <= arms
    claims = STUDY.claims(cfg)
    assert {name.split(":")[0] for name in (claim.text for claim in claims)} == {"tiny-lm", "minilm", "vit", "lm"}
    assert all(set(claim.contrast) <= arms for claim in claims)
    assert {claim.kind for claim in claims} == {"greater", "different"}
    without = STUDY.preset("laptop", pretrained="none")
    assert {arm.name for arm in STUDY.arms(without)} == {"vit-sl", "vit-sl-evaluate", "vit-ssl", "lm-less", "lm-more"}
    assert all(claim.text.startswith(("vit", "lm")) for claim in STUDY.claims(without))


def test_a_grid_that_makes_no_sense_is_refused() -> None:
    for grid in ((0.1, 0.2, 0.3, 0.4), (0.0, 0.3, 0.2, 0.5), (0.0, 0.5, 0.9)):
        with pytest.raises(RecipeError, match="grid"):
            STUDY.preset("smoke", grid=grid)


def test_a_trial_is_labelled_and_reports_its_curve(tmp_path: Path) -> None:
    arms = {arm.name: arm for arm in STUDY.arms(TELLING)}
    found = STUDY.run(TELLING, arms["lm-more"], 0, Work(tmp_path, tmp_path))
    curve = found.details["curve"]
    assert (curve["scope"], curve["protocol"]) == ("global", "prune, evaluate")
    assert [s for s, _ in found.curves["quality"]] == list(TELLING.grid)  # type: ignore[attr-defined]
    assert curve["hinge_interval"][0] <= curve["hinge_interval"][1]
    assert [row["checkpoint"] for row in found.details["track"]] == [40, 80, 120]
    assert found.metrics["quality"] > 0.5  # the text is learnt
    tuned = STUDY.run(TELLING, arms["vit-sl"], 0, Work(tmp_path, tmp_path))
    assert tuned.details["curve"]["protocol"] == "prune, fine-tune, evaluate"
    assert tuned.details["imp"]["jaccard"] - tuned.details["imp"]["chance_jaccard"] == tuned.metrics["imp_overlap"]
    assert sum(layer["kept"] for layer in tuned.layers.values()) * 2 == sum(
        layer["total"] for layer in tuned.layers.values()
    )


# ---- the networks


def test_training_holds_the_mask_and_stops_where_it_diverges() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    masks = one_shot(model, 0.5, select=lambda m: {"0.weight": m[0].weight})  # type: ignore[index,dict-item]
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))
    before = model[0].weight.detach().clone()
    made.fit(model, lambda m, step: m(x).square().mean(), 10, 0.01, masks=masks)
    masks.check(model)
    assert not torch.equal(model[0].weight[masks["0.weight"]], before[masks["0.weight"]])
    with pytest.raises(DivergedError, match="at step 3"):
        made.fit(model, lambda m, step: m(x).sum() * (math.nan if step == 3 else 1.0), 10, 0.01)


def test_the_made_text_is_one_of_order_two() -> None:
    text = made.markov(4000)
    pairs: dict[tuple[int, int], set[int]] = {}
    for a, b, c in zip(text.tolist(), text[1:].tolist(), text[2:].tolist(), strict=False):
        pairs.setdefault((a, b), set()).add(c)
    assert max(map(len, pairs.values())) <= 3
    assert len(pairs) > 20
    assert torch.equal(text, made.markov(4000))


def test_next_token_accuracy_counted_by_hand() -> None:
    class Same(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.one_hot(x, 5).float()  # says that every token comes again

    blocks = torch.tensor([[1, 1, 2, 2], [3, 3, 3, 3]])
    assert made.next_token(blocks)(Same()).tolist() == [pytest.approx(2 / 3), 1.0]


def test_reciprocal_ranks_counted_by_hand() -> None:
    queries = torch.eye(3)
    documents = torch.tensor([[1.0, 0.5, 0.0], [2.0, 0.0, 0.0], [0.0, 0.5, 1.0]])
    assert made.reciprocal_ranks(queries, documents).tolist() == [0.5, pytest.approx(1 / 3), 1.0]


def test_rewinding_prunes_in_rounds_from_the_pretrained_weights() -> None:
    start = nn.Sequential(nn.Linear(4, 10, bias=False))
    nn.init.normal_(start[0].weight, generator=torch.Generator().manual_seed(0))
    weight = start[0].weight.detach().clone()
    seen: list[tuple[float, Tensor]] = []

    def fresh() -> nn.Module:
        model = nn.Sequential(nn.Linear(4, 10, bias=False))
        model.load_state_dict(start.state_dict())
        return model

    def prune(model: nn.Module, s: float) -> Masks:
        return one_shot(model, s, select=lambda m: {"0.weight": m[0].weight})  # type: ignore[index,dict-item]

    def train(model: nn.Module, masks: Masks) -> nn.Module:
        seen.append((masks.density(), model[0].weight.detach().clone()))  # type: ignore[index,union-attr]
        return model

    masks = made.rewound(fresh, prune, train, 0.75, 2)
    assert [density for density, _ in seen] == [1.0, 0.5]
    assert masks.density() == 0.25
    for density, held in seen:
        assert int((held != 0).sum()) == round(density * 40)
        assert torch.equal(held[held != 0], weight[held != 0])
    assert torch.equal(masks["0.weight"], prune(start, 0.75)["0.weight"])  # training did nothing, so one shot is the same


def test_the_real_character_model_gives_the_curves_of_its_card() -> None:
    if "tiny-lm" not in made.available():
        pytest.skip("the tiny-lm model is not in OPENWORK_DATA or the cache, or transformers is not installed")
    subject = made.tiny_lm(6, 128, 0)
    assert sum(w.numel() for w in method.transformer_linears(subject.model).values()) == 921_600
    grid = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
    found = {scope: study._curve(subject, grid, scope, 0).quality for scope in ("global", "layer")}
    expected = {"global": (0.789, 0.787, 0.770, 0.694, 0.417, 0.202), "layer": (0.789, 0.783, 0.774, 0.759, 0.686, 0.439)}
    for scope, values in expected.items():  # other texts, so what is kept of the dense accuracy is compared
        shares = [y / found[scope][0] for y in found[scope]]
        assert shares == pytest.approx([y / values[0] for y in values], abs=0.06)
    two = study._curve(subject, None, "2:4", 0).quality[-1]
    four = study._curve(subject, None, "4:8", 0).quality[-1]
    assert two < four < found["layer"][-1]
    assert study._curve(subject, (0.0, 0.1, 0.2, 0.3), "random", 0).quality[1] < 0.6


def test_texts_by_name_are_what_their_checksums_say() -> None:
    if not texts.at_hand("tiny-shakespeare"):
        pytest.skip("tiny-shakespeare is not in OPENWORK_DATA or the cache")
    ids = made.tokens("tiny-shakespeare")
    assert (len(ids), int(ids.max()) + 1) == (1_115_394, 65)
