from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from openwork.core.cost import count
from openwork.core.masks import Masks
from openwork.core.rng import generator
from openwork.core.select import count_of, top
from openwork.errors import CostError, MaskError


def torch_flops(model: nn.Module, *args: Any, **kwargs: Any) -> int:
    """What torch's own counter says, with attention as two visible products and nothing fused."""
    was = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = False
    try:  # with gradients, the fast path of attention is off
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model.eval()(*args, **kwargs)
    finally:
        torch.backends.mkldnn.enabled = was
    return counter.get_total_flops()


def random_mask(shape: torch.Size | tuple[int, ...], density: float, seed: int, name: str = "") -> Tensor:
    score = torch.rand(tuple(shape), generator=generator(seed, "mask", name))
    return top(score, count_of(density, score.numel()))


def random_masks(model: nn.Module, density: float, seed: int = 0) -> dict[str, Tensor]:
    return {n: random_mask(p.shape, density, seed, n) for n, p in model.named_parameters() if p.dim() > 1}


def multiplications(model: nn.Module, masks: dict[str, Tensor], example: Tensor) -> int:
    """Count by brute force: with input one and weights 1 (kept) or 0, a linear model's output sums to their number."""
    counting = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in counting.named_parameters():
            parameter.copy_(masks[name] if name in masks else torch.zeros_like(parameter))
        return int(counting(torch.ones_like(example)).double().sum())


CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
CONVOLUTIONS = [
    (nn.Conv1d(3, 5, 3), (2, 3, 9)),
    (nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2, groups=2), (2, 4, 11)),
    (nn.Conv2d(3, 5, (3, 5), padding="same"), (2, 3, 8, 7)),
    (nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=4, bias=False), (3, 4, 8, 8)),
    (nn.Conv2d(6, 6, 3, padding=1, groups=6), (2, 6, 5, 5)),
    (nn.Conv2d(3, 4, 3, dilation=2, padding=2, padding_mode="reflect"), (1, 3, 7, 7)),
    (nn.Conv3d(2, 4, 2, stride=(1, 2, 1), groups=2), (2, 2, 4, 5, 6)),
    (nn.ConvTranspose1d(3, 5, 4, stride=2, padding=1), (2, 3, 6)),
    (nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1, groups=2), (2, 4, 5, 4)),
    (nn.ConvTranspose3d(2, 3, 2, dilation=2), (1, 2, 3, 4, 3)),
]


class TestAgainstTorch:
    """At density one, the same number as torch's FlopCounterMode."""

    @pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4), (2, 0, 4)])
    @pytest.mark.parametrize("bias", [True, False])
    def test_linear(self, shape: tuple[int, ...], bias: bool) -> None:
        model = nn.Linear(4, 5, bias=bias)
        cost = count(model, torch.ones(shape))
        assert cost.flops() == 2 * math.prod(shape[:-1]) * 4 * 5 == torch_flops(model, torch.ones(shape))
        assert cost.fixed == 0

    @pytest.mark.parametrize(("model", "shape"), CONVOLUTIONS)
    def test_convolution(self, model: nn.Module, shape: tuple[int, ...]) -> None:
        cost = count(model, torch.ones(shape))
        assert cost.flops() == cost.by_parameter()["weight"] == torch_flops(model, torch.ones(shape)) > 0

    @pytest.mark.parametrize("need_weights", [True, False])
    def test_self_attention(self, need_weights: bool) -> None:
        model, x = nn.MultiheadAttention(8, 2, batch_first=True), torch.ones(3, 5, 8)
        cost = count(model, {"query": x, "key": x, "value": x, "need_weights": need_weights})
        assert cost.flops() == torch_flops(model, x, x, x, need_weights=need_weights)
        assert cost.fixed == 2 * (2 * 3 * 5 * 5 * 8)  # scores and values

    @pytest.mark.parametrize("dims", [{}, {"kdim": 6, "vdim": 7}])
    def test_cross_attention(self, dims: dict[str, int]) -> None:
        model = nn.MultiheadAttention(8, 4, batch_first=True, add_bias_kv=True, **dims)
        inputs = torch.ones(2, 5, 8), torch.ones(2, 3, dims.get("kdim", 8)), torch.ones(2, 3, dims.get("vdim", 8))
        cost = count(model, inputs)
        assert cost.flops() == torch_flops(model, *inputs)
        assert cost.fixed == 2 * (2 * 2 * 5 * (3 + 1) * 8)

    def test_encoder(self) -> None:
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        model, x = nn.TransformerEncoder(layer, 2), torch.ones(2, 5, 8)
        cost = count(model, x)
        assert cost.flops() == torch_flops(model, x)
        assert cost.by_parameter()["layers.1.linear1.weight"] == 2 * 10 * 8 * 16

    def test_decoder(self) -> None:
        model = nn.TransformerDecoderLayer(8, 2, 16, batch_first=True)
        inputs = torch.ones(2, 5, 8), torch.ones(2, 3, 8)
        assert count(model, inputs).flops() == torch_flops(model, *inputs)

    def test_embedding_is_a_lookup(self) -> None:
        cost = count(nn.Embedding(10, 4), torch.arange(3))
        assert (cost.flops(), cost.uses, cost.kept()) == (0, (), 40)
        assert cost.by_parameter() == {"weight": 0}

    @pytest.mark.parametrize(("kind", "gates"), [(nn.RNN, 1), (nn.GRU, 3), (nn.LSTM, 4)])
    @pytest.mark.parametrize("batch_first", [True, False])
    def test_recurrent(self, kind: type[nn.RNNBase], gates: int, batch_first: bool) -> None:
        model = kind(5, 6, num_layers=2, bidirectional=True, batch_first=batch_first)
        x = torch.ones((3, 4, 5) if batch_first else (4, 3, 5))
        cost = count(model, x)
        first, second = 5 * 6 + 6 * 6, 12 * 6 + 6 * 6
        assert cost.flops() == 2 * 12 * gates * 2 * (first + second) == torch_flops(model, x)
        assert cost.fixed == 0

    def test_projected_lstm(self) -> None:
        model, x = nn.LSTM(5, 6, proj_size=2), torch.ones(4, 3, 5)
        cost = count(model, x)
        assert cost.flops() == 2 * 12 * (4 * (5 * 6 + 2 * 6) + 6 * 2) == torch_flops(model, x)

    def test_packed_sequence_pays_for_its_own_steps(self) -> None:
        packed = nn.utils.rnn.pack_sequence([torch.ones(3, 5), torch.ones(1, 5)])
        assert count(nn.GRU(5, 6), packed).flops() == 2 * (3 + 1) * 3 * (5 * 6 + 6 * 6)

    def test_bilinear_and_vectors(self) -> None:
        """Products that torch's counter leaves out."""
        bilinear = count(nn.Bilinear(3, 4, 5), (torch.ones(2, 3), torch.ones(2, 4)))
        assert bilinear.by_parameter()["weight"] == bilinear.flops() == 2 * 2 * 3 * 4 * 5

        class Vector(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.w = nn.Parameter(torch.ones(4))

            def forward(self, x: Tensor) -> Tensor:
                return x @ self.w

        assert count(Vector(), torch.ones(3, 4)).by_parameter() == {"w": 2 * 3 * 4}
        assert count(Vector(), torch.ones(4)).by_parameter() == {"w": 2 * 4}


class TestSparse:
    """Under masks, two FLOPs for each kept weight and each time that it is used."""

    @settings(max_examples=25, deadline=None)
    @given(sizes=st.tuples(*[st.integers(1, 6)] * 4), density=st.floats(0, 1), seed=st.integers(0, 99), bias=st.booleans())
    def test_linear(self, sizes: tuple[int, int, int, int], density: float, seed: int, bias: bool) -> None:
        batch, tokens, inputs, outputs = sizes
        model, mask = nn.Linear(inputs, outputs, bias=bias), random_mask((outputs, inputs), density, seed)
        cost = count(model, torch.ones(batch, tokens, inputs))
        assert cost.flops({"weight": mask}) == 2 * batch * tokens * int(mask.sum())

    @settings(max_examples=40, deadline=None)
    @given(
        dims=st.integers(1, 3), groups=st.integers(1, 3), width=st.integers(1, 2), kernel=st.integers(1, 3),
        stride=st.integers(1, 2), dilation=st.integers(1, 2), transposed=st.booleans(), seed=st.integers(0, 99),
    )  # fmt: skip
    def test_convolution_against_brute_force(
        self, dims: int, groups: int, width: int, kernel: int, stride: int, dilation: int, transposed: bool, seed: int
    ) -> None:
        """Without padding, or with padding that is data, each output of a counting convolution is its products."""
        kinds = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d) if transposed else CONV
        extra = {} if transposed else {"padding": 1, "padding_mode": "circular"}
        channels = groups * width
        model = kinds[dims - 1](channels, 2 * channels, kernel, stride, groups=groups, dilation=dilation, **extra)
        example = torch.ones(2, channels, *[5, 6, 5][:dims])
        masks = random_masks(model, 0.4, seed)
        assert count(model, example).flops(masks) == 2 * multiplications(model, masks, example)

    def test_padded_convolution_counts_padding_as_data(self) -> None:
        model = nn.Conv2d(3, 4, 3, padding=1)
        mask = random_mask(model.weight.shape, 0.5, 0)
        assert count(model, torch.ones(2, 3, 6, 7)).flops({"weight": mask}) == 2 * int(mask.sum()) * 2 * 6 * 7

    def test_channels_last_weight(self) -> None:
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 2, groups=1)).to(memory_format=torch.channels_last)
        example = torch.ones(2, 3, 6, 7)
        masks = random_masks(model, 0.3)
        flops = count(model, example).flops(masks)
        assert flops == 2 * 2 * (int(masks["0.weight"].sum()) * 4 * 5 + int(masks["1.weight"].sum()) * 3 * 4)

    @pytest.mark.parametrize("self_attention", [True, False])
    def test_mask_on_the_queries_only(self, self_attention: bool) -> None:
        """Cross-attention reads the three parts of in_proj_weight at different lengths."""
        model, q, k = nn.MultiheadAttention(8, 2, batch_first=True), torch.ones(2, 5, 8), torch.ones(2, 3, 8)
        k = q if self_attention else k
        cost = count(model, (q, k, k))
        mask = torch.ones(24, 8, dtype=torch.bool)
        mask[:8] = random_mask((8, 8), 0.25, 0)
        queries, others = 2 * 10 * 16, 2 * k.shape[0] * k.shape[1] * 2 * 64
        assert cost.by_parameter({"in_proj_weight": mask})["in_proj_weight"] == queries + others
        assert cost.flops({"in_proj_weight": mask}) == queries + others + 2 * 10 * 64 + cost.fixed

    @pytest.mark.parametrize("gate", [0, 1, 2])
    def test_mask_on_one_gate(self, gate: int) -> None:
        model, x = nn.GRU(5, 6), torch.ones(4, 3, 5)
        hidden = torch.ones(18, 6, dtype=torch.bool)
        hidden[6 * gate : 6 * gate + 6] = random_mask((6, 6), 0.5, gate)
        assert count(model, x).flops({"weight_hh_l0": hidden}) == 2 * 12 * (18 * 5 + 2 * 36 + 18)

    def test_tied_weights_are_charged_to_the_first_name(self) -> None:
        class Tied(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.encode = nn.Linear(6, 4)
                self.decode = nn.Linear(6, 4)
                self.decode.weight = self.encode.weight

            def forward(self, x: Tensor) -> Tensor:
                return self.decode((self.encode(x) @ self.encode.weight).relu())

        mask = random_mask((4, 6), 0.5, 3)
        cost = count(Tied(), torch.ones(3, 6))
        assert cost.flops({"encode.weight": mask}) == 3 * 2 * 3 * 12
        assert len(cost.uses) == 1
        with pytest.raises(MaskError, match=r"no parameter 'decode\.weight'"):
            cost.flops({"decode.weight": mask})

    def test_all_true_is_dense_and_all_false_is_fixed(self) -> None:
        model, x = nn.TransformerEncoderLayer(8, 2, 16), torch.ones(5, 2, 8)
        cost, params = count(model, x), dict(model.named_parameters())
        assert cost.flops(Masks.ones(params)) == cost.flops() == cost.flops({})
        none = {name: torch.zeros_like(param, dtype=torch.bool) for name, param in params.items()}
        assert cost.flops(none) == cost.fixed > 0

    def test_unmasked_parameters_stay_dense(self) -> None:
        cost = count(nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 6)), torch.ones(1, 4))
        mask = random_mask((5, 4), 0.5, 0)
        assert cost.by_parameter({"0.weight": mask}) == {"0.weight": 20, "0.bias": 0, "1.weight": 60, "1.bias": 0}


class TestOtherCosts:
    def test_training_flops(self) -> None:
        """RigL's accounting: three forward passes, of which the weight gradient's may be dense."""
        model, x = nn.TransformerEncoderLayer(8, 2, 16), torch.ones(5, 2, 8)
        cost, masks = count(model, x), random_masks(model, 0.25)
        sparse, dense = cost.flops(masks), cost.flops()
        assert cost.training_flops() == 3 * dense == cost.training_flops(dense_gradient=True)
        assert cost.training_flops(masks) == 3 * sparse < 3 * dense
        assert cost.training_flops(masks, dense_gradient=True) == 2 * sparse + dense

    def test_three_forward_passes_are_what_torch_counts_for_a_step(self) -> None:
        """If the input needs a gradient too: the rule counts the first layer's activation gradient."""
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5))
        x = torch.ones(2, 3, 6, 6, requires_grad=True)
        with FlopCounterMode(display=False) as counter:
            model(x).sum().backward()
        assert count(model, x).training_flops() == counter.get_total_flops()

    def test_bytes_and_kept(self) -> None:
        model = nn.Linear(16, 8)
        cost = count(model, torch.ones(1, 16))
        assert cost.bytes() == 4 * (128 + 8)
        assert cost.kept() == 136
        mask = random_mask((8, 16), 0.25, 0)
        assert cost.kept({"weight": mask}) == 32 + 8
        assert cost.bytes({"weight": mask}) == 32 * 4 + 128 // 8 + 8 * 4
        assert cost.bytes({"weight": torch.ones(8, 16, dtype=torch.bool)}) == 4 * 136  # a full bitmap buys nothing
        half = count(model.bfloat16(), torch.ones(1, 16, dtype=torch.bfloat16))
        assert half.bytes({"weight": mask}) == 32 * 2 + 16 + 8 * 2

    def test_mask_of_another_shape(self) -> None:
        cost = count(nn.Linear(4, 6), torch.ones(1, 4))
        for measure in (cost.flops, cost.training_flops, cost.by_parameter, cost.kept, cost.bytes):
            with pytest.raises(MaskError, match=r"'weight' has shape \(6, 4\), its mask \(4, 6\)"):
                measure({"weight": torch.ones(4, 6, dtype=torch.bool)})


class Stateful(nn.Module):
    """Writes to a buffer, replaces another, draws numbers, and writes to its input, in eval mode as well."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = x.mul_(2)[0]
        return self.norm(self.fc(x) + torch.randn(4))


def backend_flags() -> tuple[bool, ...]:
    return (
        torch.backends.mkldnn.enabled,
        torch.backends.cudnn.enabled,
        torch.backends.mha.get_fastpath_enabled(),
        torch.is_grad_enabled(),
    )


class TestLeavesNoTrace:
    @pytest.mark.parametrize("fails", [False, True])
    def test_state(self, fails: bool) -> None:
        model = nn.Sequential(Stateful(), nn.Dropout(), nn.Linear(5 if fails else 4, 2)).train()
        model[0].norm.eval()  # flags may differ from module to module
        before, x = copy.deepcopy(model.state_dict()), torch.ones(3, 4)
        flags, draws = [m.training for m in model.modules()], torch.get_rng_state()
        buffers, backends = dict(model.named_buffers()), backend_flags()
        if fails:
            with pytest.raises(CostError):
                count(model, x)
        else:
            assert count(model, x).flops() == 2 * 3 * (16 + 8)
        assert [m.training for m in model.modules()] == flags
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert all(buffer is buffers[name] for name, buffer in model.named_buffers())
        assert torch.equal(torch.get_rng_state(), draws)
        assert torch.equal(x, torch.ones(3, 4))
        assert backend_flags() == backends
        assert all(p.grad is None for p in model.parameters())

    def test_backend_flags_that_were_off_stay_off(self) -> None:
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            count(nn.Linear(4, 4), torch.ones(1, 4))
            assert not torch.backends.mha.get_fastpath_enabled()
        finally:
            torch.backends.mha.set_fastpath_enabled(True)

    def test_hooks_run_and_are_counted(self) -> None:
        """A forward hook may add work of its own."""
        model, seen = nn.Linear(4, 4, bias=False), []
        model.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
        model.register_forward_hook(lambda module, args, out: out @ module.weight)
        assert count(model, torch.ones(3, 4)).flops() == 2 * (2 * 3 * 16)
        assert seen == [(3, 4)]

    def test_inside_inference_mode(self) -> None:
        with torch.inference_mode():
            cost = count(nn.GRU(5, 6), torch.ones(4, 3, 5))
            assert torch.is_inference_mode_enabled()
        assert cost == count(nn.GRU(5, 6), torch.ones(4, 3, 5))


class TestBadInput:
    def test_forward_fails(self) -> None:
        with pytest.raises(CostError, match=r"^Linear fails in eval mode .*2x5 and 4x3.*; give one that it accepts$"):
            count(nn.Linear(4, 3), torch.ones(2, 5))

    def test_parameter_without_shape(self) -> None:
        with pytest.raises(CostError, match="'weight' has no shape yet; run the model once"):
            count(nn.LazyLinear(3), torch.ones(2, 5))
