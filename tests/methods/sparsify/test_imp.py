from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from openwork.errors import MaskError, MethodError, PatternError
from openwork.methods.sparsify._retrain import (
    adaptive_peak,
    history_of,
    phase_densities,
    prune,
    retrain_schedule,
    share_steps,
)
from openwork.methods.sparsify.imp import CARD, IMP
from openwork.sparsifier.procedure import Leg, Probe, Procedure
from tests.methods.sparsify.retrain_toys import (
    INPUTS,
    LABELS,
    PROBE,
    TRAIN,
    Loop,
    accuracy,
    network,
    one_thread,  # noqa: F401
)

LINE = [1 - i / 100 for i in range(100)]
TOTAL = 10 * 20 + 20 * 4  # masked weights of `network`

# ---- densities and steps ------------------------------------------------------------------------------------------------


def test_phase_sparsities_are_those_of_the_paper():
    assert [1 - d for d in phase_densities(0.02, 3)] == pytest.approx([0.72856, 0.92632, 0.98], abs=5e-6)


@given(st.floats(0.001, 1.0), st.integers(1, 8))
@settings(max_examples=50, deadline=None)
def test_every_phase_prunes_the_same_share_of_what_is_left(density, phases):
    found = [1.0, *phase_densities(density, phases)]
    share = 1 - density ** (1 / phases)
    assert found[-1] == density
    for before, after in itertools.pairwise(found):
        assert 1 - after / before == pytest.approx(share, abs=1e-9)


@given(st.integers(8, 500), st.floats(0, 0.8), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_steps_are_shared_without_rest(total, pretrain, phases):
    try:
        dense, rest = share_steps(total, pretrain, phases)
    except MethodError:
        assert total - round(pretrain * total) < phases
        return
    assert dense + sum(rest) == total == IMP(0.1, total_steps=total, pretrain=pretrain, phases=phases).steps
    assert max(rest) - min(rest) <= 1


# ---- retraining schedules -----------------------------------------------------------------------------------------------


def warm(t: float, high: float) -> float:
    return high / 2 * (1 - math.cos(math.pi * t / 0.1))


@pytest.mark.parametrize(
    ("name", "rate"),
    [
        ("ft", lambda t: 0.01),
        ("lrw", lambda t: 0.2 - t * 0.2),
        ("slr", lambda t: 1 - int((t - 0.1) / 0.9 * 100 + 1e-9) / 100),
        ("clr", lambda t: 0.01 + 0.99 / 2 * (1 + math.cos(math.pi * (t - 0.1) / 0.9))),
        ("llr", lambda t: 1 - (t - 0.1) / 0.9),
        ("allr", lambda t: 1 - (t - 0.1) / 0.9),
    ],
)
def test_schedules_have_their_closed_forms(name, rate):
    steps = 20
    found = retrain_schedule(name, LINE, steps)
    for step in range(steps):
        t = step / steps
        expected = warm(t, 1.0) if name not in ("ft", "lrw") and t < 0.1 else rate(t)
        assert found(t) == pytest.approx(expected, abs=1e-12), step


def test_rewinding_replays_the_last_rates_exactly():
    found = retrain_schedule("lrw", LINE, 37)
    assert [found(i / 37) for i in range(37)] == LINE[-37:]


def test_rewinding_beyond_the_start_stretches_all_rates():
    found = retrain_schedule("lrw", [1.0, 0.5], 8)
    assert [found(i / 8) for i in range(8)] == [1.0] * 4 + [0.5] * 4


def test_warm_up_of_pretraining_is_left_out():
    history = [0.0, 0.5, 1.0, 0.6, 0.2, 0.4]  # its smallest rate after the peak is .2, not 0
    assert retrain_schedule("ft", history, 5)(0.3) == 0.2
    compressed = retrain_schedule("slr", history, 60)
    assert [compressed(0.1 + 0.9 * (i + 0.5) / 6) for i in range(6)] == [1.0, 1.0, 1.0, 0.6, 0.2, 0.4]
    assert retrain_schedule("clr", history, 60)(1.0) == pytest.approx(0.2)


def test_scale_multiplies_every_rate():
    for name in ("ft", "lrw", "slr", "clr", "llr"):
        once, twice = retrain_schedule(name, LINE, 30), retrain_schedule(name, LINE, 30, scale=2.0)
        assert [twice(i / 30) for i in range(30)] == pytest.approx([2 * once(i / 30) for i in range(30)])


@given(st.floats(0, 1), st.floats(0.01, 1), st.floats(0.01, 3))
@settings(max_examples=80, deadline=None)
def test_the_adaptive_rate_stays_between_its_bounds(lost, pruned, length):
    peak = adaptive_peak(0.4, length, lost, pruned)
    assert 0.4 * min(length, 1) - 1e-12 <= peak <= 0.4
    if lost >= math.sqrt(pruned):
        assert peak == 0.4
    elif lost / math.sqrt(pruned) > length:
        assert peak == pytest.approx(0.4 * lost / math.sqrt(pruned))


def test_the_adaptive_schedule_starts_there():
    found = retrain_schedule("allr", LINE, 10, lost=0.3, pruned=0.25)
    assert found(0.1) == pytest.approx(0.6)
    assert found(0.55) == pytest.approx(0.3)


def test_history_of_a_function_and_of_a_list():
    assert history_of(lambda t: 1 - t, 100) == pytest.approx(LINE)
    assert history_of(None, 100) == pytest.approx(LINE)
    assert history_of([3.0, 2.0], 100) == [3.0, 2.0]


# ---- pruning ----------------------------------------------------------------------------------------------------------


def test_pruning_takes_the_smallest_of_all_layers_and_reports_the_lost_norm():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, -8.0], [2.0, 7.0]]))
        model[1].weight.copy_(torch.tensor([[6.0, -0.5], [3.0, 4.0]]))
    masks, lost = prune(model, None, 0.5, density=0.25, layerwise=False)
    assert model[0].weight.tolist() == [[0, -8], [0, 7]]
    assert model[1].weight.tolist() == [[6, 0], [0, 4]]
    assert lost == pytest.approx(math.sqrt((1 + 4 + 0.25 + 9) / (1 + 64 + 4 + 49 + 36 + 0.25 + 9 + 16)))
    again, _ = prune(model, masks, 0.25, density=0.25, layerwise=False)
    assert model[0].weight.tolist() == [[0, -8], [0, 0]]
    assert model[1].weight.tolist() == [[6, 0], [0, 0]]
    assert again.nnz() == 2


def test_what_is_pruned_stays_pruned_where_kept_weights_are_zero():
    model = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[3.0, 0.0, 1.0, 2.0]]))
    masks, _ = prune(model, None, 0.75, density=0.5, layerwise=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.0, 0.0, 0.0, 2.0]]))
    again, _ = prune(model, masks, 0.5, density=0.5, layerwise=False)
    assert again["weight"].tolist() == [[True, False, False, True]]


# ---- the whole run ------------------------------------------------------------------------------------------------------


def test_imp_is_a_procedure_whose_card_names_it():
    assert isinstance(IMP(0.1, total_steps=10), Procedure)
    assert CARD.entry == "IMP"


def test_a_run_has_exact_densities_its_legs_and_its_steps():
    loop, model = Loop(), network()
    imp = IMP(0.1, total_steps=101, phases=3, pretrain=0.4)
    assert imp.run(model, loop, PROBE) is model
    assert [leg.name for leg in loop.legs] == ["pretrain", "phase1", "phase2", "phase3"]
    assert [leg.steps for leg in loop.legs] == [40, 21, 20, 20]
    assert sum(leg.steps for leg in loop.legs) == 101 == imp.steps
    assert [leg.stream for leg in loop.legs] == [0, 1, 2, 3]
    assert imp.masks.nnz() == round(0.1 * TOTAL)
    imp.masks.check(model)
    for k, row in enumerate(imp.report, start=1):
        assert row["phase"] == k
        assert row["density"] == row["nonzero"] == round(0.1 ** (k / 3) * TOTAL) / TOTAL
        assert row["members"] == [row["accuracy"]]
    assert imp.report[-1]["accuracy"] == accuracy(model) > 0.5


def test_masks_only_shrink_and_each_phase_starts_where_the_last_ended():
    loop = Loop()
    IMP(0.1, total_steps=60, phases=2).run(network(norm=False), loop, PROBE)
    for earlier, later in [("pretrain", "phase1"), ("phase1", "phase2")]:
        for name in ("0.weight", "2.weight"):
            old, new = loop.after[earlier][name], loop.before[later][name]
            assert torch.equal(new, torch.where(new != 0, old, 0))
            assert (new != 0).sum() < (old != 0).sum()
        assert torch.equal(loop.after[earlier]["0.bias"], loop.before[later]["0.bias"])


def test_rates_of_the_legs_are_the_schedules():
    loop = Loop()
    IMP(0.2, total_steps=40, phases=2, schedule="lrw").run(network(), loop, PROBE)
    assert loop.rates["pretrain"] == pytest.approx([1 - i / 20 for i in range(20)])
    assert loop.rates["phase1"] == loop.rates["phase2"] == pytest.approx(loop.rates["pretrain"][-10:])


def test_the_adaptive_schedule_uses_the_norm_lost_in_its_own_phase():
    loop = Loop()
    IMP(0.2, total_steps=80, phases=2, schedule="allr", pretrain=0.5).run(network(), loop, PROBE)
    pruned = 1 - 0.2**0.5
    for earlier, later in [("pretrain", "phase1"), ("phase1", "phase2")]:
        old = torch.cat([loop.after[earlier][n].flatten() for n in ("0.weight", "3.weight")]).double()
        new = torch.cat([loop.before[later][n].flatten() for n in ("0.weight", "3.weight")]).double()
        lost = float((old - new).norm() / old.norm())
        start = adaptive_peak(1.0, 20 / 40, lost, pruned)
        assert loop.rates[later][2] == pytest.approx(start)  # step 2 of 20 is where the warm-up ends


def test_given_rates_of_pretraining_are_used_without_pretraining():
    loop = Loop()
    IMP(0.2, total_steps=8, phases=2, pretrain=0.0, schedule="lrw", base_schedule=LINE).run(network(), loop, PROBE)
    assert [leg.name for leg in loop.legs] == ["phase1", "phase2"]
    assert loop.rates["phase1"] == LINE[-4:]


def test_batch_norm_is_measured_again_after_the_last_step():
    model = network()
    IMP(0.2, total_steps=40, phases=2).run(model, Loop(), PROBE)
    seen = model[0](INPUTS[TRAIN]).detach()
    torch.testing.assert_close(model[1].running_mean, seen.mean(dim=0), rtol=0, atol=1e-5)


def test_layers_may_be_kept_at_their_allocated_densities():
    imp = IMP(0.2, total_steps=20, phases=2, scope="layers", allocate="uniform")
    imp.run(network(), Loop(), PROBE)
    assert imp.masks.densities() == {"0.weight": 0.2, "3.weight": 0.2}


def test_n_of_m_tightens_from_phase_to_phase():
    imp = IMP(0.5, total_steps=30, phases=3, pattern="2:4", exclude=["0.weight"])
    model = network()
    imp.run(model, Loop(), PROBE)
    groups = (model[3].weight.reshape(-1, 4) != 0).sum(dim=1)
    assert groups.eq(2).all()
    assert [row["density"] for row in imp.report] == [0.75, 0.75, 0.5]


def test_a_users_own_ten_lines_are_enough():
    def train(model, sparsifier, leg):
        optimizer = torch.optim.AdamW(model.parameters())
        if sparsifier is not None:
            sparsifier.attach(model, optimizer)
        for step in range(leg.steps):
            optimizer.param_groups[0]["lr"] = 0.02 * leg.schedule(step / leg.steps)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(INPUTS[TRAIN]), LABELS[TRAIN]).backward()
            optimizer.step()
        return model

    imp = IMP(0.1, total_steps=60)
    model = imp.run(network(norm=False), train, Probe(batches=list, accuracy=accuracy, loss=accuracy))
    imp.masks.check(model)
    assert imp.masks.nnz() == round(0.1 * TOTAL)
    assert accuracy(model, TRAIN) > 0.7


def test_a_run_can_be_repeated_bit_for_bit():
    runs = [IMP(0.1, total_steps=40).run(network(), Loop(), PROBE).state_dict() for _ in range(2)]
    for key, value in runs[0].items():
        assert torch.equal(value, runs[1][key])


# ---- refusals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"total_steps": 5, "phases": 4}, "every phase needs at least one"),
        ({"total_steps": 10, "phases": 0}, "at least one phase"),
        ({"total_steps": 10, "pretrain": 1.0}, "not in"),
        ({"total_steps": 10, "schedule": "cosine"}, "use one of ft, lrw"),
        ({"total_steps": 10, "scope": "all"}, "'global' or 'layers'"),
        ({"total_steps": 10, "recalibrate": 0.0}, "recalibrate"),
        ({"total_steps": 10, "pretrain": 0.0, "schedule": "slr"}, "needs the rates of a pretraining"),
        ({"total_steps": 10, "base_schedule": [0.0, 0.0]}, "base_schedule"),
        ({"total_steps": 10, "base_schedule": []}, "base_schedule"),
    ],
)
def test_settings_that_make_no_sense_are_refused_before_training(settings, message):
    with pytest.raises(MethodError, match=message):
        IMP(0.1, **settings)


def test_density_and_pattern_are_checked_before_training():
    with pytest.raises(MaskError, match="density"):
        IMP(0.0, total_steps=10)
    with pytest.raises(PatternError, match="2:4 keeps"):
        IMP(0.1, total_steps=10, pattern="2:4")


def test_an_unknown_schedule_is_refused():
    with pytest.raises(MethodError, match="'warm' is unknown"):
        retrain_schedule("warm", LINE, 3)


def test_a_loop_that_ignores_the_masks_or_returns_nothing_is_told_so():
    def careless(model: nn.Module, sparsifier: object, leg: Leg) -> nn.Module:
        with torch.no_grad():
            for param in model.parameters():
                param.add_(0.1)
        return model

    with pytest.raises(MethodError, match="never attached"):
        IMP(0.1, total_steps=10).run(network(), careless, PROBE)
    with pytest.raises(MethodError, match="NoneType for leg 'pretrain'"):
        IMP(0.1, total_steps=10).run(network(), lambda *_: None, PROBE)

    def late(model: nn.Module, sparsifier: object, leg: Leg) -> nn.Module:
        if sparsifier is not None:
            sparsifier.attach(model)
        return careless(model, sparsifier, leg)

    with pytest.raises(MethodError, match=r"masked weights of '0\.weight' are not zero"):
        IMP(0.1, total_steps=10).run(network(), late, PROBE)
