"""Essential sparsity: exact masks, marks of curves with known answers, measures with closed forms."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from openwork.core.masks import Masks
from openwork.core.patterns import NM
from openwork.errors import MaskError, MethodError, PatternError
from openwork.methods.sparsify import _sparsity_measures as measures
from openwork.methods.sparsify.essential_sparsity import (
    GRID,
    Curve,
    abruptness,
    essential_sparsity,
    from_points,
    gini,
    grid_of,
    hoyer,
    mask_similarity,
    one_shot,
    sparsity_track,
    transformer_linears,
)

G = np.array(GRID)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Net(nn.Module):
    """Token table, blocks, head: what the papers' models have."""

    def __init__(self, width: int = 8, depth: int = 3, seed: int = 0) -> None:
        super().__init__()
        self.token = nn.Embedding(11, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, 11)
        draw = torch.Generator().manual_seed(seed)
        for param in self.parameters():
            nn.init.normal_(param, generator=draw)

    def forward(self, x: Tensor) -> Tensor:
        h = self.token(x)
        for block in self.blocks:
            h = block(h)
        return self.head(h)


def count(masks: Masks) -> int:
    return masks.total() - masks.nnz()


def curve(y: object, grid: object = G, floor: float = 0.0) -> Curve:
    return Curve(tuple(map(float, grid)), tuple(map(float, y)), floor)  # type: ignore[arg-type]


# ---- marks of a curve


def test_a_broken_line_is_found_exactly() -> None:
    found = curve(0.9 - 0.02 * G - 1.48 * np.maximum(G - 0.5, 0.0))
    hinge = found.hinge()
    assert hinge is not None
    assert hinge.at == pytest.approx(0.5, abs=1e-9)
    assert (hinge.before, hinge.after) == (pytest.approx(-0.02), pytest.approx(-1.5))
    assert hinge.sharpness == pytest.approx(75.0)
    assert found.tolerance(0.01) == pytest.approx(0.5)
    assert found.tolerance() == pytest.approx(0.45)
    assert found.knee() == pytest.approx(0.5)


def test_a_break_between_two_points_is_found_exactly() -> None:
    found = curve(0.9 - 0.02 * G - 1.5 * np.maximum(G - 0.43, 0.0))
    hinge = found.hinge()
    assert hinge is not None
    assert hinge.at == pytest.approx(0.43, abs=1e-9)
    assert found.tolerance(0.01) == pytest.approx(0.401869, abs=1e-6)
    assert found.knee() == pytest.approx(0.43)


def test_a_straight_line_has_no_knee() -> None:
    found = curve(0.9 - 0.3 * G)
    hinge = found.hinge()
    assert hinge is not None
    assert hinge.after - hinge.before == pytest.approx(0.0, abs=1e-9)
    assert found.knee() is None
    assert "no knee" in found.reason()


def test_a_power_curve_gets_a_break_but_no_knee() -> None:
    found = curve(0.9 - 0.6 * G**4)
    hinge, smooth = found.hinge(), found.smooth()
    assert hinge is not None
    assert smooth is not None
    assert hinge.at == pytest.approx(0.6376, abs=2e-4)
    assert (smooth.start, smooth.rise, smooth.power) == (pytest.approx(0.9), pytest.approx(-0.6), pytest.approx(4.0))
    assert smooth.error < 1e-15
    assert found.knee() is None


@pytest.mark.parametrize("y", [0.9 - 0.8 * G**2, 0.9 - 0.01 * (np.exp(4 * G) - 1), 0.5 + 0.4 * np.cos(2 * G), 0.3 + 0 * G,
                               0.5 + 0.4 * G, 0.9 * np.exp(-3 * G)])  # fmt: skip
def test_other_smooth_curves_have_no_knee(y: object) -> None:
    assert curve(y).knee() is None


@settings(max_examples=40, deadline=None)
@given(st.floats(0.16, 0.64), st.floats(-0.2, 0.0), st.floats(-3.0, -0.8), st.floats(0.1, 50.0))
def test_any_broken_line_is_found_whatever_its_unit(c: float, before: float, after: float, unit: float) -> None:
    grid = np.linspace(0, 0.8, 17)
    y = 1.0 + before * grid + (after - before) * np.maximum(grid - c, 0.0)
    found = curve(unit * y, grid, floor=-unit)
    assert found.knee() == pytest.approx(c, abs=1e-6)


@pytest.mark.parametrize("line", [0.9 - 0.3 * G, 0.9 - 0.8 * G])
def test_a_noisy_line_seldom_has_a_knee(line: np.ndarray) -> None:
    rng = np.random.default_rng(0)
    false = sum(curve(line + 0.005 * rng.normal(size=10)).knee() is not None for _ in range(100))
    assert false <= 12


def test_a_noisy_break_mostly_has_one() -> None:
    rng = np.random.default_rng(1)
    y = 0.9 - 0.02 * G - 1.48 * np.maximum(G - 0.45, 0.0)
    knees = [curve(y + 0.005 * rng.normal(size=10)).knee() for _ in range(100)]
    assert sum(knee is not None and abs(knee - 0.45) < 0.03 for knee in knees) >= 95


GLOBAL = {0: 0.7891, 0.05: 0.7886, 0.1: 0.7869, 0.2: 0.7700, 0.3: 0.6944, 0.4: 0.4167, 0.5: 0.2023}
LAYER = {0: 0.7891, 0.05: 0.7882, 0.1: 0.7834, 0.2: 0.7739, 0.3: 0.7587, 0.4: 0.6862, 0.5: 0.4392}


def test_the_accuracy_curves_of_a_character_transformer() -> None:
    found = curve(GLOBAL.values(), GLOBAL)
    hinge = found.hinge()
    assert hinge is not None
    assert hinge.at == pytest.approx(0.267, abs=5e-4)
    assert (hinge.before, hinge.after) == (pytest.approx(-0.099, abs=5e-4), pytest.approx(-2.46, abs=5e-3))
    assert hinge.points == 7
    assert found.knee() == hinge.at
    assert found.tolerance() == pytest.approx(0.134, abs=5e-4)
    layer = curve(LAYER.values(), LAYER)
    assert layer.tolerance() == pytest.approx(0.1235, abs=6e-4)
    other = layer.hinge()
    assert other is not None
    assert other.at > hinge.at  # the two definitions rank the scopes differently
    assert layer.tolerance() < found.tolerance()  # type: ignore[operator]


def test_the_flat_end_of_a_broken_network_does_not_drag_the_break() -> None:
    y = np.where(G <= 0.3, 0.8 - 0.02 * G, 0.05)
    y[4] = 0.35
    found = curve(y)
    cut, whole = found.hinge(), found.hinge(whole=True)
    assert cut is not None
    assert whole is not None
    assert cut.points == 5
    assert cut.at < 0.35
    assert whole.points == 10
    assert whole.error > cut.error


def test_too_few_points_say_so() -> None:
    found = curve([0.9, 0.8, 0.1], (0.0, 0.25, 0.5))
    assert found.hinge() is None
    assert found.knee() is None
    assert "only 3 points" in found.reason()
    assert curve([0.1] * 10, floor=0.2).knee() is None
    assert "no better than a guess" in curve([0.1] * 10, floor=0.2).reason()


def test_a_curve_that_loses_nothing_has_no_knee() -> None:
    found = curve([0.728, 0.743, 0.770, 0.765, 0.800, 0.803, 0.775], (0.0, 0.2, 0.4, 0.6, 0.7, 0.8, 0.9))
    assert found.knee() is None
    assert "never falls" in found.reason()


@pytest.mark.parametrize(("grid", "text"), [((0.1, 0.2), "must start at 0"), ((0.0, 0.2, 0.2), "must ascend"),
                                            ((0.0, 1.2), "within"), ((0.0, math.nan), "within")])  # fmt: skip
def test_a_grid_that_makes_no_sense(grid: tuple[float, ...], text: str) -> None:
    with pytest.raises(MethodError, match=text):
        curve([0.5] * len(grid), grid)


def test_qualities_must_be_finite() -> None:
    with pytest.raises(MethodError, match=r"at sparsity 0\.1 is nan"):
        curve([0.9, math.nan], (0.0, 0.1))
    with pytest.raises(MethodError, match=r"inf at sparsity 0\.1"):
        from_points({0.0: 1.0, 0.1: math.inf}, 0.0, "global", "")
    with pytest.raises(MethodError, match="same examples"):
        from_points({0.0: [1.0, 0.0], 0.1: [1.0]}, 0.0, "global", "")


# ---- intervals


def examples(n: int, seed: int = 0, width: float = 0.1) -> Curve:
    """Examples that each break at a place of their own, spread around .45."""
    rng = np.random.default_rng(seed)
    places = 0.45 + width * rng.normal(size=n)
    return from_points({s: 0.9 - 2.0 * np.maximum(s - places, 0.0) for s in GRID[:7]}, 0.0, "global", "")


def test_the_interval_holds_the_mark_and_shrinks_with_examples() -> None:
    few, many = examples(40), examples(640)
    assert few.quality[0] == pytest.approx(0.9)
    spans = []
    for one in (few, many):
        for mark, place in (("hinge", one.hinge().at), ("tolerance", one.tolerance())):  # type: ignore[union-attr]
            span = one.interval(mark, draws=200)  # type: ignore[arg-type]
            assert span.low is not None
            assert span.high is not None
            assert span.low - 1e-9 <= place <= span.high + 1e-9  # type: ignore[operator]
            spans.append(span.high - span.low)
    assert spans[2] < 0.6 * spans[0]
    assert spans[3] < 0.6 * spans[1]


def test_the_interval_is_a_function_of_the_seed_and_covers_seeds() -> None:
    one = Curve.join([examples(50, seed) for seed in range(3)])
    assert len(one.samples) == 3
    assert one.interval(draws=50, seed=1) == one.interval(draws=50, seed=1)
    assert one.interval(draws=50, seed=1) != one.interval(draws=50, seed=2)
    seeds = Curve.join([curve(0.9 - 2.0 * np.maximum(G - c, 0.0)) for c in (0.3, 0.4, 0.5)])
    span = seeds.interval(draws=200)
    assert span.low is not None
    assert span.high is not None
    assert 0.29 <= span.low < 0.36
    assert 0.44 < span.high <= 0.51
    assert span.sharp > 0.2


def test_a_curve_of_bare_numbers_has_no_interval() -> None:
    with pytest.raises(MethodError, match="one number a point"):
        curve(0.9 - 0.3 * G).interval()
    with pytest.raises(MethodError, match="at least 20 draws"):
        examples(10).interval(draws=3)
    with pytest.raises(MethodError, match="cannot be joined"):
        Curve.join([curve([0.9, 0.8], (0.0, 0.1)), curve([0.9, 0.8], (0.0, 0.2))])


def test_a_mark_beyond_the_grid_has_an_open_interval() -> None:
    level = from_points({s: np.array([0.5, 0.7, 0.6]) for s in GRID}, 0.0, "global", "")
    assert level.tolerance() is None
    assert level.interval("tolerance", draws=20).high is None
    assert level.summary(draws=20)["tolerance"] is None


# ---- masks


SCOPES = ["global", "layer", "random", "erk"]


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("s", [0.0, 0.013, 0.1, 0.37, 0.5, 0.9, 1.0])
def test_exactly_round_s_n_weights_are_pruned(scope: str, s: float) -> None:
    masks = one_shot(Net(), s, scope)
    assert masks.total() == 3 * 2 * 128
    assert count(masks) == round(s * masks.total())
    assert set(masks) == {f"blocks.{i}.{part}.weight" for i in range(3) for part in ("up", "down")}


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 7)), min_size=1, max_size=6), st.floats(0, 1), st.floats(0, 1),
       st.integers(0, 5))  # fmt: skip
def test_masks_are_nested_and_exact_for_any_shapes(shapes: list[tuple[int, int]], a: float, b: float, seed: int) -> None:
    model = nn.ParameterDict({f"w{i}": torch.randn(s, generator=torch.Generator().manual_seed(seed + i))
                              for i, s in enumerate(shapes)})  # fmt: skip
    low, high = sorted((a, b))
    for scope in ("global", "layer", "random"):
        one, two = (one_shot(model, s, scope, select=lambda m: dict(m.named_parameters()), seed=seed) for s in (low, high))
        assert count(one) == int(low * one.total() + 0.5)
        assert all(bool((two[name] <= one[name]).all()) for name in one)
        if scope == "layer":
            for name, mask in one.items():
                assert abs((~mask).sum().item() - low * mask.numel()) < 1.0 + 1e-6
                kept, dropped = model[name].abs()[mask], model[name].abs()[~mask]
                assert not len(kept) or not len(dropped) or kept.min() >= dropped.max()


def test_global_is_one_threshold_and_random_is_none() -> None:
    model = Net()
    masks = one_shot(model, 0.4)
    kept = torch.cat([model.get_parameter(n).detach().abs()[m] for n, m in masks.items()])
    dropped = torch.cat([model.get_parameter(n).detach().abs()[~m] for n, m in masks.items()])
    assert kept.min() >= dropped.max()
    assert mask_similarity(one_shot(model, 0.5, "random"), masks).cosine < 0.7
    assert one_shot(model, 0.5, "random", seed=1)["blocks.0.up.weight"].tolist() != \
        one_shot(model, 0.5, "random", seed=2)["blocks.0.up.weight"].tolist()  # fmt: skip


def test_erk_gives_the_densities_of_erk() -> None:
    model = Net(width=8)
    model.blocks[0].up = nn.Linear(8, 64)
    model.blocks[0].down = nn.Linear(64, 8)
    from openwork.core.allocation import erk

    masks = one_shot(model, 0.8, "erk")
    shapes = {name: mask.shape for name, mask in masks.items()}
    assert masks.densities() == pytest.approx(erk(shapes, masks.density()))
    assert len({round(d, 3) for d in masks.densities().values()}) > 1


def test_a_rescaled_layer_changes_the_global_mask_and_no_layer_wise_one() -> None:
    model = Net()
    before = {scope: one_shot(model, 0.5, scope) for scope in ("global", "layer", "2:4")}
    with torch.no_grad():
        model.blocks[1].up.weight.mul_(7.0)
    after = {scope: one_shot(model, 0.5, scope) for scope in before}
    for scope in ("layer", "2:4"):
        assert all(torch.equal(before[scope][name], after[scope][name]) for name in before[scope])
    assert not torch.equal(before["global"]["blocks.1.up.weight"], after["global"]["blocks.1.up.weight"])
    assert count(after["global"]) == count(before["global"])


def test_n_of_m_keeps_n_of_every_m_inputs() -> None:
    model = Net()
    for scope, s in (("1:4", None), (NM(1, 4), 0.75), ("1:4", 0.75)):
        masks = one_shot(model, s, scope)
        for name, mask in masks.items():
            assert (mask.view(mask.shape[0], -1, 4).sum(-1) == 1).all()
            groups = model.get_parameter(name).detach().abs().view(mask.shape[0], -1, 4)
            assert torch.equal(mask.view_as(groups).float().argmax(-1), groups.argmax(-1))
    assert one_shot(model, 0.25, "1:4").density() == 0.75  # 3:4 on the way there
    assert grid_of("2:4") == (0.0, 0.25, 0.5)
    assert grid_of("global") == GRID
    with pytest.raises(MethodError, match=r"multiples of 1/4 up to 0\.5"):
        one_shot(model, 0.75, "2:4")
    with pytest.raises(MethodError, match=r"multiples of 1/4"):
        one_shot(model, 0.3, "2:4")
    with pytest.raises(PatternError, match=r"blocks\.0\.up\.weight.*multiple of 5"):
        one_shot(model, None, NM(2, 5))


class Conv1D(nn.Module):
    """Holds its weight as (inputs, outputs), as transformers' class of this name does."""

    def __init__(self, out: int, inside: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inside, out))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def test_n_of_m_lies_along_the_inputs_of_a_transposed_weight() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(Conv1D(6, 8), nn.ReLU()) for _ in range(2)))
    masks = one_shot(model, None, "2:4")
    assert set(masks) == {"0.0.weight", "1.0.weight"}
    for mask in masks.values():
        assert (mask.view(2, 4, 6).sum(1) == 2).all()


NONSENSE = [("globally", 0.5, "unknown"), ("4:2", None, "4:2"), ("global", 1.5, "0, 1"), ("global", None, "None"),
            ("a:b", None, "a:b")]  # fmt: skip


@pytest.mark.parametrize(("scope", "s", "text"), NONSENSE)
def test_scopes_and_sparsities_that_make_no_sense(scope: str, s: float | None, text: str) -> None:
    with pytest.raises(MethodError, match=text):
        one_shot(Net(), s, scope)


def test_weights_that_are_not_finite_are_refused() -> None:
    model = Net()
    with torch.no_grad():
        model.blocks[0].up.weight[0, 0] = math.nan
    with pytest.raises(MaskError, match="not finite"):
        one_shot(model, 0.5)


# ---- which weights


def test_blocks_are_found_in_any_depth_and_whatever_is_outside_is_left_out() -> None:
    for depth in (1, 2, 6):
        assert len(transformer_linears(Net(depth=depth))) == 2 * depth
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 3, enable_nested_tensor=False)
    names = set(transformer_linears(nn.ModuleDict({"emb": nn.Embedding(5, 16), "enc": encoder, "head": nn.Linear(16, 5)})))
    assert names == {f"enc.layers.{i}.{part}" for i in range(3) for part in
                     ("self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight",
                      "linear2.weight")}  # fmt: skip
    both = nn.Transformer(16, 4, 2, 1, 32, batch_first=True)
    assert {name.split(".")[0] for name in transformer_linears(both)} == {"encoder", "decoder"}


def test_frozen_weights_count_and_stay_frozen() -> None:
    model = Net().requires_grad_(False)
    assert len(transformer_linears(model)) == 6
    assert not any(param.requires_grad for param in model.parameters())


def test_a_model_without_blocks_says_what_to_do() -> None:
    plain = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(MaskError, match=r"repeats no block .* select"):
        transformer_linears(plain)
    masks = one_shot(plain, 0.5, select=lambda m: {"0.weight": m[0].weight})
    assert (masks.total(), masks.nnz()) == (32, 16)
    with pytest.raises(MaskError, match="chose no weights"):
        one_shot(plain, 0.5, select=lambda m: {})


# ---- the measurement


X = torch.arange(11).repeat(4, 1)


def agreement(reference: nn.Module) -> object:
    right = reference(X).argmax(-1)
    return lambda model: (model(X).argmax(-1) == right).double().mean(1)


def test_every_point_starts_from_untouched_weights_and_zero_is_dense_bit_for_bit() -> None:
    dense = Net()
    seen: list[Tensor] = []

    def evaluate(model: nn.Module) -> float:
        seen.append(model(X).detach())
        return 1.0

    found = essential_sparsity(lambda: copy.deepcopy(dense), evaluate, (0.0, 0.5, 0.9))
    assert torch.equal(seen[0], dense(X))
    for s, got in zip((0.5, 0.9), seen[1:], strict=True):
        once = copy.deepcopy(dense)
        one_shot(once, s).apply(once)
        assert torch.equal(once(X), got)
    assert (found.scope, found.protocol) == ("global", "prune, evaluate")
    assert essential_sparsity(lambda: copy.deepcopy(dense), evaluate, scope="2:4").sparsity == (0.0, 0.25, 0.5)


def test_a_factory_that_gives_pruned_weights_is_caught() -> None:
    model = Net()
    with pytest.raises(MethodError, match="fresh copy"):
        essential_sparsity(lambda: model, agreement(Net()))  # type: ignore[arg-type]


def test_fine_tuning_holds_the_mask_or_is_caught() -> None:
    dense = Net()

    def held(model: nn.Module, masks: Masks) -> None:
        with torch.no_grad():
            for param in model.parameters():
                param.add_(1.0)
        masks.apply(model)

    def broken(model: nn.Module, masks: Masks) -> nn.Module:
        with torch.no_grad():
            model.blocks[0].up.weight.add_(1.0)  # type: ignore[union-attr,operator,index]
        return model

    found = essential_sparsity(lambda: copy.deepcopy(dense), agreement(dense), (0.0, 0.5), finetune=held)  # type: ignore[arg-type]
    assert found.protocol == "prune, fine-tune, evaluate"
    with pytest.raises(MaskError, match="are not zero"):
        essential_sparsity(lambda: copy.deepcopy(dense), agreement(dense), (0.0, 0.5), finetune=broken)  # type: ignore[arg-type]


def test_known_points_are_not_measured_again_and_the_curve_is_the_same() -> None:
    dense = Net()
    measured: dict[float, object] = {}
    whole = essential_sparsity(lambda: copy.deepcopy(dense), agreement(dense), done=measured.__setitem__)  # type: ignore[arg-type]
    assert tuple(measured) == GRID
    kept = {s: value for s, value in measured.items() if s < 0.55}
    again: list[float] = []
    resumed = essential_sparsity(lambda: copy.deepcopy(dense), agreement(dense), known=kept,  # type: ignore[arg-type]
                                 done=lambda s, _: again.append(s))  # fmt: skip
    assert again == [0.6, 0.7, 0.8, 0.9]
    assert resumed == whole
    assert resumed.interval("tolerance", draws=20) == whole.interval("tolerance", draws=20)


def test_a_quality_that_is_no_number_is_refused() -> None:
    with pytest.raises(MethodError, match="higher is better"):
        essential_sparsity(Net, lambda model: math.nan)
    with pytest.raises(MethodError, match="str"):
        essential_sparsity(Net, lambda model: "good")
    with pytest.raises(MethodError, match="must start at 0"):
        essential_sparsity(Net, lambda model: 1.0, (0.1, 0.2))


# ---- sparsity of checkpoints


def test_hoyer_and_gini_of_a_vector() -> None:
    x = torch.tensor([0.0, 0.0, 0.1, -0.2, 0.5, -1.0])
    assert hoyer(x) == pytest.approx(0.600753, abs=1e-6)
    assert gini(x) == pytest.approx(0.611111, abs=1e-6)
    one = torch.zeros(9)
    assert (hoyer(one), gini(one)) == (0.0, 0.0)
    one[4] = -3.0
    assert hoyer(one) == pytest.approx(1.0)
    assert gini(one) == pytest.approx(8 / 9)
    assert hoyer(torch.ones(7)) == pytest.approx(0.0, abs=1e-12)
    assert gini(torch.ones(7)) == pytest.approx(0.0, abs=1e-12)
    with pytest.raises(MethodError, match="finite"):
        hoyer(torch.tensor([1.0, math.inf]))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-5, 5).map(lambda v: round(v, 3)), min_size=2, max_size=30), st.floats(0.01, 100))
def test_the_scale_free_measures_are(values: list[float], scale: float) -> None:
    x = torch.tensor(values, dtype=torch.float64)
    for measure in (hoyer, gini):
        assert measure(x * scale) == pytest.approx(measure(x), abs=1e-9)
        assert -1e-9 <= measure(x) <= 1.0
    pairs = torch.cartesian_prod(x.abs(), x.abs())
    total = float(x.abs().sum())
    if total:
        plain = float((pairs[:, 0] - pairs[:, 1]).abs().sum()) / (2 * len(values) * total)
        assert gini(x) == pytest.approx(plain)  # half the mean difference over the mean


def test_a_track_sees_a_rescaling_by_the_fixed_threshold_only() -> None:
    first, second = Net(), Net()
    with torch.no_grad():
        for name, param in transformer_linears(second).items():
            param.mul_(0.01 if "up" in name else 0.05)
    rows = sparsity_track({0: first, 100: second})
    assert [row["checkpoint"] for row in rows] == [0, 100]
    assert rows[1]["near_zero"] > rows[0]["near_zero"] + 0.1
    for name in ("small", "hoyer", "gini"):
        assert rows[1][name] == pytest.approx(rows[0][name])
    every = torch.cat([p.detach().reshape(-1) for p in transformer_linears(first).values()])
    assert rows[0]["near_zero"] == pytest.approx(float((every.abs() < 0.01).double().mean()))
    assert measures.small({"w": torch.tensor([-1.0, 1.0, 0.05, -0.05])}) == 0.5
    with pytest.raises(MethodError, match="other weights"):
        sparsity_track({0: first, 1: Net(depth=2)})
    with pytest.raises(MethodError, match="at least one checkpoint"):
        sparsity_track({})


def test_a_step_is_abrupt_and_a_line_is_not() -> None:
    step = abruptness([0.0, 0.01, 0.0, 0.9, 0.91, 0.92, 0.95, 0.96])
    line = abruptness(np.linspace(0, 1, 9))
    assert step.at == 2
    assert step.share == pytest.approx(0.9 / (0.97))
    assert line.share == pytest.approx(1 / 8)
    assert line.even == pytest.approx(1 / 8)
    assert line.share < line.permuted
    assert line.p > 0.5
    assert step.share > step.permuted
    assert abruptness([1.0, 0.5, 0.2]).share == 0.0
    assert abruptness([0, 1, 1, 3], seed=3) == abruptness([0, 1, 1, 3], seed=3)
    with pytest.raises(MethodError, match="at least 3"):
        abruptness([0.0, 1.0])


# ---- masks compared


def test_similarity_of_masks_counted_by_hand() -> None:
    a = Masks({"w": torch.tensor([[True, True, False, False]]), "v": torch.tensor([True, False])})
    b = Masks({"w": torch.tensor([[True, False, True, False]]), "v": torch.tensor([True, True])})
    found = mask_similarity(a, b)
    assert found.jaccard == pytest.approx(2 / 5)
    assert found.cosine == pytest.approx(2 / math.sqrt(3 * 4))
    assert found.chance_jaccard == pytest.approx(2 / (3 + 4 - 2))
    assert mask_similarity(a, a).jaccard == mask_similarity(a, a).cosine == 1.0
    with pytest.raises(MaskError, match="same weights"):
        mask_similarity(a, Masks({"w": a["w"]}))


@pytest.mark.parametrize("d", [0.2, 0.5, 0.8])
def test_random_masks_are_as_alike_as_chance_says(d: float) -> None:
    model = Net(width=40)
    found = mask_similarity(one_shot(model, 1 - d, "random", seed=1), one_shot(model, 1 - d, "random", seed=2))
    assert found.chance_jaccard == pytest.approx(d / (2 - d), abs=1e-3)
    assert found.chance_cosine == pytest.approx(d, abs=1e-3)
    assert found.jaccard == pytest.approx(found.chance_jaccard, abs=0.02)
    assert found.cosine == pytest.approx(found.chance_cosine, abs=0.02)
