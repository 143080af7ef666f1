from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from openwork import models
from openwork.core.select import count_of
from openwork.errors import MaskError, MethodError, PatternError
from openwork.methods.runtime import fast_sparse_convnets as module
from openwork.methods.runtime.fast_sparse_convnets import FastSparseConvNets, RowBlocks, pointwise, sparsify_pointwise
from openwork.runtime.spmm import pack_spmm
from openwork.testing import sparsifier_checks
from openwork.testing._toys import Loop
from tests.models.helpers import IMAGENET, on_meta


@pytest.mark.parametrize(("name", "check"), sparsifier_checks(FastSparseConvNets))
def test_conformance(name, check):
    check()


@pytest.mark.parametrize(("name", "check"), sparsifier_checks(partial(FastSparseConvNets, block=4, norm="l2"), density=0.25))
def test_conformance_of_blocks(name, check):
    check()


def network(ref="mobilenet-v1", side=8, **options):
    options = {"multiplier": 0.125, **options}
    return models.build(ref, input_shape=(1, side, side), classes=4, seed=0, options=options)


def trained(method, model, steps):
    """Take steps on random images."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    method.attach(model, optimizer)
    for step in range(steps):
        draw = torch.Generator().manual_seed(step)
        x, y = torch.randn(8, 1, 8, 8, generator=draw), torch.randint(4, (8,), generator=draw)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return method


# ---- which layers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ref", "count", "weights"),
    [("mobilenet-v1", 13, 3_139_584), ("mobilenet-v2", 34, 2_124_672), ("efficientnet-b0", 32, 3_146_112)],
)
def test_the_1x1_convolutions_and_no_others(ref, count, weights):
    model = on_meta(ref, IMAGENET, 1000)
    params = dict(model.named_parameters())
    expected = [
        f"{name}.weight" for name, m in model.named_modules()
        if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1) and m.bias is None
    ]  # fmt: skip
    assert pointwise(model) == expected
    assert len(expected) == count
    assert sum(params[name].numel() for name in expected) == weights
    assert pointwise(model, classifier=True) == [*expected, "fc.weight"]


def test_what_the_kernels_do_not_run_is_left_dense():
    one = partial(nn.Conv2d, 8, 8, 1)
    layers = [one(), one(stride=2), one(padding=1), one(groups=2), one(padding="same"), nn.Conv2d(8, 8, 3), nn.Linear(8, 8)]
    assert pointwise(nn.Sequential(*layers)) == ["0.weight", "4.weight"]


@pytest.mark.parametrize(
    "title", ["SqueezeExcitation", "SqueezeExcite", "SEModule", "SELayer", "SeBlock", "EfficientNetSqueezeExciteLayer"]
)
def test_gates_are_left_dense_whatever_they_are_called(title):
    gate = type(title, (nn.Sequential,), {})(nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1), nn.Linear(8, 8))
    assert pointwise(nn.Sequential(nn.Conv2d(8, 8, 1), gate), classifier=True) == ["0.weight"]


def test_squeezenet_has_no_gate():
    fire = type("SqueezeNet", (nn.Sequential,), {})(nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1))
    assert pointwise(fire) == ["0.weight", "1.weight"]


def test_only_these_are_masked_in_training_and_the_rest_stays_dense():
    model = network("efficientnet-b0", depth=0.3)
    names = pointwise(model)
    method = trained(FastSparseConvNets(0.2, total_steps=8, every=2), model, 8)
    assert list(method.masks) == names
    method.masks.check(model)
    others = [p for name, p in model.named_parameters() if name not in names and p.dim() > 1]
    assert all(bool((p != 0).all()) for p in others)
    assert method.masks.nnz() == count_of(0.2, method.masks.total())


def test_the_classifier_is_pruned_when_asked():
    method = FastSparseConvNets(0.25, total_steps=8, every=2, classifier=True, exclude=["features.6"]).attach(network())
    assert list(method.masks)[-1] == "fc.weight"
    assert "features.6.weight" not in method.masks


def test_a_network_without_convolutions_has_its_linear_layers_pruned():
    mlp = models.build("mlp-20-10", input_shape=(1, 8, 8), classes=4, seed=0)
    assert len(FastSparseConvNets(0.5, total_steps=8).attach(mlp).masks) == 3


def test_convolutions_without_a_1x1_are_refused():
    with pytest.raises(MaskError, match="no 1x1 convolution"):
        FastSparseConvNets(0.5, total_steps=8).attach(models.build("cnn", input_shape=(1, 8, 8), classes=4, seed=0))
    chosen = FastSparseConvNets(0.5, total_steps=8, parameters=["conv2"])
    assert list(chosen.attach(models.build("cnn", input_shape=(1, 8, 8), classes=4, seed=0)).masks) == ["conv2.weight"]


def test_one_method_object_serves_one_model_after_another():
    method = FastSparseConvNets(0.5, total_steps=8)
    first = list(method.attach(network()).masks)
    method.detach()
    assert list(method.attach(network("mobilenet-v2")).masks) != first


# ---- how many, when -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 2, 4])
def test_every_layer_follows_the_cubic_schedule_exactly(block):
    model = network()
    method = FastSparseConvNets(0.1, total_steps=12, block=block, begin=0.0, end=0.75, every=3)
    params = {name: p for name, p in model.named_parameters() if name in pointwise(model)}
    history = trained(method, model, 12).history
    assert [step for step, _ in history] == [0, 3, 6, 9]
    for j, (_, kept) in enumerate(history):
        target = 0.1 + 0.9 * (1 - j / 3) ** 3
        shares = method.shares(params, target)
        assert all(abs(share - target) * params[name].numel() <= 1.0 for name, share in shares.items())  # uniform
        expected = [block * count_of(shares[name], p.numel() // block) for name, p in params.items()]
        assert list(kept) == expected
        if block == 1:
            assert sum(kept) == count_of(target, sum(p.numel() for p in params.values()))


@pytest.mark.parametrize("block", [2, 4])
def test_blocks_stay_whole_at_every_update(block):
    method, seen = FastSparseConvNets(0.2, total_steps=10, block=block, every=2), []
    plain = method.revise
    method.revise = lambda *given: (seen.append(plain(*given)), seen[-1])[1]
    trained(method, network(), 10)
    revised = [masks for masks in seen if masks is not None]
    assert len(revised) == 2
    for masks in revised:
        for mask in masks.values():
            rows = mask.flatten(1).reshape(len(mask) // block, block, -1)
            assert bool((rows == rows[:, :1]).all())


def test_a_pruned_block_does_not_return():
    method, model = FastSparseConvNets(0.1, total_steps=20, block=2, every=2), network()
    before = None
    plain = method.revise

    def watched(*given):
        nonlocal before
        masks = plain(*given)
        if masks is not None and before is not None:
            assert not any(bool((masks[name] & ~mask).any()) for name, mask in before.items())
        before = masks or before
        return masks

    method.revise = watched
    trained(method, model, 20)
    assert before is not None


@given(st.integers(1, 11), st.integers(1, 6), st.sampled_from([1, 2, 4]), st.floats(0.05, 1.0), st.integers(0, 2**31))
@settings(deadline=None, max_examples=60)
def test_the_best_blocks_by_hand(out, inputs, rows, density, seed):
    score = torch.randint(0, 5, (out, inputs, 1, 1), generator=torch.Generator().manual_seed(seed)).float()
    mask = RowBlocks(rows).select(score, density)
    full = out // rows * rows
    units = [[(r, c) for r in range(top, top + rows)] for top in range(0, full, rows) for c in range(inputs)]
    single = [[(r, c)] for r in range(full, out) for c in range(inputs)]
    kept = set()
    for place, part in enumerate(part for part in (units, single) if part):
        count = count_of(density, len(part))
        count = max(count, 1) if place == 0 else count
        ranked = sorted(range(len(part)), key=lambda i: (-sum(float(score[r, c]) for r, c in part[i]), i))
        kept |= {cell for i in ranked[:count] for cell in part[i]}
    assert {(r, c) for r, c in mask.flatten(1).nonzero().tolist()} == kept
    RowBlocks(rows).check(mask)


@pytest.mark.parametrize(("norm", "winner"), [("l1", 1), ("l2", 0)])
def test_a_blocks_score_is_its_norm(norm, winner):
    layer = nn.Conv2d(2, 2, 1, bias=False)
    with torch.no_grad():
        # columns of L1 norm 4.9 and 5, of L2 norm 4.03 and 3.54
        layer.weight.copy_(torch.tensor([[3.9, 2.5], [1.0, 2.5]]).reshape(2, 2, 1, 1))
    model = nn.Sequential(layer)
    method = FastSparseConvNets(0.5, total_steps=4, block=2, norm=norm, every=1, end=0.25)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    method.attach(model, optimizer)
    for _ in range(2):
        model(torch.ones(1, 2, 1, 1)).sum().backward()
        optimizer.step()
    assert method.masks["0.weight"].flatten(1).tolist() == [[column == winner for column in range(2)]] * 2


def test_channels_left_over_go_one_by_one():
    mask = RowBlocks(4).select(torch.rand(7, 10, generator=torch.Generator().manual_seed(0)), 0.3)
    assert int(mask[:4].sum()) == 4 * 3
    assert bool((mask[:4] == mask[:1]).all())
    assert int(mask[4:].sum()) == 9
    assert not bool((mask[4:] == mask[4:5]).all())
    RowBlocks(4).check(mask)
    mask[1, int(mask[0].nonzero()[0])] = False
    with pytest.raises(PatternError, match="kept in part"):
        RowBlocks(4).check(mask)


def test_a_layer_keeps_a_block_however_small_its_share():
    masks = sparsify_pointwise(network(), 1e-4, block=4)
    assert min(int(mask.sum()) for mask in masks.values()) == 4


# ---- where blocks begin -------------------------------------------------------------------------------------------


def rows_of(mask):
    """Return the largest block in which all groups of rows agree."""
    for rows in (4, 2):
        grouped = mask.flatten(1).reshape(len(mask) // rows, rows, -1)
        if bool((grouped == grouped[:, :1]).all()):
            return rows
    return 1


@pytest.mark.parametrize("place", ["features.78.weight", "features.78", 12 / 13, 0.9])
def test_blocks_in_the_last_layer_of_v1_only(place):
    masks = sparsify_pointwise(network(multiplier=0.25), 0.3, block=4, block_from=place)
    assert [rows_of(mask) for mask in masks.values()] == [1] * 12 + [4]


def test_blocks_from_the_eleventh_bottleneck_of_v2_on():
    model = network("mobilenet-v2", multiplier=0.25)
    masks = sparsify_pointwise(model, 0.3, block=2, block_from="features.13")
    assert {name: rows_of(mask) for name, mask in masks.items()} == {
        name: 2 if int(name.split(".")[1]) >= 13 else 1 for name in pointwise(model)
    }


def test_training_puts_blocks_where_the_random_masks_have_them():
    method = FastSparseConvNets(0.2, total_steps=8, every=2, block=4, block_from="features.66")
    masks = trained(method, network(multiplier=0.25), 8).masks
    assert [rows_of(mask) for mask in masks.values()] == [1] * 10 + [4] * 3
    assert [pattern.rows for pattern in method.patterns.values()] == [1] * 10 + [4] * 3


def test_places_that_are_none_are_refused():
    with pytest.raises(MaskError, match=r"block_from='features\.5' names no pruned weight"):
        FastSparseConvNets(0.5, total_steps=8, block=2, block_from="features.5").attach(network())
    with pytest.raises(MethodError, match="block_from"):
        FastSparseConvNets(0.5, total_steps=8, block=2, block_from=1.5)


# ---- random masks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("density", "block"), [(0.1, 1), (0.25, 2), (0.3, 4)])
def test_random_masks_are_exact_and_depend_on_the_seed_alone(density, block):
    one, two, other = network(), network(), network()
    masks, again = (sparsify_pointwise(m, density, block=block, seed=3) for m in (one, two))
    assert all(torch.equal(masks[name], again[name]) for name in masks)
    assert any(
        not torch.equal(mask, sparsify_pointwise(other, density, block=block, seed=4)[name]) for name, mask in masks.items()
    )
    masks.check(one)
    assert list(masks) == pointwise(network())
    params = dict(network().named_parameters())
    for name, mask in masks.items():
        assert abs(int(mask.sum()) - density * mask.numel()) <= block
        assert torch.equal(dict(one.named_parameters())[name], params[name].masked_fill(~mask, 0))


@pytest.mark.parametrize("outputs", [32, 30, 31])
@pytest.mark.parametrize("block", [1, 2, 4])
def test_masks_are_packed_in_their_own_blocks_without_a_stored_zero(block, outputs):
    model = nn.Sequential(nn.Conv2d(24, outputs, 1))
    masks = sparsify_pointwise(model, 0.2, block=block)
    packed = pack_spmm(model[0].weight.detach().flatten(1), model[0].bias.detach())
    assert packed.block == block
    assert packed.multiplies == masks.nnz()


# ---- words --------------------------------------------------------------------------------------------------------


def test_block_and_pattern_are_two_words_for_one_thing():
    assert FastSparseConvNets(0.1, total_steps=8, pattern="block4x1").rows == 4
    assert FastSparseConvNets(0.1, total_steps=8, block=2, pattern="unstructured").rows == 2
    for wrong in ({"block": 3}, {"pattern": "2:4"}, {"pattern": "block4x4"}, {"block": 2, "pattern": "block4x1"}):
        with pytest.raises(MethodError, match="blocks of 1, 2 or 4"):
            FastSparseConvNets(0.5, total_steps=8, **wrong)


@pytest.mark.parametrize("wrong", [{"norm": "l3"}, {"end": 1.5}, {"begin": 0.6, "end": 0.5}])
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(MethodError, match=next(iter(wrong))):
        FastSparseConvNets(0.1, **{"total_steps": 10, **wrong})


def test_a_resumed_run_is_the_uninterrupted_one_where_blocks_begin_late():
    def make():
        return FastSparseConvNets(0.25, total_steps=20, block=4, block_from=0.5, every=2)

    whole = Loop(make()).run(20)
    first = Loop(make()).run(7)
    states = first.states()
    second = Loop(make())
    second.model.load_state_dict(states["model"])
    second.optimizer.load_state_dict(states["optimizers"][0])
    second.sparsifier.load_state_dict(states["sparsifier"])
    second.run(13)
    assert all(torch.equal(mask, second.sparsifier.masks[name]) for name, mask in whole.sparsifier.masks.items())
    assert whole.sparsifier.history == second.sparsifier.history


def test_nothing_is_drawn_from_the_global_generator():
    before = torch.get_rng_state()
    sparsify_pointwise(network(), 0.5)
    assert torch.equal(before, torch.get_rng_state())
    assert module.ROWS == (1, 2, 4)
