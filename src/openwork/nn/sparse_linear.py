"""A linear layer that is sparse all the time: no dense weight, gradient or optimizer state exists at any moment.

Mocanu, Mocanu, Stone, Nguyen, Gibescu, Liotta, "Scalable training of artificial neural networks with adaptive sparse
connectivity inspired by network science", Nature Communications 9, 2018: drop the smallest, grow at random (SET).
Heddes, Srinivasa, Givargis, Nicolau, "Always-Sparse Training by Growing Connections with Guided Stochastic Exploration",
2024: grow the largest gradients of a random sample of absent positions, which RigL (Evci et al., ICML 2020) takes of all.
Evci, Ioannou, Keskin, Dauphin, "Gradient Flow in Sparse Neural Networks and How Lottery Tickets Win", AAAI 2022: the scale
of the first weights follows from the entries that a row really has.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from openwork.core import sampling
from openwork.core.rng import generator as named_generator
from openwork.core.select import count_of
from openwork.errors import MaskError, ModelError, PatternError
from openwork.nn import exchange
from openwork.runtime import positions as places
from openwork.runtime.positions import Positions
from openwork.runtime.sparse_products import Products, Scout, multiply
from openwork.sparsifier.optimizers import check_optimizers


class SparseLinear(nn.Module):
    """y = x W^T + b with a sparse weight W (out, in) that is kept, differentiated and stepped at its entries only.

    Memory: 4 bytes an entry each for values, gradient and each state of the optimizer, and 4 for its column. In training
    the orders by row and by column and the offsets into the batch take 16 to 24 more, and 8 to 16 for each further batch
    size in use (of at most nine). Cost of a step: 6 operations an entry and example, at the speed of the second cache;
    a layer whose input needs no gradient is spared a third. `benchmarks/sparse_training.py` measures it.

    The output's memory is features x batch (a transposed view), and an input that is so too is read without copying:
    element-wise layers keep it so, and a stack of these layers never transposes. Any other input is copied once.
    An absent weight multiplies nothing: infinity or NaN in its input does not reach the output.

    Values in float32 on the CPU go through kernels made for the processor; the result is the same bit for bit for every
    number of threads. Other dtypes and devices go through torch. Under autocast the layer stays in its own dtype.
    It can be differentiated once; `torch.compile` runs it as it is, between the graphs.

    Args:
        in_features: inputs.
        out_features: outputs.
        density: kept share of the weights, at random positions; the number is exact. Instead of `mask`.
        bias: whether there is a bias.
        mask: bool (out, in), the positions to keep. Instead of `density`.
        block: 1, 2 or 4 consecutive outputs share their positions, which is faster; must divide `out_features`.
        dtype: of values and bias.
        generator: where positions and first values come from, on the CPU. One for all layers of a model, lest layers of
            the same size be the same.

    Attributes:
        values: parameter (nnz), row by row: entry p has the values p * block to (p + 1) * block - 1, one for each row.
        bias: parameter (out), or None.
        starts, columns: buffers int32, see `openwork.runtime.positions.Positions`. Not to be written to.

    Raises:
        MaskError: if there are both density and mask or neither, or the density is not in [0, 1].
        PatternError: if the sizes, the block or the mask do not fit one another.
    """

    values: nn.Parameter
    starts: Tensor
    columns: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        density: float | None = None,
        bias: bool = True,
        *,
        mask: Tensor | None = None,
        block: int = 1,
        dtype: torch.dtype = torch.float32,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        if (density is None) == (mask is None):
            raise MaskError(f"density is {density} and a mask is {'' if mask is None else 'not '}None: give one of the two")
        if mask is not None and mask.shape != (out_features, in_features):
            raise PatternError(f"the mask is {tuple(mask.shape)}: give a bool mask ({out_features}, {in_features})")
        self.in_features, self.out_features, self.block = in_features, out_features, block
        found = places.from_mask(mask, block) if mask is not None else self._draw(density or 0.0, generator)
        self.values = nn.Parameter(torch.empty(found.nnz, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype)) if bias else None
        self.register_buffer("starts", found.starts)
        self.register_buffer("columns", found.columns)
        self._products: Products | None = None
        self._scout: Scout | None = None
        self.reset_parameters(generator)

    @classmethod
    def from_dense(cls, linear: nn.Linear, mask: Tensor | None = None, *, block: int = 1) -> Self:
        """Return the sparse twin of a layer: its weights where `mask` (bool, its weight's shape) keeps them.

        Args:
            linear: left as it is.
            mask: None keeps what is not zero, and whole blocks around it.
            block: as in the constructor.

        Raises:
            PatternError: if mask or block do not fit the weight.
        """
        weight = linear.weight.detach()
        if mask is None:
            mask = weight != 0
            if block > 1 and weight.shape[0] % block == 0:
                mask = mask.reshape(-1, block, weight.shape[1]).any(dim=1).repeat_interleave(block, dim=0)
        made = cls(
            linear.in_features, linear.out_features, bias=linear.bias is not None, mask=mask.cpu(), block=block,
            dtype=weight.dtype, generator=named_generator(0, "SparseLinear.from_dense"),
        ).to(weight.device)  # fmt: skip
        with torch.no_grad():
            made.values.copy_(weight[made.positions.pairs()])
            if made.bias is not None:
                made.bias.copy_(linear.bias)
        return made.train(linear.training)

    def to_dense(self) -> nn.Linear:
        """Return a dense layer with the same weights, zero where this one has none; it takes out * in numbers."""
        made = nn.Linear(
            self.in_features, self.out_features, self.bias is not None, device=self.values.device, dtype=self.values.dtype
        )
        with torch.no_grad():
            made.weight.zero_()[self.positions.pairs()] = self.values.detach()
            if self.bias is not None:
                made.bias.copy_(self.bias)
        return made.train(self.training)

    @property
    def positions(self) -> Positions:
        """Where the weight has entries."""
        return self._ready().positions

    @property
    def mask(self) -> Tensor:
        """The bool mask (out, in), made anew at each reading; it takes out * in bytes."""
        return self.positions.mask()

    @property
    def density(self) -> float:
        """Kept share of the weights."""
        return self.values.numel() / (self.in_features * self.out_features)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        """Draw values from U(-1/sqrt(k), 1/sqrt(k)), k the entries of the row, and the bias as `nn.Linear` would.

        A row of k entries thus starts with outputs of the scale that `nn.Linear` gives a layer of k inputs.
        """
        counts = self.positions.starts.diff()[self.positions.group].double().repeat_interleave(self.block)
        unit = torch.rand(self.values.shape, generator=generator, dtype=torch.float64).to(self.values.device)
        self.values.copy_((2 * unit - 1) / counts.sqrt())
        if self.bias is not None:
            unit = torch.rand(self.bias.shape, generator=generator, dtype=torch.float64)
            self.bias.copy_((2 * unit - 1) / math.sqrt(self.in_features))

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T + b: (..., in) -> (..., out), of the layer's dtype.

        Raises:
            ModelError: if x is not (..., in) of the layer's dtype and device.
        """
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(self.values.dtype)
        y: Tensor = multiply(x, self.values, self.bias, self._ready(), self._scout)
        return y

    def scout(self, generator: torch.Generator, ratio: float = 1.0) -> int:
        """Draw absent positions whose gradients are collected from now on, for `exchange(..., grow="gradient")`.

        They add up over backward passes as gradients do, so call it where gradients are zeroed, before the forward pass.
        Each costs as much as an entry's gradient, until the exchange.

        Args:
            generator: on the CPU.
            ratio: positions to draw, in entries of the layer (the factor gamma of guided stochastic exploration). At
                most all absent ones, with which growth is RigL's.

        Returns:
            How many positions are watched.

        Raises:
            MaskError: if the ratio is negative or not finite.
        """
        if not 0 <= ratio < math.inf:
            raise MaskError(f"ratio is {ratio!r}: give how many positions to watch for each entry of the layer, at least 0")
        positions = self.positions
        count = min(positions.total - positions.entries, math.ceil(ratio * positions.entries))
        drawn = sampling.subset_without(positions.flat().cpu(), positions.total, count, generator)
        watched = places.from_flat(drawn.to(self.values.device), positions.shape, self.block)
        self._scout = Scout(Products(watched), self.values.detach().new_zeros(watched.nnz))
        return count

    @torch.no_grad()
    def exchange(
        self,
        share: float,
        optimizer: Optimizer | Sequence[Optimizer] | None = None,
        *,
        generator: torch.Generator,
        grow: Literal["random", "gradient"] = "random",
    ) -> int:
        """Drop a share of the entries, those of the smallest |value| (of a block: their sum), and grow as many.

        Grown are random positions (SET), or of those that `scout` has watched and those just dropped the ones of the
        largest |gradient|. What is dropped and grown again is simply kept. New entries start at zero, with a gradient of
        zero and the optimizer's state of a new weight; the optimizer keeps its parameter. Call it after the backward pass
        and before `optimizer.step()`, or, with random growth, between any two steps.
        Time and memory are O(entries log entries); the order of entries and all that depends on it is made anew.

        Args:
            share: share of the entries that leaves, in [0, 1]; rounded down to whole entries.
            optimizer: whatever steps this layer's values, or several; None if nothing holds state of them.
            generator: where random positions come from, on the CPU.
            grow: "random" or "gradient".

        Returns:
            How many entries are at new positions.

        Raises:
            MaskError: if the share is not in [0, 1], or values or gradients are not finite.
            ModelError: for growth by gradient without a backward pass since `scout`.
            OptimizerError: if the optimizer does not hold this layer's values or cannot be stepped sparsely.
        """
        if not 0 <= share <= 1:
            raise MaskError(f"share is {share!r}: give the share of the entries that leaves, from 0 to 1")
        if grow not in ("random", "gradient"):
            raise ModelError(f"grow is {grow!r}: use random or gradient")
        optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer or ())
        check_optimizers(optimizers, {"values": self.values})
        positions = self.positions
        flat, device = positions.flat(), self.values.device
        stay = exchange.survivors(self._worth(self.values), math.floor(share * positions.entries + 1e-9))
        if grow == "random":
            drawn = exchange.grown_at_random(flat.cpu(), stay.cpu(), positions.total, generator)
        else:
            drawn = self._by_gradient(flat, stay)
        after, source = exchange.merged(flat, stay, drawn.to(device))
        exchange.move(self.values, source, optimizers)
        self._place(places.from_flat(after, positions.shape, self.block))
        return int((source < 0).sum())

    def extra_repr(self) -> str:
        """Return what `print` shows."""
        block = f", block={self.block}" if self.block > 1 else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, density={self.density:.4g}{block}, "
            f"bias={self.bias is not None}"
        )

    # -- machinery -----------------------------------------------------------------------------------------------------

    def _draw(self, density: float, generator: torch.Generator) -> Positions:
        sizes = self.in_features, self.out_features
        if min(sizes) < 1 or self.block not in places.BLOCKS or self.out_features % self.block:
            raise PatternError(
                f"cannot make a weight ({self.out_features}, {self.in_features}) in blocks of {self.block} rows: give sizes "
                f"of at least 1 and a block of {', '.join(map(str, places.BLOCKS))} that divides the outputs"
            )
        total = self.in_features * self.out_features // self.block
        flat = sampling.subset(total, count_of(density, total), generator)
        return places.from_flat(flat, (self.out_features, self.in_features), self.block)

    def _ready(self) -> Products:
        if self._products is None:
            shape = (self.out_features, self.in_features)
            self._products = Products(Positions(shape, self.block, self.starts, self.columns))
        return self._products

    def _place(self, positions: Positions) -> None:
        """Take up new positions; buffers are replaced, since a graph may still refer to the old ones."""
        self.starts, self.columns = positions.starts, positions.columns
        self._products, self._scout = Products(positions), None

    def _worth(self, numbers: Tensor) -> Tensor:
        """Return the sum of |number| of each entry, of numbers (entries * block)."""
        return numbers.detach().abs().reshape(-1, self.block).sum(dim=1)

    def _by_gradient(self, flat: Tensor, stay: Tensor) -> Tensor:
        scout, grad = self._scout, self.values.grad
        if scout is None or not scout.passes or grad is None:
            raise ModelError("there are no gradients to grow by: call scout(), then run forward and backward")
        others = scout.products.positions.flat()
        return exchange.grown_by_score(flat, stay, self._worth(grad), others, self._worth(scout.grad))

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is made anew."""
        return {**self.__dict__, "_products": None, "_scout": None}

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._products = self._scout = None
        return self

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str],
        unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        """Take up the state's positions, as many as they are; then load as any module does."""
        names = ("values", "starts", "columns")
        values, starts, columns = (state_dict.get(prefix + name) for name in names)
        if isinstance(values, Tensor) and isinstance(starts, Tensor) and isinstance(columns, Tensor):
            try:
                found = Positions((self.out_features, self.in_features), self.block, starts.detach(), columns.detach())
                if values.shape != (found.nnz,):
                    raise PatternError(f"there are {tuple(values.shape)} values for {found.nnz} positions")
            except PatternError as error:
                error_msgs.append(f"cannot load {prefix.rstrip('.') or 'a SparseLinear'!r}: {error}")
                return
            if values.shape != self.values.shape:
                self.values.data = torch.empty(values.shape, dtype=self.values.dtype, device=self.values.device)
                self.values.grad = None
            self.starts = torch.empty_like(starts, device=self.starts.device)
            self.columns = torch.empty_like(columns, device=self.columns.device)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        self._products = self._scout = None
