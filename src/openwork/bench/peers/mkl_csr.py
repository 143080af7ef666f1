"""MKL's inspector-executor on compressed sparse rows, told beforehand what it will be used for; on torch's OpenMP pool."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openwork.bench.peers import Unavailable

ABOUT = "MKL CSR, inspector-executor"
DENSE, APART = False, False

_GNU, _LP64 = 3, 0  # MKL_THREADING_GNU shares the OpenMP runtime that torch has loaded
_PLAIN, _GENERAL, _ROW_MAJOR, _CALLS = 10, 20, 101, 1000


class _Kind(ctypes.Structure):
    """`struct matrix_descr` of mkl_spblas.h."""

    _fields_ = (("type", ctypes.c_int), ("mode", ctypes.c_int), ("diag", ctypes.c_int))


def operator(weight: Tensor, bias: Tensor | None, x: Tensor) -> Callable[[], Tensor]:
    """Return the product by `mkl_sparse_s_mm`, or `mkl_sparse_s_mv` for one column.

    Raises:
        Unavailable: if there is no MKL, or it refuses the matrix.
    """
    mkl = _library()
    mkl.MKL_Set_Num_Threads(torch.get_num_threads())
    (out, size), columns = weight.shape, x.shape[1]
    kept = weight != 0
    starts = torch.zeros(out + 1, dtype=torch.int32)
    starts[1:] = kept.sum(1).cumsum(0)
    places, values, kind = kept.nonzero()[:, 1].int(), weight[kept], _Kind(_GENERAL, 0, 0)
    handle, first = ctypes.c_void_p(), starts.data_ptr()
    _check(mkl.mkl_sparse_s_create_csr(
        ctypes.byref(handle), 0, out, size, ctypes.c_void_p(first), ctypes.c_void_p(first + 4),
        ctypes.c_void_p(places.data_ptr()), ctypes.c_void_p(values.data_ptr()),
    ))  # fmt: skip
    if columns == 1:
        _check(mkl.mkl_sparse_set_mv_hint(handle, _PLAIN, kind, _CALLS))
    else:
        _check(mkl.mkl_sparse_set_mm_hint(handle, _PLAIN, kind, _ROW_MAJOR, columns, _CALLS))
    _check(mkl.mkl_sparse_optimize(handle))
    y, added = weight.new_empty(out, columns), None if bias is None else bias[:, None]

    def call() -> Tensor:
        if columns == 1:
            status = mkl.mkl_sparse_s_mv(_PLAIN, 1.0, handle, kind, x.data_ptr(), 0.0, y.data_ptr())
        else:
            status = mkl.mkl_sparse_s_mm(
                _PLAIN, 1.0, handle, kind, _ROW_MAJOR, x.data_ptr(), columns, columns, 0.0, y.data_ptr(), columns
            )
        _check(status)
        return y if added is None else y.add_(added)

    # MKL reads the arrays as long as the handle lives
    weakref.finalize(call, _destroy, mkl, handle, (starts, places, values))
    return call


def _library() -> Any:
    """Return MKL with the signatures of the functions used."""
    try:
        listed = files("mkl") or []
    except PackageNotFoundError:
        raise Unavailable("there is no MKL library: pip install mkl") from None
    places = [Path(str(one.locate())) for one in listed if one.name.startswith(("libmkl_rt.", "mkl_rt."))]
    try:
        mkl = ctypes.CDLL(str(places[0].resolve()))
    except (OSError, IndexError) as error:
        raise Unavailable(f"MKL cannot be loaded ({error}): pip install mkl") from error
    mkl.MKL_Set_Interface_Layer(_LP64)
    mkl.MKL_Set_Threading_Layer(_GNU)
    address, number, real = ctypes.c_void_p, ctypes.c_int, ctypes.c_float
    mkl.mkl_sparse_s_mm.argtypes = [
        number, real, address, _Kind, number, address, number, number, real, address, number,
    ]  # fmt: skip
    mkl.mkl_sparse_s_mv.argtypes = [number, real, address, _Kind, address, real, address]
    return mkl


def _check(status: int) -> None:
    if status:
        raise Unavailable(f"MKL refuses this product with status {status}: pip install --upgrade mkl")


def _destroy(mkl: Any, handle: Any, _arrays: Any) -> None:
    mkl.mkl_sparse_destroy(handle)
