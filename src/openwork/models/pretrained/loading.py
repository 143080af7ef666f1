"""Loading a pretrained model: everything is checked by name, nothing foreign is executed, no pickle is read."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from openwork.errors import FormatError, ModelError
from openwork.models.pretrained import checks, llama2c, pooling, tokenizing
from openwork.models.pretrained.folder import (
    CONFIG,
    INDEX,
    SMALL,
    WEIGHTS,
    hushed,
    locate,
    read_json,
    shown,
    transformers,
)
from openwork.models.pretrained.pooling import Pooling
from openwork.oneshot.folder import check_depth
from openwork.runtime import files

Kind = Literal["causal", "masked", "encoder"]
KINDS: tuple[Kind, ...] = ("causal", "masked", "encoder")
DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_POOLER = "pooler."


@dataclass(frozen=True)
class Pretrained:
    """A loaded model with what belongs to it.

    Attributes:
        model: the module, in eval mode.
        tokenizer: of transformers; None if the folder holds none.
        kind: "causal" and "masked" language models, or "encoder" for everything else that turns text into states.
        folder: where it lies.
        name: what was asked for.
        pooling: how an encoder's states become a vector a text.
        length: most tokens that it takes; None where it does not say.
    """

    model: nn.Module
    tokenizer: Any
    kind: Kind
    folder: Path
    name: str
    pooling: Pooling
    length: int | None


def load(
    model: str | Path,
    *,
    kind: str = "auto",
    dtype: str = "auto",
    ignore: str | Iterable[str] = (),
    revision: str | None = None,
) -> Pretrained:
    """Load a causal, masked or encoder model of transformers with its tokenizer.

    Every tensor of the model must be in the files with its shape, and every tensor of the files in the model; ties and
    the exceptions that transformers itself makes for an architecture are allowed for. A folder that holds only the small
    file of openwork is opened from that. A llama2.c checkpoint with its vocabulary is read too.

    Args:
        model: a folder, or a name on the hub such as "org/name", which is fetched unless offline is set.
        kind: which model to make of the weights; "auto" follows the config's architecture.
        dtype: "float32", "bfloat16", "float16", or "auto" for the files' own.
        ignore: names or globs of tensors in the files that may be left unused.
        revision: branch, tag or commit on the hub.

    Raises:
        MissingExtra: if transformers is not installed.
        ModelError: if there is no such model, its config or tokenizer makes no sense, or its weights are pickles.
        FormatError: for a damaged file, non-finite numbers, or tensors missing, left over or of another shape, by name.
        StoreError: if a file cannot be read.
    """
    if kind not in ("auto", *KINDS):
        raise ModelError(f"kind={kind!r}: use auto, {', '.join(KINDS)}")
    if dtype not in ("auto", *DTYPES):
        raise ModelError(f"dtype={dtype!r}: use auto, {', '.join(DTYPES)}")
    library = transformers()
    folder = locate(model, revision)
    if llama2c.is_checkpoint(folder):
        made, tokenizer = llama2c.load(folder)
        made = made.to(DTYPES.get(dtype, torch.float32)).eval()
        return Pretrained(made, tokenizer, "causal", folder, str(model), Pooling(), longest(made.config, Pooling()))
    config = read_config(folder)
    found, made_class = _class(library, folder, config, kind)
    state = _state(folder)
    if state is None:
        checks.check_files(folder)
    check_depth(config, checks.count(folder) if state is None else len(state), folder)
    tokenizer = tokenizing.load(folder)
    given = [ignore] if isinstance(ignore, str) else list(ignore)
    made = _made(made_class, folder, config, state, DTYPES.get(dtype, "auto"), given)
    whole = checks.whole_numbers(folder) if state is None else [name for name, one in state.items() if not _real(one)]
    _check_real(made, whole, folder)
    pool = pooling.read(folder) if found == "encoder" else Pooling()
    return Pretrained(made.eval(), tokenizer, found, folder, str(model), pool, longest(config, pool))


def read_config(folder: Path) -> Any:
    """Return the config of a folder.

    Raises:
        ModelError: if there is none, transformers does not know its type, or it asks for code of its own.
    """
    library = transformers()
    entries = read_json(folder / CONFIG, "config of the model")
    kind = entries.get("model_type")
    if not isinstance(kind, str) or kind not in library.CONFIG_MAPPING:
        own = " and asks for code of its own, which is never run" if "auto_map" in entries else ""
        version = library.__version__
        raise ModelError(
            f"{shown(folder / CONFIG)} has model_type {shown(kind)}, which transformers {version} does not know{own}"
        )
    try:
        with hushed():
            config = library.CONFIG_MAPPING[kind].from_dict(
                {key: value for key, value in entries.items() if key != "auto_map"}
            )
    except Exception as error:  # a config class may raise anything on values it does not expect
        text = " ".join(str(error).split()) or "no message"
        raise ModelError(f"{shown(folder / CONFIG)} makes no config: {type(error).__name__}: {text[:300]}") from error
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{shown(folder)} holds an encoder-decoder ({kind}): causal, masked and encoder models are read")
    return config


def _class(library: Any, folder: Path, config: Any, kind: str) -> tuple[Kind, Any]:
    """Return the kind and class of the model that a config describes."""
    if not isinstance(getattr(config.get_text_config(), "vocab_size", None), int):
        raise ModelError(f"{shown(folder)} holds a {config.model_type}, no text model: use openwork.sparsify on the module")
    maps = {
        "causal": library.MODEL_FOR_CAUSAL_LM_MAPPING, "masked": library.MODEL_FOR_MASKED_LM_MAPPING,
        "encoder": library.MODEL_MAPPING,
    }  # fmt: skip
    if kind != "auto":
        if type(config) not in maps[kind]:
            raise ModelError(f"transformers has no {kind} model for {type(config).__name__}: choose another kind")
        return kind, _first(maps[kind][type(config)])  # type: ignore[return-value]
    names = config.architectures if isinstance(config.architectures, list) else []
    named = getattr(library, str(names[0]), None) if names else None
    if isinstance(named, type) and issubclass(named, library.PreTrainedModel):
        for each in ("causal", "masked"):
            if type(config) in maps[each] and named is _first(maps[each][type(config)]):
                return each, named
        return "encoder", named
    wanted = ["encoder"] if pooling.is_sentence_folder(folder) else ["masked", "causal", "encoder"]
    if getattr(config, "is_decoder", False):
        wanted = ["causal", "encoder"]
    for each in wanted:
        if type(config) in maps[each]:
            return each, _first(maps[each][type(config)])  # type: ignore[return-value]
    raise ModelError(f"transformers has no text model for {type(config).__name__} of {shown(folder)}")


def _first(entry: Any) -> Any:
    return entry[0] if isinstance(entry, tuple | list) else entry


def _state(folder: Path) -> Mapping[str, Tensor] | None:
    """Return the tensors of openwork's small file where a folder holds no other weights, else None."""
    if (folder / WEIGHTS).is_file() or (folder / INDEX).is_file() or not (folder / SMALL).is_file():
        return None
    state = files.read_state(folder / SMALL)[0]
    odd = next((name for name, one in state.items() if one.is_floating_point() and not bool(one.isfinite().all())), None)
    if odd is not None:
        raise FormatError(f"the tensor {shown(odd)} in {shown(folder / SMALL)} holds NaN or infinity: save the model anew")
    return state


def _made(
    made_class: Any, folder: Path, config: Any, state: Mapping[str, Tensor] | None, dtype: Any, ignore: list[str]
) -> nn.Module:
    """Build the model and fill it, and see that everything found its place."""
    options: dict[str, Any] = {"dtype": dtype} if state is None or dtype != "auto" else {"dtype": _dtype_of(state)}
    model, info = _filled(made_class, folder, config, state, options)
    if info["missing_keys"] and all(_POOLER in name for name in info["missing_keys"]) and not info["mismatched_keys"]:
        with contextlib.suppress(TypeError):  # encoders are often published without the pooler that they do not use
            model, info = _filled(made_class, folder, config, state, {**options, "add_pooling_layer": False})
    left = [name for name in info["unexpected_keys"] if not any(fnmatchcase(name, glob) for glob in ignore)]
    shapes = [f"{name} (file {_shape(one)}, model {_shape(two)})" for name, one, two in sorted(info["mismatched_keys"])]
    findings = {
        "missing in the files": sorted(info["missing_keys"]),
        "not in the model": sorted(left),
        "of another shape": shapes,
        "that cannot be converted": sorted(map(str, info.get("conversion_errors") or ())),
    }
    problems = [f"{words}: {_some(names)}" for words, names in findings.items() if names]
    if problems:
        raise FormatError(
            f"the weights of {shown(folder)} do not fit {made_class.__name__}, tensors {'; '.join(problems)}; "
            f"{_remedy(findings)}"
        )
    return model


def _check_real(model: nn.Module, whole: Iterable[str], folder: Path) -> None:
    """Refuse whole numbers where the model computes with real ones: they would be converted, and mean something else.

    Names in files may lack a prefix that the model has, or have one that it lacks.
    """
    real = {f".{name}" for name, one in model.named_parameters() if _real(one)}
    odd = [name for name in whole if any(own.endswith(f".{name}") or f".{name}".endswith(own) for own in real)]
    if odd:
        raise FormatError(
            f"the weights of {shown(folder)} hold whole numbers where {type(model).__name__} has real ones, tensors "
            f"{_some(sorted(odd))}: a quantised model cannot be read, save it as float32, float16 or bfloat16"
        )


def _real(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _remedy(findings: Mapping[str, list[str]]) -> str:
    if findings["of another shape"] or findings["missing in the files"]:
        return "fetch config and weights again, or choose another kind (causal, masked, encoder)"
    return "if they are meant to be left out, name them with ignore"


def _filled(
    made_class: Any, folder: Path, config: Any, state: Mapping[str, Tensor] | None, options: dict[str, Any]
) -> tuple[nn.Module, dict[str, Any]]:
    source = {"pretrained_model_name_or_path": str(folder)} if state is None else {
        "pretrained_model_name_or_path": None, "state_dict": dict(state),
    }  # fmt: skip
    try:
        with hushed():
            model, info = made_class.from_pretrained(
                **source, config=config, local_files_only=True, use_safetensors=True, output_loading_info=True,
                ignore_mismatched_sizes=True, **options,
            )  # fmt: skip
    except TypeError:
        raise
    except Exception as error:  # transformers raises many kinds
        text = " ".join(str(error).split()) or "no message"
        raise ModelError(f"{shown(folder)} makes no {made_class.__name__}: {type(error).__name__}: {text[:300]}") from error
    return model, info


def _dtype_of(state: Mapping[str, Tensor]) -> torch.dtype:
    return next((tensor.dtype for tensor in state.values() if tensor.is_floating_point()), torch.float32)


def kind_of(folder: Path, config: Any, kind: str = "auto") -> Kind:
    """Return the kind of model that `load` would make of a folder with this config."""
    return _class(transformers(), folder, config, kind)[0]


def class_of(folder: Path, config: Any, kind: str = "auto") -> str:
    """Return the name of the class of transformers that `load` would build."""
    return str(_class(transformers(), folder, config, kind)[1].__name__)


def longest(config: Any, pool: Pooling) -> int | None:
    """Return the most tokens that a model takes, None where it does not say."""
    found = getattr(config.get_text_config(), "max_position_embeddings", None)
    limits = [one for one in (found, pool.length) if isinstance(one, int) and one > 0]
    return min(limits) if limits else None


def _shape(size: Any) -> str:
    return "x".join(map(str, size)) or "scalar"


def _some(names: list[str]) -> str:
    return ", ".join(name[:160] for name in names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
