from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from openwork.errors import MissingExtra, ModelError
from openwork.integrations import onnx
from tests.models.pretrained import tiny

pytest.importorskip("transformers")
runtime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@pytest.mark.parametrize("kind", ["llama"])
def test_onnxruntime_computes_what_torch_computes_at_any_batch_and_length(kind, tmp_path):
    model = tiny.build(kind)
    for name, param in model.named_parameters():
        if param.dim() == 2 and "embed" not in name:
            param.data[param.abs() < param.abs().median()] = 0
    found = onnx.export(model, tmp_path / "m.onnx", vocabulary=30, length=16)
    assert found.error <= 1e-5
    assert found.same == 1.0
    assert found.bytes == (tmp_path / "m.onnx").stat().st_size
    session = runtime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    for shape in ((1, 1), (5, 7), (2, 31)):  # none of them is a shape that it was traced or checked with
        ids = torch.randint(4, 30, shape, generator=torch.Generator().manual_seed(0))
        feed = {"input_ids": ids.numpy(), "attention_mask": np.ones(shape, np.int64)}
        theirs = session.run(None, feed)[0]
        with torch.no_grad():
            ours = model(ids)[0].numpy()
        assert np.abs(theirs - ours).max() <= 1e-5 * np.abs(ours).max()


def test_outputs_that_differ_are_refused_and_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx, "_exported", lambda *_: b"")

    class Wrong:
        def run(self, _: object, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
            return [np.zeros((*feed["input_ids"].shape, len(tiny.tokenizer("llama"))), np.float32)]

    monkeypatch.setattr(runtime, "InferenceSession", lambda *_, **__: Wrong())
    with pytest.raises(ModelError, match="nothing was written"):
        onnx.export(tiny.build("llama"), tmp_path / "m.onnx", vocabulary=30, length=8)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_exported_is_one_sentence(tmp_path):
    class Odd(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, **_: object) -> torch.Tensor:
            return input_ids.float()[..., None] * int(input_ids.sum().item() ** 0.5)

    with pytest.raises(ModelError, match="cannot be exported to ONNX") as caught:
        onnx.export(Odd(), tmp_path / "m.onnx", vocabulary=30, length=8)
    assert "\n" not in str(caught.value)


def test_without_onnxruntime(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtra, match=r"openwork\[onnx\]"):
        onnx.export(tiny.build("llama"), tmp_path / "m.onnx", vocabulary=30, length=8)
