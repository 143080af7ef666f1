from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.flop_counter import flop_registry, register_flop_formula

from openwork.core.cost import Cost, count
from tests.core.test_cost import random_mask, random_masks, torch_flops

Chain = list[tuple[str, tuple[Any, ...]]]


class Layer(nn.Module):
    """A weight, a gate that is no parameter, and a function of (input, weight, gate)."""

    def __init__(self, shape: tuple[int, ...], function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape))
        self.register_buffer("gate", torch.ones(shape))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight, self.gate)


def apply(tensor: Tensor, chain: Chain) -> Tensor:
    for kind, arguments in chain:
        tensor = getattr(tensor, kind)(*arguments)
    return tensor


def matrix(tensor: Tensor) -> Tensor:
    return tensor.reshape(tensor.shape[0], -1)


@st.composite
def chains(draw: st.DrawFn) -> tuple[tuple[int, ...], Chain]:
    """A shape, and views and copies that can be taken of it one after another."""
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=2, max_size=3)))
    probe, chain = torch.empty(shape), Chain()
    for kind in draw(
        st.lists(st.sampled_from(["transpose", "narrow", "clone", "abs", "expand", "flatten", "rows"]), max_size=5)
    ):
        dim, other = draw(st.integers(0, probe.dim() - 1)), draw(st.integers(0, probe.dim() - 1))
        start = draw(st.integers(0, probe.shape[dim] - 1))
        step: tuple[str, tuple[Any, ...]] = {
            "transpose": ("transpose", (dim, other)),
            "narrow": ("narrow", (dim, start, probe.shape[dim] - start)),
            "clone": ("clone", ()),
            "abs": ("abs", ()),
            "expand": ("expand", (2, *probe.shape)),
            "flatten": ("flatten", (min(dim, other), max(dim, other))),
            "rows": ("index_select", (0, torch.tensor([0, probe.shape[0] - 1, 0]))),
        }[kind]
        if kind == "abs" and probe.dim() == 1:
            continue  # only matrices are followed through arithmetic
        chain.append(step)
        probe = apply(probe, [step])
    return shape, chain


class TestViewsAndCopies:
    @settings(max_examples=200, deadline=None)
    @given(case=chains(), seed=st.integers(0, 99))
    def test_what_is_done_to_the_weight_is_done_to_the_mask(self, case: tuple[tuple[int, ...], Chain], seed: int) -> None:
        shape, chain = case
        mask = random_mask(shape, 0.5, seed)
        seen = matrix(apply(mask.float(), chain))  # the brute force: the same operations on the mask itself
        cost = count(Layer(shape, lambda x, w, _: F.linear(x, matrix(apply(w, chain)))), torch.ones(3, seen.shape[1]))
        assert cost.flops() == cost.by_parameter()["weight"] == 2 * 3 * seen.numel()
        assert cost.flops({"weight": mask}) == 2 * 3 * int(seen.sum())

    @pytest.mark.parametrize(
        "function",
        [
            lambda x, w, gate: F.linear(x, w * gate),
            lambda x, w, gate: F.linear(x, gate * w),
            lambda x, w, gate: F.linear(x, w / (1 + gate)),
            lambda x, w, gate: F.linear(x, w.masked_fill(gate == 0, 0)),
            lambda x, w, gate: F.linear(x, w.clone().mul_(gate)),
            lambda x, w, gate: F.linear(x, (w * 3).sign()),
            lambda x, w, gate: F.linear(x.double(), w.double()),
            lambda x, w, gate: (gate * w).t().contiguous().t() @ x.t(),
        ],
    )
    def test_zeros_that_stay_are_followed(self, function: Any) -> None:
        cost, mask = count(Layer((5, 4), function), torch.ones(3, 4)), random_mask((5, 4), 0.4, 0)
        assert cost.flops() == 2 * 3 * 20
        assert cost.flops({"weight": mask}) == 2 * 3 * 8

    @pytest.mark.parametrize(
        "function",
        [
            lambda x, w, gate: F.linear(x, w - w.mean()),
            lambda x, w, gate: F.linear(x, gate / w),
            lambda x, w, gate: F.linear(x, w.clone().add_(gate)),
            lambda x, w, gate: F.linear(x, w.masked_fill(gate == 0, 1)),
            lambda x, w, gate: F.linear(x, torch.cat([w, gate])[:5]),
        ],
    )
    def test_zeros_that_are_lost_stay_dense(self, function: Any) -> None:
        cost, mask = count(Layer((5, 4), function), torch.ones(3, 4)), random_mask((5, 4), 0.4, 0)
        assert cost.flops({"weight": mask}) == cost.flops() == cost.fixed == 2 * 3 * 20

    def test_scaled_activations_are_no_weight(self) -> None:
        """A norm's scale times one token, and then token times token: neither is a product with the scale."""
        cost = count(Layer((4,), lambda x, w, _: (x * w) @ (x * w)), torch.ones(4))
        assert (cost.fixed, cost.by_parameter()) == (2 * 4, {"weight": 0})

    def test_parts_that_are_used_unequally(self) -> None:
        """Slices of one weight at different batch sizes, as fused projections have them."""
        mask = random_mask((6, 4), 0.5, 1)
        model = Layer((6, 4), lambda x, w, _: F.linear(F.linear(x, w[:4]), w[2:]) + F.linear(x[:1], w[::2])[0, 0])
        flops = 2 * (3 * int(mask[:4].sum()) + 3 * int(mask[2:].sum()) + int(mask[::2].sum()))
        assert count(model, torch.ones(3, 4)).flops({"weight": mask}) == flops

    def test_einsum_over_heads(self) -> None:
        mask = random_mask((2, 4, 5), 0.5, 0)
        cost = count(Layer((2, 4, 5), lambda x, w, _: torch.einsum("bsd,hdk->bshk", x, w)), torch.ones(2, 3, 4))
        assert cost.flops({"weight": mask}) == 2 * 6 * int(mask.sum())

    @pytest.mark.parametrize("bias", [True, False])
    def test_learned_input_times_weight_is_charged_to_the_weight(self, bias: bool) -> None:
        class Latents(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.latents = nn.Parameter(torch.ones(50, 4))
                self.project = nn.Linear(4, 5, bias=bias)

            def forward(self, x: Tensor) -> Tensor:
                return self.project(self.latents) @ x

        cost = count(Latents(), torch.ones(5, 1))
        assert cost.by_parameter()["project.weight"] == 2 * 50 * 20
        assert cost.by_parameter()["latents"] == 0
        assert cost.fixed == 2 * 50 * 5

    def test_part_of_a_weight_that_lies_otherwise_in_memory(self) -> None:
        """The mask is contiguous, the weight channels-last."""
        model = Layer((5, 4, 3, 3), lambda x, w, _: F.conv2d(x, w[:, 1:3])).to(memory_format=torch.channels_last)
        mask = random_mask((5, 4, 3, 3), 0.5, 0)
        cost = count(model, torch.ones(2, 2, 5, 6))
        assert model.weight.stride() != mask.stride()
        assert cost.flops({"weight": mask}) == 2 * 2 * 3 * 4 * int(mask[:, 1:3].sum())

    def test_weight_read_as_another_type_is_no_weight(self) -> None:
        """Its elements are not the mask's any more."""
        model = Layer((5, 4), lambda x, w, _: F.linear(x, w.view(torch.bfloat16)[:2]))
        cost = count(model, torch.ones(3, 8, dtype=torch.bfloat16))
        assert cost.flops() == cost.fixed == 2 * 3 * 16

    def test_parameters_that_share_one_memory(self) -> None:
        """As a flattened recurrent net has them."""
        model, memory = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 5, bias=False)), torch.ones(27)
        model[0].weight = nn.Parameter(memory[:12].view(3, 4))
        model[1].weight = nn.Parameter(memory[12:].view(5, 3))
        assert count(model, torch.ones(2, 4)).by_parameter() == {"0.weight": 2 * 24, "1.weight": 2 * 30}

    def test_autocast(self) -> None:
        model, x = nn.MultiheadAttention(8, 2), torch.ones(5, 1, 8)
        plain, masks = count(model, (x, x.clone(), x.clone())), random_masks(model, 0.3)
        with torch.autocast("cpu", torch.bfloat16):
            cast = count(model, (x, x.clone(), x.clone()))
        assert cast.flops(masks) == plain.flops(masks) < plain.flops()

    def test_weight_norm(self) -> None:
        model, mask = parametrizations.weight_norm(nn.Linear(4, 5)), random_mask((5, 4), 0.4, 0)
        cost = count(model, torch.ones(3, 4))
        assert cost.flops({"parametrizations.weight.original1": mask}) == 2 * 3 * 8 == cost.flops() * 0.4

    def test_grouped_product(self) -> None:
        mask = random_mask((3, 8, 8), 0.5, 0)
        ends = torch.tensor([2, 2, 5], dtype=torch.int32)
        model = Layer((3, 8, 8), lambda x, w, _: F.grouped_mm(x, w.bfloat16(), offs=ends))
        cost = count(model, torch.ones(5, 8, dtype=torch.bfloat16))
        assert cost.flops() == 2 * 5 * 64
        assert cost.flops({"weight": mask}) == 2 * (2 * int(mask[0].sum()) + 3 * int(mask[2].sum()))


class TestCustomOperations:
    def test_unknown_ones_are_named_and_known_ones_counted(self) -> None:
        @torch.library.custom_op("openwork_test::project", mutates_args=())
        def project(x: Tensor, weight: Tensor) -> Tensor:
            return x @ weight.t()

        op, mask = torch.ops.openwork_test.project, random_mask((5, 4), 0.4, 0)
        model = Layer((5, 4), lambda x, w, _: op(x, w))
        cost = count(model, torch.ones(3, 4))
        assert (cost.flops(), cost.uncounted) == (0, ("openwork_test.project",))
        register_flop_formula(op)(lambda x, w, out_shape=None, **_: 2 * x[0] * x[1] * w[0])
        try:
            cost = count(model, torch.ones(3, 4))
        finally:
            del flop_registry[op]
        assert (cost.flops(), cost.uncounted) == (2 * 3 * 20, ())
        assert cost.flops({"weight": mask}) == 2 * 3 * 8

    def test_compiled_model(self) -> None:
        model = torch.compile(nn.Sequential(nn.Linear(4, 5), nn.ReLU()), backend="eager")
        model(torch.ones(3, 4))
        assert count(model, torch.ones(3, 4)).flops() == 2 * 3 * 20

    @pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
    def test_flex_attention(self) -> None:
        from torch.nn.attention.flex_attention import flex_attention

        model = Layer((16, 16), lambda x, w, _: flex_attention(x @ w, x, x))
        cost = count(model, torch.ones(1, 2, 32, 16))
        assert cost.fixed == 2 * (2 * 2 * 32 * 32 * 16)
        assert cost.by_parameter()["weight"] == 2 * 64 * 256


class TestTransformers:
    """Models of another library, from tiny configurations: with every weight matrix under a mask of its own."""

    def check(self, model: nn.Module, inputs: dict[str, Tensor], calls: dict[str, int]) -> Cost:
        """Compare with torch's counter and, under masks, with two FLOPs per kept weight and `calls` (1 by default)."""
        cost = count(model, inputs)
        assert cost.flops() == torch_flops(model, **inputs)
        assert cost.uncounted == ()
        masks = random_masks(model, 0.3)
        products = {name: flops for name, flops in cost.by_parameter().items() if flops}
        tokens = {name: flops // (2 * cost.parameters[name]) for name, flops in products.items()}
        assert all(tokens[name] == calls.get(name, inputs["input_ids"].numel()) for name in products), tokens
        assert cost.flops(masks) == cost.fixed + sum(2 * int(masks[name].sum()) * tokens[name] for name in products)
        return cost

    def test_bert(self) -> None:
        transformers = pytest.importorskip("transformers")
        config = transformers.BertConfig(
            vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
        )
        ids = torch.arange(10).reshape(2, 5)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        cost = self.check(transformers.BertModel(config), inputs, {"pooler.dense.weight": 2})
        assert cost.fixed == 2 * 2 * (2 * 2 * 5 * 5 * 16)
        assert len([flops for flops in cost.by_parameter().values() if flops]) == 2 * 6 + 1

    def test_gpt2_with_tied_head(self) -> None:
        transformers = pytest.importorskip("transformers")
        config = transformers.GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2)
        model = transformers.GPT2LMHeadModel(config)
        cost = self.check(model, {"input_ids": torch.arange(10).reshape(2, 5)}, {})
        assert model.lm_head.weight is model.transformer.wte.weight
        assert cost.by_parameter()["transformer.wte.weight"] == 2 * 10 * 50 * 16
        assert "lm_head.weight" not in cost.parameters
        assert cost.kept() == sum(p.numel() for p in model.parameters())

    def test_llama_with_grouped_queries(self) -> None:
        transformers = pytest.importorskip("transformers")
        config = transformers.LlamaConfig(
            vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=16, tie_word_embeddings=False,
        )  # fmt: skip
        cost = self.check(transformers.LlamaForCausalLM(config), {"input_ids": torch.arange(10).reshape(2, 5)}, {})
        assert cost.by_parameter()["model.layers.0.self_attn.k_proj.weight"] == 2 * 10 * 16 * 8

    @pytest.mark.parametrize("experts", ["eager", "grouped_mm", "batched_mm"])
    def test_mixtral_pays_for_its_routes(self, experts: str) -> None:
        transformers = pytest.importorskip("transformers")
        config = transformers.MixtralConfig(
            vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, experts_implementation=experts,
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = transformers.MixtralForCausalLM(config)
        routed = torch.zeros(4, dtype=torch.int64)
        gate = dict(model.named_modules())["model.layers.0.mlp.gate"]

        def note(module: nn.Module, args: Any, out: Any) -> None:
            routed.add_(torch.bincount(out[2].reshape(-1), minlength=4))

        gate.register_forward_hook(note)
        cost = count(model, {"input_ids": torch.arange(10).reshape(2, 5)})
        name = "model.layers.0.mlp.experts.down_proj"
        mask = random_mask(cost.shapes[name], 0.3, 1)
        mask[0] = True
        mask[1] = False
        assert routed.sum() == 20
        assert routed.unique().numel() > 1  # uneven routes, or the test shows nothing
        assert cost.by_parameter()[name] == 2 * 20 * 16 * 32
        assert cost.by_parameter({name: mask})[name] == 2 * int((mask.sum((1, 2)) * routed).sum())
