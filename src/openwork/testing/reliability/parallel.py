"""R9, R10: processes that train one model together hold the same masks, and notice when one does not."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from openwork.core.rng import generator
from openwork.errors import MaskError
from openwork.testing import faults
from openwork.testing.reliability import _children, _work
from openwork.testing.reliability._rows import Measured, Part, Parts, Scale, complaints, total
from openwork.train.loop import fit
from openwork.train.settings import Settings

STEPS, EVERY, CLOSE = 30, 4, 1e-6


class Uneven(_work.Clusters):
    """Clusters whose batches no number of ranks divides, the last of an epoch smaller than the others."""

    def steps_per_epoch(self, batch_size: int) -> int:
        """Return how many batches there are, the last one included."""
        return -(-len(self.y) // batch_size)

    def train_batches(self, seed: int, epoch: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield all batches of an epoch."""
        order = torch.randperm(len(self.y), generator=generator(seed, "order", epoch))
        for chosen in torch.split(order, batch_size):
            yield self.x[chosen], self.y[chosen]


class Wide(Uneven):
    """The same in float64."""

    def __init__(self, n: int) -> None:
        super().__init__(n)
        self.x = self.x.double()


def one_rank(rank: int, world: int, method: str, folder: str, flip: int | None, wide: bool) -> dict[str, Any]:
    """Train as one of `world` processes with a global seed of its own.

    Args:
        rank: which process this is.
        world: how many there are.
        method: what trains.
        folder: where they meet, and where the weights go.
        flip: the rank whose mask gets one wrong bit, if any.
        wide: train in float64.
    """
    import torch.distributed as dist

    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    torch.manual_seed(1000 + rank)
    model, held = _net().to(torch.float64 if wide else torch.float32), _sparsifier(method)
    flipped: list[int] = []

    def on_step(step: int, _loss: float) -> None:
        if flip is not None and step == 9:
            faults.rank_disagrees(held, rank=flip, name="3.weight", index=5)
            flipped.append(held.step)

    settings = Settings(steps=STEPS, batch_size=27, lr=0.01, schedule="constant")
    said, revised = "", 0
    try:
        fit(model, (Wide if wide else Uneven)(100), settings, seed=0, sparsifier=held, on_step=on_step)
    except MaskError as error:
        said, revised = str(error), len([step for step, _ in held.history if flipped and step >= flipped[0]])
    finally:
        if world > 1:
            dist.destroy_process_group()
    safetensors.torch.save_file(model.state_dict(), f"{folder}/{world}-{rank}.safetensors")
    return {"masks": _work.digest(held.masks), "said": said, "later revisions": revised, "step": held.step}


def _net() -> nn.Module:
    """Return a network without dropout: what a rank draws for itself is its own."""
    return nn.Sequential(*(layer for layer in _work.net().children() if not isinstance(layer, nn.Dropout)))


def _sparsifier(method: str) -> Any:
    held = _work.build(method, 0.4, STEPS)
    held.every = type(held.every)(EVERY)
    return held


def together(world: int, method: str, folder: Path, flip: int | None = None, wide: bool = False) -> list[dict[str, Any]]:
    """Run `world` ranks at once and return what each found.

    Raises:
        AssertionError: if one of them ends without an answer.
    """
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(world) as pool:
        ended = list(
            pool.map(lambda rank: _children.call(one_rank, rank, world, method, str(folder), flip, wide), range(world))
        )
    lost = [rank for rank, one in enumerate(ended) if one.value is None]
    if lost:
        raise AssertionError(f"rank {lost[0]} ended with status {ended[lost[0]].code} and without an answer")
    return [one.value for one in ended]


def agreeing(world: int, method: str, wide: bool = False) -> Part:
    """Compare the ranks' masks with one another and with one process, and their weights with that process'."""
    with _children.folder() as folder:
        (alone,) = together(1, method, folder, wide=wide)
        found = together(world, method, folder, wide=wide)
        reference = safetensors.torch.load_file(folder / "1-0.safetensors")
        apart = 0.0
        for rank in range(world):
            weights = safetensors.torch.load_file(folder / f"{world}-{rank}.safetensors")
            trained = [name for name in reference if name.endswith((".weight", ".bias"))]
            apart = max(apart, *(float((weights[name] - reference[name]).abs().max()) for name in trained))
    wrong = [f"rank {rank}: {one['said']}" for rank, one in enumerate(found) if one["said"]]
    wrong += [
        f"rank {rank} holds other masks than one process" for rank, one in enumerate(found) if one["masks"] != alone["masks"]
    ]
    wrong += [] if apart <= CLOSE else [f"weights are {apart:.1e} from those of one process"]
    return {"cases": world, "wrong": wrong, "apart": apart}


def _agreements(scale: Scale) -> Parts:
    methods, worlds = (["rigl", "set", "granet", "gmp"], (2, 4)) if scale == "long" else (["rigl"], (2, 4))
    kinds = {"": False, " in float64": True} if scale == "long" else {"": False}
    return {
        f"{method}, {world} ranks{kind}": partial(agreeing, world, method, wide)
        for kind, wide in kinds.items() for method in methods for world in worlds
    }  # fmt: skip


def _judge_agreements(found: Mapping[str, Part]) -> Measured:
    bad = sum(bool(part["wrong"]) for part in found.values())
    apart, wide = (
        max((part.get("apart", 0.0) for name, part in found.items() if name.endswith("float64") == kind), default=0.0)
        for kind in (False, True)
    )
    value = f"masks and weights agree in {len(found) - bad} of {len(found)} runs of 2 and 4 ranks; within {apart:.1e}"
    value += f", in float64 {wide:.0e}" if wide else ""
    rounding = "; the masks are the same, and float32 sums of other orders are what is left: see float64"
    only = all(" from those of one process" in text for part in found.values() for text in part["wrong"])
    return Measured(value, bad == 0, complaints(found) + (rounding if bad and only and wide else ""))


def disagreeing(world: int, flip: int) -> Part:
    """Flip one bit of one rank's mask, and read what every rank says, and when."""
    with _children.folder() as folder:
        found = together(world, "rigl", folder, flip)
    wrong = []
    for rank, one in enumerate(found):
        if not one["said"]:
            wrong.append(f"rank {rank} says nothing")
        elif not re.search(rf"\brank {flip}\b", one["said"]) and world > 2:
            wrong.append(f"rank {rank} does not name rank {flip}: {one['said']}")
        elif not re.search(r"\brank", one["said"]) or "3.weight" not in one["said"]:
            wrong.append(f"rank {rank} does not name rank and layer: {one['said']}")
        elif one["later revisions"] or one["step"] - 10 > EVERY:
            wrong.append(f"rank {rank} says so at step {one['step']}, after {one['later revisions']} more revisions")
    return {"cases": world, "wrong": wrong}


def _disagreements(scale: Scale) -> Parts:
    cases = [(2, 1), (4, 0), (4, 2), (4, 3)] if scale == "long" else [(4, 2)]
    return {f"rank {flip} of {world}": partial(disagreeing, world, flip) for world, flip in cases}


def _judge_disagreements(found: Mapping[str, Part]) -> Measured:
    bad = sum(bool(part["wrong"]) for part in found.values())
    value = f"{len(found) - bad} of {len(found)} flipped bits named by rank and layer at the next revision, on all ranks"
    return Measured(value, bad == 0 and total(found, "cases") > 0, complaints(found))


AGREEMENT = _agreements, _judge_agreements
DISAGREEMENT = _disagreements, _judge_disagreements
