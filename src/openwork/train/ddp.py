"""Training one model in several processes: each takes its part of every batch, all take the same step.

`fit` does it by itself where torch.distributed is set up (under torchrun: inside `processes()`). Every process goes
through the same batches, which are a pure function of seed and epoch, and computes on its own rows of each; gradients
are averaged with every example counting alike, so the run is that of one process up to rounding. What a loop of one's
own with DistributedDataParallel needs beside `Sparsifier.attach` is `mean_of_all`, for batches of unequal size.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from openwork.core.metrics import IGNORED
from openwork.core.rng import derive
from openwork.errors import DataError, DivergedError, ModelError, RecipeError
from openwork.sparsifier import agreement, peers
from openwork.sparsifier.peers import ALONE, Peers
from openwork.sparsifier.sparsifier import Sparsifier
from openwork.train.synced_norm import Synced

if TYPE_CHECKING:
    from openwork.core.masks import Masks

_WORDS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@contextmanager
def processes(timeout: float = 600.0, backend: str | None = None) -> Iterator[Peers]:
    """Join the processes that torchrun started, for as long as the context lasts; without torchrun this one is alone.

    Args:
        timeout: seconds that a process waits for another before it gives up.
        backend: of torch.distributed; None is gloo, with NCCL for what lies on a GPU.

    Raises:
        RecipeError: if the environment names only a part of what torchrun sets, or the others cannot be reached.
    """
    found = {word: os.environ.get(word) for word in _WORDS}
    if found["WORLD_SIZE"] in (None, "1"):
        yield ALONE
        return
    missing = [word for word, value in found.items() if not value]
    if missing:
        raise RecipeError(
            f"WORLD_SIZE is {found['WORLD_SIZE']} but {', '.join(missing)} is not set; start the processes with "
            "torchrun --nproc-per-node N, which sets them all, or unset WORLD_SIZE"
        )
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    try:
        dist.init_process_group(backend or ("cpu:gloo,cuda:nccl" if cuda else "gloo"), timeout=timedelta(seconds=timeout))
    except (RuntimeError, ValueError) as error:
        place = f"{found['MASTER_ADDR']}:{found['MASTER_PORT']}"
        raise RecipeError(
            f"rank {found['RANK']} cannot join the {found['WORLD_SIZE']} processes at {place}: {error}"
        ) from error
    try:
        yield peers.everyone()
    finally:
        dist.destroy_process_group()


def mean_of_all(losses: Tensor, *, of: int | None = None, group: Any = "auto") -> Tensor:
    """Return this process's share of the mean loss over the examples of all processes, to call `backward` on.

    DistributedDataParallel averages gradients over processes whatever each of them saw, so that examples of a small part
    count more. With this loss the averaged gradient is that of the mean over all examples, as one process has it.

    Args:
        losses: (examples,), one a loss (`reduction="none"`), of this process; there may be none at all.
        of: how many examples the step has in all processes (and in all its micro-batches, where gradients are
            accumulated under `no_sync`), if it is known; None asks the others, who must all ask.
        group: a process group, None for this process alone, or "auto" for the default group.

    Raises:
        DataError: if there is no example anywhere, or `of` is none.
    """
    all_of_us = peers.everyone() if isinstance(group, str) else peers.of(group)
    if of is None:
        of = int(all_of_us.gather(torch.tensor([losses.numel()])).sum())
    if of < 1:
        raise DataError(f"there are {of} examples in the batches of all {all_of_us.world} processes; expected at least 1")
    return losses.sum() * (all_of_us.world / of)


def rows(total: int, world: int, place: int) -> slice:
    """Return the rows of a batch of `total` that the process at `place` of `world` takes: equal parts, larger ones first."""
    size, more = divmod(total, world)
    start = place * size + min(place, more)
    return slice(start, start + size + (place < more))


@dataclass(frozen=True)
class News:
    """What the processes told one another in a step.

    Attributes:
        loss: mean over the whole batch.
        failed: the rank whose loss is not finite, if any.
        save: whether all write a checkpoint after this step; None: decide alone.
        stop: whether all stop after this step; None: decide alone.
    """

    loss: float
    failed: int | None = None
    save: bool | None = None
    stop: bool | None = None


class Team:
    """What the training loop does together with other processes; alone, every part of it does nothing."""

    def __init__(self, model: nn.Module, among: Peers) -> None:
        self.model, self.peers = model, among
        self._seen = False  # whether the processes have compared their first batches
        self._masks: Masks | None = None
        self._kept: dict[str, Tensor] = {}

    def begin(self, run: Mapping[str, Any]) -> None:
        """Check that all train the same model in the same way, and take the weights of the first process.

        Raises:
            ModelError: if the model is in a DistributedDataParallel wrapper.
            RecipeError: in every process, naming the rank that differs, and in what.
        """
        if self.peers.alone:
            return
        if peers.data_parallel(self.model) is not None:
            raise ModelError("fit shares the work itself: give it the model inside DistributedDataParallel, model.module")
        found = {name: str(value) for name, value in run.items()}
        held = {name: (tuple(tensor.shape), str(tensor.dtype)) for name, tensor in self._tensors().items()}

        def same(values: Mapping[str, Any]) -> list[int]:
            return [agreement.digest(repr(sorted(values.items())).encode()) for values in (values["run"], values["model"])]

        agreement.together(
            self.peers, lambda: {"run": found, "model": held}, same, ["the training settings", "the model's tensors"],
            "the runs", "give every process the same arguments", RecipeError,
        )  # fmt: skip
        self.peers.copy_first_(list(self._tensors().values()))

    def noise(self, seed: int) -> int:
        """Return the seed of this process's noise: the first one's is that of a run alone."""
        return seed if self.peers.place == 0 else derive(seed, "rank", self.peers.place)

    def part(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, float | None]:
        """Return this process's rows of a batch and what to divide the sum of their losses by (None: their number).

        Raises:
            DataError: if there are fewer examples than processes, or the processes do not hold the same batch.
        """
        if self.peers.alone:
            return x, y, None
        if len(x) < self.peers.world:
            raise DataError(
                f"a batch of {len(x)} cannot be shared by {self.peers.world} processes; take a batch_size of at least "
                f"{self.peers.world} or fewer processes"
            )
        if not self._seen:
            agreement.together(
                self.peers, lambda: (x, y), lambda pair: [_content(tensor) for tensor in pair], ["inputs", "targets"],
                "the first batches", "give every process the whole data, of which fit takes its part of each batch",
                DataError,
            )  # fmt: skip
            self._seen = True
        counted = int((y != IGNORED).sum())
        own = rows(len(x), self.peers.world, self.peers.place)
        return x[own], y[own], max(1, counted) / self.peers.world

    def meet(self, loss: float, x: Tensor, *, save: bool, stop: bool) -> News:
        """Exchange losses and wishes, once a step, before anything depends on them: one gather of four numbers.

        Args:
            loss: this process's share.
            x: its inputs, looked at if the loss is not finite.
            save: whether a checkpoint is due; the first process decides for all.
            stop: whether somebody asked this process to stop; one is enough for all.
        """
        if self.peers.alone:
            return News(loss, None if math.isfinite(loss) else self.peers.rank)
        bad = 0 if math.isfinite(loss) else 1 if bool(torch.isfinite(x).all()) else 2
        found = self.peers.gather(torch.tensor([loss, bad, save, stop], dtype=torch.float64))
        # Where the layers add over the batch all losses are bad at once: the bad input tells whose fault it is.
        worst = float(found[:, 1].max())
        failed = self.peers.ranks[found[:, 1].tolist().index(worst)] if worst else None
        return News(float(found[:, 0].mean()), failed, bool(found[0, 2]), bool(found[:, 3].any()))

    def diverged(self, rank: int, alone: Synced, report: Callable[[], DivergedError]) -> DivergedError:
        """Return, in every process, what `report` says in the process `rank`, where it runs by itself."""
        if self.peers.alone:
            return report()

        def told() -> bytes:
            with alone.paused():
                return str(report()).encode()

        return DivergedError(f"on rank {rank}, {self.peers.ask(told, rank).decode()}")

    @torch.no_grad()
    def average(self, sparsifier: Sparsifier | None, step: int) -> None:
        """Add up the gradients of all processes, which are shares of the whole batch's, and take the mean.

        Of a masked parameter only the kept part travels, unless the step needs the gradient of masked weights too: at
        10 % density a tenth of the bytes. A parameter that has no gradient here but has one elsewhere counts as zero.

        Raises:
            ModelError: if a gradient is a sparse tensor.
        """
        if self.peers.alone:
            return
        trained = {name: param for name, param in self.model.named_parameters() if param.requires_grad}
        sparse = [name for name, param in trained.items() if param.grad is not None and param.grad.is_sparse]
        if sparse:
            raise ModelError(f"the gradient of {sparse[0]!r} is a sparse tensor, which is not averaged; set sparse=False")
        kept = self._positions(sparsifier, step)
        present, sums, parts = [], [], []
        for name, param in trained.items():
            present.append(param.grad is not None)
            if param.grad is None:
                param.grad = torch.zeros_like(param)
            param.grad.div_(self.peers.world)
            if name in kept and param.grad.is_contiguous():
                part = param.grad.view(-1).index_select(0, kept[name])
                parts.append((param.grad, kept[name], part))
                sums.append(part)
            else:
                sums.append(param.grad)
        one = sums[0]
        counts = torch.tensor(present, dtype=one.dtype, device=one.device)
        self.peers.add_([*sums, counts])
        for grad, index, part in parts:
            grad.zero_().view(-1).index_copy_(0, index, part)
        for param, count in zip(trained.values(), counts.tolist(), strict=True):
            if not count:
                param.grad = None

    def check(self, sparsifier: Sparsifier | None) -> None:
        """Check that all hold the same masks and, bit for bit, the same weights and buffers; before it is kept.

        Raises:
            MaskError: naming rank and layer.
            ModelError: naming rank and tensor.
        """
        if self.peers.alone:
            return
        if sparsifier is not None:
            sparsifier.check_agreement()
        tensors = self._tensors()
        agreement.together(
            self.peers, lambda: tensors, lambda found: [_content(tensor) for tensor in found.values()], list(tensors),
            "the weights", "the processes drifted apart: run them on machines of one kind, change weights in none of them "
            "by hand, and continue from the last checkpoint", ModelError,
        )  # fmt: skip

    def _tensors(self) -> dict[str, Tensor]:
        found = {name: param.detach() for name, param in self.model.named_parameters()}
        return found | dict(self.model.named_buffers())

    def _positions(self, sparsifier: Sparsifier | None, step: int) -> dict[str, Tensor]:
        """Return the flat positions of what travels, by parameter; a parameter that travels whole is missing."""
        if sparsifier is None or step in sparsifier.every or sparsifier.needs_dense_gradient(step):
            return {}
        kind = type(sparsifier)
        if kind.before_step is not Sparsifier.before_step or kind.mask_gradients is not Sparsifier.mask_gradients:
            return {}
        if self._masks is not sparsifier.masks:
            self._masks = sparsifier.masks
            self._kept = {
                name: mask.reshape(-1).nonzero().squeeze(1)
                for name, mask in sparsifier.masks.items()
                if 2 * int(mask.sum()) < mask.numel()  # otherwise gathering costs more than it saves
            }
        return self._kept


def _content(tensor: Tensor) -> int:
    """Return a 64-bit digest of a tensor's bytes."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return agreement.digest(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
