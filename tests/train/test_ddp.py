"""`fit` in several processes is `fit` in one: the same masks, the same weights, the same end."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from openwork.core.metrics import IGNORED
from openwork.core.rng import generator
from openwork.errors import RecipeError
from openwork.methods.sparsify.gmp import GMP
from openwork.methods.sparsify.granet import GraNet
from openwork.methods.sparsify.imp import IMP
from openwork.methods.sparsify.random_pruning import RandomPruning, snip_scores
from openwork.methods.sparsify.rigl import RigL
from openwork.methods.sparsify.set import SET
from openwork.sparsifier import Leg, Probe, Sparsifier, peers
from openwork.train import checkpoints
from openwork.train.ddp import Team, processes, rows
from openwork.train.evaluate import evaluate
from openwork.train.loop import History, fit
from openwork.train.settings import Settings
from openwork.train.synced_norm import synced_norm
from tests import ranks
from tests.train.toys import Toy, assert_same, stop_at, weights

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no fork server")

STEPS = 16
SETTINGS = Settings(steps=STEPS, batch_size=10, lr=0.05, warmup=0.1, label_smoothing=0.1, clip=0.5)
FEW = Settings(steps=9, batch_size=8, lr=0.05)


class Wide(Toy):
    """The toy in float64, with an uneven last batch: 10, 10, 10 and 7 examples, or parts of 3, 3, 2, 2 and 2, 2, 2, 1."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__(37)
        self.x = self.x.to(dtype)

    def steps_per_epoch(self, batch_size: int) -> int:
        return -(-len(self.y) // batch_size)


class Words:
    """Token sequences, of which unequal numbers count; every third sequence counts not at all."""

    name = "words"

    def steps_per_epoch(self, batch_size: int) -> int:
        return 3

    def train_batches(self, seed: int, epoch: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        draw = generator(seed, "words", epoch)
        for _ in range(3):
            x = torch.randint(0, 9, (batch_size, 5), generator=draw)
            y = torch.where(torch.rand(x.shape, generator=draw) < 0.5, x, IGNORED)
            y[::3] = IGNORED
            yield x, y


class Reader(nn.Module):
    """Reads words; the branch of a word that no row holds has no gradient in that process."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 8)
        self.paths = nn.ModuleList(nn.Linear(8, 8) for _ in range(9))
        self.head = nn.Linear(8, 9)
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.table(x)
        for word in range(9):
            if bool((x[:, 0] == word).any()):
                h = h + (x[:, :1, None] == word) * self.paths[word](h).tanh()
        return self.head(h)


def dense_net(dtype: torch.dtype = torch.float64) -> nn.Module:
    layers = [
        nn.Linear(12, 16),
        nn.BatchNorm1d(16),
        nn.ReLU(),
        nn.Linear(16, 16),
        nn.BatchNorm1d(16, momentum=None),
        nn.Linear(16, 3),
    ]
    return nn.Sequential(*layers).to(dtype)


def conv_net(dtype: torch.dtype = torch.float64) -> nn.Module:
    layers = [
        nn.Unflatten(1, (1, 3, 4)),
        nn.Conv2d(1, 6, 2),
        nn.BatchNorm2d(6, affine=False),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(36, 3),
    ]
    return nn.Sequential(*layers).to(dtype)


def result(model: nn.Module, sparsifier: Any, history: History) -> dict[str, Any]:
    masks = {} if sparsifier is None else dict(sparsifier.masks)
    return {"weights": weights(model), "masks": masks, "losses": history.losses, "resumed": history.resumed}


def job(model: nn.Module, method: Sparsifier | None, dtype: torch.dtype, **how: Any) -> dict[str, Any]:
    source = how.pop("source", None) or Wide(dtype)
    return result(model, method, fit(model, source, how.pop("settings", SETTINGS), seed=3, sparsifier=method, **how))


def imp(dtype: torch.dtype) -> dict[str, Any]:
    source, model = Wide(dtype), dense_net(dtype)
    whole = [(source.x, source.y)]

    def train(model: nn.Module, sparsifier: Sparsifier | None, leg: Leg) -> nn.Module:
        how = {"steps": leg.steps, "schedule": leg.schedule, "stream": leg.stream}
        fit(model, source, SETTINGS, seed=3, sparsifier=sparsifier, **how)
        return model

    method = IMP(0.3, total_steps=STEPS, phases=2)
    probe = Probe(
        batches=lambda: source.train_batches(0, 0, 10),
        accuracy=lambda model: evaluate(model, whole).accuracy,
        loss=lambda model: evaluate(model, whole).nll,
    )
    model = method.run(model, train, probe)
    return {"weights": weights(model), "masks": dict(method.masks), "losses": (), "resumed": 0}


def random_by_snip(dtype: torch.dtype) -> dict[str, Any]:
    """The whole batch's scores on every rank, from which all draw the same layer-wise ratios."""
    model, (x, y) = dense_net(dtype).eval(), next(Wide(dtype).train_batches(0, 0, 10))
    model[1], model[4] = nn.Identity(), nn.Identity()  # statistics of a part are not those of the whole
    own = rows(len(x), peers.everyone().world, peers.everyone().place)
    return job(model, RandomPruning(0.3, ratios=snip_scores(model, (x[own], y[own]))), dtype)


JOBS: dict[str, Callable[[torch.dtype], dict[str, Any]]] = {
    "dense": lambda dtype: job(dense_net(dtype), None, dtype),
    "convolution": lambda dtype: job(conv_net(dtype), None, dtype),
    "set": lambda dtype: job(dense_net(dtype), SET(0.3, total_steps=STEPS, every=3), dtype),
    "rigl": lambda dtype: job(dense_net(dtype), RigL(0.3, total_steps=STEPS, every=3, stop=1.0), dtype),
    "gmp": lambda dtype: job(dense_net(dtype), GMP(0.2, total_steps=STEPS, every=2, end=0.9), dtype),
    "granet": lambda dtype: job(conv_net(dtype), GraNet(0.2, total_steps=STEPS, every=3), dtype),
    "random": random_by_snip,
    "imp": imp,
    "words": lambda dtype: job(
        Reader().to(dtype), RigL(0.3, total_steps=STEPS, every=3), dtype, source=Words(), settings=FEW
    ),
}


def run_all(rank: int, dtype: torch.dtype) -> dict[str, dict[str, Any]]:
    found = {}
    for name, run in JOBS.items():
        torch.manual_seed(1000 + 17 * rank)  # so weights differ between ranks, and rank 0's count
        found[name] = run(dtype)
    return found


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


@pytest.mark.parametrize(("world", "dtype", "bound"), [(2, torch.float32, 1e-6), (4, torch.float64, 1e-13)])
def test_many_processes_are_one(world: int, dtype: torch.dtype, bound: float) -> None:
    whole = run_all(0, dtype)
    found = ranks.values(ranks.run(world, run_all, dtype))
    for name, one in whole.items():
        for many in (other[name] for other in found):
            assert_same(many["weights"], found[0][name]["weights"])
            for key, mask in one["masks"].items():
                assert torch.equal(mask, many["masks"][key]), (name, key)
            assert apart(one["weights"], many["weights"]) <= bound, name
            assert [step for step, _ in many["losses"]] == [step for step, _ in one["losses"]]
            assert all(abs(a[1] - b[1]) < 10 * bound for a, b in zip(one["losses"], many["losses"], strict=True)), name
    assert any(bool((~mask).any()) for mask in whole["rigl"]["masks"].values())


# ---- batch normalisation over all parts ---------------------------------------------------------------------------


def norms(rank: int) -> dict[str, float]:
    draw = generator(0, "norm")
    found = {}
    kinds = {
        "1d": (nn.BatchNorm1d(4), (11, 4)),
        "sequence": (nn.BatchNorm1d(4, momentum=0.3), (5, 4, 3)),
        "2d": (nn.BatchNorm2d(4, affine=False), (6, 4, 2, 3)),
        "cumulative": (nn.BatchNorm2d(4, momentum=None), (7, 4, 2, 2)),
        "no statistics": (nn.BatchNorm1d(4, track_running_stats=False), (9, 4)),
    }
    for name, (layer, shape) in kinds.items():
        twin = type(layer)(4, momentum=layer.momentum, affine=layer.affine, track_running_stats=layer.track_running_stats)
        layer.double(), twin.double()
        twin.load_state_dict(layer.state_dict())
        worst = 0.0
        for _ in range(2):
            x = (torch.randn(shape, generator=draw, dtype=torch.float64) * 3 + 7).requires_grad_()
            weight = torch.randn(shape, generator=draw, dtype=torch.float64)
            own = rows(len(x), 2, rank)
            part = x.detach()[own].requires_grad_()
            with synced_norm(layer, peers.everyone()):
                y = layer(part)
                (y * weight[own]).sum().backward()
            expected = twin(x)
            (expected * weight).sum().backward()
            pairs = [(y, expected[own]), (part.grad, x.grad[own])]
            pairs += [(a.double(), b.double()) for a, b in zip(layer.buffers(), twin.buffers(), strict=True)]
            for p in layer.parameters():
                peers.everyone().add_([p.grad])
            pairs += [(a.grad, b.grad) for a, b in zip(layer.parameters(), twin.parameters(), strict=True)]
            worst = max(worst, *(float((a - b).abs().max()) for a, b in pairs))
            layer.zero_grad(), twin.zero_grad()
        assert "forward" not in vars(layer)
        found[name] = worst
    return found


def test_batch_norm_is_over_the_whole_batch() -> None:
    for found in ranks.values(ranks.run(2, norms)):
        assert len(found) == 5
        assert all(worst < 1e-12 for worst in found.values()), found


# ---- checkpoints --------------------------------------------------------------------------------------------------


def halting(rank: int, folder: Path, cut: int | None, every: float, shared: bool) -> dict[str, Any]:
    """A run that is killed, or told to stop, after step `cut`; only rank 0's folder exists unless it is shared."""
    torch.manual_seed(1000 + 17 * rank)
    place = folder if shared or rank == 0 else folder / f"elsewhere-{rank}"

    def on_step(step: int, _loss: float) -> None:
        if step + 1 == cut and rank == 1:
            os.kill(os.getpid(), signal.SIGINT if every > 1 else signal.SIGKILL)

    model, rigl = dense_net(), RigL(0.3, total_steps=STEPS, every=3, stop=1.0)
    history = fit(model, Wide(), SETTINGS, seed=3, sparsifier=rigl, checkpoint=place, every_seconds=every, on_step=on_step)
    return {**result(model, rigl, history), "written": sorted(path.name for path in place.glob("*"))}


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_a_run_continues_bit_for_bit(tmp_path: Path, how: str) -> None:
    every = 0.0 if how == "killed" else 1e6
    whole = ranks.values(ranks.run(2, halting, tmp_path / "whole", None, 1e6, True))
    first = ranks.run(2, halting, tmp_path / "cut", 7, every, False)
    if how == "killed":
        assert (first[1].error, first[1].value) == (None, None)
        assert first[0].error is not None
    else:  # Ctrl-C on one rank stops all after the same step
        assert [one.error for one in first] == ["KeyboardInterrupt"] * 2
    reached = checkpoints.newest(tmp_path / "cut")[0].step
    assert reached in (6, 7) if how == "killed" else reached == 8
    again = ranks.values(ranks.run(2, halting, tmp_path / "cut", None, 1e6, False))
    for one, other in zip(whole, again, strict=True):
        assert other["resumed"] == reached
        assert_same(one["weights"], other["weights"])
        assert_same(one["masks"], other["masks"])
        assert one["losses"] == other["losses"]
    assert whole[0]["written"] == ["run.json", f"step-{STEPS:06d}"]
    assert again[0]["written"] == ["run.json", f"step-{reached:06d}", f"step-{STEPS:06d}"]
    assert again[1]["written"] == [], "only rank 0 writes"


def refused_folder(rank: int, folder: Path) -> tuple[str, str]:
    return caught(lambda: job(dense_net(), None, torch.float64, checkpoint=folder if rank == 0 else folder / "none"))


def test_what_rank_0_finds_in_the_folder_is_told_by_all(tmp_path: Path) -> None:
    job(dense_net(), None, torch.float64, checkpoint=tmp_path / "alone")
    other = Settings(steps=STEPS, batch_size=10, lr=0.01)
    job(dense_net(), None, torch.float64, checkpoint=tmp_path / "other", settings=other)
    for name, expected in (
        ("alone", ("", "")),
        ("other", ("StoreError", "are of another run: 'lr' was 0.01, now it is 0.05")),
    ):
        zero, one = ranks.values(ranks.run(2, refused_folder, tmp_path / name))
        assert zero == one
        assert zero[0] == expected[0]
        assert expected[1] in zero[1]
    (tmp_path / "other" / f"step-{STEPS:06d}" / "manifest.json").write_text("{}")
    zero, one = ranks.values(ranks.run(2, refused_folder, tmp_path / "other"))
    assert zero == one
    assert zero[0] == "FormatError"


def moved(rank: int, folder: Path, steps: int) -> dict[str, Any]:
    torch.manual_seed(1000)
    model, rigl = dense_net(), RigL(0.3, total_steps=STEPS, every=3, stop=1.0)
    history = fit(model, Wide(), SETTINGS, seed=3, sparsifier=rigl, checkpoint=folder, on_step=stop_at(steps))
    return {**result(model, rigl, history), "notes": history.notes}


def test_a_run_may_continue_in_another_number_of_processes(tmp_path: Path) -> None:
    whole = moved(0, tmp_path / "whole", STEPS + 1)
    with pytest.raises(KeyboardInterrupt):
        moved(0, tmp_path / "run", 5)
    zero, one = ranks.values(ranks.run(2, moved, tmp_path / "run", STEPS + 1))
    assert zero["resumed"] == one["resumed"] == 5
    assert "2 processes, begun under" in zero["notes"][0]
    assert all(torch.equal(mask, zero["masks"][name]) for name, mask in whole["masks"].items())
    assert apart(whole["weights"], zero["weights"]) < 1e-13


# ---- what goes wrong on one rank is told by all -------------------------------------------------------------------


class Spoilt(Wide):
    """Gives one bad number from step 5 on, in the rows of one rank."""

    def __init__(self, row: int) -> None:
        super().__init__()
        self.row = row

    def train_batches(self, seed: int, epoch: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        for index, (x, y) in enumerate(super().train_batches(seed, epoch, batch_size)):
            if epoch == 1 and index == 1:
                x = x.clone()
                x[self.row, 0] = float("nan")
            yield x, y


class Broken(nn.Module):
    """Overflows on one rank only, at its sixth forward pass."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.inner, self.mine, self.calls = dense_net(), rank == 1, 0
        self.inner[1] = nn.Identity()
        self.inner[4] = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.inner(x * float("inf") if self.mine and self.calls > 5 else x)


def caught(act: Callable[[], Any]) -> tuple[str, str]:
    try:
        act()
    except BaseException as error:
        return type(error).__name__, str(error)
    return "", ""


def wrong(rank: int, folder: Path) -> dict[str, tuple[str, str, int]]:
    seen: list[int] = []

    def try_it(act: Callable[[], Any]) -> tuple[str, str, int]:
        seen.clear()
        return (*caught(act), len(seen))

    def tell(step: int, _loss: float) -> None:
        seen.append(step)

    def tampered(step: int, _loss: float, model: nn.Module) -> None:
        if step == 6 and rank == 1:
            with torch.no_grad():
                model[0].weight[2, 3] += 1e-9

    def run(model: nn.Module, **how: Any) -> dict[str, Any]:
        return job(model, how.pop("method", None), torch.float64, **{"on_step": tell, **how})

    def drift() -> None:
        model = dense_net()
        run(model, on_step=lambda step, loss: tampered(step, loss, model), checkpoint=folder, every_seconds=0.0)

    def held(model: nn.Module) -> None:
        fixed = RandomPruning(0.3)

        def flip(step: int) -> None:
            if step == 6 and rank == 1:
                mask = fixed.masks["0.weight"]
                mask[0, 0] = ~mask[0, 0]

        run(model, method=fixed, observe=flip)

    norms = dense_net()
    plain = Broken(rank)
    source = Spoilt(8)
    few = Settings(steps=4, batch_size=1)
    other = Settings(steps=4, batch_size=10, lr=0.1 * (1 + rank))
    shard = Wide()
    shard.x, shard.y = shard.x[rank::2], shard.y[rank::2]
    return {
        "input, batch norm": try_it(lambda: run(norms, source=source)),
        "input": try_it(lambda: run(plain_net(), source=source)),
        "activation": try_it(lambda: run(plain)),
        "few": try_it(lambda: run(dense_net(), settings=few)),
        "settings": try_it(lambda: run(dense_net(), settings=other)),
        "sharded data": try_it(lambda: run(dense_net(), source=shard)),
        "models": try_it(lambda: run(dense_net() if rank else conv_net())),
        "sparsifiers": try_it(lambda: run(dense_net(), method=SET(0.3, total_steps=9) if rank else None)),
        "wrapped": try_it(lambda: run(nn.parallel.DistributedDataParallel(dense_net()))),
        "drift": try_it(drift),
        "held masks": try_it(lambda: held(dense_net())),
    }


def plain_net() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)).double()


NAN = "on rank 1, training diverged at step 5: the loss is nan and the first non-finite tensor is "
ODD = "are not the same in all 2 processes: rank 1 differs from rank 0 in "
WRONG = {
    "input, batch norm": ("DivergedError", NAN + "the input batch", 5),
    "input": ("DivergedError", NAN + "the input batch", 5),
    "activation": ("DivergedError", NAN + "the output of 'inner.0'", 5),
    "few": ("DataError", "a batch of 1 cannot be shared by 2 processes", 0),
    "settings": ("RecipeError", f"the runs {ODD}'the training settings'", 0),
    "sharded data": ("DataError", f"the first batches {ODD}'inputs'", 0),
    "models": ("RecipeError", "rank 1 differs from rank 0 in \"the model's tensors\"", 0),
    "sparsifiers": ("RecipeError", "rank 1 differs from rank 0 in 'the training settings'", 0),
    "wrapped": ("ModelError", "give it the model inside DistributedDataParallel, model.module", 0),
    "drift": ("ModelError", f"the weights {ODD}'0.weight'", 0),
    "held masks": ("MaskError", "rank 1 differs from rank 0 in '0.weight'", 16),
}  # fmt: skip


def test_what_is_wrong_on_one_rank_stops_all_with_its_name(tmp_path: Path) -> None:
    zero, one = ranks.values(ranks.run(2, wrong, tmp_path))
    for name, (kind, message, steps) in WRONG.items():
        assert zero[name] == one[name], name
        assert zero[name][0] == kind, (name, zero[name])
        assert message in zero[name][1], (name, zero[name])
        assert zero[name][2] == steps, name
    assert checkpoints.newest(tmp_path)[0].step == 6, "the state with the changed weight was never written"


def full_disk(rank: int, folder: Path) -> dict[str, Any]:
    """Rank 0 cannot write its checkpoints: they are lost, the run is not."""
    from openwork.errors import StoreError

    def write(place: Path, snapshot: Any) -> Path:
        raise StoreError(f"cannot write {str(place)!r}: the disk is full")

    if rank == 0:
        checkpoints.write = write
    torch.manual_seed(1000)
    model = dense_net()
    history = fit(model, Wide(), SETTINGS, seed=3, checkpoint=folder, every_seconds=0.0)
    return {"weights": weights(model), "notes": history.notes}


def test_a_full_disk_on_rank_0_costs_checkpoints_only(tmp_path: Path) -> None:
    zero, one = ranks.values(ranks.run(2, full_disk, tmp_path))
    assert_same(zero["weights"], one["weights"])
    assert len(zero["notes"]) >= STEPS
    assert one["notes"] == ()


# ---- what travels -------------------------------------------------------------------------------------------------


def traffic(rank: int) -> dict[str, Any]:
    import torch.distributed as dist

    sent: list[int] = []
    real = dist.all_reduce

    def spy(flat: Tensor, **options: Any) -> Any:
        sent.append(flat.numel())
        return real(flat, **options)

    dist.all_reduce = spy
    model = nn.Sequential(nn.Linear(12, 40, bias=False), nn.ReLU(), nn.Linear(40, 3, bias=False)).double()
    rigl = RigL(0.1, total_steps=9, every=4, start=4, stop=1.0, allocate="uniform")
    settings = Settings(steps=9, batch_size=10, lr=0.05)
    fit(model, Wide(), settings, seed=3, sparsifier=rigl)
    dist.all_reduce = real
    return {"sent": sent, "masks": dict(rigl.masks)}


def test_only_kept_gradients_travel_between_revisions() -> None:
    for one in ranks.values(ranks.run(2, traffic)):
        whole, kept, extra = 600, 60, 2  # a number a parameter tells which have a gradient
        assert one["sent"] == [kept + extra] * 4 + [whole + extra] + [kept + extra] * 3 + [whole + extra]


# ---- joining torchrun's processes ---------------------------------------------------------------------------------


def joining(rank: int) -> dict[str, Any]:
    with processes(timeout=20) as found:
        row = found.gather(torch.tensor([rank * 10])).reshape(-1).tolist()
        said = found.ask(lambda: f"from {rank}".encode(), 1).decode()
        tensors = [torch.full((3,), float(rank)), torch.full((2,), rank), torch.full((1,), float(rank)).expand(4)]
        found.copy_first_(tensors[:1])
        found.add_(tensors[1:])
        failure = caught(lambda: found.ask(lambda: (_ for _ in ()).throw(ValueError("x" * 5))))
        noise = Team(nn.Linear(2, 2), found).noise(5)
    return {"row": row, "said": said, "values": [one.tolist() for one in tensors], "failure": failure, "noise": noise,
            "after": peers.everyone() is peers.ALONE, "first": found.first}  # fmt: skip


def test_processes_join_and_leave() -> None:
    zero, one = ranks.values(ranks.run(2, joining, group=False))
    for found in (zero, one):
        assert found["row"] == [0, 10]
        assert found["said"] == "from 1"
        assert found["values"] == [[0.0] * 3, [1] * 2, [1.0] * 4]
        assert found["after"]
    assert (zero["first"], one["first"]) == (True, False)
    assert zero["failure"] == ("ValueError", "xxxxx")
    assert one["failure"] == ("OpenworkError", "rank 0 failed with ValueError: xxxxx")
    assert zero["noise"] == 5 != one["noise"]


def test_without_torchrun_one_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for word in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(word, raising=False)
    with processes() as found:
        assert found is peers.ALONE
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RecipeError, match=r"WORLD_SIZE is 2 but RANK, MASTER_ADDR, MASTER_PORT is not set"), processes():
        pass
