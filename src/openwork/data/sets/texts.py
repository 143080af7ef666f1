"""Texts and a small pretrained language model: what studies of language models read."""

from __future__ import annotations

from openwork.data.entry import Entry, File, Raw
from openwork.errors import DataError

_GITHUB = "https://raw.githubusercontent.com"
_BABY = f"{_GITHUB}/EN10/BabyLlama"


def read(entry: Entry) -> Raw:
    """Refuse: these sets hold no images.

    Raises:
        DataError: always, with the function that reads the set.
    """
    how = "folder" if entry.kind == "model" else "text" if len(entry.files) == 1 else "records"
    raise DataError(f"{entry.name!r} holds no images: read it with openwork.data.texts.{how}({entry.name!r})")


def _abstracts(part: str, sha256: str, md5: str, size: int) -> File:
    home = f"{_GITHUB}/allenai/scitldr/master/SciTLDR-Data/SciTLDR-A/{part}.jsonl"
    return File(f"scitldr-a.{part}.jsonl", (home,), sha256, md5, size)


ENTRIES = (
    Entry(
        name="tiny-shakespeare",
        what="plays, as text of 65 characters",
        shape=(0, 0, 0),
        classes=0,
        sizes=(1, 0),
        home="https://github.com/karpathy/char-rnn",
        licence="text in the public domain",
        citation="Karpathy, char-rnn, 2015",
        read=read,
        files=(
            File(
                "input.txt",
                (f"{_GITHUB}/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",),
                "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
                "6fb458f1232090904fb40fe944165e91",
                1_115_394,
            ),
        ),
        kind="text",
    ),
    Entry(
        name="sci-abstracts",
        what="titles, abstracts and one-line summaries of papers",
        shape=(0, 0, 0),
        classes=0,
        sizes=(1992, 618),
        home="https://github.com/allenai/scitldr",
        licence="Apache-2.0",
        citation="Cachola, Lo, Cohan, Weld, TLDR: Extreme Summarization of Scientific Documents, 2020, arXiv:2004.15011",
        read=read,
        files=(
            _abstracts(
                "train",
                "b222771d387be585cfdf5ae957b36757138415a352e0a3e3b23f73f87c3b1119",
                "a73103de10a30941947972e707481a89",
                3_155_015,
            ),
            _abstracts(
                "dev",
                "3191fa98ccc09521332b7a1cd63b1930be4e8df125a235ccd31e40329709525e",
                "4f4986b13431148fa303c65ad110a4af",
                1_124_865,
            ),
            _abstracts(
                "test",
                "fb42dd6cd4f4a1928ae8a01a189456fbfe994a07e938bd49f68653933f6503c9",
                "fdb1e3a7b4afc69a2cee14b9e96fcdeb",
                1_204_107,
            ),
        ),
        kind="text",
    ),
    Entry(
        name="tiny-lm",
        what="a small pretrained Llama that reads characters",
        shape=(0, 0, 0),
        classes=0,
        sizes=(1, 0),
        home="https://github.com/EN10/BabyLlama",
        licence="MIT",
        citation="EN10, BabyLlama, 2023; trained on TinyStories, Eldan, Li, 2023, arXiv:2305.07759",
        read=read,
        files=(
            File(
                "babyllama-105/model5000.bin",
                (f"{_BABY}/792a5675980176710cd5d44cca6cfb3a44ed662b/tok105/model5000.bin",),
                "98b63851593002f0ab706ff1db61fd9f5fd73d89df34970dd66eced9ee954464",
                "571ec5d394477eef191a8f555375160f",
                3_762_204,
            ),
            File(
                "babyllama-105/tok105.vocab",
                (f"{_BABY}/9daf30a355da9ae4275795efda9566f2c8459f9c/tok105/tok105.vocab",),
                "e55a336fb620a372a3627c8a1bfeff9de95b3970d2b2eef8b8240da885cbe82c",
                "fb4faab1fbb3f2bc08ae581ae6095c8d",
                651,
            ),
        ),
        kind="model",
    ),
)
