"""Folders of tiny models of transformers, made from configs, with a tokenizer trained on a few sentences."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

TALE = """the cat sat on the mat and looked at the moon while a small dog ran over the green hill to find its old red ball
then night came and all the stars were out so they went home to sleep near the warm fire until the sun rose again"""
WORDS = TALE.split()

LLAMA = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 1, "max_position_embeddings": 32, "initializer_range": 0.2}  # fmt: skip
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "n_inner": 24, "initializer_range": 0.2}
BERT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "max_position_embeddings": 32, "initializer_range": 0.2}  # fmt: skip


def text(count: int, seed: int = 0) -> str:
    """Return `count` words, twelve a line, drawn in pairs that belong together."""
    draw = torch.Generator().manual_seed(seed)
    places = torch.randint(len(WORDS) - 1, (-(-count // 2),), generator=draw).tolist()
    words = [word for place in places for word in WORDS[place : place + 2]][:count]
    return "\n".join(" ".join(words[start : start + 12]) for start in range(0, count, 12)) + "\n"


def tokenizer(kind: str) -> Any:
    """Return a fast tokenizer: [CLS] and [SEP] around a text for BERT, <s> before it for Llama, nothing for GPT-2."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"] if kind == "bert" else ["[PAD]", "[UNK]", "<s>", "</s>"]
    vocabulary = {word: place for place, word in enumerate([*special, *sorted(set(WORDS))])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"unk_token": "[UNK]", "pad_token": "[PAD]"}
    if kind == "bert":
        inner.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 2), ("[SEP]", 3)])
        names |= {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
        inner.enable_truncation(8)  # as published tokenizers of sentence encoders do
        inner.enable_padding(length=8)
    else:
        if kind == "llama":
            inner.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 2)])
        names |= {"bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **names)


def build(kind: str, seed: int = 0, **changes: Any) -> Any:
    """Return the model "llama", "gpt2", "bert" (masked) or "encoder" with first values from a seed."""
    import transformers

    made = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, LLAMA),
        "gpt2": (transformers.GPT2Config, transformers.GPT2LMHeadModel, GPT2),
        "bert": (transformers.BertConfig, transformers.BertForMaskedLM, BERT),
        "encoder": (transformers.BertConfig, transformers.BertModel, BERT),
    }  # fmt: skip
    config_class, model_class, sizes = made[kind]
    words = tokenizer(family(kind))
    config = config_class(
        **{"vocab_size": len(words), "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, **sizes, **changes}
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model_class(config).eval()


def family(kind: str) -> str:
    """Return the kind of tokenizer that a model takes."""
    return "bert" if kind in ("bert", "encoder") else kind


def save(folder: Path, kind: str, seed: int = 0, model: Any = None, **options: Any) -> Path:
    """Write a tiny model with its tokenizer, and for "encoder" the layout of sentence-transformers; return the folder."""
    model = build(kind, seed) if model is None else model
    model.save_pretrained(folder, **options)
    tokenizer(family(kind)).save_pretrained(folder)
    if kind == "encoder":
        steps = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
        modules = [
            {"idx": place, "name": str(place), "path": path, "type": f"sentence_transformers.models.{name}"}
            for place, (path, name) in enumerate(steps)
        ]
        (folder / "modules.json").write_text(json.dumps(modules))
        (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 24, "do_lower_case": False}))
        (folder / "1_Pooling").mkdir()
        entries = {"word_embedding_dimension": 16, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(entries))
    return folder
