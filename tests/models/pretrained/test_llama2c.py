from __future__ import annotations

import json
import math
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from openwork.data import files
from openwork.errors import FormatError, ModelError
from openwork.models import pretrained
from openwork.models.pretrained import llama2c

pytest.importorskip("transformers")

SIZES = (8, 12, 2, 4, 2, 9, 16)  # width, hidden, layers, heads, groups, vocabulary, context
PIECES = ["<unk>", "<s>", "</s>", "\u2581", "a", "b", "c", ".", "\u2019"]


def checkpoint(folder: Path, seed: int = 0, tied: bool = True) -> dict[str, np.ndarray]:
    """Write a checkpoint of random weights; return the weights."""
    folder.mkdir()
    width, hidden, layers, heads, groups, vocabulary, context = SIZES
    head = width // heads
    shapes = {
        "embed": (vocabulary, width), "an": (layers, width), "q": (layers, width, width),
        "k": (layers, groups * head, width),
        "v": (layers, groups * head, width), "o": (layers, width, width), "fn": (layers, width),
        "w1": (layers, hidden, width), "w2": (layers, width, hidden), "w3": (layers, hidden, width), "norm": (width,),
        "cos": (context, head // 2), "sin": (context, head // 2),
    }  # fmt: skip
    if not tied:
        shapes["head"] = (vocabulary, width)
    draw = np.random.default_rng(seed)
    held = {name: draw.standard_normal(shape).astype("<f4") for name, shape in shapes.items()}
    header = struct.pack("<7i", *SIZES[:5], vocabulary if tied else -vocabulary, context)
    (folder / "model.bin").write_bytes(header + b"".join(one.tobytes() for one in held.values()))
    (folder / "tok.vocab").write_text("".join(f"{piece}\t-1\n" for piece in PIECES), encoding="utf-8")
    return held


def plain(held: dict[str, np.ndarray], ids: list[int], tied: bool = True) -> np.ndarray:
    """The forward pass of llama2.c's run.c, position by position, in float64."""
    width, _, layers, heads, groups, _, _ = SIZES
    head, share = width // heads, heads // groups
    w = {name: one.astype(np.float64) for name, one in held.items()}

    def norm(x: np.ndarray, gain: np.ndarray) -> np.ndarray:
        return gain * x / math.sqrt(float((x * x).mean()) + 1e-5)

    keys: list[list[np.ndarray]] = [[] for _ in range(layers)]
    values: list[list[np.ndarray]] = [[] for _ in range(layers)]
    found = []
    for place, token in enumerate(ids):
        x = w["embed"][token].copy()
        for layer in range(layers):
            h = norm(x, w["an"][layer])
            q, k, v = w["q"][layer] @ h, w["k"][layer] @ h, w["v"][layer] @ h
            for vector in (q, k):
                for i in range(0, len(vector), 2):
                    angle = place * 10000.0 ** (-(i % head) / head)
                    one, two = vector[i], vector[i + 1]
                    vector[i] = one * math.cos(angle) - two * math.sin(angle)
                    vector[i + 1] = one * math.sin(angle) + two * math.cos(angle)
            keys[layer].append(k)
            values[layer].append(v)
            mixed = np.zeros(width)
            for each in range(heads):
                own = slice(each * head, (each + 1) * head)
                theirs = slice(each // share * head, (each // share + 1) * head)
                scores = np.array([q[own] @ past[theirs] / math.sqrt(head) for past in keys[layer]])
                weights = np.exp(scores - scores.max())
                weights /= weights.sum()
                mixed[own] = sum(a * past[theirs] for a, past in zip(weights, values[layer], strict=True))
            x = x + w["o"][layer] @ mixed
            h = norm(x, w["fn"][layer])
            gate = w["w1"][layer] @ h
            x = x + w["w2"][layer] @ (gate / (1 + np.exp(-gate)) * (w["w3"][layer] @ h))
        found.append((w["embed"] if tied else w["head"]) @ norm(x, w["norm"]))
    return np.stack(found)


@pytest.mark.parametrize("tied", [True, False])
def test_the_model_computes_what_llama2c_computes(tied, tmp_path):
    held = checkpoint(tmp_path / "m", tied=tied)
    found = pretrained.load(tmp_path / "m")
    ids = [1, 3, 4, 8, 5, 5, 0, 7, 6, 2]
    with torch.no_grad():
        ours = found.model(torch.tensor([ids])).logits[0].double().numpy()
    expected = plain(held, ids, tied)
    assert np.abs(ours - expected).max() <= 1e-5 * np.abs(expected).max()
    assert (found.kind, found.length) == ("causal", 16)


def test_its_tokenizer_and_its_way_to_a_folder_of_transformers(tmp_path):
    checkpoint(tmp_path / "m")
    found = pretrained.load(tmp_path / "m")
    assert found.tokenizer("a  b\nz.")["input_ids"] == [1, 3, 4, 3, 5, 3, 0, 7]
    assert found.tokenizer.decode([1, 3, 4, 3, 5], skip_special_tokens=True) == "a b"
    (tmp_path / "hf").mkdir()
    llama2c.convert(tmp_path / "m", tmp_path / "hf")
    again = pretrained.load(tmp_path / "hf")
    ids = torch.tensor([[1, 3, 4, 5]])
    assert torch.equal(again.model(ids).logits, found.model(ids).logits)
    assert again.tokenizer("ab c")["input_ids"] == found.tokenizer("ab c")["input_ids"]


def test_what_is_wrong_with_a_checkpoint_is_said(tmp_path):
    checkpoint(tmp_path / "m")
    path = tmp_path / "m" / "model.bin"
    data = path.read_bytes()
    path.write_bytes(data[:-4])
    assert not llama2c.is_checkpoint(tmp_path / "m")
    with pytest.raises(ModelError, match=r"config\.json"):
        pretrained.load(tmp_path / "m")
    path.write_bytes(data[:40] + struct.pack("<f", math.nan) + data[44:])
    with pytest.raises(FormatError, match="'embed'"):
        pretrained.load(tmp_path / "m")
    path.write_bytes(data)
    vocabulary = tmp_path / "m" / "tok.vocab"
    vocabulary.write_text(vocabulary.read_text(encoding="utf-8").replace("a\t", "ab\t"), encoding="utf-8")
    with pytest.raises(ModelError, match="several characters"):
        pretrained.load(tmp_path / "m")
    vocabulary.write_text("a\t0\n")
    with pytest.raises(ModelError, match="has 1 pieces, the model a vocabulary of 9"):
        pretrained.load(tmp_path / "m")


def test_the_small_llama_tells_its_story():
    root = files.root()
    if root is None or not (root / "tiny-lm" / "babyllama-105").is_dir():
        pytest.skip("needs the set tiny-lm in $OPENWORK_DATA")
    folder = root / "tiny-lm" / "babyllama-105"
    expected = json.loads((folder / "config.json").read_text())["check"].split("'")[1].strip()
    found = pretrained.load(folder)
    ids = found.model.generate(torch.tensor([[1]]), max_new_tokens=60, do_sample=False, pad_token_id=0)
    story = found.tokenizer.decode(ids[0], skip_special_tokens=True).strip()
    assert len(story) > 40
    assert expected.startswith(story)
