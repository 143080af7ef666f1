"""Models of the transformers library, made from a config file alone: nothing is downloaded and no foreign code runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from openwork.errors import MissingExtra, ModelError


def build(path: str, *, classes: int, options: Mapping[str, Any]) -> nn.Module:
    """Return the model that the config at `path` (the file, or a folder with `config.json`) describes.

    The class is `architectures[0]` where transformers has it. Otherwise it is the one that transformers maps the
    config type to: image classification first; then causal language modelling if `classes` is the config's vocabulary;
    then sequence classification; then causal language modelling. First values come from torch's global generator.

    Args:
        path: of the config.
        classes: becomes `num_labels`; a language model must have a vocabulary of at least this size.
        options: entries that replace the config's.

    Raises:
        MissingExtra: if transformers is not installed.
        ModelError: if the file is missing or no config, an option is no entry of it, or no class is mapped to it.
    """
    try:
        import transformers
    except ImportError as error:
        raise MissingExtra("hf: models need transformers: pip install 'openwork[transformers]'") from error
    entries = _read(path)
    try:
        config = _config(transformers, path, entries, options)
        config.num_labels = classes
        model_class = _class(transformers, config, classes)
        vocabulary = getattr(config.get_text_config(), "vocab_size", classes)
        if model_class.__name__.endswith(("LM", "LMHeadModel")) and vocabulary < classes:
            raise ModelError(f"{path!r} has a vocabulary of {vocabulary}, the data one of {classes}: raise vocab_size")
        model: nn.Module = model_class(config)
    except ModelError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        raise ModelError(f"{path!r} makes no model: {type(error).__name__}: {text or 'no message'}") from error
    return model.train()


def _config(transformers: Any, path: str, entries: dict[str, Any], options: Mapping[str, Any]) -> Any:
    kind = entries.pop("model_type", None)
    if kind not in transformers.CONFIG_MAPPING:
        raise ModelError(f"{path!r} has model_type {kind!r}: transformers {transformers.__version__} knows no such type")
    config_class = transformers.CONFIG_MAPPING[kind]
    known = sorted(config_class().to_dict().keys() | entries.keys())
    for name in options:
        if name not in known:
            raise ModelError(f"{path!r} has no option {name!r}; the entries of a {kind} config: {', '.join(known)}")
    return config_class.from_dict({**entries, **options})


def _read(path: str) -> dict[str, Any]:
    file = Path(path) / "config.json" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise ModelError(f"there is no file {str(file)!r}: hf: takes a local config.json or its folder and never downloads")
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{str(file)!r} is not JSON: {error}") from error
    if not isinstance(entries, dict):
        raise ModelError(f"{str(file)!r} holds a {type(entries).__name__}: a config is a JSON object")
    return entries


def _class(transformers: Any, config: Any, classes: int) -> Any:
    named = getattr(transformers, (config.architectures or [""])[0], None)
    if isinstance(named, type) and issubclass(named, transformers.PreTrainedModel):
        return named
    image = transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
    sequence = transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    causal = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    language = getattr(config, "vocab_size", None) == classes
    for mapping in (image, causal, sequence) if language else (image, sequence, causal):
        if type(config) in mapping:
            found = mapping[type(config)]
            return found[0] if isinstance(found, tuple) else found
    raise ModelError(
        f"transformers maps {type(config).__name__} to no classifier and no causal language model: "
        "name a class under 'architectures' in the config"
    )
