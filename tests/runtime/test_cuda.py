from __future__ import annotations

import copy
import importlib.util
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from openwork.core.rng import generator
from openwork.errors import ModelError
from openwork.runtime import cuda, wrapping
from openwork.runtime.bounds import bound
from openwork.runtime.cuda import blocks, semi_structured

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
has_triton = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not has_triton, reason="triton is not installed; its interpreter needs no device")
needs_cuda = pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device on this machine")
KERNEL = "openwork.runtime.cuda._blocks"


@pytest.fixture
def runnable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the Triton kernel run: on the device where there is one, else in the interpreter."""
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        monkeypatch.delitem(sys.modules, KERNEL, raising=False)
        monkeypatch.delattr(cuda, "_blocks", raising=False)


def blocked(
    out: int, columns: int, density: float, side: int = 16, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return a weight (out, columns) whose blocks of `side` are zero but for a share of `density`."""
    draw = generator(seed, "blocked", out, columns)
    kept = torch.rand(-(-out // side), -(-columns // side), generator=draw) < density
    mask = kept.repeat_interleave(side, 0).repeat_interleave(side, 1)[:out, :columns]
    return (torch.randn(out, columns, generator=draw) * mask).to(DEVICE, dtype)


def two_of_four(out: int, columns: int, dtype: torch.dtype = torch.float16) -> Tensor:
    draw = generator(0, "two of four", out, columns)
    order = torch.rand(out, columns // 4, 4, generator=draw).argsort(dim=2)
    return (torch.randn(out, columns, generator=draw) * (order < 2).reshape(out, columns)).to(dtype)


def inputs(columns: int, dtype: torch.dtype) -> list[Tensor]:
    draw = generator(0, "inputs", columns)
    drawn = [
        torch.randn(columns, generator=draw),
        torch.randn(0, columns, generator=draw),
        torch.randn(2, 3, columns, generator=draw),
        torch.randn(columns, 65, generator=draw).t(),
        torch.randn(5, 2 * columns, generator=draw)[:, ::2],
        torch.randn(1, columns, generator=draw).expand(4, columns),
    ]
    return [x.to(DEVICE, dtype) for x in drawn]


def check(format: Any, packed: Any, weight: Tensor, bias: Tensor | None, x: Tensor) -> None:
    before = x.clone()
    y = format.matmul(packed, x)
    exact = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
    assert y.shape == exact.shape
    assert y.dtype == x.dtype
    assert bool(((y.double() - exact).abs() <= bound(weight, bias, x)).all())
    assert torch.equal(x, before)


def test_the_folder_is_the_registry() -> None:
    assert cuda.names() == ["blocks", "semi_structured"]
    assert {f"cuda.{name}" for name in cuda.names()} < set(wrapping.PLACES)
    for name in cuda.names():
        assert wrapping.load(f"cuda.{name}") is cuda.load(name)
    with pytest.raises(ModelError, match="choose from blocks, semi_structured"):
        cuda.load("_checks")


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a CUDA device")
def test_without_a_device_there_are_reasons() -> None:
    layer = nn.Linear(64, 32).half()
    for name in cuda.names():
        reason = cuda.obstacle(layer, name)
        assert reason in ("is on cpu, not on cuda", "needs triton, which is not installed: pip install triton")
        with pytest.raises(ModelError, match=rf"cannot hold this Linear in the format {name}: it (is on cpu|needs triton)"):
            cuda.pack(layer, name)
        with pytest.raises(ModelError, match=r"cannot pack this weight: it (is on cpu|needs triton)"):
            cuda.load(name).pack(layer.weight)


def test_layers_that_are_no_plain_linear_ones_are_refused() -> None:
    class Own(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return input

    hooked = nn.Linear(2, 2)
    hooked.register_forward_pre_hook(lambda *_: None)
    cases = {"plain": nn.Conv2d(2, 2, 1), "no plain": Own(2, 2), "hooks": hooked, "no weight yet": nn.LazyLinear(2)}
    for words, layer in cases.items():
        assert all(words in str(cuda.obstacle(layer, name)) for name in cuda.names())


def test_the_reasons_of_two_of_four(monkeypatch: pytest.MonkeyPatch) -> None:
    assert semi_structured.shape_obstacle(torch.ones(64, 128)) is None
    for shape in ((33, 64), (32, 32), (32, 96), (16, 64)):
        assert "multiples of 32 and 64" in str(semi_structured.shape_obstacle(torch.ones(shape)))
    weight = two_of_four(32, 64)
    assert semi_structured.pattern_obstacle(weight) is None
    weight[3, :4], weight[7, 8:12] = 1, 1
    assert semi_structured.pattern_obstacle(weight) == "has 2 of 512 groups of four inputs with more than two non-zeros"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "an old card")
    old = SimpleNamespace(ndim=2, dtype=torch.float16, shape=torch.Size((32, 64)), device=torch.device("cuda:0"))
    old.numel = lambda: 2048
    assert semi_structured.obstacle(old) == "is on an old card, which has no sparse tensor cores"  # type: ignore[arg-type]


@needs_cuda
@pytest.mark.parametrize("dtype", semi_structured.DTYPES)
def test_two_of_four_on_the_device(dtype: torch.dtype) -> None:
    weight, bias = two_of_four(96, 128, dtype).cuda(), torch.randn(96, generator=generator(0, "bias")).to("cuda", dtype)
    if (reason := semi_structured.obstacle(weight, bias)) is not None:
        pytest.skip(reason)
    for added in (None, bias):
        packed = semi_structured.pack(weight, added)
        assert torch.equal(semi_structured.unpack(packed)[0], weight)
        assert weight.nbytes // 2 <= semi_structured.nbytes(packed) < weight.nbytes
        for x in inputs(128, dtype):
            check(semi_structured, packed, weight, added, x)


@needs_triton
@pytest.mark.usefixtures("runnable")
@pytest.mark.parametrize("dtype", blocks.DTYPES)
@pytest.mark.parametrize("side", blocks.BLOCKS)
def test_blocks_are_within_the_bound(dtype: torch.dtype, side: int) -> None:
    weight = blocked(70, 100, 0.4, dtype=dtype)
    bias = torch.randn(70, generator=generator(0, "bias")).to(DEVICE, dtype)
    for added in (None, bias):
        packed = blocks.pack(weight, added, side)
        for x in inputs(100, dtype):
            check(blocks, packed, weight, added, x)


@needs_triton
@pytest.mark.usefixtures("runnable")
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(1, 40), st.integers(1, 40), st.integers(0, 20), st.floats(0, 1), st.sampled_from(blocks.BLOCKS),
    st.sampled_from(blocks.DTYPES), st.integers(0, 2**31),
)  # fmt: skip
def test_blocks_of_any_shape(
    out: int, columns: int, rows: int, density: float, side: int, dtype: torch.dtype, seed: int
) -> None:
    weight = blocked(out, columns, density, 8, seed, dtype)
    packed = blocks.pack(weight, weight[:, 0], side)
    assert torch.equal(blocks.unpack(packed)[0], weight)
    x = torch.randn(rows, columns, generator=generator(seed, "x")).to(DEVICE, dtype)
    check(blocks, packed, weight, weight[:, 0], x)


@needs_triton
@pytest.mark.usefixtures("runnable")
def test_products_of_whole_numbers_are_exact() -> None:
    draw = generator(0, "whole")
    weight = torch.randint(-3, 4, (50, 90), generator=draw).to(DEVICE, torch.float32)
    weight[16:32] = 0
    x = torch.randint(-5, 6, (33, 90), generator=draw).to(DEVICE, torch.float32)
    expected = (x.double() @ weight.double().t()).long()
    for side in blocks.BLOCKS:
        assert torch.equal(blocks.matmul(blocks.pack(weight, None, side), x).long(), expected)


@needs_triton
@pytest.mark.usefixtures("runnable")
def test_zero_blocks_are_neither_held_nor_multiplied() -> None:
    weight = blocked(96, 64, 0.5, 16, seed=3)
    packed = blocks.pack(weight, None, 16)
    kept = weight.reshape(6, 16, 4, 16).ne(0).any(3).any(1)
    assert len(packed.values) == int(kept.sum())
    assert packed.starts.diff().tolist() == kept.sum(1).tolist()
    assert blocks.nbytes(packed) == len(packed.values) * (16 * 16 * 4 + 4) + 7 * 4
    x = torch.ones(2, 64, device=DEVICE)
    x[:, 16:32] = torch.nan
    reached = blocks.matmul(packed, x).isnan().reshape(2, 6, 16)
    assert torch.equal(reached, kept[:, 1].expand(2, 6)[..., None].expand(2, 6, 16))


@needs_triton
@pytest.mark.usefixtures("runnable")
def test_the_block_is_the_largest_that_is_full() -> None:
    for side in blocks.BLOCKS:
        assert blocks.pack(blocked(256, 256, 0.4, side)).block == side
    assert blocks.pack(blocked(64, 64, 0.3, 1)).block == 16
    assert blocks.pack(torch.zeros(64, 64, device=DEVICE)).block == 64
    for wrong in (8, True, 16.5, "16"):
        with pytest.raises(ModelError, match="choose from 64, 32, 16"):
            blocks.pack(torch.ones(16, 16, device=DEVICE), None, wrong)  # type: ignore[arg-type]


@needs_triton
@pytest.mark.usefixtures("runnable")
def test_what_blocks_do_not_take_is_refused_in_a_sentence() -> None:
    weight = torch.ones(16, 16, device=DEVICE)
    cases: list[tuple[str, tuple[Any, ...]]] = [
        ("is torch.float64, not one of float16, bfloat16, float32", (weight.double(),)),
        (r"has a weight of shape \(16,\)", (weight[0],)),
        (r"has a weight of shape \(0, 16\)", (weight[:0],)),
        ("is on meta", (weight.to("meta"),)),
        (r"a bias of shape \(3,\)", (weight, weight[0, :3])),
        ("a bias of shape .* torch.float16", (weight, weight[0].half())),
    ]
    for words, operands in cases:
        with pytest.raises(ModelError, match=f"cannot pack this weight: it .*{words}"):
            blocks.pack(*operands)
    packed = blocks.pack(weight)
    for x in (torch.ones(4, 3), torch.ones(4, 16).half(), torch.tensor(1.0), torch.ones(4, 16).long()):
        with pytest.raises(ModelError, match=r"give \(\.\.\., 16\) of torch\.float32"):
            blocks.matmul(packed, x.to(DEVICE))


@needs_triton
@pytest.mark.usefixtures("runnable")
def test_the_layer_saves_and_copies_as_the_dense_one() -> None:
    layer = nn.Linear(64, 48).to(DEVICE)
    layer.weight.data = blocked(48, 64, 0.5)
    twin, x = cuda.pack(layer, "blocks"), torch.randn(2, 5, 64, generator=generator(0, "x")).to(DEVICE)
    assert twin(x).shape == (2, 5, 48)
    check(SimpleNamespace(matmul=lambda _, x: twin(x)), None, layer.weight.detach(), layer.bias.detach(), x)
    state = twin.state_dict()
    assert state.keys() == layer.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in layer.state_dict().items())
    assert torch.equal(copy.deepcopy(twin)(x), twin(x))
    assert wrapping.is_right(twin, layer, x)
    assert wrapping.is_right(wrapping.pack(layer, "cuda.blocks"), layer, x)
    assert not twin(x.requires_grad_()).requires_grad
    assert f"48x64, format=cuda.blocks, bytes={blocks.nbytes(twin.packed)}" in repr(twin)


COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from openwork.runtime.cuda._blocks import multiply

kinds = {name: "i32" for name in ("x_row", "x_column", "rows", "width", "out")}
kinds |= {name: "*i32" for name in ("columns", "starts")}
kinds |= {name: "*fp16" for name in ("x", "values", "bias", "y")}
fixed = {"HAS_BIAS": True, "BLOCK": 32, "TILE": 16, "WIDEN": False}
source = ASTSource(fn=multiply, signature={**kinds, **dict.fromkeys(fixed, "constexpr")}, constexprs=fixed)
code = triton.compile(source, target=GPUTarget("cuda", 80, 32)).asm
assert "mma.sync" in code["ptx"], "no tensor cores"
print("compiled", len(code["ptx"]))
"""


@needs_triton
def test_the_kernel_compiles_for_tensor_cores(tmp_path: Any) -> None:
    """Triton compiles for a device that is not there; in a process of its own, where it does not interpret."""
    settings = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_DEFAULT_FP_FUSION": "1"}
    settings.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "-c", COMPILED], env=settings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("compiled")
