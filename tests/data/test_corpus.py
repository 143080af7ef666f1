from __future__ import annotations

import os
import tracemalloc
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from openwork.data import corpus
from openwork.errors import DataError


def letters(text: str) -> list[int]:
    """Token numbers: one a character."""
    return [ord(char) % 1000 for char in text]


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_blocks_are_the_text_cut_up_and_no_token_is_in_two(tmp_path):
    text = "".join(chr(97 + place % 26) for place in range(1000))
    found = corpus.blocks(write(tmp_path / "a.txt", text), letters, length=10, samples=70, held_out=20)
    row = torch.tensor(letters(text)).reshape(100, 10)
    assert torch.equal(found.held_out, row[80:])
    assert found.calibration.shape == (70, 10)
    assert (found.tokens, found.is_cut) == (1000, False)
    unique = [chr(200 + place) for place in range(800)]  # every token once
    found = corpus.blocks(write(tmp_path / "b.txt", "".join(unique)), letters, length=8, samples=80, held_out=20)
    kept = set(found.calibration.flatten().tolist())
    assert len(kept) == found.calibration.numel()
    assert not kept & set(found.held_out.flatten().tolist())


def test_the_draw_is_the_seeds_and_nothing_else(tmp_path):
    path = write(tmp_path / "a.txt", "".join(chr(97 + place * place % 26) for place in range(5000)))
    torch.manual_seed(1)
    one = corpus.blocks(path, letters, length=50, samples=10, seed=4)
    state = torch.random.get_rng_state()
    two = corpus.blocks([path, str(path)], letters, length=50, samples=10, seed=4)
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(one.calibration, two.calibration)  # a file given twice counts once
    assert not torch.equal(one.calibration, corpus.blocks(path, letters, length=50, samples=10, seed=5).calibration)


def test_special_tokens_stand_before_files_or_around_blocks(tmp_path):
    write(tmp_path / "a.txt", "abcdef")
    write(tmp_path / "b.txt", "ghi")
    plain = corpus.first(tmp_path, letters, length=11, count=5, prefix=[1])
    assert plain.tolist() == [[1, *letters("abcdef"), 1, *letters("ghi")]]
    wrapped = corpus.first(tmp_path, letters, length=5, count=5, prefix=[1], suffix=[2], wrap=True)
    assert wrapped.tolist() == [[1, *letters(part), 2] for part in ("abc", "def", "ghi")]


def test_less_text_than_asked_for_gives_fewer_blocks_and_too_little_says_how_much(tmp_path):
    path = write(tmp_path / "a.txt", "x" * 35)
    found = corpus.blocks(path, letters, length=10, samples=50, held_out=50)
    assert (len(found.calibration), len(found.held_out)) == (2, 1)
    with pytest.raises(DataError, match=r"there are 35 tokens, but one block of 36 needs 36; give more text"):
        corpus.blocks(path, letters, length=36, samples=1)
    with pytest.raises(
        DataError, match=r"there are 35 tokens, but one block to calibrate on and one held out of 20 need 40"
    ):
        corpus.blocks(path, letters, length=20, samples=1, held_out=1)
    with pytest.raises(DataError, match="no room for text"):
        corpus.blocks(path, letters, length=2, samples=1, prefix=[1], suffix=[2], wrap=True)
    with pytest.raises(DataError, match="0 samples"):
        corpus.blocks(path, letters, length=2, samples=0)


def test_folders_are_read_in_order_and_their_empty_files_left_out(tmp_path):
    for name, text in (
        ("b.txt", "B"),
        ("a/z.md", "Z"),
        (".hidden.txt", "H"),
        ("c.bin", "C"),
        ("e.txt", ""),
        ("a/.x/y.txt", "Y"),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / name, text)
    (tmp_path / "loop").symlink_to(tmp_path)
    files, skipped = corpus.find(tmp_path)
    assert [path.name for path in files] == ["b.txt", "z.md"]
    assert [path.name for path in skipped] == ["e.txt"]


@settings(max_examples=60, deadline=None)
@given(
    text=st.text(st.characters(exclude_categories=["Cs", "Cc"], include_characters="\n "), min_size=1),
    size=st.integers(1, 40),
)
def test_pieces_are_the_text(tmp_path_factory, text, size):
    path = write(tmp_path_factory.mktemp("t") / "a.txt", text)
    found = list(corpus.pieces(path, size))
    assert "".join(found) == text.removeprefix("\ufeff")
    assert all(0 < len(piece) <= size for piece in found[:-1])


def test_pieces_end_at_lines_then_spaces_and_words_stay_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "_CHUNK", 7)  # so that characters and line breaks fall across reads
    lines = "".join(f"zeile {place} \u2014 \u00fc\r\n" for place in range(30))
    found = list(corpus.pieces(write(tmp_path / "a.txt", lines), 40))
    assert "".join(found) == lines.replace("\r\n", "\n")
    assert all(piece.endswith("\n") for piece in found)
    found = list(corpus.pieces(write(tmp_path / "b.txt", "word " * 50), 23))
    assert all(piece.startswith(" word") for piece in found[1:])
    assert list(corpus.pieces(write(tmp_path / "c.txt", b"\xef\xbb\xbfab"), 23)) == ["ab"]


def test_an_endless_line_takes_no_more_memory_than_another(tmp_path):
    path = tmp_path / "line.txt"
    with path.open("wb") as stream:
        stream.truncate(0)
        for _ in range(64):
            stream.write(b"abcdefgh" * 2**17)  # 64 MiB without a space
    tracemalloc.start()
    found = corpus.blocks(path, lambda text: range(len(text) // 64), length=64, samples=4)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.tokens == 2**20
    assert peak < 40 * 2**20
    cut = corpus.blocks(path, letters, length=64, samples=4, limit=10_000)
    assert (cut.tokens, cut.is_cut) == (10_000, True)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is empty"), (b"text\x00text", "binary"), (bytes(range(1, 32)) * 10, "binary"),
        (b"good text \xff\xfe", "not UTF-8 text .* at byte 10"), (b"cut \xe2\x82", "not UTF-8 text .* at byte 4"),
        ("t\u00e9xt".encode("utf-16"), "UTF-16"), (b"%PDF-1.7 \xff", "a PDF"), (b"PK\x03\x04 rest", "a zip archive"),
        (b"\x1f\x8b\x08rest", "gzip"), (b"\xed\xa0\x80", "not UTF-8"),
    ],
)  # fmt: skip
def test_what_is_no_text_is_said_in_one_sentence(data, words, tmp_path):
    with pytest.raises(DataError, match=words) as caught:
        corpus.blocks(write(tmp_path / "a.txt", data), letters, length=2, samples=1)
    assert "\n" not in str(caught.value)


def test_the_byte_of_a_bad_character_is_counted_over_the_whole_file(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "_CHUNK", 16)
    path = write(tmp_path / "a.txt", ("\u00e9" * 50).encode() + b"\xff tail")
    with pytest.raises(DataError, match="at byte 100"):
        list(corpus.pieces(path))


def test_paths_that_lead_nowhere(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "none").mkdir()
    (tmp_path / "dangling.txt").symlink_to(tmp_path / "gone")
    for path, words in (
        ("missing.txt", "there is no file"), ("pipe.txt", "neither a file nor a folder"), ("none", "holds no text"),
        ("dangling.txt", "there is no file"), ("n" * 10_000, "cannot read"), ("a\x00b", "cannot read"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=words):
            corpus.find(tmp_path / path)
    with pytest.raises(DataError, match="no text to read"):
        corpus.find([])


def test_hostile_names_are_read_and_shown_harmless(tmp_path):
    for name in ("a\x1b[31mred.txt", "b\u202etxt.exe.txt", "c\nd.txt", "<script>.txt", "=1+1.txt", "{{7*7}}.txt"):
        path = write(tmp_path / name, "")
        with pytest.raises(DataError) as caught:
            corpus.find(path)
        assert str(caught.value).isprintable()
        write(path, "fine text")
        assert corpus.first(path, letters, length=4, count=1).shape == (1, 4)
    assert corpus.find(tmp_path)[1] == []


def test_a_tokenizer_that_fails_or_limits_its_input(tmp_path):
    pytest.importorskip("transformers")
    from tests.models.pretrained import tiny

    path = write(tmp_path / "a.txt", tiny.text(200))
    made = tiny.tokenizer("bert")  # cuts at 8 tokens and pads to 8 by default
    for tokenizer in (made, made.backend_tokenizer):
        assert len(corpus.encoder(tokenizer)(tiny.text(200))) == 200
    assert corpus.blocks(path, corpus.encoder(made), length=10, samples=5).calibration.shape == (5, 10)

    def fail(text: str) -> list[int]:
        raise RuntimeError("out of\nwords")

    with pytest.raises(DataError, match="the tokenizer fails with RuntimeError: out of words"):
        corpus.blocks(path, fail, length=10, samples=5)


def test_overlap_counts_blocks_in_both():
    one = torch.tensor([[1, 2], [3, 4], [5, 6]])
    assert corpus.overlap(one, torch.tensor([[3, 4], [4, 3], [1, 2]])) == 2
    assert corpus.overlap(one, one[:0]) == 0
