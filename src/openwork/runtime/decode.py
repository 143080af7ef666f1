"""Sparse decode: codes given as values and indices times a dictionary, without the dense codes (batch, atoms) ever.

out[b] = bias + sum_j values[b, j] * dictionary[indices[b, j]], the decoder of a k-sparse autoencoder (Makhzani and Frey,
"k-Sparse Autoencoders", ICLR 2014; Gao et al., "Scaling and evaluating sparse autoencoders", 2024, section 2.3). It reads
k rows of the dictionary for a sample where the dense product reads all of them. The gradient to the values is a gathered
dot product; that to the dictionary is the same sum again with the codes sorted by atom, so it has one order of addition.

float32 on the CPU runs on kernels made for this machine; other dtypes and devices run on torch's `embedding_bag`.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from openwork.errors import ModelError
from openwork.runtime.kernels import decode as kernel
from openwork.runtime.kernels.launch import Program
from openwork.runtime.kernels.target import host, targets
from openwork.runtime.launching import Pool, Ready

SMALL = 1 << 20
"""Bytes of gathered rows below which a second thread costs more than it brings."""
SHARED = 16
"""Samples from which threads share them; fewer have their features shared."""
_KINDS: dict[torch.dtype, kernel.Kind] = {torch.float32: "f32", torch.bfloat16: "bf16"}
_INDICES: dict[torch.dtype, kernel.Index] = {torch.int32: "i32", torch.int64: "i64"}
_OPERANDS = ("indices", "values", "matrix", "bias", "out")


class _Key(NamedTuple):
    """What a program is made for; strides in bytes."""

    target: str
    rows: int
    entries: int
    columns: int
    matrix_row: int
    out_row: int
    kind: kernel.Kind
    numbers: kernel.Index


def decode(
    values: Tensor,
    indices: Tensor,
    dictionary: Tensor,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    *,
    sparse_grad: bool = False,
    threads: int | None = None,
) -> Tensor:
    """Return bias + sum_j values[..., j] * dictionary[indices[..., j]], with first derivatives.

    An atom that a sample names twice counts twice. A value of zero is multiplied like any other, so that NaN and infinity
    in the dictionary reach the samples that name them and no other. The result is the same bit for bit for every number
    of threads.

    Args:
        values: (..., k), float32; another real dtype takes the slower path of torch.
        indices: (..., k), whole numbers of 0 to atoms - 1.
        dictionary: (atoms, features) of values' dtype, or bfloat16 with float32 values, which halves what is read. Rows
            whose features lie side by side are read where they are; another layout is copied at each call.
        bias: (features) of values' dtype, or None.
        out: where to write, (..., features), contiguous, overlapping nothing else; only where no gradient is wanted.
        sparse_grad: the gradient to the dictionary is a sparse tensor, as that of `nn.Embedding(sparse=True)` is, with one
            row for each atom that the codes name; on kernels only.
        threads: at most; None is torch's number, one where the product is small.

    Returns:
        (..., features) of values' dtype.

    Raises:
        ModelError: if shapes, dtypes or devices do not fit one another or, on the CPU, an index is out of range.
    """
    _check(values, indices, dictionary, bias)
    shape = (*values.shape[:-1], dictionary.shape[1])
    if out is not None:
        _check_out(out, shape, (values, indices, dictionary, bias))
    if indices.dtype not in _INDICES:
        indices = indices.long()
    flat = (math.prod(values.shape[:-1]), values.shape[-1])
    codes, places = values.reshape(flat), indices.reshape(flat)
    if values.dtype != torch.float32 or values.device.type != "cpu" or host() is None or 0 in shape:
        if sparse_grad:
            raise ModelError(f"there is no sparse gradient of {values.dtype} on {values.device}: give sparse_grad=False")
        y = _plain(codes, places, dictionary, bias).reshape(shape)
        return y if out is None else out.copy_(y)
    if torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in (values, dictionary, bias)):
        return _Decode.apply(codes, places, dictionary, bias, sparse_grad, threads).reshape(shape)  # type: ignore[no-any-return, no-untyped-call]
    y = torch.empty(shape) if out is None else out
    _sums(codes, places, dictionary, bias, y.view(len(codes), dictionary.shape[1]), threads)
    return y


class _Decode(torch.autograd.Function):
    """The product on kernels, codes (samples, k), and its three gradients."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, indices: Tensor, dictionary: Tensor, bias: Tensor | None, sparse: bool, threads: int | None
    ) -> Tensor:
        ctx.save_for_backward(values, indices, dictionary)
        ctx.sparse, ctx.threads = sparse, threads
        y = torch.empty(values.shape[0], dictionary.shape[1])
        _sums(values.detach(), indices, dictionary.detach(), None if bias is None else bias.detach(), y, threads)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, indices, dictionary = ctx.saved_tensors
        needs_values, _, needs_dictionary, needs_bias = ctx.needs_input_grad[:4]
        grad = grad.contiguous()
        to_values = _dots(grad, indices, dictionary, ctx.threads) if needs_values else None
        to_dictionary = _scattered(grad, values, indices, dictionary, ctx.sparse, ctx.threads) if needs_dictionary else None
        return to_values, None, to_dictionary, grad.sum(dim=0) if needs_bias else None, None, None


def _plain(values: Tensor, indices: Tensor, dictionary: Tensor, bias: Tensor | None) -> Tensor:
    """Return the sums by torch alone, codes (samples, k)."""
    samples, entries = indices.shape
    starts = torch.arange(samples, dtype=indices.dtype, device=indices.device) * entries
    rows = dictionary.to(values.dtype)
    y = functional.embedding_bag(indices.reshape(-1), rows, starts, mode="sum", per_sample_weights=values.reshape(-1))
    return y if bias is None else y + bias


def _sums(
    values: Tensor, indices: Tensor, dictionary: Tensor, bias: Tensor | None, out: Tensor, threads: int | None
) -> None:
    """Write the sums for codes (samples, k) to `out` (samples, features) on kernels."""
    target = host()
    assert target is not None  # asked by the caller
    dictionary, values, indices = _rows(dictionary), values.contiguous(), indices.contiguous()
    bias = out.new_zeros(out.shape[1]) if bias is None else bias.contiguous()
    (samples, entries), columns, size = values.shape, out.shape[1], dictionary.element_size()
    kind, index = _KINDS[dictionary.dtype], _INDICES[indices.dtype]
    key = _Key(target.name, samples, entries, columns, size * dictionary.stride(0), 4 * columns, kind, index)
    operands = (indices.data_ptr(), values.data_ptr(), dictionary.data_ptr(), bias.data_ptr(), out.data_ptr())
    _pool().run(key, operands, _useful(threads, samples * entries * columns * size))


def _ready(key: _Key) -> Ready:
    """Return the program that sums `entries` rows for each of `rows` samples."""
    starts = np.arange(key.rows + 1, dtype=np.int64) * key.entries
    place = starts.ctypes.data
    entries = kernel.Entries(place, place + 8, 0, 0, key.numbers, key.rows * key.entries)
    matrix = kernel.Rows(0, key.matrix_row, key.columns, key.kind)
    target = targets()[key.target]
    run, across = kernel.few(key.entries, 4 * key.columns), key.columns if key.rows >= SHARED else 1
    calls = kernel.sums(target, entries, matrix, 0, 0, key.out_row, key.rows, run=run, across=across)
    patches = [(call.slots, kernel.SUM_WORDS.index(word), i) for call in calls for i, word in enumerate(_OPERANDS)]
    return Ready(Program([calls], target), tuple(patches), starts)


@functools.cache
def _pool() -> Pool[_Key]:
    return Pool(_ready)


def _dots(grad: Tensor, indices: Tensor, dictionary: Tensor, threads: int | None) -> Tensor:
    """Return <grad[b], dictionary[indices[b, j]]>: (samples, k)."""
    target = host()
    assert target is not None  # the forward pass ran on it
    dictionary, indices = _rows(dictionary), indices.contiguous()
    (samples, entries), size = indices.shape, dictionary.element_size()
    found = torch.empty(samples, entries)
    matrix = kernel.Rows(dictionary.data_ptr(), size * dictionary.stride(0), grad.shape[1], _KINDS[dictionary.dtype])
    calls = kernel.dots(
        target, indices.data_ptr(), found.data_ptr(), matrix, grad.data_ptr(), 4 * grad.shape[1], samples, entries,
        _INDICES[indices.dtype],
    )  # fmt: skip
    Program([calls], target).run(_useful(threads, found.numel() * grad.shape[1] * size))
    return found


def _scattered(
    grad: Tensor, values: Tensor, indices: Tensor, dictionary: Tensor, sparse: bool, threads: int | None
) -> Tensor:
    """Return sum over b, j of values[b, j] * grad[b] at row indices[b, j]: (atoms, features) of dictionary's dtype."""
    from scipy import sparse as matrices

    target = host()
    assert target is not None  # the forward pass ran on it
    (samples, entries), (atoms, columns) = values.shape, dictionary.shape
    starts = np.arange(samples + 1) * entries
    codes = (values.contiguous().reshape(-1).numpy(), indices.int().contiguous().reshape(-1).numpy(), starts)
    by_atom = matrices.csr_array(codes, shape=(samples, atoms)).tocsc()  # a counting sort that keeps the order of samples
    bounds = by_atom.indptr.astype(np.int64)
    begins, ends = bounds[:-1], bounds[1:]
    named = np.flatnonzero(begins < ends) if sparse else None
    if named is not None:
        begins, ends = begins[named], ends[named]
    weights = np.ascontiguousarray(by_atom.data, np.float32)
    found, bias = torch.empty(len(begins), columns), np.zeros(columns, np.float32)
    lines = np.ascontiguousarray(by_atom.indices, np.int32)
    listed = kernel.Entries(
        begins.ctypes.data, ends.ctypes.data, lines.ctypes.data, weights.ctypes.data, "i32", len(weights)
    )  # fmt: skip
    matrix = kernel.Rows(grad.data_ptr(), 4 * columns, columns)
    run = kernel.few(-(-len(weights) // max(1, len(begins))) + 1, 4 * columns)
    calls = kernel.sums(
        target, listed, matrix, bias.ctypes.data, found.data_ptr(), 4 * columns, len(begins), run=run, across=columns
    )  # fmt: skip
    Program([calls], target).run(_useful(threads, 4 * columns * (len(weights) + len(begins))))
    found = found.to(dictionary.dtype)
    if named is None:
        return found
    place = torch.from_numpy(named)[None]
    return torch.sparse_coo_tensor(place, found, (atoms, columns), is_coalesced=True, check_invariants=False)


def _rows(dictionary: Tensor) -> Tensor:
    """Return a dictionary whose rows have their features side by side, itself where they do."""
    fits = dictionary.shape[1] == 1 or dictionary.stride(1) == 1
    return dictionary if fits and dictionary.stride(0) >= 0 else dictionary.contiguous()


def _useful(threads: int | None, size: int) -> int:
    """Return how many threads to use for gathering `size` bytes."""
    if threads is not None:
        return threads
    return torch.get_num_threads() if size > SMALL else 1


def _check(values: Tensor, indices: Tensor, dictionary: Tensor, bias: Tensor | None) -> None:
    """Refuse what does not fit one another."""
    if values.ndim < 1 or values.shape != indices.shape:
        raise ModelError(f"values of shape {tuple(values.shape)} and indices of {tuple(indices.shape)}: give both (..., k)")
    if dictionary.ndim != 2 or (bias is not None and bias.shape != dictionary.shape[1:]):
        other = "" if bias is None else f" and a bias of {tuple(bias.shape)}"
        raise ModelError(
            f"a dictionary of shape {tuple(dictionary.shape)}{other}: give (atoms, features) and a bias of (features)"
        )
    mixed = values.dtype == torch.float32 and dictionary.dtype == torch.bfloat16
    kinds = {values.dtype, *([] if mixed else [dictionary.dtype]), *([] if bias is None else [bias.dtype])}
    if len(kinds) > 1 or not values.is_floating_point():
        raise ModelError(
            f"values of {values.dtype} with a dictionary of {dictionary.dtype}{_bias(bias)}: give one real dtype, or "
            "float32 with a dictionary of bfloat16"
        )
    whole = not (indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool)
    if not whole or len({one.device for one in (values, indices, dictionary, bias) if one is not None}) > 1:
        raise ModelError(
            f"indices of {indices.dtype} on {indices.device}, values on {values.device}, the dictionary on "
            f"{dictionary.device}: give whole numbers, and one device for all"
        )
    if indices.numel() and indices.device.type == "cpu":
        low, high = (int(bound) for bound in indices.aminmax())
        if low < 0 or high >= dictionary.shape[0]:
            raise ModelError(
                f"indices reach from {low} to {high}, the dictionary has {dictionary.shape[0]} atoms: give 0 to "
                f"{dictionary.shape[0] - 1}"
            )


def _bias(bias: Tensor | None) -> str:
    return "" if bias is None else f" and a bias of {bias.dtype}"


def _check_out(out: Tensor, shape: tuple[int, ...], others: tuple[Tensor | None, ...]) -> None:
    """Refuse an output that does not fit, or one that a gradient would have to flow through."""
    values = others[0]
    assert values is not None
    if tuple(out.shape) != shape or out.dtype != values.dtype or out.device != values.device or not out.is_contiguous():
        raise ModelError(
            f"cannot write sums of shape {shape} and {values.dtype} to a tensor of shape {tuple(out.shape)} and {out.dtype} "
            f"with strides {out.stride()}: give a contiguous one that fits, or no out"
        )
    if torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in (*others, out)):
        raise ModelError("out takes no gradient: leave it out, or decode under torch.no_grad()")
