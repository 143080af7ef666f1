"""Fast sparse ConvNets: gradual pruning of the 1x1 convolutions of a mobile network, in blocks that its kernels like.

Elsen, Dukhan, Gale, Simonyan. "Fast Sparse ConvNets". CVPR 2020.
Claim: with sparse 1x1 convolutions in CHW layout, sparse MobileNets and EfficientNets beat strong dense ones in accuracy
at equal time; a block of output channels that share their input channels trades accuracy for speed.
Equations: every 1x1 weight follows d_t = d + (1 - d) (1 - (t - t_0) / (n Dt))^3 (Zhu & Gupta 2018, Eq. 1), all to the
same density. The units are blocks of B = 1, 2 or 4 consecutive output channels and one input channel; a unit's score is
the L1 norm of its weights. Entry convolution, depthwise convolutions, gates and the classifier stay dense.
Departures: exact counts; a layer keeps at least one block; a pruned weight does not return; channels left over by the
blocks are pruned one by one, as they are packed; networks without any convolution have their linear layers pruned. The
densities and places of blocks per network are the paper's (.1 for MobileNet-v1 with blocks of 4 in the last layer, .15
for v2 with blocks of 2 from the eleventh bottleneck on), given as options; the cache-aware MobileNet-v2 is not here.
Cost: one selection a layer every `every` steps until `end`; nothing in between.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from openwork.cards import Card
from openwork.core import allocation, criteria, patterns
from openwork.core.criteria import Context
from openwork.core.masks import Masks
from openwork.core.patterns import Block, Pattern, Unstructured
from openwork.core.rng import generator
from openwork.errors import MaskError, MethodError
from openwork.methods.sparsify.gmp import GMP
from openwork.sparsifier.parameters import unwrap
from openwork.sparsifier.sparsifier import Grads, Params

CARD = Card(
    name="fast-sparse-convnets",
    title="Fast Sparse ConvNets",
    authors=("Erich Elsen", "Marat Dukhan", "Trevor Gale", "Karen Simonyan"),
    year=2020,
    venue="CVPR",
    link="https://arxiv.org/abs/1911.09723",
    wing="runtime",
    claim="Mobile networks with sparse 1x1 convolutions beat dense ones in accuracy at equal time.",
    entry="FastSparseConvNets",
    departures=(
        "Exact counts, and at least one block a layer.",
        "A pruned weight does not return.",
        "Channels left over by the blocks are pruned one by one.",
        "Networks without any convolution have their linear layers pruned.",
    ),
)

ROWS = (1, 2, 4)
"""Output channels of a block, as the kernels have them."""
_GATE = re.compile(r"squeeze.?(and)?.?exc|^se(layer|module|block)$", re.IGNORECASE)


@dataclass(frozen=True)
class RowBlocks(Pattern):
    """Blocks of `rows` consecutive output channels and one input stay or go whole; channels left over go one by one.

    Blocks and left-over weights keep the same density, and a weight keeps at least one of them.
    """

    rows: int

    def tiles(self, score: Tensor) -> Tensor:
        """Return (1, units): the blocks, row by row of blocks, then the weights of the channels left over."""
        single = Block(1).tiles(score)  # refuses what is no matrix
        full = score.shape[0] // self.rows * self.rows
        if self.rows == 1 or not full:
            return single
        return torch.cat([Block(self.rows).tiles(score[:full]), Unstructured().tiles(score[full:])], dim=1)

    def untile(self, units: Tensor, shape: torch.Size) -> Tensor:
        """Return every block's unit repeated over its rows."""
        full = shape[0] // self.rows * self.rows
        top, rest = torch.Size([full, *shape[1:]]), torch.Size([shape[0] - full, *shape[1:]])
        split = top.numel() // self.rows
        blocks = Block(self.rows).untile(units[:, :split], top)
        return torch.cat([blocks, Unstructured().untile(units[:, split:], rest)])

    def select(self, score: Tensor, density: float) -> Tensor:
        """Return the mask of the best blocks and, apart from them, of the best left-over weights, at `density` each."""
        units = self.tiles(score)
        split = score.shape[0] // self.rows * score[0].numel()
        parts = [part for part in (units[:, :split], units[:, split:]) if part.numel()]
        shares = [max(density, 1.0 / parts[0].numel()), *[density] * (len(parts) - 1)]
        kept = [Unstructured().select(part, share) for part, share in zip(parts, shares, strict=True)]
        return self.untile(torch.cat(kept, dim=1), score.shape)


class FastSparseConvNets(GMP):
    """Gradual magnitude pruning of the 1x1 convolutions, all to one density, in blocks of rows (Elsen et al. 2020).

    Args:
        density: kept share of the pruned weights at the end; the paper has .1 to .2.
        total_steps: optimizer steps of the whole training.
        block: output channels of a block: 1, 2 or 4. None takes it from `pattern`: unstructured, block2x1 or block4x1.
        block_from: where blocks begin; layers before it are pruned weight by weight. The name of a weight or of a
            module (the blocks begin with its first pruned weight), or the share of pruned layers that come before.
        norm: a block's score, "l1" or "l2".
        classifier: prune linear layers too, as the paper does in EfficientNet.
        begin: share of training after which pruning starts.
        end: share of training at which the final density is reached.
        every: steps between updates; None is a fortieth of the run, at most 100.
        options: `allocate` ("uniform" by default), `pattern`, `parameters` (instead of the 1x1 convolutions),
            `exclude`, `seed` of every Sparsifier.

    Attributes:
        patterns: the pattern of every pruned weight, by name, once attached.

    Raises:
        MethodError: if a word or share is not one of those above.
        MaskError: (on `attach`) if the model has convolutions but none that could be pruned.
    """

    def __init__(
        self,
        density: float,
        *,
        total_steps: int,
        block: Literal[1, 2, 4] | None = None,
        block_from: str | float = 0.0,
        norm: Literal["l1", "l2"] = "l1",
        classifier: bool = False,
        begin: float = 0.0,
        end: float = 0.5,
        every: int | None = None,
        **options: Any,
    ) -> None:
        self.rows = _rows(block, options.pop("pattern", "unstructured"))
        pattern = RowBlocks(self.rows) if self.rows > 1 else Unstructured()
        super().__init__(
            density, total_steps=total_steps, initial=1.0, begin=begin, end=end, every=every, scope="layers",
            pattern=pattern, **{"allocate": "uniform", **options},
        )  # fmt: skip
        if norm not in ("l1", "l2"):
            raise MethodError(f"norm={norm!r}: use 'l1' or 'l2'")
        self.block_from = _begin(block_from)
        self.norm, self.classifier, self.own_choice = norm, classifier, options.get("parameters") is None
        self.patterns: Mapping[str, RowBlocks] = {}

    def attach(self, model: nn.Module, optimizer: Optimizer | Sequence[Optimizer] | None = None) -> Self:
        """Mask the 1x1 convolutions of `model` and hold the masks, as every Sparsifier does."""
        if self.own_choice:
            inner = unwrap(model)
            self._choice = pointwise(inner, classifier=self.classifier) if _convolves(inner) else None
        return super().attach(model, optimizer)

    def initial(self, params: Params) -> Masks:
        """Return all ones."""
        self.patterns = _laid_out(params, self.rows, self.block_from)
        return super().initial(params)

    def revise(self, params: Params, grads: Grads, step: int) -> Masks | None:
        """Keep the blocks of the largest norms of every layer, down to d_t."""
        if step not in self.every:
            return None
        scores = self.score(params, criteria.magnitude if self.norm == "l1" else _square)
        final, now = self.shares(params), self.shares(params, self.target(step))
        shares = {name: max(share, final[name]) for name, share in now.items()}  # rounding may take what none gives back
        on = {name: scores[name].where(mask, -1.0) for name, mask in self.masks.items()}  # what is off stays off
        return Masks({name: self.patterns[name].select(on[name], shares[name]) & self.masks[name] for name in params})


def pointwise(model: nn.Module, *, classifier: bool = False) -> list[str]:
    """Return the names of the weights that are pruned: of the 1x1 convolutions that the kernels run, in model order.

    These have stride 1, no padding and one group. Those inside squeeze-and-excitation (a module whose class says so) see
    one pixel and are left out.

    Args:
        model: any module.
        classifier: name the weights of linear layers too.

    Raises:
        MaskError: if there is none.
    """
    gates = [module for module in model.modules() if _GATE.search(type(module).__name__)]
    left_out = {id(part) for gate in gates for part in gate.modules()}
    kept = [module for module in model.modules() if id(module) not in left_out]
    weights = {id(module.weight) for module in kept if isinstance(module, nn.Conv2d) and _is_pointwise(module)}
    if not weights:
        raise MaskError(
            f"{type(model).__name__} has no 1x1 convolution of stride 1, without padding and groups; name the weights to "
            "prune with parameters=[...]"
        )
    if classifier:
        weights |= {id(module.weight) for module in kept if isinstance(module, nn.Linear)}
    return [name for name, param in model.named_parameters() if id(param) in weights]


def sparsify_pointwise(
    model: nn.Module,
    density: float,
    *,
    block: Literal[1, 2, 4] = 1,
    block_from: str | float = 0.0,
    classifier: bool = False,
    seed: int = 0,
) -> Masks:
    """Zero random blocks of a model's 1x1 convolutions, in place, and return the masks: sparse networks to time.

    `sparsify_pointwise(models.build("mobilenet-v1", ...), 0.1, block=4, block_from=0.9)` is the paper's MobileNet-v1 but
    for the values of its weights.

    Args:
        model: any module with 1x1 convolutions.
        density: kept share of their weights, the same in each.
        block: output channels of a block.
        block_from: where blocks begin, as in `FastSparseConvNets`.
        classifier: prune linear layers too.
        seed: seed of the draw; a layer's draw depends on its name and on nothing else.

    Raises:
        MaskError: if there is no 1x1 convolution, or the density is out of range.
        MethodError: if the block is none of the kernels'.
    """
    named = dict(model.named_parameters())
    params = {name: named[name] for name in pointwise(model, classifier=classifier)}
    shares = allocation.uniform({name: param.shape for name, param in params.items()}, density)
    laid = _laid_out(params, _rows(block, "unstructured"), _begin(block_from))
    masks = {}
    for name, param in params.items():
        score = torch.rand(param.shape, generator=generator(seed, "pointwise", name), dtype=torch.float64)
        masks[name] = laid[name].select(score, shares[name]).to(param.device)
    made = Masks(masks)
    made.apply(model)
    return made


def _square(weight: Tensor, context: Context) -> Tensor:
    """Return w^2, whose sum over a block orders blocks as their L2 norms do."""
    return weight.detach().double().square()


def _is_pointwise(layer: nn.Conv2d) -> bool:
    plain = set(layer.kernel_size) == {1} and set(layer.stride) == {1} and layer.groups == 1
    return plain and layer.padding in ((0, 0), "valid", "same")


def _convolves(model: nn.Module) -> bool:
    return any(isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) for module in model.modules())


def _rows(block: int | None, pattern: Pattern | str) -> int:
    """Return the rows of a block from the two words for them, which may not contradict one another."""
    given = patterns.parse(pattern) if isinstance(pattern, str) else pattern
    rows = block or 1
    if isinstance(given, Block) and given.cols == 1:
        rows = given.rows
    elif not isinstance(given, Unstructured):
        rows = 0
    if rows not in ROWS or block not in (None, rows):
        raise MethodError(
            f"block={block!r} with pattern={pattern!r}: the kernels have blocks of 1, 2 or 4 output channels and one "
            "input; give block= alone, or pattern= unstructured, block2x1 or block4x1"
        )
    return rows


def _begin(block_from: str | float) -> str | float:
    if not isinstance(block_from, str) and not 0.0 <= block_from <= 1.0:
        raise MethodError(f"block_from={block_from!r}: give a name, or a share of the pruned layers in [0, 1]")
    return block_from


def _laid_out(names: Iterable[str], rows: int, block_from: str | float) -> dict[str, RowBlocks]:
    """Return the pattern of every weight: single weights before `block_from`, blocks of `rows` from there on."""
    listed = list(names)
    if isinstance(block_from, str):
        hits = [i for i, name in enumerate(listed) if name == block_from or name.startswith(f"{block_from}.")]
        if not hits:
            raise MaskError(f"block_from={block_from!r} names no pruned weight; those are {', '.join(listed)}")
        first = hits[0]
    else:
        first = round(block_from * len(listed))
    return {name: RowBlocks(rows if place >= first else 1) for place, name in enumerate(listed)}
