"""Processes that do not hold the same masks all stop, with the rank and the layer named; none waits for another."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from openwork.core.masks import Masks
from openwork.core.schedules import Every
from openwork.errors import MaskError, OpenworkError
from openwork.methods.sparsify.dpf import DPF
from openwork.methods.sparsify.gmp import GMP
from openwork.methods.sparsify.magnitude import Magnitude
from openwork.methods.sparsify.random_pruning import RandomPruning, grasp_scores, snip_scores
from openwork.methods.sparsify.rigl import RigL
from openwork.methods.sparsify.set import SET
from openwork.sparsifier import Fixed, Sparsifier, agreement
from openwork.sparsifier.peers import ALONE, Peers, everyone
from openwork.train.ddp import mean_of_all, rows
from tests import ranks
from tests.sparsifier.test_ddp import Activations, batches, network, part

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no fork server")

STEPS = 12


def loop(
    make: Callable[[nn.Sequential], Sparsifier],
    *,
    before: Callable[[int, Sparsifier, nn.Module], None] = lambda *_: None,
    local: bool = False,
) -> Sparsifier:
    """Twelve steps of a user's loop; `before` is called before each."""
    inner = network(torch.float64)
    model = DistributedDataParallel(inner)
    optimizer = torch.optim.SGD(inner.parameters(), lr=0.1, momentum=0.9)
    sparsifier = make(inner).attach(model, optimizer)
    for step, (x, y) in zip(range(STEPS), batches(torch.float64), strict=False):
        optimizer.zero_grad()
        a, b = part(x, y)
        if local:
            with model.no_sync():
                F.cross_entropy(model(a), b).backward()
        else:
            F.cross_entropy(model(a), b).backward()
        before(step, sparsifier, model)
        optimizer.step()
    return sparsifier


def caught(act: Callable[[], Any]) -> tuple[str, str, int]:
    """Return kind and message of the error that `act` raises, and the sparsifier's step if it tells one."""
    try:
        act()
    except Exception as error:
        return type(error).__name__, str(error), 0
    return "", "nothing was raised", 0


# ---- a flipped bit ------------------------------------------------------------------------------------------------

FLIPPED = {
    "set": lambda _: SET(0.3, total_steps=STEPS, every=4),
    "rigl": lambda _: RigL(0.3, total_steps=STEPS, every=4, stop=1.0),
    "gmp": lambda _: GMP(0.2, total_steps=STEPS, every=4, end=0.9),
    "dpf": lambda _: DPF(0.2, total_steps=STEPS, every=4),  # chooses from the dense weights, whatever the mask was
}


def flip(sparsifier: Sparsifier, name: str, position: int) -> None:
    masks = {key: mask.clone() for key, mask in sparsifier.masks.items()}
    masks[name].view(-1)[position] ^= True
    sparsifier.masks = Masks(masks)


def flip_all(rank: int, culprit: int) -> dict[str, tuple[str, str, int]]:
    found = {}
    for method, make in FLIPPED.items():
        reached = []

        def before(step: int, sparsifier: Sparsifier, _model: nn.Module, reached: list[int] = reached) -> None:
            reached.append(step)
            if step == 2 and rank == culprit:
                flip(sparsifier, "2.weight", 37)

        kind, message, _ = caught(lambda make=make, before=before: loop(make, before=before))
        found[method] = kind, message, reached[-1]
    return found


@pytest.mark.parametrize("world", [2, 4])
def test_one_flipped_bit_stops_every_rank_at_the_next_revision(world: int) -> None:
    culprit = world - 1
    found = ranks.values(ranks.run(world, flip_all, culprit))
    for method in FLIPPED:
        assert len({one[method] for one in found}) == 1, "every rank says the same"
        kind, message, step = found[0][method]
        assert kind == "MaskError"
        assert step == 4, "the flip came before step 2, the next revision is at step 4"
        assert message.startswith(f"the masks at step 4 are not the same in all {world} processes: rank {culprit} differs ")
        assert "from rank 0 in '2.weight'" in message


# ---- other disagreements, all in one group ------------------------------------------------------------------------


class Failing(Sparsifier):
    """Fails, or decides, on one rank only."""

    every = Every(3, 3)

    def __init__(self, what: str) -> None:
        super().__init__(0.5, allocate="uniform")
        self.what = what

    def initial(self, params: Mapping[str, nn.Parameter]) -> Masks:
        if self.what == "initial" and dist.get_rank() == 1:
            raise ValueError("out of luck")
        return self.random_masks(params)

    def revise(self, params: Mapping[str, nn.Parameter], grads: Any, step: int) -> Masks | None:
        if step not in self.every:
            return None
        if self.what == "revise" and dist.get_rank() == 1:
            raise ValueError("out of luck")
        return self.masks if self.what == "decide" and dist.get_rank() == 1 else None


class Careless(Activations):
    """Forgets to average what it measured."""

    def averaged(self, statistics: Any, weight: float = 1.0) -> Any:
        return dict(statistics)


def disagreements(rank: int) -> dict[str, tuple[str, str, int]]:
    def bare(make: Sparsifier, model: nn.Module | None = None) -> None:
        model = model or network(torch.float64)  # weights of this rank's own global generator
        make.attach(model, torch.optim.SGD(model.parameters(), lr=0.1))

    def poisoned(step: int, sparsifier: Sparsifier, model: nn.Module) -> None:
        if step == 4 and rank == 1:
            with torch.no_grad():
                next(model.parameters())[0, 0] = float("nan")

    def drifted(step: int, sparsifier: Sparsifier, model: nn.Module) -> None:
        if rank == 1:
            with torch.no_grad():
                model.module[0].weight.mul_(torch.linspace(0.5, 1.5, 12))

    jobs: dict[str, Callable[[], Any]] = {
        "seed": lambda: loop(lambda _: SET(0.3, total_steps=STEPS, seed=rank)),
        "seed later": lambda: loop(lambda _: GMP(0.3, total_steps=STEPS, seed=rank)),
        "density": lambda: loop(lambda _: SET(0.3 + 0.1 * rank, total_steps=STEPS)),
        "method": lambda: loop(lambda _: SET(0.3, total_steps=STEPS) if rank else RigL(0.3, total_steps=STEPS)),
        "every": lambda: loop(lambda _: SET(0.3, total_steps=STEPS, every=1 + rank)),
        "weights": lambda: bare(Magnitude(0.3, total_steps=STEPS, at=0.0)),
        "layers": lambda: bare(
            SET(0.3, total_steps=9), nn.Sequential(nn.Linear(9, 9), *[nn.Linear(9, 9)] * rank, nn.Linear(9, 8 + rank))
        ),
        "initial": lambda: loop(lambda _: Failing("initial")),
        "revise": lambda: loop(lambda _: Failing("revise")),
        "decide": lambda: loop(lambda _: Failing("decide")),
        "careless": lambda: loop(Careless),
        "unsynced": lambda: loop(lambda _: RigL(0.3, total_steps=STEPS, every=3, start=3), local=True),
        "poisoned": lambda: loop(lambda _: GMP(0.3, total_steps=STEPS, every=5, end=1.0), before=poisoned),
        "drifted": lambda: loop(lambda _: GMP(0.3, total_steps=STEPS, every=3, end=1.0), before=drifted),
    }
    return {name: caught(job) for name, job in jobs.items()}


EXPECTED = {
    "seed": "the sparsifiers are not the same in all 2 processes: rank 1 differs from rank 0 in 'generator'",
    "seed later": "rank 1 differs from rank 0 in 'generator'",
    "density": "rank 1 differs from rank 0 in 'density'",
    "method": "rank 1 differs from rank 0 in 'method'",
    "every": "rank 1 differs from rank 0 in 'every'",
    "weights": "the masks at step 0 are not the same in all 2 processes: rank 1 differs from rank 0 in '0.weight'",
    "layers": "rank 1 differs from rank 0 in 'masked parameters'",
    "decide": "the masks at step 3 are not the same in all 2 processes: rank 1 decided where rank 0 did not",
    "careless": "the masks at step 4 are not the same in all 2 processes: rank 1 differs from rank 0 in '0.weight'",
    "unsynced": "the masks at step 3 are not the same in all 2 processes: rank 1 differs from rank 0 in '0.weight'",
    "drifted": "the masks at step 3 are not the same in all 2 processes: rank 1 differs from rank 0 in '0.weight'",
}


def test_every_disagreement_is_told_on_every_rank() -> None:
    zero, one = ranks.values(ranks.run(2, disagreements))
    for name, expected in EXPECTED.items():
        assert zero[name] == one[name], name
        assert zero[name][0] == "MaskError", (name, zero[name])
        assert expected in zero[name][1], (name, zero[name])
    # What fails on one rank is told there in its own words, and elsewhere by its rank.
    assert one["initial"][:2] == one["revise"][:2] == ("ValueError", "out of luck")
    assert zero["initial"][1] == "the sparsifiers could not be decided: rank 1 failed; the message there says why"
    assert zero["revise"][1] == "the masks at step 3 could not be decided: rank 1 failed; the message there says why"
    # NaN in one rank's weights spreads by the next averaged gradient, so both see it at the revision.
    assert {zero["poisoned"][0], one["poisoned"][0]} == {"MaskError"}


# ---- what is said, exactly ----------------------------------------------------------------------------------------


class Table(Peers):
    """Peers whose rows are known: what each of several ranks would gather."""

    def gather(self, row: torch.Tensor) -> torch.Tensor:
        return self.group


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.lists(st.integers(0, 2), min_size=3, max_size=3), min_size=2, max_size=5), st.data())
def test_all_ranks_say_the_same_and_name_the_fewest(rows_of: list[list[int]], data: st.DataObject) -> None:
    """Whatever the digests, every rank raises or none does; the ranks named are those outside of a commonest row."""
    world = len(rows_of)
    numbers = tuple(sorted(data.draw(st.sets(st.integers(0, 40), min_size=world, max_size=world))))
    gathered = torch.tensor([[1, *row] for row in rows_of])
    said = []
    for rank, row in zip(numbers, rows_of, strict=True):
        peers = Table(rank, numbers, gathered)
        kind, message, _ = caught(lambda p=peers, r=row: agreement.together(p, lambda: r, list, "abc", "they", "mend it"))
        said.append((kind, message))
    assert len(set(said)) == 1
    counts = [rows_of.count(row) for row in rows_of]
    assert (said[0][0] == "MaskError") == (max(counts) < world)
    if max(counts) < world:
        right = rows_of[counts.index(max(counts))]
        for rank, row in zip(numbers, rows_of, strict=True):
            first = next((name for name, one, other in zip("abc", row, right, strict=True) if one != other), None)
            assert (f"rank {rank} differs from rank {numbers[counts.index(max(counts))]} in {first!r}" in said[0][1]) == (
                row != right
            )
        assert said[0][1].endswith("; mend it")


def test_a_digest_tells_every_bit_and_where_a_string_ends() -> None:
    assert agreement.digest(b"ab", b"c") != agreement.digest(b"a", b"bc")
    mask = torch.zeros(3, 7, dtype=torch.bool)
    plain = agreement.digests({"w": mask})
    found = set()
    for place in range(mask.numel()):
        other = mask.clone()
        other.view(-1)[place] = True
        found.add(agreement.digests({"w": other})[0])
    assert len(found | set(plain)) == mask.numel() + 1
    assert all(-(2**63) <= one < 2**63 for one in found)


# ---- cost, and who takes part -------------------------------------------------------------------------------------


def counted(rank: int) -> dict[str, Any]:
    sent: list[int] = []
    real = dist.all_gather

    def spy(into: list[torch.Tensor], own: torch.Tensor, **options: Any) -> Any:
        sent.append(own.numel() * own.element_size())
        return real(into, own, **options)

    marks = {}
    dist.all_gather = spy

    def before(step: int, sparsifier: Sparsifier, _model: nn.Module) -> None:
        marks[step] = len(sent)

    sparsifier = loop(lambda _: RigL(0.3, total_steps=STEPS, every=5, start=5, stop=1.0), before=before)
    dist.all_gather = real
    return {"marks": marks, "sent": sent, "layers": len(sparsifier.masks), "changes": len(sparsifier.history)}


def test_a_revision_costs_one_gather_of_a_word_a_layer() -> None:
    for one in ranks.values(ranks.run(2, counted)):
        assert one["changes"] == 3, "at the start and at steps 5 and 10"
        marks = one["marks"]
        assert marks[0] == 2, "attach: settings, then masks"
        grown = [step for step in range(STEPS - 1) if marks[step + 1] > marks[step]]
        assert grown == [5, 10]
        assert one["sent"][2:] == [8 * (1 + one["layers"])] * 2


def by_itself(rank: int) -> dict[str, Any]:
    """Rank 0 prunes and trains a model of its own while rank 1 does nothing of the kind."""
    torch.manual_seed(0)
    if rank == 1:
        dist.barrier()
        return {}
    model = network(torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    once = Magnitude(0.5, total_steps=9, at=0.0).attach(model).finalize()  # without an optimizer nobody is asked
    sparsifier = SET(0.3, total_steps=6, every=2).among(None).attach(model, optimizer)
    for _, (x, y) in zip(range(6), batches(torch.float64), strict=False):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    scores = snip_scores(model, (x, y), redraw=False, group=None)
    dist.barrier()
    return {"once": once.density(), "changes": len(sparsifier.history), "scores": len(scores)}


def test_a_process_may_work_by_itself() -> None:
    zero, _ = ranks.values(ranks.run(2, by_itself))
    assert zero == {"once": pytest.approx(0.5, abs=0.01), "changes": 3, "scores": 3}


def some_of_them(rank: int) -> dict[str, Any]:
    """Ranks 0 and 2 train one model, ranks 1 and 3 another: messages name the numbers of the whole world."""
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    inner = network(torch.float64)
    model = DistributedDataParallel(inner, process_group=groups[rank % 2])
    kind, message, _ = caught(lambda: SET(0.3, total_steps=9, seed=rank if rank in (1, 3) else 0).attach(
        model, torch.optim.SGD(inner.parameters(), lr=0.1)
    ))  # fmt: skip
    foreign = caught(lambda: SET(0.3, total_steps=9).among(groups[1 - rank % 2]))
    return {"kind": kind, "message": message, "foreign": foreign}


def test_a_group_of_some_ranks() -> None:
    found = ranks.values(ranks.run(4, some_of_them))
    assert [one["kind"] for one in found] == ["", "MaskError", "", "MaskError"]
    assert "rank 3 differs from rank 1 in 'generator'" in found[1]["message"] == found[3]["message"]
    assert {one["foreign"][0] for one in found} <= {"MaskError", "ValueError"}


# ---- batches of unequal number and size ---------------------------------------------------------------------------


def joined(rank: int, method: str) -> dict[str, Any]:
    """Rank 1 has one batch less than rank 0, under torch's Join."""
    inner = network(torch.float64)
    model = DistributedDataParallel(inner)
    optimizer = torch.optim.SGD(inner.parameters(), lr=0.1)
    masks = {"0.weight": torch.arange(24 * 12).view(24, 12) % 3 == 0}
    sparsifier = Fixed(masks) if method == "fixed" else SET(0.3, total_steps=9, every=2)
    sparsifier.attach(model, optimizer)
    mine = [part(x, y) for _, (x, y) in zip(range(6 - rank), batches(torch.float64), strict=False)]
    with Join([model]):
        for x, y in mine:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    sparsifier.project()
    sparsifier.check_agreement()
    sparsifier.masks.check(inner)
    return {"weights": dict(inner.state_dict()), "step": sparsifier.step}


def test_join_holds_masks_and_refuses_to_change_them() -> None:
    zero, one = ranks.values(ranks.run(2, joined, "fixed"))
    assert (zero["step"], one["step"]) == (6, 5)
    assert all(torch.equal(zero["weights"][name], one["weights"][name]) for name in zero["weights"])
    for ended in ranks.run(2, joined, "set"):
        assert ended.error == "MaskError"
        assert "masks cannot change inside torch's Join" in ended.message


def emptied(rank: int) -> dict[str, Any]:
    """A last batch of 3 for 4 ranks: one has no example at all and takes part with a loss of nothing."""
    inner = network(torch.float64)
    model = DistributedDataParallel(inner)
    x, y = next(batches(torch.float64))
    x, y = x[:3], y[:3]
    own = rows(3, 4, rank)
    mean_of_all(F.cross_entropy(model(x[own]), y[own], reduction="none")).backward()
    averaged = [param.grad.clone() for param in inner.parameters()]
    inner.zero_grad()
    F.cross_entropy(inner(x), y).backward()
    return {"apart": max(float((a - p.grad).abs().max()) for a, p in zip(averaged, inner.parameters(), strict=True))}


def test_a_rank_without_examples() -> None:
    assert all(one["apart"] < 1e-15 for one in ranks.values(ranks.run(4, emptied)))


@given(st.integers(0, 50), st.integers(1, 9))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_rows_share_every_batch_out(total: int, world: int) -> None:
    parts = [list(range(total))[rows(total, world, place)] for place in range(world)]
    assert [row for part in parts for row in part] == list(range(total))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


# ---- scores from batches, states, and what is refused ---------------------------------------------------------------


def scores(rank: int) -> dict[str, Any]:
    torch.manual_seed(1000)
    model = network(torch.float64)
    whole = [pair for _, pair in zip(range(4), batches(torch.float64), strict=False)]
    if everyone().alone:
        return {"snip": snip_scores(model, whole[2], seed=3), "grasp": grasp_scores(model, whole)}
    torch.manual_seed(1000 + rank)
    model = network(torch.float64) if rank else model  # other weights on rank 1: rank 0's count
    found = {"snip": snip_scores(DistributedDataParallel(model), part(*whole[2]), seed=3)}
    torch.manual_seed(1000 + rank)
    model = network(torch.float64)
    found["grasp"] = grasp_scores(model, whole[:3] if rank else whole[3:])
    return found


def test_scores_of_batches_are_those_of_the_whole() -> None:
    whole = scores(0)
    for one in ranks.values(ranks.run(2, scores)):
        for kind in ("snip", "grasp"):
            assert whole[kind].keys() == one[kind].keys()
            for name, score in whole[kind].items():
                torch.testing.assert_close(one[kind][name], score, rtol=1e-12, atol=1e-15)


def half(rank: int, steps: int, state: dict[str, Any] | None) -> dict[str, Any]:
    """Train from step `steps` of a state, or for `steps`; the state has the model's own names either way."""
    torch.manual_seed(1000)
    inner = network(torch.float64)
    model: nn.Module = inner if everyone().alone else DistributedDataParallel(inner)
    optimizer = torch.optim.SGD(inner.parameters(), lr=0.1)
    sparsifier = RigL(0.3, total_steps=STEPS, every=2, stop=1.0)
    start, end = 0, steps
    if state is not None:
        start, end = steps, STEPS
        inner.load_state_dict(state["weights"])
        sparsifier.load_state_dict(state["sparsifier"])
    sparsifier.attach(model, optimizer)
    for step, (x, y) in zip(range(end), batches(torch.float64), strict=False):
        if step < start:
            continue
        optimizer.zero_grad()
        a, b = part(x, y)
        mean_of_all(F.cross_entropy(model(a), b, reduction="none")).backward()
        optimizer.step()
    return {"weights": dict(inner.state_dict()), "sparsifier": sparsifier.state_dict()}


def test_a_state_goes_from_many_processes_to_one_and_back() -> None:
    whole = half(0, STEPS, None)
    many = ranks.values(ranks.run(2, half, 5, None))[0]
    alone = half(0, 5, None)
    for found in (half(0, 5, many), *ranks.values(ranks.run(2, half, 5, alone))):
        masks, expected = (
            Masks.load({k[6:]: v for k, v in one["sparsifier"].items() if k.startswith("masks.")}) for one in (found, whole)
        )
        assert masks.keys() == {"0.weight", "2.weight", "4.weight"}
        assert all(torch.equal(masks[name], expected[name]) for name in masks)
        assert all(torch.allclose(found["weights"][n], w, rtol=0, atol=1e-13) for n, w in whole["weights"].items())


def sharded(rank: int) -> tuple[str, str, int]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = network(torch.float32)
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    return caught(lambda: SET(0.3, total_steps=9).attach(model, torch.optim.SGD(model.parameters(), lr=0.1)))


def test_sharded_parameters_are_refused() -> None:
    for kind, message, _ in ranks.values(ranks.run(2, sharded)):
        assert kind == "MaskError"
        assert "sharded over processes (FSDP or DTensor)" in message


def killed(rank: int) -> None:
    def before(step: int, _sparsifier: Sparsifier, _model: nn.Module) -> None:
        if step == 4 and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    loop(lambda _: SET(0.3, total_steps=STEPS, every=4), before=before)


def test_a_killed_rank_does_not_leave_the_others_waiting() -> None:
    zero, one = ranks.run(2, killed)
    assert one.error is None
    assert one.value is None
    assert zero.error is not None
    assert zero.seconds < ranks.PATIENCE, "the broken connection tells, not the timeout"


def test_alone_nothing_is_asked_and_nothing_copied() -> None:
    assert everyone() is ALONE
    tensor = torch.arange(3.0)
    ALONE.add_([tensor])
    ALONE.mean_([tensor], 0.0)
    ALONE.copy_first_([tensor])
    assert tensor.tolist() == [0, 1, 2]
    assert ALONE.ask(lambda: b"x") == b"x"
    with pytest.raises(OpenworkError, match="no"):
        ALONE.ask(lambda: (_ for _ in ()).throw(MaskError("no")))
    assert RandomPruning(0.5).attach(network(torch.float32)).averaged({"a": tensor}, 3)["a"].tolist() == [0, 1, 2]
