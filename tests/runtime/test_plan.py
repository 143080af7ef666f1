from __future__ import annotations

import copy
import io
import itertools
import json
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from openwork.core.rng import generator
from openwork.errors import ModelError
from openwork.runtime import choose, plan, record
from openwork.runtime.graph import graft
from openwork.runtime.kernels.target import host
from openwork.runtime.modules import PackedConv2d, PackedLinear
from openwork.runtime.plan import Choice, Plan, accelerate
from openwork.runtime.show import show, summary
from openwork.saving import save


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def measured_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no plan be found again."""
    monkeypatch.setattr(record, "find", lambda key: None)


@pytest.fixture
def packs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Make csr_torch win every layer and the whole, whatever the machine says."""
    asked: list[str] = []

    def layers(calls: dict[str, Any], **_: Any) -> dict[str, float]:
        asked.extend(calls)
        return {name: 1.0 if name == "csr_torch" else 2.0 for name in calls}

    monkeypatch.setattr(graft, "graft", lambda model, example: [])
    monkeypatch.setattr(choose, "interleave", layers)
    monkeypatch.setattr(choose, "HOPELESS", float("inf"))
    monkeypatch.setattr(plan, "measure", lambda models, example, repeats: {n: 1.0 + (n == "dense") for n in models})
    return asked


def thinned(model: nn.Module, density: float, seed: int = 0) -> nn.Module:
    draw = generator(seed, "plan")
    for weight in model.parameters():
        weight.data = torch.randn(weight.shape, generator=draw) / max(weight[0].numel(), 1) ** 0.5
        if weight.ndim > 1:
            weight.data[torch.rand(weight.shape, generator=draw) >= density] = 0
    return model


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 40), nn.ReLU(), nn.Dropout(), nn.Linear(40, 5))


class Net(nn.Module):
    """A small net with everything: batch norm, a 1x1 and a grouped convolution, a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.b, self.deep = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.c, self.fc = nn.Conv2d(8, 12, 3, stride=2), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.a(x)).relu()
        x = (self.deep(self.b(x)) + x).relu()
        return self.fc(self.c(x).mean((2, 3)))


def trained_norms(model: nn.Module) -> nn.Module:
    model(torch.randn(32, 3, 9, 7, generator=generator(0, "bn")))
    return model


def batch(model: nn.Module, size: int) -> Tensor:
    shape = (3, 9, 7) if isinstance(model, Net) else (3, 4, 4)
    return torch.randn(size, *shape, generator=generator(size, "batch"))


def close(model: nn.Module, fast: nn.Module, x: Any) -> bool:
    """Both against the float64 model: the packed one may not be farther off than some roundings of a deep sum."""
    model.eval()
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double())
        allowed = 100 * torch.finfo(torch.float32).eps * exact.abs().max().clamp(min=1)
        return bool(((fast(x) - exact).abs() <= allowed).all() and ((model(x) - exact).abs() <= allowed).all())


@pytest.mark.parametrize("density", [0.0, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("make", [mlp, Net])
@pytest.mark.usefixtures("packs")
def test_packed_models_give_the_same_outputs(make: Any, density: float) -> None:
    model = thinned(make(), density)
    if make is Net:
        trained_norms(model)
    for size in (1, 3, 16):
        fast = accelerate(model, batch(model, size), verbose=False)
        assert fast.plan.accelerated == (density < 1)  # type: ignore[union-attr]
        for other in (0, 1, 2, 16):
            if other or make is not Net:
                assert close(model, fast, batch(model, other)) if other else fast(batch(model, 0)).shape == (0, 5)


@pytest.mark.parametrize("density", [0.0, 0.05, 1.0])
@pytest.mark.parametrize("make", [mlp, Net])
def test_real_measurements_give_the_same_outputs(make: Any, density: float) -> None:
    model = trained_norms(thinned(Net(), density)) if make is Net else thinned(mlp(), density)
    fast = accelerate(model, batch(model, 2), verbose=False, repeats=3)
    assert close(model, fast, batch(model, 2))
    for choice in fast.plan:  # type: ignore[union-attr]
        if choice.chosen in choice.ms and choice.chosen != "dense":
            assert choice.ms["dense"] >= choose.MARGIN * choice.ms[choice.chosen]


@pytest.mark.usefixtures("packs")
def test_the_plan_says_what_was_seen() -> None:
    model = thinned(Net(), 0.25)
    fast = accelerate(model, batch(model, 2), verbose=False)
    found: Plan = fast.plan  # type: ignore[assignment]
    by_name = {choice.layer: choice for choice in found}
    assert list(by_name) == ["a", "b", "deep", "c", "fc"]
    assert len(found) == 5
    assert by_name["c"].input_shape == (2, 8, 9, 7)
    assert by_name["c"].shape == (12, 8, 3, 3)
    assert by_name["c"].density == int((model.c.weight != 0).sum()) / model.c.weight.numel()  # type: ignore[operator, union-attr]
    assert by_name["c"].ms["dense"] == by_name["c"].ms["csr_scipy"] == 2000.0
    assert by_name["c"].ms["csr_torch"] == 1000.0
    assert (by_name["c"].chosen, by_name["c"].gain, by_name["c"].calls) == ("csr_torch", 2.0, 1)
    assert (by_name["deep"].chosen, by_name["deep"].note) == ("dense", "has groups")
    assert (found.dense_ms, found.ms, found.gain, found.threads) == (2000.0, 1000.0, 2.0, 1)
    assert isinstance(fast.c, PackedConv2d)
    assert isinstance(fast.fc, PackedLinear)
    assert type(fast.deep) is nn.Conv2d


@pytest.mark.usefixtures("packs")
def test_the_users_model_is_left_alone_and_the_state_is_complete(tmp_path: Any) -> None:
    model = trained_norms(thinned(Net(), 0.25)).train()
    before = copy.deepcopy(model.state_dict())
    fast = accelerate(model, batch(model, 2), verbose=False)
    assert model.training
    assert all(weight.requires_grad for weight in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert not any(module._forward_pre_hooks for module in fast.modules())
    assert not fast.training
    assert fast.state_dict().keys() == before.keys()
    for name, value in fast.state_dict().items():
        assert torch.equal(value, before[name])
        assert torch.equal(model.state_dict()[name], before[name])
    plan_bytes = len(json.dumps(record.write(fast.plan.record)))  # type: ignore[union-attr]
    assert save(fast, tmp_path / "f").bytes <= save(model, tmp_path / "m").bytes + 2 * plan_bytes


@pytest.mark.usefixtures("packs")
def test_a_layer_in_two_places_is_replaced_in_both_and_a_lone_layer_whole() -> None:
    shared = nn.Linear(6, 6)
    model = thinned(nn.Sequential(shared, nn.Tanh(), shared), 0.3)
    fast = accelerate(model, torch.ones(2, 6), verbose=False)
    assert isinstance(fast[0], PackedLinear)  # type: ignore[index]
    assert fast[0] is fast[2]  # type: ignore[index]
    assert [choice.calls for choice in fast.plan] == [2]  # type: ignore[union-attr]
    lone = accelerate(thinned(nn.Linear(6, 6), 0.3), torch.ones(2, 6), verbose=False)
    assert isinstance(lone, PackedLinear)
    assert lone.plan.choices[0].layer == "(model)"  # type: ignore[union-attr]


def test_layers_stay_dense_where_nothing_is_won(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def even(calls: dict[str, Any], **_: Any) -> dict[str, float]:
        asked.extend(calls)
        return {name: 1.04 if name == "dense" else 1.0 for name in calls}

    monkeypatch.setattr(choose, "interleave", even)
    monkeypatch.setattr(choose, "HOPELESS", float("inf"))
    model = thinned(mlp(), 0.1)
    fast = accelerate(model, batch(model, 2), verbose=False, repeats=2)
    assert {"dense", "csr_torch", "csr_scipy"} <= set(asked)
    assert not fast.plan.accelerated  # type: ignore[union-attr]
    assert type(fast[1]) is nn.Linear  # type: ignore[index]
    assert fast.plan.gain == 1.0  # type: ignore[union-attr]
    assert fast.plan.note == "no layer is faster in a sparse format: the model stays dense"  # type: ignore[union-attr]


def test_the_whole_falls_back_to_dense(packs: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "measure", lambda models, example, repeats: dict.fromkeys(models, 1.0))
    model = thinned(mlp(), 0.1)
    fast = accelerate(model, batch(model, 2), verbose=False)
    assert packs
    assert [type(module) for module in fast.modules()] == [type(module) for module in model.modules()]
    assert "the whole is not" in fast.plan.note  # type: ignore[union-attr]
    assert [choice.chosen for choice in fast.plan] == ["dense", "dense"]  # type: ignore[union-attr]
    assert fast.plan.choices[0].note == "csr_torch is 2.00x as fast alone"  # type: ignore[union-attr]


@pytest.mark.usefixtures("packs")
def test_a_wrong_format_is_never_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    from openwork.runtime.formats import csr_torch

    right = csr_torch.matmul
    monkeypatch.setattr(csr_torch, "matmul", lambda packed, x: right(packed, x) * 1.001)
    fast = accelerate(thinned(mlp(), 0.1), torch.ones(2, 3, 4, 4), verbose=False)
    assert not fast.plan.accelerated  # type: ignore[union-attr]
    assert "csr_torch" not in fast.plan.choices[0].ms  # type: ignore[union-attr]


class Peeks(nn.Module):
    """A model that cannot work with another kind of layer."""

    def __init__(self, other: Any) -> None:
        super().__init__()
        self.fc, self.other = nn.Linear(6, 6), other

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        return y if isinstance(self.fc, nn.Linear) else self.other(y)


def _raise(y: Tensor) -> Tensor:
    raise ValueError("only linear layers")


@pytest.mark.parametrize(
    ("other", "words"),
    [(_raise, "does not run with packed layers"), (lambda y: y + 1, "outputs differ"), (lambda y: y[:1], "other shapes")],
)
@pytest.mark.usefixtures("packs")
def test_a_model_that_packed_layers_break_stays_dense(other: Any, words: str) -> None:
    fast = accelerate(thinned(Peeks(other), 0.3), torch.ones(2, 6), verbose=False)
    assert words in fast.plan.note  # type: ignore[union-attr]
    assert type(fast.fc) is nn.Linear


@pytest.mark.usefixtures("packs")
def test_compiled_models_and_models_with_a_plan() -> None:
    model = thinned(nn.Sequential(nn.Linear(6, 6)), 0.3)
    fast = accelerate(torch.compile(model, backend="eager"), torch.ones(2, 6), verbose=False)  # type: ignore[arg-type]
    assert isinstance(fast, nn.Sequential)
    model.plan = "mine"  # type: ignore[assignment]
    fast = accelerate(model, torch.ones(2, 6), verbose=False)
    assert fast.plan == "mine"
    assert fast.openwork_plan.accelerated  # type: ignore[union-attr]


@pytest.mark.usefixtures("packs")
def test_layers_that_are_not_called_or_get_other_types_stay() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused, self.empty = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            self.empty(x[:0])
            return self.used(x) + self.unused.weight.sum()

    fast = accelerate(thinned(Odd(), 0.3), torch.ones(2, 6), verbose=False)
    notes = {choice.layer: choice.note for choice in fast.plan}  # type: ignore[union-attr]
    assert notes == {
        "used": "",
        "unused": "is not called by the example",
        "empty": "gets torch.float32 of shape (0, 6)",
    }
    assert [choice.chosen for choice in fast.plan] == ["csr_torch", "dense", "dense"]  # type: ignore[union-attr]


def test_transformers_models_take_keywords(packs: list[str]) -> None:
    import transformers

    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=30
    )
    model = transformers.BertForSequenceClassification(config).eval()
    draw = generator(0, "bert")
    for weight in model.parameters():
        if weight.ndim > 1:
            weight.data[torch.rand(weight.shape, generator=draw) < 0.8] = 0
    example = {"input_ids": torch.arange(12).reshape(2, 6), "attention_mask": torch.ones(2, 6, dtype=torch.long)}
    fast = accelerate(model, example, verbose=False)
    assert packs
    assert sum(choice.chosen == "csr_torch" for choice in fast.plan) >= 6  # type: ignore[union-attr]
    with torch.no_grad():
        assert torch.allclose(fast(**example).logits, model(**example).logits, rtol=0, atol=1e-6)


def test_bad_input_is_named() -> None:
    with pytest.raises(ModelError, match="a str cannot be accelerated"):
        accelerate("model", torch.ones(1))  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="Sequential refuses the example"):
        accelerate(mlp(), torch.ones(2, 7), verbose=False)
    with pytest.raises(ModelError, match="the example is a int"):
        accelerate(mlp(), 3, verbose=False)
    with pytest.raises(ModelError, match="threads is 0"):
        accelerate(mlp(), torch.ones(2, 48), threads=0, verbose=False)
    stuck = mlp()
    stuck.lock = (x for x in range(3))  # type: ignore[assignment]
    with pytest.raises(ModelError, match="Sequential cannot be copied"):
        accelerate(stuck, torch.ones(2, 48), verbose=False)


def test_models_elsewhere_stay_dense() -> None:
    model = nn.Sequential(nn.Linear(4, 4, device="meta"))
    fast = accelerate(model, torch.ones(2, 4, device="meta"), verbose=False, repeats=1)
    assert fast.plan.note == "the model is on meta, where there are no sparse formats yet: the model stays dense"  # type: ignore[union-attr]


def test_threads_are_put_back_and_recorded() -> None:
    fast = accelerate(mlp(), torch.ones(2, 48), threads=2, verbose=False, repeats=1)
    assert fast.plan.threads == 2  # type: ignore[union-attr]
    assert torch.get_num_threads() == 1


def printed(shown: Plan) -> str:
    stream = io.StringIO()
    show(shown, Console(file=stream, width=80, color_system=None))
    return stream.getvalue()


def test_the_table() -> None:
    names = ("blocks.0.very_long_name.of_a_layer.attention[red]", "fc")
    first = Choice(names[0], "Linear", (3072, 768), (1, 768), 1, 0.05, {"dense": 2.0, "x": 0.5, "y": 1}, "csr_torch", 4.0)
    second = Choice(names[1], "Linear", (10, 768), (1, 768), 1, 1.0, note="is dense")
    text = printed(Plan((first, second), 3.0, 1.5, 2, "AVX2"))
    rows = text.splitlines()
    assert all(len(row) <= 80 for row in rows)
    assert rows[0].split() == ["layer", "weight", "density", "dense", "ms", "sparse", "ms", "chosen", "gain"]
    assert rows[1].split()[1:] == ["3072x768", "0.050", "2.000", "0.500", "csr_torch", "4.00x"]
    assert rows[2].split() == ["fc", "10x768", "1.000", "-", "-", "dense"]
    assert "2.00x as fast: 1.500 ms against 3.000 ms dense (2 threads, AVX2)" in " ".join(text.split())
    assert summary(Plan((second,), 3.0, 3.0, 1, "AVX2", "why")) == "dense 3.000 ms (1 thread, AVX2); why"


def test_long_tables_show_the_costliest_layers() -> None:
    choices = tuple(
        Choice(f"l{i}", "Linear", (1, 1), (1, 1), 1, 0.5, {"dense": float(i % 50), "x": 1.0}) for i in range(100)
    )
    text = printed(Plan(choices, 1.0, 1.0, 1, "AVX2", "why"))
    assert "and 40 more layers" in text
    shown = [row.split()[0] for row in text.splitlines()[1:61]]
    assert set(shown) == {f"l{i}" for i in range(100) if i % 50 >= 20}
    assert shown == sorted(shown, key=lambda name: int(name[1:]))


def test_verbose_prints_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    accelerate(thinned(mlp(), 0.1), torch.ones(2, 48), repeats=1)
    assert "layer" in capsys.readouterr().out
    accelerate(thinned(mlp(), 0.1), torch.ones(2, 48), repeats=1, verbose=False)
    assert capsys.readouterr().out == ""


def test_the_largest_input_is_measured(packs: list[str]) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x[:1]).sum() + self.fc(x).sum() + self.fc(x[:2]).sum()

    (choice,) = accelerate(thinned(Twice(), 0.3), torch.ones(5, 6), verbose=False).plan  # type: ignore[union-attr, misc]
    assert (choice.input_shape, choice.calls) == ((5, 6), 3)
    assert list(itertools.islice(packs, 3)) == ["dense", "csr_scipy", "csr_torch"]


def convolutions() -> nn.Module:
    return trained_norms(thinned(Net(), 0.2))


@pytest.fixture
def islands(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let whole stretches win, whatever the machine says."""
    if host() is None:
        pytest.skip("there is no LLVM on this machine")
    monkeypatch.setattr(plan, "measure", lambda models, example, repeats: {n: 1.0 + (n == "dense") for n in models})


@pytest.mark.usefixtures("islands")
def test_a_traced_stretch_is_run_as_one_and_every_layer_of_it_has_a_row() -> None:
    model = convolutions()
    fast = accelerate(model, batch(model, 2), verbose=False)
    found = fast.plan
    assert found.record.mode == "graph"  # type: ignore[union-attr]
    assert [choice.layer for choice in found] == ["a", "b", "deep", "c", "fc"]  # type: ignore[union-attr]
    assert all(choice.chosen.startswith("fused") for choice in list(found)[:4])  # type: ignore[arg-type]
    assert all(choice.ms["fused"] > 0 and choice.ms["dense"] > 0 for choice in list(found)[:4])  # type: ignore[arg-type]
    for size in (1, 2, 7):
        assert close(model, fast, batch(model, size))
    assert fast.state_dict().keys() == model.state_dict().keys()


@pytest.mark.usefixtures("islands")
def test_whole_stretches_that_do_not_pay_leave_the_layers_their_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def slow(models: dict[str, Any], example: Any, repeats: int) -> dict[str, float]:
        asked.append(models)
        return dict.fromkeys(models, 1.0)

    raced, real = [], plan.choose
    monkeypatch.setattr(plan, "choose", lambda name, *rest: (raced.append(name), real(name, *rest))[1])
    monkeypatch.setattr(plan, "measure", slow)
    model = convolutions()
    fast = accelerate(model, batch(model, 2), verbose=False, repeats=2)
    assert sorted(raced) == ["a", "b", "c", "deep", "fc"]  # "fc" is outside the stretches, and not raced again
    assert not fast.plan.accelerated  # type: ignore[union-attr]
    assert fast.plan.note  # type: ignore[union-attr]
    assert len(asked) == 2
    assert not hasattr(fast.forward, "islands")


@pytest.mark.parametrize("value", [0.9, float("nan"), -1])
def test_a_speed_up_below_one_is_refused(value: float) -> None:
    with pytest.raises(ModelError, match="at least 1"):
        accelerate(mlp(), torch.ones(1, 3, 4, 4), min_speedup=value)
