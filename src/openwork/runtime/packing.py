"""Bit-exact packing of one tensor: its non-zero values, and where they stand.

A value counts as zero only if all its bits are zero, so that -0.0, NaN payloads and infinities survive unchanged.
Three encodings, of which the smallest is taken:

    dense   the raw values
    bits    the non-zero values, and one bit an entry (8 a byte, lowest bit first)
    gaps    the non-zero values, and one byte a value: how many zeros stand before it; 255 means "255 zeros, no value
            yet". The zeros after the last value are written as well, to within 254, so that the size of the packed
            data bounds the size of the tensor: one byte never stands for more than 255 entries.

Multiplying by a mask turns dropped negative weights into -0.0. Where there are many, `bits+signs` and `gaps+signs`
leave them out like zeros, and one bit for each entry left out says which zero it was.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from openwork.errors import FormatError

Bytes = npt.NDArray[np.uint8]

DTYPES: dict[str, torch.dtype] = {  # safetensors' names, in safetensors' own order
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}
SIGNED = frozenset(DTYPES[name] for name in ("F8_E5M2", "F8_E4M3", "F16", "BF16", "F32", "F64"))
ENCODINGS = ("dense", "bits", "gaps", "bits+signs", "gaps+signs")
ESCAPE = 255
MAX_DIMS = 64


@dataclass(frozen=True)
class Packed:
    """One tensor at rest: `values` are the raw bytes of the kept entries, `index` says where they stand."""

    encoding: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    values: Bytes
    index: Bytes

    @property
    def nbytes(self) -> int:
        """Bytes of values and index together."""
        return int(self.values.nbytes + self.index.nbytes)


def pack(tensor: Tensor, encoding: str | None = None) -> Packed:
    """Pack a tensor of any shape, dtype of `DTYPES` and device, in the smallest encoding or the one asked for.

    Raises:
        FormatError: for a dtype that safetensors cannot store, and for sparse, quantised or meta tensors.
    """
    words = _words(tensor)
    if encoding is not None and encoding not in ENCODINGS:
        raise FormatError(f"there is no encoding {encoding!r}: choose one of {', '.join(ENCODINGS)}")
    mask, signs = words != 0, np.empty(0, np.uint8)
    if tensor.dtype in SIGNED:
        mask, signs = _signs(words, mask, encoding)
    kept, suffix = words[mask], "+signs" if signs.size else ""
    index = {"bits": np.packbits(mask, bitorder="little")}
    if max(kept.size, words.size // ESCAPE) < index["bits"].size or (encoding or "").startswith("gaps"):
        index["gaps"] = _gaps(np.flatnonzero(mask), words.size)
    best = (encoding or min(index, key=lambda name: index[name].size)).removesuffix("+signs")
    if encoding == "dense" or (encoding is None and kept.nbytes + index[best].size + signs.size >= words.nbytes):
        best, kept, index["dense"], signs, suffix = "dense", words, np.empty(0, np.uint8), np.empty(0, np.uint8), ""
    where = np.concatenate((index[best], signs))
    return Packed(best + suffix, tensor.dtype, tuple(tensor.shape), kept.view(np.uint8), where)


def unpack(packed: Packed) -> Tensor:
    """Return the tensor, bit for bit, on the CPU and contiguous.

    Raises:
        FormatError: if the bytes do not add up to the declared shape; checked before anything is allocated.
    """
    check(packed)
    total, width = entries(packed.shape), packed.dtype.itemsize
    kind = np.dtype(f"u{width}")
    words = packed.values.copy().view(kind)  # a copy is aligned and writeable, a slice of a file need not be
    if packed.encoding != "dense":
        full = np.zeros(total, kind)
        middle = packed.index.size - _sign_bytes(packed)
        mask = _mask(packed.encoding, packed.index[:middle], total, words.size)
        full[mask] = words
        if packed.encoding.endswith("+signs"):
            negative = np.unpackbits(packed.index[middle:], count=total - words.size, bitorder="little")
            full[~mask] = negative.astype(kind) << np.array(8 * width - 1, kind)
        words = full
    return torch.from_numpy(words.view(np.uint8)).view(packed.dtype).reshape(packed.shape)


def entries(shape: tuple[int, ...]) -> int:
    """Return the number of entries of a declared shape.

    Raises:
        FormatError: if the shape is none that torch can hold (sizes and strides are signed 64-bit numbers).
    """
    if len(shape) > MAX_DIMS or any(size < 0 for size in shape) or math.prod(max(size, 1) for size in shape) >= 2**60:
        raise FormatError(f"a tensor of shape {_brief(shape)} cannot exist: the file is corrupted or hostile")
    return math.prod(shape)


def check(packed: Packed) -> None:
    """Check, without allocating the tensor, that its size is what the packed bytes can stand for.

    Raises:
        FormatError: if the declared shape is larger than the bytes allow, or smaller.
    """
    total, width, index = entries(packed.shape), packed.dtype.itemsize, packed.index.size - _sign_bytes(packed)
    kept = packed.values.size // width
    fits = {
        "dense": kept == total and index == 0,
        "bits": kept <= total and index == -(-total // 8),
        "gaps": kept <= index and kept <= total <= index * ESCAPE + ESCAPE - 1,
    }
    if packed.values.size % width or not fits.get(packed.encoding.removesuffix("+signs"), False):
        raise FormatError(
            f"a tensor of shape {_brief(packed.shape)} does not fit its {packed.nbytes} bytes in encoding "
            f"{packed.encoding!r}: the file is corrupted or hostile"
        )


def _words(tensor: Tensor) -> npt.NDArray[Any]:
    """Return the flat tensor as unsigned integers of its own width: the bit patterns."""
    if tensor.dtype not in NAMES or tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        kind = "a meta tensor" if tensor.is_meta else f"{tensor.layout} with dtype {tensor.dtype}"
        raise FormatError(f"cannot store {kind}: give an ordinary dense tensor of one of {', '.join(NAMES.values())}")
    flat = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    raw: Bytes = flat.view(torch.uint8).numpy()
    return raw.view(f"u{flat.element_size()}")


def _gaps(positions: npt.NDArray[np.int64], total: int) -> Bytes:
    """Return the gap bytes of ascending positions among `total` entries."""
    edges = np.concatenate(([-1], positions, [total]))
    zeros = np.diff(edges) - 1
    escapes = zeros // ESCAPE
    ends = np.cumsum(escapes + 1) - 1
    gaps = np.full(int(ends[-1]) + 1, ESCAPE, np.uint8)
    gaps[ends] = zeros % ESCAPE
    return gaps[:-1]  # the last entry leads to the end, not to a value


def _mask(encoding: str, index: Bytes, total: int, kept: int) -> npt.NDArray[np.bool_]:
    """Return which entries of the flat tensor are kept."""
    if encoding.startswith("bits"):
        mask = np.unpackbits(index, count=total, bitorder="little").view(np.bool_)
        last, found = total, int(np.count_nonzero(mask))
    else:
        escaped = index == ESCAPE
        ends = np.cumsum(index + (~escaped).astype(np.int64))
        last = int(ends[-1]) if ends.size else 0
        positions = ends[~escaped] - 1
        found = positions.size
        mask = np.zeros(total, np.bool_)
        if last <= total:
            mask[positions] = True
    if found != kept or not last <= total < last + ESCAPE:
        raise FormatError(f"the index leads to {found} entries up to {last}, not to {kept} of {total}: it is corrupted")
    return mask


def _signs(
    words: npt.NDArray[Any], mask: npt.NDArray[np.bool_], encoding: str | None
) -> tuple[npt.NDArray[np.bool_], Bytes]:
    """Take the negative zeros out of `mask` where that saves bytes; return the mask and the sign bits of its zeros."""
    width = words.itemsize
    kept = words << np.array(1, words.dtype) != 0
    zeros = words.size - int(np.count_nonzero(kept))
    spared = int(np.count_nonzero(mask)) - (words.size - zeros)
    wanted = spared * width > -(-zeros // 8) if encoding is None else encoding.endswith("+signs")
    if not wanted:
        return mask, np.empty(0, np.uint8)
    return kept, np.packbits(words[~kept] != 0, bitorder="little")


def _sign_bytes(packed: Packed) -> int:
    """Return the bytes at the end of the index that hold the signs of the zeros."""
    if not packed.encoding.endswith("+signs"):
        return 0
    return -(-(entries(packed.shape) - packed.values.size // packed.dtype.itemsize) // 8)


def _brief(shape: tuple[int, ...]) -> str:
    text = "x".join(map(str, shape[:8])) or "()"
    return text[:120] + ("..." if len(shape) > 8 or len(text) > 120 else "")
