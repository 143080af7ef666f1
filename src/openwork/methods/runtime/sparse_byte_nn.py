"""SparseByteNN: groups of output channels that share their pattern, after the channels of the whole network are rearranged.

Xu, Liu, Xu, Wang, Li, Yan, Li, Fu, Pan, Chen. "SparseByteNN: A Novel Mobile Inference Acceleration Framework Based on
Fine-Grained Group Sparsity". arXiv 2310.19509, 2023.
Claim: fine-grained kernel sparsity with a pattern for each operator, with a whole-network rearrangement, keeps precision
at a granularity that runs fast: 1.27x over dense for a MobileNet-v1 of 30 % sparsity, at .224 points of accuracy.
Equations: units of g output channels and one input column have the score s = sum |w| (or sum w^2, or |sum w dL/dw|);
the K = round(density (O / g) C) best of a layer stay. The rearrangement maximises J(pi) = sum of the kept s over the
permutations pi of each class of channels, by greedy clustering and swaps (see `_rearrange`).
Departures: a reconstruction. The public repository is a stub and the paper states neither pattern sizes nor the search;
groups of 8, the units, the search and the training recipe (gradual magnitude pruning) are choices made here, and all of
them are arguments. Every layer keeps at least one unit; a smaller group takes the channels left over.
Cost: one selection a layer at every update; a search of O^2 C operations a sweep for each class of O channels when
channels are rearranged, by default once, at the first update.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, Self

from torch import Tensor, nn
from torch.optim import Optimizer

from openwork.cards import Card
from openwork.core.allocation import Allocation
from openwork.core.masks import Masks
from openwork.core.patterns import KernelGroup
from openwork.core.schedules import Every, cubic
from openwork.errors import MethodError
from openwork.methods.runtime._whole_network import ByOperator, Criterion, Gain, Report, depthwise_weights, rearrange, scores
from openwork.methods.sparsify._common import period, unit, updates
from openwork.sparsifier.parameters import Choice, unwrap
from openwork.sparsifier.permute import moved
from openwork.sparsifier.prune_grow import tighten
from openwork.sparsifier.sparsifier import Grads, Params, Sparsifier, State

__all__ = ["CARD", "ByOperator", "Gain", "Report", "SparseByteNN", "rearrange"]

CARD = Card(
    name="sparse-byte-nn",
    title="SparseByteNN: A Novel Mobile Inference Acceleration Framework Based on Fine-Grained Group Sparsity",
    authors=(
        "Haitao Xu", "Songwei Liu", "Yuyang Xu", "Shuai Wang", "Jiashi Li", "Chenqian Yan", "Liangqiang Li", "Lean Fu",
        "Xin Pan", "Fangmin Chen",
    ),
    year=2023,
    venue="arXiv",
    link="https://arxiv.org/abs/2310.19509",
    wing="runtime",
    claim="Groups of kernels with a shared pattern, after a rearrangement of all channels, stay precise and run fast.",
    entry="SparseByteNN",
    departures=(
        "A reconstruction: the public repository is a stub; sizes of groups, units and the search are choices made here.",
        "Training is gradual magnitude pruning or one pruning with fine-tuning; the paper's recipe is not public.",
        "Every layer keeps at least one unit, and channels left over by the groups form a smaller one.",
        "Depthwise convolutions stay dense unless asked for.",
    ),
)  # fmt: skip


class SparseByteNN(Sparsifier):
    """Kernel groups, pruned gradually or at once, over channels that are rearranged for them.

    The model's channels move in place (parameters, gradients, norms, optimizer state); its function does not change.

    Args:
        density: kept share of the units of every pruned layer at the end.
        total_steps: optimizer steps of the whole training.
        group: output channels of a group in 1x1 convolutions and linear layers.
        spatial_group: the same for larger kernels; None is `group`.
        unit: what a group shares in larger kernels: "kernel" whole kernels, "point" each kernel position.
        balance: "layer" lets the groups of a layer compete, "row" keeps the same number in each.
        depthwise: prune depthwise convolutions too, the kernels of a group at a time.
        criterion: "magnitude", "squared" or "taylor" (first order).
        schedule: "cubic" from dense at `begin` to the density at `end`; "one-shot" prunes once, at `begin`.
        begin: share of training at which pruning starts.
        end: share of training at which the final density is reached.
        every: steps between updates; None is a fortieth of the run, at most 100.
        search: "greedy+swap", "sort", or "identity" for no rearrangement.
        rearrange: "first" rearranges before the first pruning, "every" before each; a pruned weight may then return.
        example: what the model is called with; the outputs before and after a rearrangement are held against each other.
        budget_s: seconds that a rearrangement may search; None does not stop, and only then do seeds decide everything.
        trials: channels without gain after which the search of a class stops; None looks at all.
        copies: models with the same names that follow this one (moving averages); their channels move too.
        allocate: how the density is shared among layers; by default all have the same.
        parameters: which parameters get a mask.
        exclude: names or globs of parameters to leave dense.
        seed: seed of the method's own draws.

    Attributes:
        reports: what each rearrangement gained, in order; not part of the state.
        orders: class of channels -> where its channels stood in the beginning, int64.

    Raises:
        MethodError: if a share is not in [0, 1], `begin` is not before `end`, or a word is unknown.
    """

    def __init__(
        self,
        density: float,
        *,
        total_steps: int,
        group: int = 8,
        spatial_group: int | None = None,
        unit: Literal["kernel", "point"] = "kernel",
        balance: Literal["layer", "row"] = "layer",
        depthwise: bool = False,
        criterion: Criterion = "magnitude",
        schedule: Literal["cubic", "one-shot"] = "cubic",
        begin: float = 0.0,
        end: float = 0.5,
        every: int | None = None,
        search: Literal["greedy+swap", "sort", "identity"] = "greedy+swap",
        rearrange: Literal["first", "every"] = "first",
        example: Any = None,
        budget_s: float | None = None,
        trials: int | None = None,
        copies: Sequence[nn.Module] = (),
        allocate: str | Mapping[str, float] | Allocation = "uniform",
        parameters: Choice = None,
        exclude: Iterable[str] = (),
        seed: int = 0,
    ) -> None:
        pattern = ByOperator(KernelGroup(group, "kernel", balance), KernelGroup(spatial_group or group, unit, balance))
        super().__init__(
            density, allocate=allocate, pattern=pattern, parameters=parameters, exclude=exclude, seed=seed
        )  # fmt: skip
        _check_words(criterion=criterion, schedule=schedule, search=search, rearrange=rearrange)
        self.pattern: ByOperator = pattern
        self.criterion, self.rearrange, self.depthwise = criterion, rearrange, depthwise
        self.every, self.target = _plan(total_steps, density, schedule, begin, end, every)
        if criterion == "taylor" and 0 in self.every:
            raise MethodError("criterion='taylor' needs a gradient, and there is none at step 0; raise begin above 0")
        self._searching: dict[str, Any] = {
            "example": example, "search": search, "budget_s": budget_s, "trials": trials, "copies": tuple(copies),
            "seed": seed,
        }  # fmt: skip
        self._uniform = allocate == "uniform"
        self._model: nn.Module | None = None
        self.reports: list[Report] = []
        self.orders: dict[str, Tensor] = {}

    def attach(self, model: nn.Module, optimizer: Optimizer | Sequence[Optimizer] | None = None) -> Self:
        """Mask `model` now and hold the masks through every step of `optimizer`; see `Sparsifier.attach`."""
        if not self._params:
            self._model = unwrap(model)
            if not self.depthwise:
                self._exclude = tuple(dict.fromkeys([*_words(self._exclude), *depthwise_weights(self._model)]))
        return super().attach(model, optimizer)

    def detach(self) -> None:
        """Remove the hooks; masks are kept here but no longer held."""
        super().detach()
        self._model = None

    def initial(self, params: Params) -> Masks:
        """Return all ones, or the pruned masks when pruning is at step 0."""
        dense = Masks.ones(params)
        if 0 not in self.every or self._pending is not None:
            return dense
        self.masks = dense
        return self._pruned(params, {}, 0)

    def needs_dense_gradient(self, step: int) -> bool:
        """First-order scores need the gradients of the update's step."""
        return self.criterion == "taylor" and step in self.every

    def revise(self, params: Params, grads: Grads, step: int) -> Masks | None:
        """Rearrange the channels where that is due, then keep the best units down to d_t."""
        if step not in self.every or step == 0:
            return None
        return self._pruned(params, grads, step)

    def shares(self, params: Mapping[str, Tensor], density: float | None = None) -> dict[str, float]:
        """Return the layer densities: the same for all unless another allocation was chosen."""
        density = self.density if density is None else density
        found = dict.fromkeys(params, density) if self._uniform else super().shares(params, density)
        return {name: max(share, 1 / self.pattern.width(params[name].shape)) for name, share in found.items()}

    def extra_state(self) -> State:
        """Return where the channels stood in the beginning."""
        return dict(self.orders)

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Restore where the channels stood."""
        self.orders = {name: order.clone() for name, order in state.items()}

    def _pruned(self, params: Params, grads: Grads, step: int) -> Masks:
        shares = self.shares(params, self.target(step))
        found = self._scores(params, grads)
        is_first = step == self.every.start
        if self._searching["search"] != "identity" and (is_first or self.rearrange == "every"):
            self._move(params, grads, {name: shares[name] for name in found})
            found = self._scores(params, grads)
        return Masks({
            name: tighten(mask, found[name], shares[name], self.pattern) if name in found else mask
            for name, mask in self.masks.items()
        })  # fmt: skip

    def _scores(self, params: Params, grads: Grads) -> dict[str, Tensor]:
        """Return finite scores of every parameter; first order, of those that have a gradient."""
        given = grads if self.criterion == "taylor" else None
        return self.score(params, lambda weight, context: scores(weight, context.grad, self.criterion, self.pattern), given)

    def _move(self, params: Params, grads: Grads, shares: Mapping[str, float]) -> None:
        """Rearrange the model; masks, and gradients that were set aside, move along."""
        if self._model is None or not shares:
            return
        report = rearrange(
            self._model, self.pattern, shares, criterion=self.criterion, parameters=tuple(shares), depthwise=True,
            optimizer=self._optimizers, grads=grads, **self._searching,
        )  # fmt: skip
        for name, dims in report.moves.items():
            if name in self.masks:
                self.masks = Masks({**self.masks, name: moved(self.masks[name], dims)})
            kept, held = grads.get(name), params[name].grad if name in params else None
            if kept is not None and (held is None or kept.data_ptr() != held.data_ptr()):
                kept.copy_(moved(kept, dims))
        for name, order in report.orders.items():
            self.orders[name] = self.orders[name][order] if name in self.orders else order
        self.reports.append(report)


def _plan(total_steps: int, density: float, schedule: str, begin: float, end: float, every: int | None) -> tuple[Every, Any]:
    """Return the steps of the updates and the density at a step."""
    first = round(unit("begin", begin) * total_steps)
    if schedule == "one-shot":
        step = max(0, min(first, total_steps - 1))
        return Every(1, step, step + 1), lambda _step: density
    if not begin < unit("end", end):
        raise MethodError(f"begin={begin!r} is not before end={end!r}")
    steps = period(total_steps, every)
    length = updates(total_steps, steps, first, first + (end - begin) * total_steps) * steps
    return Every(steps, first + steps, first + length + 1), cubic(1.0, density, begin=first, steps=length)


_WORDS = {
    "criterion": ("magnitude", "squared", "taylor"),
    "schedule": ("cubic", "one-shot"),
    "search": ("greedy+swap", "sort", "identity"),
    "rearrange": ("first", "every"),
}


def _check_words(**given: str) -> None:
    for name, word in given.items():
        if word not in _WORDS[name]:
            raise MethodError(f"{name}={word!r}: use {' or '.join(map(repr, _WORDS[name]))}")


def _words(names: Iterable[str]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)
