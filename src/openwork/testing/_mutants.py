"""Mutants of a file: its bytes with something changed, the same ones for the same seed."""

from __future__ import annotations

import random
from collections.abc import Iterator

from openwork.core.rng import derive


def mutate(data: bytes, n: int, *, seed: int = 0, header: int | None = None) -> Iterator[bytes]:
    """Yield `n` mutants of `data`, none equal to it; the k-th is a function of `data`, `seed` and k alone.

    Bits are flipped, bytes set, runs cut, repeated, swapped and inserted, numbers in the text made huge or negative, the
    end lost. Half of the changes fall into the first `header` bytes (by default a quarter), where formats keep sizes.
    """
    head = max(1, len(data) // 4 if header is None else min(header, len(data)))
    for number in range(n):
        draw = drawn(seed, "mutate", number)
        mutant = data
        while mutant == data:
            for _ in range(draw.choice((1, 1, 1, 2, 4))):
                mutant = bytes(_mutant(bytearray(mutant), draw, head))
        yield mutant


def _mutant(data: bytearray, draw: random.Random, head: int) -> bytearray:
    """Return `data` with one change."""
    end = min(len(data), head) if draw.random() < 0.5 else len(data)
    place = draw.randrange(max(1, end))
    length = draw.choice((1, 1, 2, 4, 8, 64))
    kind = draw.choice(("flip", "flip", "set", "cut", "repeat", "swap", "insert", "number", "end"))
    if not data or kind == "insert":
        data[place:place] = draw.randbytes(length)
    elif kind == "flip":
        data[place] ^= 1 << draw.randrange(8)
    elif kind == "set":
        data[place : place + length] = bytes([draw.choice((0, 1, 0x7F, 0x80, 0xFF))]) * len(data[place : place + length])
    elif kind == "cut":
        del data[place : place + length]
    elif kind == "repeat":
        data[place:place] = data[place : place + length] * draw.choice((1, 2, 50))
    elif kind == "swap":
        other = draw.randrange(len(data))
        data[place], data[other] = data[other], data[place]
    elif kind == "number":
        digits = [k for k in range(place, min(place + 64, len(data))) if 0x30 <= data[k] <= 0x39]
        at = digits[0] if digits else place
        data[at : at + 1] = draw.choice((b"-1", b"0", b"9" * 20, b"1e999", b"4294967296", b"NaN", b"null"))
    else:
        del data[draw.randrange(len(data)) :]
    return data


def drawn(seed: int, *purpose: str | int) -> random.Random:
    """Return Python's generator for one purpose of the fault kit."""
    return random.Random(derive(seed, "faults", *purpose))
