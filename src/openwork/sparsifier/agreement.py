"""The check that data-parallel processes hold the same masks: a 64-bit digest a layer, gathered after each revision.

Masks are never sent, except as digests: every process decides them for itself, from averaged gradients and from
generators that know no rank, so that all decide the same. Where one does not, all stop, with the layer and the rank.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from openwork.errors import MaskError, OpenworkError
from openwork.sparsifier.peers import Peers

T = TypeVar("T")
M = TypeVar("M", bound=Mapping[str, Tensor])

_IDENTITY = ("method", "density", "pattern", "every", "masked parameters", "step", "generator")
_REMEDY = (
    "step only on gradients that were averaged over all processes, and load weights and checkpoints in every process; if "
    "that is so, a process has damaged its masks: restart from the last checkpoint"
)
_FAILED, _UNCHANGED, _DECIDED = -1, 0, 1


def digest(*parts: bytes) -> int:
    """Return a 64-bit digest of byte strings as a signed integer."""
    found = hashlib.blake2b(digest_size=8)
    for part in parts:
        found.update(len(part).to_bytes(8, "little"))
        found.update(part)
    return int.from_bytes(found.digest(), "little", signed=True)


def digests(*states: Mapping[str, Tensor]) -> list[int]:
    """Return one digest a layer over the packed masks (one bit a weight) of all of `states`, in the order of the first."""
    return [digest(*(_packed(state[name]) for state in states)) for name in states[0]]


def together(
    peers: Peers,
    act: Callable[[], T | None],
    digests: Callable[[T], Sequence[int]],
    names: Sequence[str],
    what: str,
    remedy: str,
    kind: type[OpenworkError] = MaskError,
) -> T | None:
    """Let every process `act`, check that all came to the same, and return it.

    One gather of 8 (1 + layers) bytes a process. If one process fails, all raise; none waits for it.

    Args:
        peers: the processes.
        act: what each does; None stands for nothing.
        digests: result -> 64-bit integers, as many as `names`.
        names: what each of them is a digest of.
        what: what is compared, to begin the message with.
        remedy: what to do, to end the message with.
        kind: the error's kind.

    Raises:
        OpenworkError: of that kind, in every process, naming the ranks that disagree with the others, and in what first.
    """
    if peers.alone:
        return act()
    result, failure = None, None
    try:
        result = act()
    except Exception as error:
        failure = error
    status = _FAILED if failure is not None else _UNCHANGED if result is None else _DECIDED
    own = [0] * len(names) if result is None else list(digests(result))
    rows = peers.gather(torch.tensor([status, *own], dtype=torch.int64)).tolist()
    if failure is not None:
        raise failure
    failed = [rank for rank, row in zip(peers.ranks, rows, strict=True) if row[0] == _FAILED]
    if failed:
        raise kind(f"{what} could not be decided: {_ranks(failed)} failed; the message there says why")
    found = _difference(peers, rows, names)
    if found:
        raise kind(f"{what} are not the same in all {peers.world} processes: {found}; {remedy}")
    return result


def begin(
    peers: Peers,
    act: Callable[[], None],
    identity: Callable[[], Mapping[str, object]],
    masks: Callable[[], Mapping[str, int]],
) -> None:
    """Let every process choose its first masks, and check that all begin alike.

    Args:
        peers: the processes.
        act: chooses the masks.
        identity: afterwards, returns name -> what must be equal, the same names everywhere.
        masks: afterwards, returns layer -> digest of its mask.

    Raises:
        MaskError: in every process, naming rank and setting, or rank and layer.
    """
    if peers.alone:
        return act()

    def settings() -> Mapping[str, object]:
        act()
        return identity()

    together(
        peers, settings, lambda found: [digest(repr(value).encode()) for value in found.values()], list(_IDENTITY),
        "the sparsifiers", "build them with the same arguments, seed included, over the same model in every process",
    )  # fmt: skip
    return compare(
        peers, 0, masks(), remedy="start every process with the same weights and buffers: wrap the model in "
        "DistributedDataParallel first and attach to the wrapper"
    )  # fmt: skip


def compare(peers: Peers, step: int, masks: Mapping[str, int], remedy: str | None = None) -> None:
    """Check that all processes hold the same masks, given as layer -> digest."""
    what = f"the masks at step {step}"
    together(peers, lambda: masks, lambda found: list(found.values()), list(masks), what, remedy or _REMEDY)


def revised(peers: Peers, step: int, held: Mapping[str, Tensor], act: Callable[[], M | None]) -> M | None:
    """Return the revised masks, or None, that `act` gives, once all processes came to the same from the same.

    The digests are of the masks before and after, so that a difference that the revision happens to heal is seen too.
    """
    what = f"the masks at step {step}"
    return together(peers, act, lambda masks: digests(held, masks), list(held), what, _REMEDY)


def _difference(peers: Peers, rows: list[list[int]], names: Sequence[str]) -> str:
    """Return which ranks differ and in what, the same text everywhere; empty if all rows are equal."""
    counts = Counter(map(tuple, rows))
    if len(counts) == 1:
        return ""
    # The commonest is taken for right; of equally common ones that of the lowest rank, since Counter keeps their order.
    right = counts.most_common(1)[0][0]
    keeper = peers.ranks[[tuple(row) for row in rows].index(right)]
    odd = {rank: row for rank, row in zip(peers.ranks, rows, strict=True) if tuple(row) != right}
    return "; ".join(f"rank {rank} {_said(row, right, names, keeper)}" for rank, row in odd.items())


def _said(row: Sequence[int], right: Sequence[int], names: Sequence[str], keeper: int) -> str:
    if row[0] != right[0]:
        did, other = ("decided", "did not") if row[0] == _DECIDED else ("decided nothing", "did")
        return f"{did} where rank {keeper} {other}"
    wrong = [name for name, one, other in zip(names, row[1:], right[1:], strict=True) if one != other]
    more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
    return f"differs from rank {keeper} in {wrong[0]!r}{more}"


def check_joining(wrapper: Any) -> None:
    """Refuse to change masks inside torch's Join, where a process out of data no longer steps and would keep old ones.

    Raises:
        MaskError: if the data-parallel wrapper is inside Join's context.
    """
    if bool(getattr(getattr(wrapper, "_join_config", None), "enable", False)):
        raise MaskError(
            "masks cannot change inside torch's Join: a process that has run out of data takes no optimizer step and would "
            "keep its old masks and momentum; give every process the same number of batches and weigh a smaller last one "
            "(openwork.train.ddp.mean_of_all)"
        )


def _packed(mask: Tensor) -> bytes:
    return np.packbits(mask.cpu().numpy().reshape(-1)).tobytes()


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else "ranks " + ", ".join(map(str, ranks))
