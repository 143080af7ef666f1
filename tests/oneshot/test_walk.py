from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from openwork.core.patterns import NM, Unstructured
from openwork.core.select import count_of
from openwork.errors import AllocationError, ModelError, PatternError
from openwork.oneshot.api import sparsify
from openwork.oneshot.sparsegpt import sparsegpt
from openwork.oneshot.wanda import wanda
from tests.oneshot.networks import Residual, correlated, mlp, mobile, normal, seeded


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def seen(model: nn.Module, names: list[str], batches: list[Tensor]) -> dict[str, Tensor]:
    """Return what each layer is given when the model runs, by plain hooks."""
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda m, args, name=name: found[name].append(args[0].detach().flatten(0, -2).clone())
        )
        for name in names
    ]
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts).double() for name, parts in found.items()}


def pruned(method: str, weight: Tensor, X: Tensor, density: float) -> tuple[Tensor, Tensor]:
    if method == "wanda":
        mask = wanda(weight, X.square().sum(0, keepdim=True), density, Unstructured())
        return weight.masked_fill(~mask, 0), mask
    found, mask = sparsegpt(weight, (X.T @ X)[None], density, Unstructured())
    return found.to(weight.dtype).masked_fill(~mask, 0), mask


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_each_block_sees_what_the_pruned_blocks_before_it_make(method):
    model, batches = Residual(), [normal(6, 5, seed=k) for k in range(3)]
    plain = copy.deepcopy(model)
    masks = {}
    for i in range(3):  # the whole model again for every block
        names = [f"blocks.{i}.up", f"blocks.{i}.down"]
        for name, X in seen(plain, names, batches).items():
            layer = plain.get_submodule(name)
            layer.weight.data, masks[f"{name}.weight"] = pruned(method, layer.weight.detach(), X, 0.5)
    result = sparsify(model, batches, method=method, exclude=["entry", "exit"])
    assert result.walk == "blocks"
    assert all(torch.equal(result.masks[name], mask) for name, mask in masks.items())
    assert set(masks) == set(result.masks)
    for name, value in plain.state_dict().items():
        assert torch.allclose(model.state_dict()[name], value, atol=1e-5)


def test_layers_around_the_blocks_are_pruned_first_and_last():
    model, batches = Residual(), [normal(6, 5, seed=k) for k in range(2)]
    plain = copy.deepcopy(model)
    for stage in (["entry"], *([f"blocks.{i}.up", f"blocks.{i}.down"] for i in range(3)), ["exit"]):
        for name, X in seen(plain, stage, batches).items():
            layer = plain.get_submodule(name)
            layer.weight.data, _ = pruned("wanda", layer.weight.detach(), X, 0.5)
    sparsify(model, batches, select="*")
    assert same(state(model), state(plain))


def test_the_report_is_the_error_of_each_layer_on_its_inputs():
    model, batches = Residual(), [normal(6, 5, seed=k) for k in range(2)]
    dense = copy.deepcopy(model)
    result = sparsify(model, batches, exclude=["entry"])
    X = seen(dense, ["blocks.0.up"], batches)["blocks.0.up"]
    before, after = (net.get_submodule("blocks.0.up").weight.detach().double() for net in (dense, model))
    row = result.report[0]
    assert row.name == "blocks.0.up.weight"
    assert row.error == pytest.approx(
        float((X @ (after - before).T).square().sum() / (X @ before.T).square().sum()), rel=1e-6
    )
    assert (row.kept, row.size, row.tokens, row.density) == (64, 128, 12, 0.5)
    assert [row.error for row in sparsify(copy.deepcopy(dense), batches, errors=False).report] == [None] * len(
        (*result.report, row)
    )


@pytest.mark.parametrize("make", [mlp, mobile])
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_models_without_blocks_are_pruned_from_one_dense_pass(make, method):
    model = make()
    x = normal(6, 12) if make is mlp else normal(4, 3, 10, 10)
    before = state(model)
    result = sparsify(model, [x], method=method)
    assert result.walk == "dense"
    result.masks.check(model)
    assert result.masks.nnz() == count_of(0.5, result.masks.total())
    head = "4.weight" if make is mlp else "9.weight"
    assert head in result.left
    assert torch.equal(model.state_dict()[head], before[head])
    assert all(0 < row.error < 1 for row in result.report)


def test_every_layer_of_a_dense_pass_sees_the_dense_network():
    model, x = mlp(), normal(30, 12)
    inputs = seen(model, ["0", "2"], [x])
    expected = {
        name: wanda(model.get_submodule(name).weight, X.square().sum(0, keepdim=True), 0.5, Unstructured())
        for name, X in inputs.items()
    }
    result = sparsify(model, [x])
    assert all(torch.equal(result.masks[f"{name}.weight"], mask) for name, mask in expected.items())


@pytest.mark.parametrize("make", [Residual, mlp])
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_how_calibration_is_cut_into_batches_does_not_matter(make, method):
    width = 5 if make is Residual else 12
    x = normal(16, width)
    models = [make() for _ in range(3)]
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    cuts = [list(x.split(1)), list(x.split(8)), list(x[order].split(3))]
    results = [sparsify(model, batches, method=method) for model, batches in zip(models, cuts, strict=True)]
    for model, result in zip(models[1:], results[1:], strict=True):
        assert all(torch.equal(result.masks[name], results[0].masks[name]) for name in result.masks)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(model.parameters(), models[0].parameters(), strict=True))
        assert [row.error for row in result.report] == pytest.approx([row.error for row in results[0].report], rel=1e-4)


def test_a_function_may_run_the_model():
    one, two = Residual(), Residual()
    batches = [normal(6, 5, seed=k) for k in range(2)]

    def run(model: nn.Module) -> None:
        for batch in batches:
            model(batch)

    sparsify(one, batches)
    assert sparsify(two, run).walk == "blocks"
    assert same(state(one), state(two))


@pytest.mark.parametrize("wrap", [tuple, list], ids=["tuple", "list"])
def test_labels_behind_the_inputs_are_left_out(wrap):
    one, two = mlp(), mlp()
    sparsify(one, [normal(6, 12)])
    sparsify(two, [wrap((normal(6, 12), torch.zeros(6)))])
    assert same(state(one), state(two))


def test_one_tensor_or_mapping_is_one_batch():
    one, two, three = mlp(), mlp(), mlp()
    x = normal(6, 12)
    sparsify(one, [x])
    sparsify(two, x)
    sparsify(three, {"input": x})
    assert same(state(one), state(two))
    assert same(state(one), state(three))


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_at_density_one_nothing_changes(method):
    model = Residual()
    before = state(model)
    result = sparsify(model, [normal(6, 5)], method=method, density=1.0)
    assert same(before, state(model))
    assert result.density == 1.0
    assert {row.error for row in result.report} == {0.0}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_other_dtypes_stay_and_get_exact_zeros(dtype, method):
    model = Residual().to(dtype)
    result = sparsify(model, [normal(40, 5, dtype=dtype)], method=method, pattern="2:4", exclude="entry")
    result.masks.check(model)
    assert {param.dtype for param in model.parameters()} == {dtype}
    for name, mask in result.masks.items():
        NM(2, 4).check(mask)
        assert name.endswith("weight")


def test_a_tied_weight_is_pruned_once_on_all_that_it_multiplies():
    a, b = nn.Linear(6, 6), nn.Linear(6, 6)
    b.weight = a.weight
    model = nn.Sequential(a, nn.ReLU(), b, nn.ReLU(), nn.Linear(6, 2))
    x = normal(20, 6)
    inputs = seen(model, ["0", "2"], [x])
    X = torch.cat(list(inputs.values()))
    expected = wanda(a.weight, X.square().sum(0, keepdim=True), 0.5, Unstructured())
    result = sparsify(model, [x])
    assert torch.equal(result.masks["0.weight"], expected)
    assert list(result.masks) == ["0.weight"]
    assert result.report[0].tokens == 40


def test_blocks_that_share_a_weight_fall_back_to_one_dense_pass():
    model = Residual()
    model.blocks[2].up.weight = model.blocks[0].up.weight
    result = sparsify(model, [normal(6, 5)])
    assert result.walk == "dense"
    result.masks.check(model)


class Skipping(Residual):
    """Its last block takes what the first one made, not the second."""

    def forward(self, x: Tensor) -> Tensor:
        first = self.blocks[0](self.entry(x))
        return self.exit(self.blocks[2](first) + self.blocks[1](first))


class Between(Residual):
    """Works on the hidden state between its blocks."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.entry(x)
        for block in self.blocks:
            x = torch.tanh(block(x))
        return self.exit(x)


class Twice(Residual):
    """Goes through its blocks two times."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.entry(x)
        for block in [*self.blocks, *self.blocks]:
            x = block(x)
        return self.exit(x)


class Hidden(Residual):
    """Its blocks lean on something beside their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        for block in self.blocks:
            block.register_forward_pre_hook(self._scale)

    def _scale(self, block: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        self.count += 1
        return (args[0] * self.count,)


@pytest.mark.parametrize("make", [Skipping, Between, Twice, Hidden])
def test_blocks_that_are_no_chain_fall_back_to_one_dense_pass(make):
    model = make()
    result = sparsify(model, [normal(6, 5)], method="sparsegpt")
    assert (result.walk == "dense") == (make is not Twice)
    result.masks.check(model)
    if make is Twice:  # two passes through one chain would each start anew: they are told apart, and both count
        assert result.report[1].tokens == 12


def test_blocks_may_work_in_place():
    class Inplace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return x.add_(torch.tanh(self.fc(x)))

    model = nn.Sequential(nn.Linear(5, 8), nn.Sequential(*[Inplace() for _ in range(3)]), nn.Linear(8, 2))
    plain, x = copy.deepcopy(model), normal(12, 5)
    for i in range(3):
        X = seen(plain, [f"1.{i}.fc"], [x])[f"1.{i}.fc"]
        layer = plain.get_submodule(f"1.{i}.fc")
        layer.weight.data, _ = pruned("wanda", layer.weight.detach(), X, 0.5)
    result = sparsify(model, [x], exclude=["0", "2"])
    assert result.walk == "blocks"
    assert same(state(model), state(plain))


def test_a_torch_encoder_goes_by_blocks_and_its_attention_stays_dense():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    result = sparsify(model, [normal(2, 6, 16)], method="sparsegpt")
    assert result.walk == "blocks"
    assert len(result.report) == 6
    assert "layers.0.self_attn.in_proj_weight" in result.left


def test_densities_by_name():
    model = Residual()
    rule = {"blocks.*": 0.5, "blocks.1": 0.25, "blocks.1.up": 1.0, "entry": 1.0}
    result = sparsify(model, [normal(6, 5)], allocation=rule)
    found = {row.name: row.density for row in result.report}
    assert found["blocks.0.up.weight"] == 0.5
    assert found["blocks.1.up.weight"] == found["entry.weight"] == 1.0
    assert found["blocks.1.down.weight"] == 0.25
    with pytest.raises(AllocationError, match="ask for"):
        sparsify(Residual(), [normal(6, 5)], allocation=rule, density=0.1)
    with pytest.raises(PatternError, match=r"2:4 keeps 0.5; give that, or 1"):
        sparsify(Residual(), [normal(6, 5)], allocation={"blocks": 0.5, "blocks.2": 0.25}, pattern="2:4", exclude="entry")


def test_owl_gives_the_layers_of_a_block_one_density_and_the_exact_total():
    model = Residual()
    model.blocks[1].up.weight.data[:, 0] *= 40  # outliers
    result = sparsify(model, [normal(40, 5)], allocation="owl", spread=0.1, exclude="entry")
    found = [row.density for row in result.report]
    assert result.masks.nnz() == count_of(0.5, result.masks.total())
    assert all(abs(density - 0.5) <= 0.1 + 0.01 for density in found)
    assert all(abs(found[2 * i] - found[2 * i + 1]) < 0.02 for i in range(3))
    assert max(abs(density - 0.5) for density in found) == pytest.approx(0.1, abs=0.01)
    with pytest.raises(PatternError, match="nothing to share out"):
        sparsify(model, [normal(40, 5)], allocation="owl", pattern="2:4")


def test_global_magnitude_needs_no_data_and_is_one_ranking():
    model = Residual()
    weights = torch.cat([p.detach().reshape(-1) for n, p in model.named_parameters() if p.dim() == 2 and "exit" not in n])
    result = sparsify(model, method="magnitude", allocation="global", density=0.3)
    assert result.walk == "none"
    kept = torch.cat([result.masks[row.name].reshape(-1) for row in result.report])
    assert int(kept.sum()) == count_of(0.3, kept.numel())
    assert weights.abs()[kept].min() >= weights.abs()[~kept].max()
    assert {row.error for row in result.report} == {None}


def test_an_embedding_is_pruned_by_magnitude_where_it_is_named():
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 4), nn.Linear(4, 3))
    with pytest.raises(ModelError, match=r"'0' is an embedding"):
        sparsify(model, [torch.arange(10)], select="*")
    result = sparsify(model, method="magnitude", select="*")
    assert set(result.masks) == {"0.weight", "1.weight", "2.weight"}
    assert "0.weight" in sparsify(model, method="magnitude").left


def test_sparsegpt_does_better_than_wanda_on_what_the_model_puts_out():
    errors = dict.fromkeys(("magnitude", "wanda", "sparsegpt"), 0.0)
    for seed in range(4):
        x = correlated(200, 5, seed=seed, dtype=torch.float32)
        dense = seeded(Residual(width=16), seed)
        for method in errors:
            model = copy.deepcopy(dense)
            sparsify(model, [x], method=method, exclude="entry")
            errors[method] += (model(x) - dense(x)).detach().square().sum().item() / dense(x).detach().square().sum().item()
    assert errors["sparsegpt"] < errors["wanda"] < errors["magnitude"]
