"""LSTM and GRU layers with packed weights: the product with all inputs at once, then step after step in native code.

A layer and its steps are one program: at each step the product with h, then the gates. States lie in panels, features by
columns of the batch, so that no step copies anything; a batch of one or two takes the products with single columns.
Where there are no kernels, or another format is wanted, the steps are a loop over the format's product.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from openwork.errors import ModelError
from openwork.runtime import formats, matvec, tuning
from openwork.runtime.kernels import arrange, cells
from openwork.runtime.kernels import spmm as kernel
from openwork.runtime.kernels.cells import GATES, Cell
from openwork.runtime.kernels.launch import Call, Program
from openwork.runtime.kernels.target import Target, host, targets
from openwork.runtime.launching import Pool, Ready
from openwork.runtime.spmm import PackedSpMM, spmm_chw, spmm_tokens, unpack_spmm

Recurrent = nn.LSTM | nn.GRU
STEPS = 32
"""Steps of one program; longer sequences run several."""
SINGLE = 4
"""Largest batch whose columns are multiplied one by one."""
WIDEST = 5
"""Vectors of a panel."""
_SHIFT, _MIDDLE = 56, 1 << 50
_PLACES = ("input", "state", "input_back", "state_back", "scratch")
"""What the addresses of a program are relative to."""


def obstacle(layer: Recurrent) -> str | None:
    """Return why a recurrent layer cannot be packed, None if it can."""
    own = nn.LSTM if isinstance(layer, nn.LSTM) else nn.GRU
    if type(layer).forward is not own.forward:
        return "has a forward of its own"
    if layer.proj_size:
        return "projects its state"
    return None


@dataclass(frozen=True, eq=False)
class _Direction:
    """The weights of one layer in one direction.

    Attributes:
        input: (gates * hidden, in) packed with its bias.
        hidden: (gates * hidden, hidden) packed with its bias.
    """

    input: Any
    hidden: Any

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is made anew."""
        return {"input": self.input, "hidden": self.hidden}

    @functools.cached_property
    def for_one(self) -> dict[str, matvec.PackedMatVec]:
        """The hidden weight packed for single columns, by target."""
        return {}


class _Key(NamedTuple):
    """What the program of some steps is made for."""

    target: str
    layer: int
    steps: int
    tiles: int
    wide: int
    single: bool
    threads: int


class PackedRecurrent(nn.Module):
    """An LSTM or GRU with packed weights; takes and returns what the layer does. Inference only."""

    def __init__(self, layer: Recurrent, format: str) -> None:
        super().__init__()
        self.format, self.mode = format, layer.mode
        self.cell: Cell = "lstm" if isinstance(layer, nn.LSTM) else "gru"
        self.input_size, self.hidden_size, self.num_layers = layer.input_size, layer.hidden_size, layer.num_layers
        self.bidirectional, self.batch_first, self.bias = layer.bidirectional, layer.batch_first, layer.bias
        self.directions = 2 if layer.bidirectional else 1
        self.weights = tuple(tuple(self._pack(layer, name) for name in names) for names in self._names())
        self._start()

    def forward(self, input: Any, hx: Any = None) -> tuple[Any, Any]:
        """Return the output of all steps and the last state, without gradients.

        Args:
            input: (steps, batch, in), (batch, steps, in) with `batch_first`, (steps, in), or a `PackedSequence`.
            hx: the first state, h or (h, c) of (layers * directions, batch, hidden); None is zero.

        Raises:
            ModelError: if the input or the state does not fit.
        """
        with torch.no_grad():
            if isinstance(input, PackedSequence):
                return self._ragged(input, hx)
            self._check(input)
            single = input.ndim == 2
            x = input.unsqueeze(1) if single else input.transpose(0, 1) if self.batch_first else input
            h, c = self._first(hx, x, single)
            y, h, c = self._layers(x, h, c)
            y = y.squeeze(1) if single else y.transpose(0, 1) if self.batch_first else y
            h, c = (h.squeeze(1), c.squeeze(1)) if single else (h, c)
            return y, (h, c) if self.cell == "lstm" else h

    def extra_repr(self) -> str:
        """Return what `print` shows."""
        count = f"{self.mode}, {self.input_size}, {self.hidden_size}, num_layers={self.num_layers}"
        return f"{count}, bidirectional={self.bidirectional}, format={self.format}, bytes={self.nbytes}"

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weights."""
        size = formats.load(self.format).nbytes
        return sum(size(one.input) + size(one.hidden) for layer in self.weights for one in layer)

    def tensors(self) -> dict[str, Tensor]:
        """Return weights and biases by the names that they have in the layer, unpacked anew."""
        unpack = formats.load(self.format).unpack
        found: dict[str, Tensor] = {}
        for names, layer in zip(self._names(), self.weights, strict=True):
            for name, one in zip(names, layer, strict=True):
                (input, input_bias), (hidden, hidden_bias) = unpack(one.input), unpack(one.hidden)
                found |= {f"weight_ih_{name}": input, f"weight_hh_{name}": hidden}
                if input_bias is not None and hidden_bias is not None:
                    found |= {f"bias_ih_{name}": input_bias, f"bias_hh_{name}": hidden_bias}
        return found

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is made anew."""
        return {key: value for key, value in self.__dict__.items() if key not in ("_matmul", "_pool")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Find the product again."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._start()

    def _start(self) -> None:
        self._matmul = formats.load(self.format).matmul
        self._pool: Pool[_Key] = Pool(self._ready)

    def _names(self) -> list[list[str]]:
        """Return what follows `weight_ih_` for every layer and direction."""
        return [[f"l{layer}{'_reverse' * back}" for back in range(self.directions)] for layer in range(self.num_layers)]

    def _pack(self, layer: Recurrent, name: str) -> _Direction:
        pack = formats.load(self.format).pack
        parts = {
            part: pack(getattr(layer, f"weight_{part}_{name}").detach(), getattr(layer, f"bias_{part}_{name}", None))
            for part in ("ih", "hh")
        }
        return _Direction(parts["ih"], parts["hh"])

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination.update({prefix + name: value for name, value in self.tensors().items()})

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        errors: list[str] = rest[-1]
        errors.append(f"{prefix.rstrip('.')!r} is packed: load into the original model, then accelerate it again")

    def _check(self, x: Tensor) -> None:
        if x.ndim not in (2, 3) or x.shape[-1] != self.input_size or x.device.type != "cpu":
            raise ModelError(
                f"cannot run {self.mode} on an input of shape {tuple(x.shape)} on {x.device}: give (steps, batch, "
                f"{self.input_size}), with batch_first (batch, steps, {self.input_size}), or (steps, {self.input_size})"
            )
        if x.numel() == 0:
            raise ModelError(f"cannot run {self.mode} on an input of shape {tuple(x.shape)}: give at least one step")

    def _first(self, hx: Any, x: Tensor, single: bool) -> tuple[Tensor, Tensor]:
        """Return the first h and c (layers * directions, batch, hidden)."""
        shape = (self.num_layers * self.directions, x.shape[1], self.hidden_size)
        if hx is None:
            return x.new_zeros(shape), x.new_zeros(shape)
        h, c = hx if self.cell == "lstm" else (hx, hx)
        if single:
            h, c = h.unsqueeze(1), c.unsqueeze(1)
        if tuple(h.shape) != shape or tuple(c.shape) != shape or h.dtype != x.dtype:
            raise ModelError(f"the first state has shape {tuple(h.shape)} of {h.dtype}: give {shape} of {x.dtype}")
        return h.detach(), c.detach()

    def _ragged(self, input: PackedSequence, hx: Any) -> tuple[PackedSequence, Any]:
        """Run a packed sequence: the examples of each length are a batch of their own."""
        x, lengths = pad_packed_sequence(input)
        h, c = self._first(hx, x, single=False)
        y = x.new_zeros(*x.shape[:2], self.directions * self.hidden_size)
        h, c = h.clone(), c.clone()
        for length in sorted(set(lengths.tolist())):
            own = (lengths == length).nonzero()[:, 0]
            y[:length, own], h[:, own], c[:, own] = self._layers(x[:length, own], h[:, own], c[:, own])
        order = input.sorted_indices
        packed = (
            pack_padded_sequence(y, lengths) if order is None else pack_padded_sequence(y, lengths, enforce_sorted=False)
        )
        packed = PackedSequence(packed.data, packed.batch_sizes, order, input.unsorted_indices)
        return packed, (h, c) if self.cell == "lstm" else h

    def _layers(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return outputs (steps, batch, directions * hidden) and the last states of x (steps, batch, in)."""
        target = host()
        run = self._looped
        if self.format == "spmm" and target is not None and x.dtype == torch.float32:
            run = functools.partial(self._native, target=target)
        size = self.directions
        hs, cs = [], []
        for number in range(self.num_layers):
            own = slice(number * size, (number + 1) * size)
            x, last_h, last_c = run(number, x, h[own], c[own])
            hs.append(last_h)
            cs.append(last_c)
        return x, torch.cat(hs), torch.cat(cs)

    # -- step by step in torch ----------------------------------------------------------------------------------------

    def _looped(self, number: int, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        outputs, hs, cs = [], [], []
        for back, one in enumerate(self.weights[number]):
            inputs = self._matmul(one.input, x)
            now_h, now_c, steps = h[back], c[back], []
            for step in reversed(inputs) if back else inputs:
                now_h, now_c = _step(self.cell, self._matmul(one.hidden, now_h), step, now_h, now_c)
                steps.append(now_h)
            outputs.append(torch.stack(steps[::-1] if back else steps))
            hs.append(now_h)
            cs.append(now_c)
        return torch.cat(outputs, dim=-1), torch.stack(hs), torch.stack(cs)

    # -- in native code -----------------------------------------------------------------------------------------------

    def _native(self, number: int, x: Tensor, h: Tensor, c: Tensor, target: Target) -> tuple[Tensor, Tensor, Tensor]:
        (steps, batch, _), size, directions = x.shape, self.hidden_size, self.directions
        single, (tiles, wide) = batch <= SINGLE, _panels(batch, target)
        if single:
            tiles, wide = batch, 1
        gates = GATES[self.cell] * size
        products = [self._inputs(one.input, x, tiles, wide, single) for one in self.weights[number]]
        states = torch.empty(steps + 2, tiles, directions * size, wide)
        scratch = torch.empty(directions, tiles * (gates + size) * wide)
        cell = scratch[:, tiles * gates * wide :].view(directions, tiles, size, wide)
        for back in range(directions):
            own = slice(back * size, (back + 1) * size)
            states[(steps + 1) * back, :, own] = _to_panels(h[back], tiles, wide)
            cell[back] = _to_panels(c[back], tiles, wide)
        work = self.weights[number][0].hidden.multiplies * batch * directions
        threads = tuning.useful_threads(work, target, torch.get_num_threads())
        for begin in range(0, steps, STEPS):
            count = min(STEPS, steps - begin)
            key = _Key(target.name, number, count, tiles, wide, single, threads)
            back = steps - 1 - begin
            places = [products[0].data_ptr() + 4 * begin * tiles * gates * wide, states[begin + 1].data_ptr()]
            places += [products[-1].data_ptr() + 4 * back * tiles * gates * wide, states[back + 1].data_ptr()]
            self._pool.run(key, (*places, scratch.data_ptr()), threads)
        ends = [states[steps * (1 - back) + back, :, back * size : (back + 1) * size] for back in range(directions)]
        last_h = torch.stack([_from_panels(end, batch) for end in ends])
        last_c = torch.stack([_from_panels(end, batch) for end in cell])
        y = states[1:-1].transpose(2, 3).reshape(steps, tiles * wide, directions * size)[:, :batch]
        return y, last_h, last_c

    def _inputs(self, packed: PackedSpMM, x: Tensor, tiles: int, wide: int, single: bool) -> Tensor:
        """Return the products with all inputs in the layout of the states."""
        steps, batch, width = x.shape
        if single:
            return spmm_tokens(packed, x)
        if tiles * wide != batch:
            x = nn.functional.pad(x, (0, 0, 0, tiles * wide - batch))
        return spmm_chw(packed, x.reshape(steps * tiles, wide, width).transpose(1, 2))

    def _ready(self, key: _Key) -> Ready:
        """Return the program of some steps of a layer, all directions at once."""
        target = targets()[key.target]
        size, gates = self.hidden_size, GATES[self.cell] * self.hidden_size
        columns = 4 * key.wide
        row = self.directions * size * columns  # bytes of a tile of states
        keep: list[object] = []
        stages: list[list[Call]] = []
        multiply = [self._multiplier(key, one, keep, target) for one in self.weights[key.layer]]
        for step in range(key.steps):
            products: list[list[Call]] = []
            pointwise: list[Call] = []
            for back in range(self.directions):
                way = -1 if back else 1
                own = size * columns * back
                state = _tag(2 * back + 1, way * step * key.tiles * row + own)
                before = _tag(2 * back + 1, way * (step - 1) * key.tiles * row + own)
                hidden = _tag(4, 4 * back * key.tiles * (gates + size) * key.wide)
                cell = hidden + key.tiles * gates * columns
                made = multiply[back](before, hidden, row)
                products += [[] for _ in range(len(made) - len(products))]
                for stage, more in zip(products, made, strict=False):
                    stage += more
                pointwise += cells.calls(
                    target, self.cell, (hidden, gates * columns),
                    (_tag(2 * back, way * step * key.tiles * gates * columns), gates * columns), (cell, size * columns),
                    (before, row), (state, row), gate=size * columns, count=size * key.wide, tiles=key.tiles,
                )  # fmt: skip
            stages += [*products, pointwise]
        program = _Moving(stages, target)
        return Ready(program, tuple((program.places, place, place) for place in range(len(_PLACES))), keep)

    def _multiplier(self, key: _Key, one: _Direction, keep: list[object], target: Target) -> Any:
        """Return a function that gives the stages of the product of h at one address into another."""
        hidden: PackedSpMM = one.hidden
        gates = hidden.shape[0]
        if key.single:
            if target.name not in one.for_one:
                one.for_one[target.name] = matvec.pack_rows(*unpack_spmm(hidden))
            stages = one.for_one[target.name].stages
            keep.append(stages)
            return lambda x, y, row: matvec.calls(stages, target, x, y, columns=key.tiles, x_step=row, y_step=4 * gates)
        main, columns = hidden.sections[0], 4 * key.wide
        sizes = (main.rows, len(main.columns), hidden.shape, key.wide, target, key.threads, key.tiles)
        tiling = tuning.default_tiling(*sizes)
        offsets = np.arange(hidden.shape[1], dtype=np.int64) * columns
        arranged = [arrange.arrange(section, offsets, tiling.part, tiling.chunks) for section in hidden.sections]
        bias = np.zeros(hidden.shape[0], np.float32) if hidden.bias is None else hidden.bias.numpy()
        keep += [*arranged, bias]

        def multiply(x: int, y: int, row: int) -> list[list[Call]]:
            found: list[Call] = []
            for section, weights in zip(hidden.sections, arranged, strict=True):
                into = kernel.Matrix(y + section.first * columns, hidden.shape[0] * columns, columns)
                found += kernel.calls(
                    target, weights, kernel.Matrix(x, row, columns), into, vectors=tiling.vectors, columns=key.wide,
                    bias=bias.ctypes.data + 4 * section.first, images=key.tiles,
                )  # fmt: skip
            return [found]

        return multiply


class _Moving(Program):
    """A program whose addresses are relative to places, which may be others at each run."""

    def __init__(self, stages: Sequence[Sequence[Call]], target: Target) -> None:
        words = [call.slots for stage in stages for call in stage]
        self.places = np.zeros(1 + len(_PLACES), np.int64)
        self._table = np.concatenate(words)
        place = self._table >> _SHIFT
        self._place = np.where(place > 0, place - 1, len(_PLACES))
        self._offset = np.where(place > 0, self._table - (place << _SHIFT) - _MIDDLE, self._table)
        ends = np.cumsum([len(one) for one in words])
        views = iter(np.split(self._table, ends[:-1]))
        moved = [[Call(call.address, next(views), call.units) for call in stage] for stage in stages]
        self._words = self._table
        super().__init__(moved, target)

    def run(self, threads: int) -> None:
        """Run all stages at the present places."""
        np.add(self.places[self._place], self._offset, out=self._words)
        super().run(threads)


def pack_recurrent(layer: Recurrent, format: str) -> PackedRecurrent:
    """Return the packed twin of an LSTM or GRU, in eval mode. The layer itself is left as it is.

    Raises:
        ModelError: if there is no such format, or it refuses a weight.
    """
    return PackedRecurrent(layer, format).eval()


def _tag(place: int, offset: int) -> int:
    """Return an address relative to a place, as `_Moving` takes it."""
    return ((place + 1) << _SHIFT) + _MIDDLE + offset


def _panels(batch: int, target: Target) -> tuple[int, int]:
    """Return how many panels of how many columns hold a batch."""
    if batch <= target.lanes:
        return 1, 1 << (batch - 1).bit_length()
    vectors = -(-batch // target.lanes)
    tiles = -(-vectors // WIDEST)
    return tiles, -(-vectors // tiles) * target.lanes


def _to_panels(state: Tensor, tiles: int, wide: int) -> Tensor:
    """Return (batch, hidden) as (tiles, hidden, wide), zero beyond the batch."""
    batch, size = state.shape
    padded = nn.functional.pad(state, (0, 0, 0, tiles * wide - batch))
    return padded.reshape(tiles, wide, size).transpose(1, 2)


def _from_panels(state: Tensor, batch: int) -> Tensor:
    """Return (tiles, hidden, wide) as (batch, hidden)."""
    tiles, size, wide = state.shape
    return state.transpose(1, 2).reshape(tiles * wide, size)[:batch]


def _step(cell: Cell, hidden: Tensor, input: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Return the next h and c from both products (batch, gates * hidden)."""
    if cell == "lstm":
        i, f, g, o = (hidden + input).chunk(4, dim=-1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c
    (hr, hz, hn), (xr, xz, xn) = hidden.chunk(3, dim=-1), input.chunk(3, dim=-1)
    n = (xn + (xr + hr).sigmoid() * hn).tanh()
    return n + (xz + hz).sigmoid() * (h - n), c
