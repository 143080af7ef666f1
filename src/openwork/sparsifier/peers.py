"""The processes that train one model together, as one of them sees them, and the few things they tell one another.

Everything here is collective: all processes of the group call it, in the same order. Alone it does nothing and costs
nothing. Only tensors travel, no pickle.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from openwork import errors
from openwork.errors import MaskError, OpenworkError

BUCKET = 2**23  # elements of one all-reduce: enough to hide its latency, few enough to copy


@dataclass(frozen=True)
class Peers:
    """A process among those that train the same model.

    Attributes:
        rank: this process, as torch.distributed numbers it.
        ranks: all of them, in the order of the group; messages name these numbers.
        group: their process group; None alone.
    """

    rank: int = 0
    ranks: tuple[int, ...] = (0,)
    group: Any = None

    @property
    def world(self) -> int:
        """Return how many processes there are."""
        return len(self.ranks)

    @property
    def alone(self) -> bool:
        """Tell whether this is the only process."""
        return self.group is None

    @property
    def place(self) -> int:
        """Return where this process stands in the group, from 0."""
        return self.ranks.index(self.rank)

    @property
    def first(self) -> bool:
        """Tell whether this is the process that writes for all."""
        return self.rank == self.ranks[0]

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # a process group cannot be copied, nor need it be

    def gather(self, row: Tensor) -> Tensor:
        """Return the rows of all processes as (world, length), on the CPU, the same everywhere.

        Args:
            row: (length,) of the same length and dtype in every process.
        """
        if self.alone:
            return row.cpu()[None]
        own = row.to(self._device())
        rows = [torch.empty_like(own) for _ in self.ranks]
        dist.all_gather(rows, own, group=self.group)
        return torch.stack(rows).cpu()

    @torch.no_grad()
    def add_(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their sums over all processes, in place, a few large messages for many tensors."""
        if self.alone:
            return
        waiting = []
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            waiting.append((dist.all_reduce(flat, group=self.group, async_op=True), flat, bucket))
        for work, flat, bucket in waiting:
            work.wait()
            _deal(flat, bucket)

    @torch.no_grad()
    def mean_(self, tensors: Sequence[Tensor], weight: float = 1.0) -> None:
        """Replace floating-point tensors by their means over all processes, in place.

        Args:
            tensors: the same shapes and dtypes in every process.
            weight: what this process counts: the number of its examples, say; not the same 0 everywhere.

        Raises:
            MaskError: if no process counts.
        """
        if self.alone:
            return
        total = float(self.gather(torch.tensor([weight], dtype=torch.float64)).sum())
        if not total > 0:
            raise MaskError(f"a mean over {self.world} processes needs weights above 0; theirs sum to {total}")
        for tensor in tensors:
            tensor.mul_(weight / total)
        self.add_(tensors)

    @torch.no_grad()
    def copy_first_(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by those of the first process, in place."""
        if self.alone:
            return
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            dist.broadcast(flat, self.ranks[0], group=self.group)
            _deal(flat, bucket)

    def ask(self, act: Callable[[], bytes], rank: int | None = None) -> bytes:
        """Let one process act, and return in all of them the bytes that it got.

        Args:
            act: called in that process only.
            rank: which process; None is the first.

        Raises:
            OpenworkError: in every process, of the kind and with the message that `act` raised.
        """
        if self.alone:
            return act()
        source = self.ranks[0] if rank is None else rank
        data, failure = b"", None
        if self.rank == source:
            try:
                data = act()
            except Exception as error:
                failure = error
                data = json.dumps([type(error).__name__, str(error)]).encode()
        data, failed = self._send(data, failure is not None, source)
        if failure is not None:
            raise failure
        if failed:
            name, message = json.loads(data)
            kind = getattr(errors, name, OpenworkError)
            raise kind(message if kind is not OpenworkError else f"rank {source} failed with {name}: {message}")
        return data

    def _send(self, data: bytes, failed: bool, source: int) -> tuple[bytes, bool]:
        head = torch.tensor([len(data), failed], dtype=torch.int64, device=self._device())
        dist.broadcast(head, source, group=self.group)
        length, flag = head.tolist()
        body = torch.empty(length, dtype=torch.uint8)
        if self.rank == source and data:
            body.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        body = body.to(self._device())
        for start in range(0, length, 2**28):
            dist.broadcast(body[start : start + 2**28], source, group=self.group)
        return body.cpu().numpy().tobytes(), bool(flag)

    def _device(self) -> torch.device:
        """Return where the group's messages must lie: NCCL and its like send nothing from the CPU."""
        backend = str(dist.get_backend(self.group))
        if backend in ("gloo", "mpi", "fake") or "cpu" in backend or backend == "undefined":
            return torch.device("cpu")
        return torch.accelerator.current_accelerator() or torch.device("cpu")


ALONE = Peers()


def everyone() -> Peers:
    """Return all processes of torch.distributed's default group, or this one alone if none was set up."""
    return of(dist.group.WORLD) if dist.is_available() and dist.is_initialized() else ALONE


def of(group: Any) -> Peers:
    """Return the processes of a process group as this one sees them; a group of one is ALONE.

    Raises:
        MaskError: if this process is none of the group.
    """
    if group is None or isinstance(group, Peers):
        return group or ALONE
    ranks = tuple(dist.get_process_group_ranks(group))
    if dist.get_rank() not in ranks:
        raise MaskError(f"rank {dist.get_rank()} is not in the process group of ranks {list(ranks)} that it was given")
    return Peers(dist.get_rank(), ranks, group) if len(ranks) > 1 else ALONE


def around(model: nn.Module) -> Peers:
    """Return the processes that train `model`: its DistributedDataParallel wrapper's, else those of the default group."""
    wrapper = data_parallel(model)
    return everyone() if wrapper is None else of(wrapper.process_group)


def data_parallel(model: nn.Module) -> Any:
    """Return the DistributedDataParallel wrapper at or right inside `model` (torch.compile's lies around it), or None."""
    inner: Any = model
    while inner is not None:
        if wraps(inner, "DistributedDataParallel"):
            return inner
        inner = getattr(inner, "_orig_mod", None)
    return None


def wraps(model: Any, *names: str) -> bool:
    """Tell whether `model` is of a class of that name or derived from one."""
    return any(kind.__name__ in names for kind in type(model).__mro__)


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield tensors of one dtype and device, about BUCKET elements at a time, in the order given within each kind."""
    order = sorted(range(len(tensors)), key=lambda i: (str(tensors[i].dtype), str(tensors[i].device)))
    for _, group in groupby(order, key=lambda i: (tensors[i].dtype, tensors[i].device)):
        bucket: list[Tensor] = []
        size = 0
        for index in group:
            if bucket and size + tensors[index].numel() > BUCKET:
                yield bucket
                bucket, size = [], 0
            bucket.append(tensors[index])
            size += tensors[index].numel()
        yield bucket


def _deal(flat: Tensor, bucket: Sequence[Tensor]) -> None:
    """Write the parts of `flat` back to the tensors that it was made of."""
    parts = torch.split(flat, [tensor.numel() for tensor in bucket])
    for tensor, part in zip(bucket, parts, strict=True):
        values = part.view(tensor.shape)
        # An expanded buffer stores one value many times; writing to it is only allowed once.
        for dim, stride in enumerate(tensor.stride()):
            if stride == 0 and tensor.shape[dim] > 1:
                tensor, values = tensor.narrow(dim, 0, 1), values.narrow(dim, 0, 1)
        tensor.copy_(values)
