"""Data of the user's own, made by a function that a reference names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from openwork.core.rng import derive
from openwork.data import checks, datasets, loaders
from openwork.data.noise import Noise
from openwork.data.prepare import Options, own
from openwork.data.source import Source
from openwork.errors import DataError, OpenworkError
from openwork.references import resolve


def load(ref: str, options: Options) -> Source:
    """Call the function that `ref` names, without arguments, and return the source of what it returns.

    It returns (train, test), (train, validation, test), or a dict of these names and perhaps "classes", their number.
    Each part is a pair (x, y) of arrays or tensors, a map-style Dataset, or a loader: a DataLoader, a list of batches,
    or any object that gives batches (x, y) each time it is gone through. Where the validation part is missing it is
    taken from the training part; how, the module of each kind says (`prepare`, `datasets`, `loaders`).

    Raises:
        LookupFailed: if `ref` leads nowhere.
        DataError: if the function fails or returns something else.
    """
    function = resolve(ref)
    name = label(ref)
    try:
        with Noise(derive(0, "data")).lent():
            made = function()
    except OpenworkError:
        raise
    except Exception as error:
        text = " ".join(str(error).split()) or "no message"
        raise DataError(f"{ref!r} fails with {type(error).__name__}: {text}") from error
    parts, classes = _parts(made, ref)
    kinds = {part: _kind(value, checks.where(part, name)) for part, value in parts.items()}
    if kinds["train"] == "loader":
        whole = {part: _as_loader(value, kinds[part]) for part, value in parts.items()}
        return loaders.load(name, whole, options, classes)
    if "loader" in kinds.values():
        raise DataError(f"{ref!r} gives loaders to evaluate but no loader to train on: make all of one kind")
    if "dataset" in kinds.values():
        sets = {part: value if kinds[part] == "dataset" else _Pairs(value) for part, value in parts.items()}
        return datasets.load(name, sets, options, classes)
    pairs = {part: value.tensors if isinstance(value, TensorDataset) else value for part, value in parts.items()}
    return own(name, pairs, options, classes)


def label(ref: str) -> str:
    """Return a reference without its folders, which differ from machine to machine."""
    return ref.replace("\\", "/").rpartition("/")[2]


class _Pairs:
    """A pair of arrays as a Dataset."""

    def __init__(self, pair: Any) -> None:
        self.x, self.y = pair

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return self.x[index], self.y[index]


def _parts(made: Any, ref: str) -> tuple[dict[str, Any], int | None]:
    """Return the parts by name and the number of classes, where it is given."""
    if isinstance(made, Mapping):
        unknown = sorted(str(key) for key in made.keys() - {*checks.PARTS, "classes"})
        if unknown or not {"train", "test"} <= made.keys():
            raise DataError(
                f"{ref!r} returns a dict of {', '.join(map(str, made)) or 'nothing'}; expected 'train' and 'test', and "
                "perhaps 'validation' and 'classes'"
            )
        classes = made.get("classes")
        if classes is not None and (isinstance(classes, bool) or not isinstance(classes, int) or classes < 1):
            raise DataError(f"{ref!r} says that there are {classes!r} classes; expected a whole number of at least 1")
        return {part: made[part] for part in checks.PARTS if part in made}, classes
    if not isinstance(made, tuple | list) or len(made) not in (2, 3):
        length = f" of {len(made)}" if isinstance(made, tuple | list) else ""
        raise DataError(
            f"{ref!r} returns a {type(made).__name__}{length}; expected (train, test), (train, validation, test), or a "
            "dict with these names"
        )
    order = ("train", "test") if len(made) == 2 else ("train", "validation", "test")
    return dict(zip(order, made, strict=True)), None


def _kind(part: Any, place: str) -> str:
    """Return "arrays", "dataset" or "loader"."""
    if isinstance(part, TensorDataset) and len(part.tensors) == 2:
        return "arrays"
    if isinstance(part, tuple | list) and len(part) == 2 and all(hasattr(one, "shape") for one in part):
        return "arrays"
    if isinstance(part, IterableDataset):
        raise DataError(f"{place} come as an IterableDataset, which gives single examples: put it into a DataLoader")
    if isinstance(part, Dataset):
        return "dataset"
    if isinstance(part, Iterator):
        raise DataError(f"{place} come as a {type(part).__name__}, which can be gone through once: return a list of it")
    if isinstance(part, DataLoader | list | tuple):
        return "loader"
    plain = hasattr(part, "shape") or isinstance(part, str | bytes | Mapping)
    if not plain and hasattr(part, "__iter__"):
        with Noise(0).lent():
            once = iter(part) is iter(part)
        if once:
            raise DataError(f"{place} give the same iterator twice, so they end after one pass: make a new one")
        return "loader"
    if not plain and hasattr(part, "__len__") and hasattr(part, "__getitem__"):
        return "dataset"
    raise DataError(f"{place} come as a {type(part).__name__}; expected a pair (x, y), a Dataset or a loader")


def _as_loader(part: Any, kind: str) -> Any:
    if kind == "loader":
        return part
    whole: Any = part if kind == "dataset" or isinstance(part, TensorDataset) else _Pairs(part)
    return DataLoader(whole, batch_size=512)
