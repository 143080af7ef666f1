"""Text files as blocks of tokens: some to calibrate on, others, disjoint, to evaluate on.

Files are read in pieces and never as a whole, so that a file of one endless line takes no more memory than any other. A
piece ends at a line break where there is one, else at a space. Every draw is from a named generator: the same files and
seed give the same blocks.
"""

from __future__ import annotations

import codecs
import io
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openwork.core.rng import generator
from openwork.errors import DataError

SUFFIXES = (".txt", ".text", ".md")
LIMIT = 2**22
"""Most tokens that are read of a corpus unless asked otherwise."""
PIECE = 2**18
"""Characters of a piece."""

Encode = Callable[[str], Sequence[int]]

_CHUNK = 2**20
_MAGIC = {
    b"%PDF": "a PDF", b"PK\x03\x04": "a zip archive", b"\x1f\x8b": "a gzip archive", b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text", b"\x89PNG": "a picture", b"\xfd7zXZ": "an xz archive", b"BZh": "a bzip2 archive",
    b"\x28\xb5\x2f\xfd": "a zstd archive",
}  # fmt: skip
_CONTROLS = re.compile(r"[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f]")


@dataclass(frozen=True)
class Corpus:
    """Blocks of tokens.

    Attributes:
        calibration: (n, length) int64, in the order of the draw.
        held_out: (m, length) int64, from the end of the text, in its order; no token is also in `calibration`.
        tokens: how many tokens were read.
        files: the files they are from.
        skipped: empty files of a folder.
        is_cut: whether the text goes on after the last token that was read.
    """

    calibration: Tensor
    held_out: Tensor
    tokens: int
    files: tuple[Path, ...]
    skipped: tuple[Path, ...]
    is_cut: bool


def blocks(
    paths: str | Path | Iterable[str | Path],
    encode: Encode,
    *,
    length: int,
    samples: int,
    held_out: int = 0,
    seed: int = 0,
    prefix: Sequence[int] = (),
    suffix: Sequence[int] = (),
    wrap: bool = False,
    limit: int = LIMIT,
) -> Corpus:
    """Return blocks of `length` tokens of one or more text files, or of the text files in a folder.

    The tokens of all files are one row that is cut into blocks; the last `held_out` blocks are held out, and `samples` of
    the others are drawn. Where there is less text, up to a fifth of the blocks is held out (at least one), and fewer are
    drawn (at least one): look at the shapes.

    Args:
        paths: UTF-8 files, or folders, of which all files ending in .txt, .text or .md are read in the order of their
            paths.
        encode: text -> token numbers, without special tokens.
        length: tokens of a block, special tokens included.
        samples: blocks to calibrate on.
        held_out: blocks to evaluate on.
        seed: of the draw.
        prefix: tokens before each file or, with `wrap`, before each block: <s>, [CLS].
        suffix: tokens after each block with `wrap`: [SEP].
        wrap: whether each block gets its own prefix and suffix, as encoders expect.
        limit: most tokens to read; what comes after them is left unread.

    Raises:
        DataError: if a path is missing, no text, empty, binary or not UTF-8, or the text is too short for the blocks;
            the sentence has the number of tokens that there are and that are needed.
    """
    if samples < 1 or held_out < 0:
        raise DataError(f"{samples} samples and {held_out} blocks held out make no sense: give at least one sample")
    files, skipped = find(paths)
    row, is_cut = _row(files, encode, () if wrap else prefix, limit)
    whole = _blocks(row, files, length, prefix, suffix, wrap, 2 if held_out else 1)
    kept = min(held_out, max(1, len(whole) // 5)) if held_out else 0
    order = torch.randperm(len(whole) - kept, generator=generator(seed, "calibration blocks"))[:samples]
    return Corpus(whole[order], whole[len(whole) - kept :], len(row), tuple(files), tuple(skipped), is_cut)


def first(
    paths: str | Path | Iterable[str | Path],
    encode: Encode,
    *,
    length: int,
    count: int,
    prefix: Sequence[int] = (),
    suffix: Sequence[int] = (),
    wrap: bool = False,
) -> Tensor:
    """Return the first `count` blocks of the text, or as many as there are (at least one), in its order: (n, length) int64.

    Arguments and errors are those of `blocks`; what comes after the last block is not read.
    """
    files, _ = find(paths)
    row, _ = _row(files, encode, () if wrap else prefix, length * max(1, count))
    return _blocks(row, files, length, prefix, suffix, wrap, 1)[:count]


def find(paths: str | Path | Iterable[str | Path]) -> tuple[list[Path], list[Path]]:
    """Return the text files that `paths` name, each once, and the empty ones of folders, which are left out.

    Raises:
        DataError: if a path is missing, neither file nor folder, an empty file, or a folder without text.
    """
    given = [paths] if isinstance(paths, str | Path) else list(paths)
    found: dict[tuple[int, int], Path] = {}
    skipped: list[Path] = []
    for path in map(Path, given):
        info = _stat(path)
        if stat.S_ISREG(info.st_mode):
            if not info.st_size:
                raise DataError(f"{shown(path)} is empty: give a file with text")
            found.setdefault((info.st_dev, info.st_ino), path)
        elif stat.S_ISDIR(info.st_mode):
            inside, empty = _inside(path)
            skipped += empty
            for each in inside:
                info = _stat(each)
                found.setdefault((info.st_dev, info.st_ino), each)
        else:
            raise DataError(f"{shown(path)} is neither a file nor a folder: give text files")
    if not found:
        raise DataError("there is no text to read: give at least one file")
    return list(found.values()), skipped


def pieces(path: str | Path, size: int = PIECE) -> Iterator[str]:
    """Yield the text of a file in pieces of about `size` characters, cut after a line break or before a space.

    Raises:
        DataError: if the file cannot be read, is binary, or not UTF-8.
    """
    buffer = ""
    for text in _decoded(Path(path)):
        buffer += text
        while len(buffer) > size:
            end = _cut(buffer, size)
            yield buffer[:end]
            buffer = buffer[end:]
    if buffer:
        yield buffer


def encoder(tokenizer: Any) -> Encode:
    """Return text -> token numbers without special tokens, for a tokenizer of transformers or tokenizers."""
    if hasattr(tokenizer, "no_truncation"):  # of the tokenizers library; a copy, since files may bring limits along
        inner = type(tokenizer).from_str(tokenizer.to_str())
        inner.no_truncation()
        inner.no_padding()
        return lambda text: inner.encode(text, add_special_tokens=False).ids
    quiet = {"add_special_tokens": False, "truncation": False, "padding": False, "verbose": False}
    return lambda text: tokenizer(text, **quiet)["input_ids"]


def overlap(one: Tensor, two: Tensor) -> int:
    """Return how many rows of `two` (m, length) are also rows of `one` (n, length), token for token."""
    known = {row.tobytes() for row in one.numpy()}
    return sum(row.tobytes() in known for row in two.numpy())


def shown(path: object, limit: int = 160) -> str:
    """Return a name as a sentence can hold it: quoted, controls and direction marks escaped, its middle left out."""
    text = str(path)
    if len(text) > limit:
        text = f"{text[: limit // 2]}...{text[-limit // 4 :]}"
    return repr(text)


def _row(files: Sequence[Path], encode: Encode, prefix: Sequence[int], limit: int) -> tuple[np.ndarray[Any, Any], bool]:
    """Return the tokens of all files, at most `limit`, and whether there was more."""
    parts: list[np.ndarray[Any, Any]] = []
    total = 0
    for path in files:
        parts.append(np.asarray(prefix, dtype=np.int32))
        total += len(prefix)
        for piece in pieces(path):
            try:
                ids = np.asarray(encode(piece), dtype=np.int32)
            except Exception as error:
                text = " ".join(str(error).split()) or "no message"
                raise DataError(f"{shown(path)}: the tokenizer fails with {type(error).__name__}: {text}") from error
            parts.append(ids)
            total += len(ids)
            if total >= limit:
                return np.concatenate(parts)[:limit], True
    return np.concatenate(parts), False


def _blocks(
    row: np.ndarray[Any, Any], files: Sequence[Path], length: int, prefix: Sequence[int], suffix: Sequence[int], wrap: bool,
    need: int,
) -> Tensor:  # fmt: skip
    """Return a row of tokens as blocks, at least `need` of them; what is left over at the end is dropped."""
    content = length - (len(prefix) + len(suffix) if wrap else 0)
    if content < 1:
        raise DataError(f"blocks of {length} tokens leave no room for text: give a longer length")
    count = len(row) // content
    if count < need:
        what = "one block to calibrate on and one held out" if need > 1 else "one block"
        raise DataError(
            f"{_listed(files)}: there are {len(row)} tokens, but {what} of {content} need{'' if need > 1 else 's'} "
            f"{need * content}; give more text or a shorter length"
        )
    whole = torch.from_numpy(row[: count * content].reshape(count, content).astype(np.int64))
    if not wrap:
        return whole
    ends = [torch.tensor(list(each), dtype=torch.int64).expand(count, len(each)) for each in (prefix, suffix)]
    return torch.cat([ends[0], whole, ends[1]], dim=1)


def _decoded(path: Path) -> Iterator[str]:
    """Yield the text of a file as it is read, line breaks as `\\n`, without a byte order mark."""
    utf8 = codecs.getincrementaldecoder("utf-8")()
    lines = io.IncrementalNewlineDecoder(None, translate=True)
    read = 0
    try:
        with path.open("rb") as stream:
            while True:
                chunk = stream.read(_CHUNK)
                if not read:
                    _look(path, chunk)
                pending = len(utf8.getstate()[0])
                try:
                    text = utf8.decode(chunk, final=not chunk)
                except UnicodeDecodeError as error:
                    place = read - pending + error.start
                    raise DataError(
                        f"{shown(path)} is not UTF-8 text ({error.reason} at byte {place}): convert it, for example with "
                        "iconv -f latin1 -t utf-8"
                    ) from None
                _check_printable(path, text)
                yield lines.decode(text.removeprefix("\ufeff") if not read else text, final=not chunk)
                read += len(chunk)
                if not chunk:
                    return
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {shown(path)}: {getattr(error, 'strerror', None) or error}") from error


def _look(path: Path, head: bytes) -> None:
    kind = next((kind for magic, kind in _MAGIC.items() if head.startswith(magic)), None)
    if kind is not None:
        raise DataError(f"{shown(path)} is {kind}, not UTF-8 text: convert it to plain text")


def _check_printable(path: Path, text: str) -> None:
    """Refuse text with a NUL, or of which more than a hundredth are control characters."""
    if "\x00" in text:
        raise DataError(f"{shown(path)} is binary (it holds NUL characters): give plain UTF-8 text")
    if len(_CONTROLS.findall(text)) > max(16, len(text) // 100):
        raise DataError(f"{shown(path)} is binary (it is full of control characters): give plain UTF-8 text")


def _cut(text: str, size: int) -> int:
    """Return where a piece ends: after the last line break within `size` characters, before the last space, or there."""
    newline = text.rfind("\n", size // 2, size)
    if newline >= 0:
        return newline + 1
    space = text.rfind(" ", size // 2, size)
    return space if space > 0 else size


def _stat(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except FileNotFoundError:
        raise DataError(f"there is no file or folder {shown(path)} (looked from {shown(Path.cwd())})") from None
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {shown(path)}: {getattr(error, 'strerror', None) or error}") from None


def _inside(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return the text files and the empty ones of a folder and the folders in it; links to folders are not followed."""
    found: list[Path] = []
    empty: list[Path] = []
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(place, name)
            if name.startswith(".") or path.suffix.lower() not in SUFFIXES or not path.is_file():
                continue
            (found if path.stat().st_size else empty).append(path)
    if not found:
        note = f" (only empty ones: {len(empty)})" if empty else ""
        raise DataError(f"{shown(folder)} holds no text{note}: expected files ending in {', '.join(SUFFIXES)}")
    return found, empty


def _listed(files: Sequence[Path]) -> str:
    rest = f" and {len(files) - 1} more" if len(files) > 1 else ""
    return f"{shown(files[0])}{rest}"
