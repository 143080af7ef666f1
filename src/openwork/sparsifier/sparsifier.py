"""The Sparsifier: masks held over any module by hooks on any stepping optimizer.

The model itself is left alone: same keys, same parameters, no hooks on it, so deepcopy, checkpoints and torch.compile
do not notice. Before a step the masks may be revised from the dense gradients, then gradients are masked; after it the
masked weights are set to exactly zero. In data-parallel training every process does this for itself, from gradients
that are averaged by then, and a digest of the masks is compared after each revision (see `openwork.sparsifier.agreement`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from openwork.core import allocation as allocations
from openwork.core import criteria, patterns
from openwork.core.allocation import Allocation
from openwork.core.criteria import Context, Criterion
from openwork.core.masks import Masks
from openwork.core.patterns import Pattern
from openwork.core.rng import generator
from openwork.core.schedules import Every
from openwork.errors import AllocationError, MaskError, PatternError
from openwork.sparsifier import agreement, optimizers, peers
from openwork.sparsifier.parameters import Choice, maskable, unwrap
from openwork.sparsifier.prune_grow import prune_and_grow, shrink, tighten

State = dict[str, Tensor | int | float | str]
Params = Mapping[str, nn.Parameter]
Grads = Mapping[str, Tensor]


class Sparsifier:
    """Base of every method that is masks over a model; write `initial`, `revise` or both.

    Args:
        density: kept share of the masked weights at the end, in (0, 1].
        allocate: how the density is shared among layers: "erk", "er", "uniform", "uniform+", "erk+", a mapping from
            parameter name to density, or a function (shapes, density) -> densities.
        pattern: which masks are legal, a Pattern or its name ("2:4", "block4x1", ...).
        parameters: which parameters get a mask (see `openwork.sparsifier.parameters.maskable`).
        exclude: names or globs of parameters to leave dense.
        seed: seed of the method's own draws.

    Attributes:
        masks: what is kept now; empty before `attach`.
        step: optimizer steps taken under this sparsifier.
        every: the steps at which masks may change; by default any.
        history: (step, kept weights of each masked parameter in order), at the start and after every change.

    Raises:
        MaskError: if the density is out of range.
        PatternError: if the pattern is unknown.
    """

    every = Every(1)
    skip_step = False  # leave the weights alone at a revision, as RigL's paper does
    clears_state = True  # reset optimizer state where weights are dropped or grown

    def __init__(
        self,
        density: float,
        *,
        allocate: str | Mapping[str, float] | Allocation = "erk",
        pattern: Pattern | str = "unstructured",
        parameters: Choice = None,
        exclude: Iterable[str] = (),
        seed: int = 0,
    ) -> None:
        if not 0.0 < density <= 1.0:
            raise MaskError(f"density {density!r} is not in (0, 1]; it is the share of weights that is kept")
        self.density = float(density)
        self.pattern = patterns.parse(pattern) if isinstance(pattern, str) else pattern
        if isinstance(self.pattern, patterns.NM):
            self.pattern.check_density(density)
            allocate = "uniform"  # N:M fixes the same density in every layer
        self.allocate = _allocation(allocate)
        self.generator = generator(seed, "sparsifier", type(self).__name__)
        self.masks = Masks({})
        self.step = 0
        self.history: list[tuple[int, tuple[int, ...]]] = []
        self._choice, self._exclude = parameters, exclude
        self._params: dict[str, nn.Parameter] = {}
        self._optimizers: list[Optimizer] = []
        self._fresh: list[dict[str, float]] = []
        self._handles: list[Any] = []
        self._dense: dict[str, tuple[Tensor, Tensor]] = {}  # the gradient masked, and what it was before
        self._idle = False
        self._pending: Mapping[str, Any] | None = None
        self._among: peers.Peers | None = None  # None: found out by attach
        self._peers, self._wrapper = peers.ALONE, None

    # ---- what a method writes -------------------------------------------------------------------------------------

    def initial(self, params: Params) -> Masks:
        """Return the masks to start with; all ones unless a method says otherwise."""
        return Masks.ones(params)

    def revise(self, params: Params, grads: Grads, step: int) -> Masks | None:
        """Return new masks, or None to leave them.

        Args:
            params: masked parameters by name, zero where masked.
            grads: their dense gradients, as autograd left them; a parameter without gradient is missing.
            step: optimizer steps taken so far.
        """
        return None

    def penalty(self) -> Tensor:
        """Return a term to add to the loss; zero unless a method regularises."""
        return torch.zeros(())

    def needs_dense_gradient(self, step: int) -> bool:
        """Tell whether this step needs the gradient of masked weights too; no unless a method says so."""
        return False

    def born(self, name: str, weight: Tensor, where: Tensor) -> None:
        """Set the newly grown weights `weight[where]`; they are zero unless a method says otherwise."""

    def extra_state(self) -> State:
        """Return what the method must remember beyond masks, step and generator."""
        return {}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `extra_state` returned."""

    # ---- what a user calls ----------------------------------------------------------------------------------------

    def attach(self, model: nn.Module, optimizer: Optimizer | Sequence[Optimizer] | None = None) -> Self:
        """Mask `model` now and hold the masks through every step of `optimizer`.

        Args:
            model: any module; compiled and data-parallel wrappers are looked through. The processes of a
                DistributedDataParallel wrapper, or for a bare module with an optimizer those of torch.distributed's
                default group, must all call this, and all hold the same masks from then on (see `among`).
            optimizer: any stepping optimizer of the model's parameters, or several that step one after the other;
                None masks the model once and holds nothing.

        Returns:
            self, so that `GraNet(...).attach(model, optimizer)` reads as one line.

        Raises:
            MaskError: if it is attached already, there is nothing to mask, the parameters are sharded, or the processes
                do not start with the same masks, generators and settings.
            PatternError: naming the first parameter that the pattern does not divide.
            OptimizerError: for LBFGS, SparseAdam, or an optimizer of another model.
        """
        if self._params:
            raise MaskError(f"this {type(self).__name__} is attached already; call finalize() or build another")
        params = maskable(unwrap(model), self._choice, self._exclude)
        stepping = [] if optimizer is None else [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
        optimizers.check_optimizers(stepping, params)
        self._check_pattern(params)
        self._params, self._optimizers = params, stepping
        self._fresh = [optimizers.fresh_values(one) for one in stepping]
        self._wrapper = peers.data_parallel(model)
        shared = self._wrapper is not None or bool(stepping)
        self._peers = self._among or (peers.around(model) if shared else peers.ALONE)
        try:
            agreement.begin(self._peers, lambda: self._begin(params), self._identity, self._digests)
        except BaseException:
            self._params, self._optimizers = {}, []
            raise
        self._hold()
        self.project()
        if not self.history:
            self._remember()
        return self

    def among(self, group: Any) -> Self:
        """Say, before `attach`, which processes train this model; without it `attach` finds them.

        Args:
            group: a process group of torch.distributed, or Peers; None for this process alone, which then talks to no
                other although torch.distributed is set up.

        Returns:
            self.
        """
        self._among = peers.of(group)
        return self

    def check_agreement(self) -> None:
        """Check that all data-parallel processes hold the same masks; all of them call it. Alone it does nothing.

        It is done after every revision by itself; masks that are held for long may be checked before they are saved.

        Raises:
            MaskError: in every process, naming rank and layer.
        """
        agreement.compare(self._peers, self.step, self._digests())

    def mask_gradients(self) -> None:
        """Set the gradients of masked weights to zero; call it before clipping, whose norm would count them otherwise.

        The dense gradients that a revision at this step needs are set aside first.
        """
        if self.step in self.every:
            for name, param in self._params.items():
                if param.grad is not None and not self._is_masked(name, param.grad):
                    self._dense[name] = param.grad, param.grad.detach().clone()
        self._zero_gradients()

    @torch.no_grad()
    def project(self) -> None:
        """Set every masked weight to exactly zero; call it after loading weights into an attached model."""
        for name, param in self._params.items():
            param.masked_fill_(~self.masks[name], 0)

    def state_dict(self) -> State:
        """Return step, masks (one bit a weight), generator and method state: tensors and plain values only."""
        state: State = {"step": self.step, "generator": self.generator.get_state()}
        state["history"] = torch.tensor([[step, *kept] for step, kept in self.history], dtype=torch.int64)
        state |= {f"masks.{key}": value for key, value in self.masks.state_dict().items()}
        return state | {f"extra.{key}": value for key, value in self.extra_state().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken: before `attach`, which then takes the state up, or after it.

        `attach` masks the model, so a model that is attached first gets its weights loaded after that, before this.

        Raises:
            MaskError: if the state's masks do not fit the model.
        """
        if not self._params:
            self._pending = dict(state)
            return
        self._restore(state)
        self.project()

    def finalize(self) -> Masks:
        """Project once more, let go of optimizer and model, and return the masks; the model is plain torch."""
        self.project()
        self.detach()
        return self.masks

    def detach(self) -> None:
        """Remove the hooks; masks are kept here but no longer held."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._params, self._optimizers = [], {}, []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.detach()

    def __repr__(self) -> str:
        return f"{type(self).__name__}(density={self.density}, step={self.step}, {self.masks!r})"

    # ---- words for methods ----------------------------------------------------------------------------------------

    def shares(self, params: Mapping[str, Tensor], density: float | None = None) -> dict[str, float]:
        """Return the layer densities that the allocation gives for `density` (None: the final one)."""
        shapes = {name: param.shape for name, param in params.items()}
        return self.allocate(shapes, self.density if density is None else density)

    def random_masks(self, params: Params, density: float | None = None) -> Masks:
        """Return masks at random positions, at the allocated densities."""
        return self.select(params, criteria.random, self.shares(params, density))

    def select(self, params: Params, criterion: Criterion, shares: Mapping[str, float]) -> Masks:
        """Return the masks of the highest scores of every layer at the densities `shares`."""
        scores = self.score(params, criterion)
        return Masks({name: self.pattern.select(scores[name], shares[name]) for name in params})

    def score(self, params: Params, criterion: Criterion, grads: Grads | None = None) -> dict[str, Tensor]:
        """Return `criterion` of every parameter (with `grads`: of every parameter that has a gradient)."""
        return {
            name: self._named(name, criterion, param, self._context(name, None if grads is None else grads[name]))
            for name, param in params.items()
            if grads is None or name in grads
        }

    def exchange(
        self,
        params: Params,
        grads: Grads,
        masks: Mapping[str, Tensor],
        share: float,
        *,
        drop: Criterion = criteria.magnitude,
        grow: Criterion = criteria.gradient,
        round_up: bool = False,
    ) -> Masks:
        """Drop a share of every layer's weights and grow as many (see `prune_and_grow`).

        A layer without a gradient at this step is left as it is.
        """
        lowest, highest = self.score(params, drop, grads), self.score(params, grow, grads)
        return Masks({
            name: prune_and_grow(
                mask, lowest[name], highest[name], share, pattern=self.pattern, round_up=round_up
            ) if name in grads else mask
            for name, mask in masks.items()
        })  # fmt: skip

    def shrink(self, params: Params, masks: Mapping[str, Tensor], density: float, *, layerwise: bool = False) -> Masks:
        """Keep the largest magnitudes of what `masks` keeps, down to `density` over all.

        Args:
            params: parameters by name.
            masks: what is kept now.
            density: kept share over all layers afterwards.
            layerwise: keep every layer at its allocated density rather than let all layers compete; patterns that fix
                their own balance (N:M) are always layer-wise.
        """
        scores = self.score(params, criteria.magnitude)
        if not (layerwise or self.pattern.balanced):
            return Masks(shrink(masks, scores, density, self.pattern))
        shares = self.shares(params, density)
        return Masks({name: tighten(mask, scores[name], shares[name], self.pattern) for name, mask in masks.items()})

    def averaged(self, statistics: Mapping[str, Tensor], weight: float = 1.0) -> dict[str, Tensor]:
        """Return statistics of forward passes (activation norms, say) as means over all data-parallel processes.

        Gradients are averaged by the time a method sees them; what it measures on its own batches is not, and must go
        through here before it decides anything. All processes call it, in the same revision.

        Args:
            statistics: name -> floating-point tensor, of the same shapes in every process.
            weight: what this process counts: how many examples it has seen, if not all have seen as many.
        """
        own = {name: tensor.detach().clone() for name, tensor in statistics.items()}
        self._peers.mean_(list(own.values()), weight)
        return own

    # ---- machinery ------------------------------------------------------------------------------------------------

    def before_step(self, params: Params) -> None:
        """Act between the revision and the optimizer's step: by default gradients are masked."""
        self._zero_gradients()

    @torch.no_grad()
    def after_step(self, params: Params) -> None:
        """Act after the optimizer's step: by default masked weights are set to zero."""
        self.project()

    def between_steps(self, params: Params) -> None:
        """Act after one of several optimizers has stepped, before the next: by default as after a step."""
        self.project()

    def _begin(self, params: Params) -> None:
        """Set the first masks, or those of a loaded state, with which the model keeps the weights that it came with."""
        before = {} if self._pending is None else {name: param.detach().clone() for name, param in params.items()}
        self.masks = self._check_masks(self.initial(params))
        if self._pending is not None:
            with torch.no_grad():
                for name, weight in before.items():
                    params[name].copy_(weight)
            self._restore(self._pending)

    def _identity(self) -> dict[str, object]:
        """Return what must be the same in every process for the masks to stay the same, as far as it can be told."""
        shapes = [(name, tuple(param.shape)) for name, param in self._params.items()]
        same = {"method": type(self).__name__, "density": self.density, "pattern": str(self.pattern), "every": self.every}
        return {**same, "masked parameters": shapes, "step": self.step, "generator": self.generator.get_state().tolist()}

    def _digests(self) -> dict[str, int]:
        return dict(zip(self.masks, agreement.digests(self.masks), strict=True))

    def _is_masked(self, name: str, grad: Tensor) -> bool:
        """Tell whether `grad` was masked already: a new backward, after a skipped step say, makes it dense again."""
        return name in self._dense and self._dense[name][0] is grad and not bool(grad[~self.masks[name]].any())

    def _zero_gradients(self) -> None:
        for name, param in self._params.items():
            if param.grad is not None:
                param.grad.masked_fill_(~self.masks[name], 0)

    def _hold(self) -> None:
        for place, optimizer in enumerate(self._optimizers):
            self._handles.append(optimizer.register_step_pre_hook(self._pre if place == 0 else self._pre_other))
            last = place == len(self._optimizers) - 1
            self._handles.append(optimizer.register_step_post_hook(self._post if last else self._post_other))

    def _pre(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        changed = _evaluate_closure(args, kwargs)
        self._idle = optimizers.overflowed(optimizer)
        if self._idle:
            self._dense = {}
            return changed
        grads = {name: p.grad.detach() for name, p in self._params.items() if p.grad is not None}
        grads |= {name: dense for name, (_, dense) in self._dense.items()}
        with torch.no_grad():
            masks = self._revised(grads)
            if masks is not None:
                self._change(masks)
        self.before_step(self._params)
        self._dense = {}
        if masks is not None and self.skip_step:
            for one in self._optimizers:
                one.zero_grad(set_to_none=True)
        return changed

    def _revised(self, grads: Grads) -> Masks | None:
        """Return the revised masks, if any, once every process has come to the same."""

        def act() -> Masks | None:
            masks = self.revise(self._params, grads, self.step)
            return None if masks is None else self._check_masks(masks)

        # Outside of `every` nothing is due, and nothing is exchanged that others might not be waiting for.
        if self._peers.alone or self.step not in self.every:
            return act()
        agreement.check_joining(self._wrapper)
        return agreement.revised(self._peers, self.step, self.masks, act)

    def _pre_other(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return _evaluate_closure(args, kwargs)

    def _post(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._idle:
            self.after_step(self._params)
            self.step += 1
        self._idle = False

    def _post_other(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._idle:
            self.between_steps(self._params)

    def _change(self, masks: Masks) -> None:
        for name, param in self._params.items():
            changed = self.masks[name] ^ masks[name]
            if not bool(changed.any()):
                continue
            if self.clears_state:
                if param.grad is not None:
                    param.grad.masked_fill_(changed, 0)  # as mask_gradients() does: what is new steps from the next step on
                for optimizer, fresh in zip(self._optimizers, self._fresh, strict=True):
                    optimizers.clear_state(optimizer, param, changed, fresh)
            self.born(name, param, changed & masks[name])
        self.masks = masks
        self.project()
        self._remember()

    def _remember(self) -> None:
        self.history.append((self.step, tuple(int(mask.sum()) for mask in self.masks.values())))

    def _check_masks(self, masks: Masks) -> Masks:
        for name, param in self._params.items():
            if name not in masks or masks[name].shape != param.shape:
                found = tuple(masks[name].shape) if name in masks else "no mask"
                raise MaskError(f"{name!r} needs a mask of shape {tuple(param.shape)}, got {found}")
        return Masks({name: masks[name].to(param.device) for name, param in self._params.items()})

    def _check_pattern(self, params: Params) -> None:
        odd = [name for name, param in params.items() if not self.pattern.divides(param.shape)]
        if odd:
            raise PatternError(
                f"{self.pattern} does not divide {', '.join(odd)} (the first has shape {tuple(params[odd[0]].shape)}); "
                f"leave them dense with exclude={odd!r}"
            )

    def _context(self, name: str, grad: Tensor | None) -> Context:
        return Context(name=name, step=self.step, grad=grad, generator=self.generator)

    def _named(self, name: str, criterion: Criterion, param: Tensor, context: Context) -> Tensor:
        score = criterion(param, context)
        if not bool(torch.isfinite(score).all()):
            raise MaskError(
                f"the scores of {name!r} at step {self.step} are not finite; its weights or gradients hold NaN or "
                "infinity (lower the learning rate or clip gradients)"
            )
        return score

    def _restore(self, state: Mapping[str, Any]) -> None:
        masks = Masks.load({k.removeprefix("masks."): v for k, v in state.items() if k.startswith("masks.")})
        self.masks = self._check_masks(masks)
        self.step = int(state["step"])
        self.history = [(row[0], tuple(row[1:])) for row in state["history"].tolist()]
        self.generator.set_state(state["generator"])
        self.load_extra_state({k.removeprefix("extra."): v for k, v in state.items() if k.startswith("extra.")})
        self._pending = None


class Fixed(Sparsifier):
    """Holds given masks and never revises them.

    Args:
        masks: parameter name -> bool tensor; these parameters and no others are masked.
    """

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        given = Masks(masks)
        super().__init__(max(given.density(), 1e-12), parameters=list(given))
        self._given = given
        self.every = Every(1, stop=0)

    def initial(self, params: Params) -> Masks:
        """Return the given masks."""
        return self._given


def _allocation(allocate: str | Mapping[str, float] | Allocation) -> Allocation:
    if isinstance(allocate, str):
        return allocations.named(allocate)
    if isinstance(allocate, Mapping):
        return allocations.explicit(allocate)
    if not callable(allocate):
        raise AllocationError(f"allocate={allocate!r} is neither a name, a mapping of densities nor a function")
    return allocate


def _evaluate_closure(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Evaluate a closure given to `step` now, so that its gradients are seen before the step; pass its loss on."""
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if not callable(closure):
        return None
    with torch.enable_grad():
        loss = closure()
    if "closure" in kwargs:
        return args, {**kwargs, "closure": lambda: loss}
    return (args[0], lambda: loss, *args[2:]), kwargs
