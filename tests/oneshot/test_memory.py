from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

transformers = pytest.importorskip("transformers")
pytest.importorskip("resource")

LAYERS, HIDDEN, FEED = 24, 512, 1024

SCRIPT = """
import json, resource, sys
from openwork.oneshot.api import sparsify, stream
from tests.oneshot.networks import llama, tokens
sparsify(llama(), tokens(1), method="sparsegpt")  # what the libraries themselves take, once
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = stream(sys.argv[1], sys.argv[2], tokens(2, batch=1, length=64))
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
unit = 1 if sys.platform == "darwin" else 1024
print(json.dumps({"grown": (after - before) * unit, "rows": len(found.report), "density": found.density}))
"""


@pytest.fixture(scope="module")
def deep(tmp_path_factory) -> Path:
    """A Llama of 24 layers in a shard a layer, all layers with the same numbers."""
    folder = tmp_path_factory.mktemp("deep")
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=HIDDEN, intermediate_size=FEED, num_hidden_layers=LAYERS, num_attention_heads=8,
        bos_token_id=1, eos_token_id=2, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: param.shape for name, param in transformers.LlamaForCausalLM(config).named_parameters()}
    source, index = torch.Generator().manual_seed(0), {}
    drawn = {shape: torch.rand(shape, generator=source).mul_(0.1).sub_(0.05) for shape in set(shapes.values())}
    for layer in [*range(LAYERS), None]:
        inside = [n for n in shapes if (n.split(".")[2] if "layers" in n else "") == ("" if layer is None else str(layer))]
        file = f"part-{layer}.safetensors"
        values = {n: drawn[shapes[n]] + (1 if len(shapes[n]) == 1 else 0) for n in inside}
        save_file(values, folder / file, {"format": "pt"})
        index |= dict.fromkeys(inside, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


def test_the_peak_is_a_block_and_not_the_model(deep, tmp_path):
    """Peak memory grows by less than a quarter of the model; the model has 24 blocks."""
    model = sum(path.stat().st_size for path in deep.glob("*.safetensors"))
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), str(deep), str(tmp_path / "out")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["rows"] == 7 * LAYERS
    assert found["density"] == pytest.approx(0.5, abs=1e-6)
    assert model > 200e6
    assert found["grown"] < model / 4, f"{found['grown'] / 1e6:.0f} MB for a model of {model / 1e6:.0f} MB"
