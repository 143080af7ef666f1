from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from openwork.core.masks import Masks
from openwork.core.rng import generator
from openwork.errors import MaskError, MethodError, ModelError
from openwork.methods.sparsify.imp import IMP
from openwork.methods.sparsify.sparse_model_soups import CARD, GradualSoup, SparseModelSoup, soup, soup_report
from openwork.nn.batchnorm import recalibrate_norm
from openwork.sparsifier.averaging import average_state
from openwork.sparsifier.procedure import Leg, Probe, Procedure
from openwork.sparsifier.sparsifier import Fixed, Sparsifier
from tests.methods.sparsify.retrain_toys import (
    INPUTS,
    LABELS,
    PROBE,
    TRAIN,
    Loop,
    accuracy,
    batches,
    network,
    one_thread,  # noqa: F401
)

TOTAL = 10 * 20 + 20 * 4  # masked weights of `network`


def learned(loop: Loop, name: str) -> dict[str, torch.Tensor]:
    """What a leg ended with, without what recalibration changes."""
    return {key: value for key, value in loop.after[name].items() if "running" not in key}


# ---- plan: steps, legs and what varies ------------------------------------------------------------------------------------


def test_soups_are_a_procedure_whose_card_names_them():
    assert isinstance(SparseModelSoup(0.1, total_steps=10), Procedure)
    assert isinstance(GradualSoup(0.1, total_steps=10), Procedure)
    assert (CARD.name, CARD.entry, CARD.aliases) == ("sparse-model-soups", "SparseModelSoup", ("soups", "sms"))


def test_steps_count_every_members():
    assert SparseModelSoup(0.1, total_steps=90, members=3, pretrain=1 / 3).steps == 30 + 3 * 60
    assert SparseModelSoup(0.1, total_steps=90, members=3, pretrain=1 / 3, last_only=True).steps == 30 + 20 + 20 + 3 * 20
    assert SparseModelSoup(0.1, total_steps=90, pretrain=1 / 3, vary="length").steps == 30 + 3 * (13 + 20 + 27)


@given(
    st.integers(1, 5), st.integers(1, 4), st.floats(0, 0.9), st.sampled_from(["seed", "length", "schedule"]), st.booleans()
)
@settings(max_examples=30, deadline=None)
def test_steps_grow_with_the_length_of_a_path(members, phases, pretrain, vary, last_only):
    build = partial(SparseModelSoup, 0.1, members=members, phases=phases, pretrain=pretrain, vary=vary, last_only=last_only)
    found = [build(total_steps=total).steps for total in range(50, 120)]
    assert all(later >= earlier for earlier, later in itertools.pairwise(found))
    assert found[-1] > found[0]


def test_a_run_has_exact_densities_its_legs_and_its_steps():
    loop, model = Loop(), network()
    sms = SparseModelSoup(0.1, total_steps=60, members=3, phases=2)
    assert sms.run(model, loop, PROBE) is model
    names = ["pretrain", *(f"phase{k}-member{i}" for k in (1, 2) for i in range(3))]
    assert [leg.name for leg in loop.legs] == names
    assert [leg.stream for leg in loop.legs] == [0, 1, 2, 3, 4, 5, 6]
    assert sum(leg.steps for leg in loop.legs) == sms.steps == 30 + 3 * 30
    assert sms.masks.nnz() == round(0.1 * TOTAL)
    sms.masks.check(model)
    assert [row["density"] for row in sms.report] == [round(0.1**0.5 * TOTAL) / TOTAL, 0.1]
    assert sms.report[-1]["accuracy"] == accuracy(model) > 0.5
    assert sms.report[-1]["members"] == [accuracy(member) for member in sms.members]


@pytest.mark.parametrize(
    ("vary", "values", "decays", "steps"),
    [
        ("weight_decay", [0.0, 1e-3, 1e-2], [0.0, 1e-3, 1e-2], [10, 10, 10]),
        ("length", None, [None] * 3, [7, 10, 13]),
        ("length", [0.5, 1.0, 1.0], [None] * 3, [5, 10, 10]),
        ("schedule", ["clr", 1.0, 2.0], [None] * 3, [10, 10, 10]),
    ],
)
def test_one_thing_varies_at_a_time(vary, values, decays, steps):
    loop = Loop()
    SparseModelSoup(0.3, total_steps=20, phases=1, vary=vary, values=values).run(network(), loop, PROBE)
    members = loop.legs[1:]
    assert [leg.weight_decay for leg in members] == decays
    assert [leg.steps for leg in members] == steps
    assert {leg.stream for leg in members} == {1}
    plain, twice = loop.rates["phase1-member1"], loop.rates["phase1-member2"]
    if vary == "schedule":
        assert twice == pytest.approx([2 * rate for rate in plain])
        assert loop.rates["phase1-member0"][:2] == plain[:2]
        assert loop.rates["phase1-member0"] != plain


# ---- averaging in the run ------------------------------------------------------------------------------------------------


def test_members_of_a_phase_start_from_one_model_and_keep_its_mask():
    loop = Loop()
    sms = SparseModelSoup(0.1, total_steps=40, phases=2)
    model = sms.run(network(), loop, PROBE)
    for k in (1, 2):
        starts = [loop.before[f"phase{k}-member{i}"] for i in range(3)]
        for i, start in enumerate(starts):
            for key, value in start.items():
                assert torch.equal(value, starts[0][key])
            for name in ("0.weight", "3.weight"):
                assert torch.equal(loop.after[f"phase{k}-member{i}"][name] != 0, start[name] != 0)
    for name, mask in sms.masks.items():
        assert torch.equal(model.state_dict()[name] != 0, mask)
    assert not torch.equal(loop.after["phase2-member0"]["0.weight"], loop.after["phase2-member1"]["0.weight"])


def test_the_next_phase_prunes_the_average_and_starts_from_it():
    loop = Loop()
    sms = SparseModelSoup(0.1, total_steps=40, phases=2)
    sms.run(network(), loop, PROBE)
    mean = average_state([learned(loop, f"phase1-member{i}") for i in range(3)])
    start = loop.before["phase2-member0"]
    ranked = torch.cat([mean[name].abs().flatten() for name in ("0.weight", "3.weight")]).sort(descending=True).values
    threshold = ranked[sms.masks.nnz() - 1]
    for name in ("0.weight", "3.weight"):
        assert torch.equal(start[name], torch.where(mean[name].abs() >= threshold, mean[name], 0))
    assert torch.equal(start["3.bias"], mean["3.bias"])
    assert torch.equal(start["1.weight"], mean["1.weight"])


def test_the_final_model_is_the_average_with_statistics_of_its_own():
    loop = Loop()
    model = SparseModelSoup(0.2, total_steps=40, phases=2).run(network(), loop, PROBE)
    mean = average_state([learned(loop, f"phase2-member{i}") for i in range(3)])
    for key, value in mean.items():
        if value.is_floating_point():
            assert torch.equal(model.state_dict()[key], value), key
    seen = model[0](INPUTS[TRAIN]).detach()
    torch.testing.assert_close(model[1].running_mean, seen.mean(dim=0), rtol=0, atol=1e-5)


def test_equal_members_make_the_soup_that_iterative_pruning_makes():
    """Nothing varies, so averaging m equal models must give what IMP gives alone."""
    common = {"total_steps": 40, "phases": 2}
    soups = SparseModelSoup(0.2, vary="weight_decay", values=[1e-3] * 3, **common).run(network(), Loop(), PROBE)

    def decayed(model: nn.Module, sparsifier: Sparsifier | None, leg: Leg) -> nn.Module:
        decay = 1e-3 if sparsifier else None
        return Loop()(model, sparsifier, Leg(leg.name, leg.steps, leg.schedule, leg.stream, decay))

    alone = IMP(0.2, **common).run(network(), decayed, PROBE)
    for key, value in alone.state_dict().items():
        torch.testing.assert_close(soups.state_dict()[key], value, rtol=0, atol=1e-6)


def test_one_member_is_iterative_pruning_bit_for_bit():
    one = SparseModelSoup(0.2, total_steps=40, phases=2, members=1).run(network(), Loop(), PROBE)
    alone = IMP(0.2, total_steps=40, phases=2).run(network(), Loop(), PROBE)
    for key, value in alone.state_dict().items():
        assert torch.equal(one.state_dict()[key], value), key


def test_last_only_is_iterative_pruning_until_the_last_phase():
    loop, other = Loop(), Loop()
    sms = SparseModelSoup(0.1, total_steps=60, phases=3, last_only=True)
    sms.run(network(), loop, PROBE)
    IMP(0.1, total_steps=60, phases=3).run(network(), other, PROBE)
    assert [leg.name for leg in loop.legs] == ["pretrain", "phase1", "phase2", *(f"phase3-member{i}" for i in range(3))]
    assert sum(leg.steps for leg in loop.legs) == sms.steps
    for key, value in other.before["phase3"].items():
        assert torch.equal(loop.before["phase3-member0"][key], value)
    assert [len(row["members"]) for row in sms.report] == [1, 1, 3]


def test_greedy_is_never_below_the_best_member_and_best_is_it():
    for choice in ("greedy", "best"):
        sms = SparseModelSoup(0.05, total_steps=30, phases=2, members=4, soup=choice)
        model = sms.run(network(), Loop(), PROBE)
        for row in sms.report:
            assert row["accuracy"] >= max(row["members"])
            assert row["members"][row["chosen"][0]] == max(row["members"])
        if choice == "best":
            assert [len(row["chosen"]) for row in sms.report] == [1, 1]
            member = sms.members[sms.report[-1]["chosen"][0]]
            for key, value in member.state_dict().items():
                assert torch.equal(model.state_dict()[key], value), key


def test_greedy_leaves_out_what_would_spoil_the_soup():
    """The last member of each phase is trained at a ruinous rate; the greedy soup must not contain it."""
    sms = SparseModelSoup(0.3, total_steps=60, phases=1, vary="schedule", values=[1.0, 0.9, 500.0], soup="greedy")
    sms.run(network(), Loop(), PROBE)
    assert 2 not in sms.report[0]["chosen"]
    plain = SparseModelSoup(0.3, total_steps=60, phases=1, vary="schedule", values=[1.0, 0.9, 500.0])
    plain.run(network(), Loop(), PROBE)
    assert plain.report[0]["chosen"] == [0, 1, 2]
    assert plain.report[0]["accuracy"] < sms.report[0]["accuracy"]


def test_members_may_be_trained_at_the_same_time():
    one = SparseModelSoup(0.2, total_steps=30, phases=2).run(network(), Loop(), PROBE)
    loop = Loop()
    with ThreadPoolExecutor(2) as pool:
        other = SparseModelSoup(0.2, total_steps=30, phases=2, map=pool.map).run(network(), loop, PROBE)
    assert len(loop.legs) == 7
    for key, value in one.state_dict().items():
        assert torch.equal(other.state_dict()[key], value), key


def test_a_soup_at_initialisation_needs_no_pretraining():
    loop = Loop()
    sms = SparseModelSoup(0.3, total_steps=20, phases=1, pretrain=0.0)
    sms.run(network(), loop, PROBE)
    assert [leg.name for leg in loop.legs] == [f"phase1-member{i}" for i in range(3)]
    start = network().state_dict()
    magnitudes = torch.cat([start[name].abs().flatten() for name in sms.masks])
    threshold = magnitudes.sort(descending=True).values[sms.masks.nnz() - 1]
    for name, mask in sms.masks.items():
        assert torch.equal(mask, start[name].abs() >= threshold)


def test_a_users_own_ten_lines_are_enough():
    def train(model, sparsifier, leg):
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        if sparsifier is not None:
            sparsifier.attach(model, optimizer)
        chosen = torch.randperm(160, generator=generator(0, "mine", leg.stream))[:120]
        for step in range(leg.steps):
            optimizer.param_groups[0]["lr"] = 0.2 * leg.schedule(step / leg.steps)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(INPUTS[chosen]), LABELS[chosen]).backward()
            optimizer.step()
        return model

    sms = SparseModelSoup(0.1, total_steps=60)
    model = sms.run(network(norm=False), train, Probe(batches=list, accuracy=accuracy, loss=accuracy))
    sms.masks.check(model)
    assert sms.masks.nnz() == round(0.1 * TOTAL)
    assert accuracy(model, TRAIN) > 0.6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"members": 0}, "at least one"),
        ({"soup": "mean"}, "'uniform', 'greedy' or 'best'"),
        ({"vary": "rate"}, "'weight_decay', 'length' or 'schedule'"),
        ({"vary": "weight_decay"}, "needs values"),
        ({"vary": "weight_decay", "values": [0.1]}, "1 values for 3"),
        ({"vary": "weight_decay", "values": [0.1, -0.1, 0.2]}, "at least 0"),
        ({"vary": "length", "values": ["llr", 1, 1]}, "at least 0"),
        ({"vary": "schedule", "values": ["warm", 1, 1]}, "'warm'"),
        ({"values": [1, 2, 3]}, "takes no values"),
        ({"total_steps": 2}, "every phase"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(MethodError, match=message):
        SparseModelSoup(0.1, **{"total_steps": 20, **settings})


def test_fixed_masks_are_what_holds_a_member():
    seen = []

    def train(model: nn.Module, sparsifier: Sparsifier | None, leg: Leg) -> nn.Module:
        seen.append(type(sparsifier))
        return Loop()(model, sparsifier, leg)

    SparseModelSoup(0.3, total_steps=12, phases=1, members=2).run(network(), train, PROBE)
    assert seen == [type(None), Fixed, Fixed]


# ---- soup ----------------------------------------------------------------------------------------------------------------


def masked(seed: int, mask_seed: int = 0, *, norm: bool = True) -> nn.Module:
    model = network(seed, norm=norm)
    params = {name: param for name, param in model.named_parameters() if param.dim() == 2}
    draw = generator(mask_seed, "mask")
    Masks({n: torch.rand(p.shape, generator=draw) < 0.2 for n, p in params.items()}).apply(model)
    return model


def test_the_soups_mask_is_its_members():
    members = [masked(seed) for seed in range(3)]
    mixed = soup(members)
    for name in ("0.weight", "3.weight"):
        values = [member.state_dict()[name] for member in members]
        assert torch.equal(mixed.state_dict()[name] != 0, values[0] != 0)
        torch.testing.assert_close(mixed.state_dict()[name], sum(values) / 3)
    assert all(mixed is not member for member in members)


def test_a_soup_of_copies_is_the_model_and_a_one_hot_soup_is_that_member():
    members = [masked(seed) for seed in range(3)]
    for key, value in soup([members[0]] * 3).state_dict().items():
        torch.testing.assert_close(value, members[0].state_dict()[key], rtol=0, atol=1e-7)
    for key, value in soup(members, weights=[0, 1, 0]).state_dict().items():
        assert value.numpy().tobytes() == members[1].state_dict()[key].numpy().tobytes()


def test_models_pruned_differently_are_refused():
    with pytest.raises(MaskError, match=r"'0\.weight' differ"):
        soup([masked(0, 0), masked(1, 1)])
    masks = Masks.of({"0.weight": masked(0, 0)[0].weight})
    with pytest.raises(MaskError, match="are not zero"):
        soup([masked(0, 0), masked(1, 1)], masks=masks)
    with pytest.raises(MethodError, match="at least one"):
        soup([])
    with pytest.raises(ModelError, match="only some"):
        soup([masked(0, norm=False), deepcopy_with_more(masked(0, norm=False))])


def deepcopy_with_more(model: nn.Module) -> nn.Module:
    more = deepcopy(model)
    more.register_buffer("more", torch.ones(1))
    return more


def test_a_kept_weight_that_happens_to_be_zero_needs_the_masks():
    members = [masked(0), masked(1)]
    masks = Masks.of({n: p for n, p in members[0].named_parameters() if p.dim() == 2})
    index = tuple(int(i) for i in masks["0.weight"].nonzero()[0])
    with torch.no_grad():
        members[1][0].weight[index] = 0
    with pytest.raises(MaskError, match="differ"):
        soup(members)
    assert soup(members, masks=masks)[0].weight[index] == members[0][0].weight[index] / 2


def test_statistics_of_a_soup_are_measured_from_the_batches():
    members = [masked(seed) for seed in range(3)]
    for place, member in enumerate(members):
        recalibrate_norm(member, batches())
        member[1].num_batches_tracked.fill_(place + 1)
    plain, measured = soup(members), soup(members, batches=batches())
    assert plain[1].num_batches_tracked.item() == 1
    expected = measured[0](INPUTS[TRAIN]).detach()
    torch.testing.assert_close(measured[1].running_mean, expected.mean(dim=0), rtol=0, atol=1e-5)
    variances = torch.stack([measured[0](x).detach().var(dim=0) for x, _ in batches()])
    torch.testing.assert_close(measured[1].running_var, variances.mean(dim=0))
    assert (plain[1].running_var - measured[1].running_var).abs().max() > 0.05  # what averaging statistics misses


# ---- soup_report ---------------------------------------------------------------------------------------------------------


def test_the_report_of_three_known_points():
    rows = [torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0]), torch.tensor([-3.0, 0.0])]
    report = soup_report([{"w": row, "steps": torch.tensor(9)} for row in rows])
    assert report["distance"] == [[0, 5, 6], [5, 0, 5], [6, 5, 0]]
    assert report["cosine"] == [[1, 0, -1], [0, 1, 0], [-1, 0, 1]]
    third = 4 / 3
    expected = [(9 + third**2) ** 0.5, 4 - third, (9 + third**2) ** 0.5]
    assert report["to_mean"] == pytest.approx(expected)


@given(st.integers(1, 5), st.integers(0, 50))
@settings(max_examples=25, deadline=None)
def test_distances_to_the_mean_and_among_members_obey_huygens(count, seed):
    draw = generator(seed, "report")
    parts = [{"a": torch.randn(3, 2, generator=draw), "b": torch.randn(4, generator=draw)} for _ in range(count)]
    report = soup_report(parts)
    pairs = sum(value**2 for row in report["distance"] for value in row)
    assert sum(value**2 for value in report["to_mean"]) == pytest.approx(pairs / (2 * count), abs=1e-9)


def test_the_report_compares_what_it_is_told_to():
    parts = [{"w": torch.zeros(2), "m": torch.ones(2)}, {"w": torch.ones(2), "m": torch.full((2,), 9.0)}]
    report = soup_report(parts, ["w"])
    assert report["distance"][0][1] == pytest.approx(2**0.5)
    assert report["cosine"] == [[0.0, 0.0], [0.0, pytest.approx(1.0)]]
    with pytest.raises(ModelError, match="'v'"):
        soup_report(parts, ["v"])
    with pytest.raises(ModelError, match="no numbers"):
        soup_report([{"steps": torch.tensor(1)}])
    with pytest.raises(MethodError, match="at least one"):
        soup_report([])
