from __future__ import annotations

import hashlib
import json
import os
import pickle
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from openwork.core.rng import generator
from openwork.errors import FormatError, StoreError
from openwork.runtime import files
from openwork.runtime.files import plain_bytes, read_state, ties, write_state

STATE_TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.bool)


def small_state(seed: int = 0, density: float = 0.2) -> dict[str, Tensor]:
    draw = generator(seed, "state")
    weight = torch.randn(20, 30, generator=draw)
    weight[torch.rand(20, 30, generator=draw) >= density] = 0
    return {"fc.weight": weight, "fc.bias": torch.randn(20, generator=draw), "steps": torch.tensor(7)}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(
        one[name].dtype == two[name].dtype
        and one[name].shape == two[name].shape
        and torch.equal(one[name].reshape(-1).view(torch.uint8), two[name].reshape(-1).view(torch.uint8))
        for name in one
    )


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    st.dictionaries(st.text(max_size=12), st.tuples(st.sampled_from(STATE_TYPES), st.integers(0, 40)), max_size=5),
    st.dictionaries(st.text(max_size=8), st.none() | st.integers() | st.text(max_size=9) | st.lists(st.booleans())),
    st.integers(0, 2**32),
)
def test_any_state_and_metadata_come_back(
    tmp_path_factory: pytest.TempPathFactory,
    described: dict[str, tuple[torch.dtype, int]],
    metadata: dict[str, object],
    seed: int,
) -> None:
    path = tmp_path_factory.mktemp("any") / "a.safetensors"
    draw = generator(seed, "any")
    state = {name: torch.randn(size, 3, generator=draw).to(dtype) for name, (dtype, size) in described.items()}
    written = write_state(path, state, metadata)
    back, told = read_state(path)
    assert same(back, state)
    assert told == metadata
    assert written == path.stat().st_size


def test_ties_are_stored_once_and_come_back_tied(tmp_path: Path) -> None:
    one = torch.randn(50, 40, generator=generator(0, "t"))
    state = {"embed": one, "head": one.detach(), "view": one[:10], "other": one.clone()}
    assert ties(state) == (["embed", "view", "other"], {"head": "embed"})
    size = write_state(tmp_path / "a.safetensors", state)
    assert 4 * (2000 + 400 + 2000) < size < 4 * (2000 + 400 + 2000) + 1500
    back, _ = read_state(tmp_path / "a.safetensors")
    assert same(back, state)
    assert back["embed"].data_ptr() == back["head"].data_ptr()
    assert back["embed"].data_ptr() != back["other"].data_ptr()


def test_empty_tensors_are_never_tied() -> None:
    assert ties({"a": torch.empty(0), "b": torch.empty(0)}) == (["a", "b"], {})


@pytest.mark.parametrize("seed", range(4))
def test_plain_bytes_is_the_size_of_the_plain_file(seed: int) -> None:
    draw = generator(seed, "plain")
    state = {
        f"näme.{i}": torch.randn(int(torch.randint(0, 400, (), generator=draw)), 3).to(STATE_TYPES[i % 7]) for i in range(20)
    }
    assert plain_bytes(state) == len(safetensors.torch.save(state))


def test_plain_files_are_read(tmp_path: Path) -> None:
    state = small_state()
    safetensors.torch.save_file(state, tmp_path / "p.safetensors", metadata={"format": "pt"})
    back, metadata = read_state(tmp_path / "p.safetensors")
    assert same(back, state)
    assert metadata == {"format": "pt"}


def test_a_packed_file_is_a_sound_safetensors_file(tmp_path: Path) -> None:
    write_state(tmp_path / "a.safetensors", small_state())
    loaded = safetensors.torch.load_file(tmp_path / "a.safetensors")
    assert list(loaded) == [files.PAYLOAD]


def test_every_flipped_bit_is_found_or_changes_nothing(tmp_path: Path) -> None:
    state, metadata = {"w": small_state()["fc.weight"][:5, :9]}, {"é": 1}
    path = tmp_path / "a.safetensors"
    write_state(path, state, metadata)
    sound = path.read_bytes()
    found = 0
    for bit in range(8 * len(sound)):
        damaged = bytearray(sound)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            back, told = read_state(path)
        except FormatError:
            found += 1
        else:
            assert same(back, state)
            assert told == metadata
    assert found >= 8 * len(sound) - 64


def test_every_truncation_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_state(path, {"w": torch.eye(9)}, {"a": 1})
    sound = path.read_bytes()
    for length in range(len(sound)):
        path.write_bytes(sound[:length])
        with pytest.raises(FormatError):
            read_state(path)
    path.write_bytes(sound + b"\0")
    with pytest.raises(FormatError):
        read_state(path)


@pytest.mark.timeout(120)
@settings(deadline=None, max_examples=400, derandomize=True)
@given(data=st.data())
def test_mutated_bytes_give_our_error_or_equal_content(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "a.safetensors"
    state = small_state(density=0.1)
    write_state(path, state, {"ref": "mlp"})
    damaged = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(damaged[:8], "little")
    for _ in range(data.draw(st.integers(1, 6))):
        end = data.draw(st.sampled_from([8, header, len(damaged)]))
        place = data.draw(st.integers(0, max(0, min(end, len(damaged)) - 1)))
        piece = data.draw(st.binary(max_size=4))
        damaged[place : place + data.draw(st.integers(0, 4))] = piece
    path.write_bytes(damaged)
    try:
        back, _ = read_state(path)
    except FormatError:
        pass
    else:
        assert same(back, state)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


def sealed(path: Path, text: str, payload: bytes) -> None:
    """Write a file whose digests are right whatever its manifest says: what a hostile author would do."""
    header = json.dumps(
        {
            "__metadata__": {files.MANIFEST: text, files.DIGEST: hashlib.sha256(text.encode()).hexdigest()},
            files.PAYLOAD: {"dtype": "U8", "shape": [len(payload)], "data_offsets": [0, len(payload)]},
        }
    ).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + payload)


@pytest.mark.timeout(120)
@settings(deadline=None, max_examples=400, derandomize=True)
@given(data=st.data())
def test_hostile_manifests_give_our_error_or_declared_tensors(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("hostile") / "a.safetensors"
    write_state(path, small_state(density=0.1))
    with files.safe_open(path, framework="pt") as file:
        manifest = json.loads(file.metadata()[files.MANIFEST])
        payload = bytes(file.get_tensor(files.PAYLOAD).numpy())
    places = [manifest, manifest["tensors"], manifest["tied"], *manifest["tensors"], manifest["tensors"][0][2]]
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.sampled_from(places))
        if isinstance(place, dict):
            place[data.draw(st.sampled_from(["format", "tensors", "tied", "sha256", "metadata", "x"]))] = data.draw(JSON)
        elif place:
            place[data.draw(st.integers(0, len(place) - 1))] = data.draw(JSON)
    sealed(path, json.dumps(manifest), payload)
    try:
        back, _ = read_state(path)
    except FormatError:
        pass
    else:
        assert all(isinstance(tensor, Tensor) for tensor in back.values())


def claim(path: Path, shape: list[int], encoding: str = "gaps", dtype: str = "F32", index: int = 100) -> None:
    payload = b"\xff" * index
    manifest = {
        "format": 1,
        "tensors": [["w", dtype, shape, encoding, 0, index]],
        "tied": {},
        "sha256": hashlib.sha256(payload).hexdigest(),
        "metadata": {},
    }
    sealed(path, json.dumps(manifest), payload)


@pytest.mark.parametrize("shape", [[10**12], [10**6, 10**6], [2**62, 4], [10**40], [0, 2**70], [1] * 100])
@pytest.mark.parametrize("encoding", ["dense", "bits", "gaps", "gaps+signs"])
def test_a_small_file_cannot_claim_a_huge_tensor(tmp_path: Path, shape: list[int], encoding: str) -> None:
    claim(tmp_path / "bomb.safetensors", shape, encoding)
    with pytest.raises(FormatError):
        read_state(tmp_path / "bomb.safetensors")


def test_the_limit_on_the_expanded_size(tmp_path: Path) -> None:
    path = tmp_path / "zeros.safetensors"
    write_state(path, {"w": torch.zeros(25_000)})
    assert path.stat().st_size < 1000
    assert read_state(path, limit=100_000)[0]["w"].shape == (25_000,)
    with pytest.raises(FormatError, match="would take 100000 bytes, more than the limit of 99999"):
        read_state(path, limit=99_999)
    safetensors.torch.save_file({"w": torch.zeros(25_000)}, tmp_path / "plain.safetensors")
    with pytest.raises(FormatError, match="limit"):
        read_state(tmp_path / "plain.safetensors", limit=1000)


class Trap:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str, int]]:
        return os.mkdir, (str(self.mark), 0o777)


def test_pickles_are_named_and_never_run(tmp_path: Path) -> None:
    path, mark = tmp_path / "m.safetensors", tmp_path / "ran"
    path.write_bytes(pickle.dumps(Trap(mark)))
    with pytest.raises(FormatError, match="pickle"):
        read_state(path)
    torch.save({"w": torch.zeros(3)}, path)
    with pytest.raises(FormatError, match=r"zip archive, most likely written by torch\.save"):
        read_state(path)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "0 bytes"), (b"\x89HDF\r\n\x1a\n" + b"x" * 99, "HDF5"), (b"GGUF" + b"\1" * 99, "GGUF"), (b"h" * 99, "no header")],
)
def test_other_formats_are_refused(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "f").write_bytes(content)
    with pytest.raises(FormatError, match=words):
        read_state(tmp_path / "f")


def test_deeply_nested_json_is_refused(tmp_path: Path) -> None:
    sealed(tmp_path / "deep.safetensors", "[" * 100_000, b"")
    with pytest.raises(FormatError):
        read_state(tmp_path / "deep.safetensors")
    header = b"[" * 100_000
    (tmp_path / "deep.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(FormatError):
        read_state(tmp_path / "deep.safetensors")


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="there is no file"):
        read_state(tmp_path / "none.safetensors")
    with pytest.raises(StoreError, match="not a file"):
        read_state(tmp_path)


def test_metadata_must_be_json(tmp_path: Path) -> None:
    for bad in ({"a": {1, 2}}, {"a": float("nan")}):
        with pytest.raises(FormatError, match="metadata cannot be stored"):
            write_state(tmp_path / "a.safetensors", {}, bad)
    assert not list(tmp_path.iterdir())


def test_a_newer_format_says_so(tmp_path: Path) -> None:
    sealed(tmp_path / "a.safetensors", '{"format": 99}', b"")
    with pytest.raises(FormatError, match="format 99"):
        read_state(tmp_path / "a.safetensors")
