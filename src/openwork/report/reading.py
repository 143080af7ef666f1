"""Reading a run back: find its results file, and refuse what is damaged or foreign in one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, Field, ValidationError

from openwork.errors import FormatError, StoreError
from openwork.report.pages import read_results
from openwork.report.summary import Results
from openwork.report.text import visible

RESULTS = "results.json"
_WHOLE = 2**63
"""JSON knows no largest number; 64-bit stores and plots do."""


def _number(value: object) -> object:
    """Let a number or null pass; a whole number must fit a float."""
    if value is None or isinstance(value, float):
        return value
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**1000:
        return value
    raise ValueError("input should be a number or null")


def _metric(value: object) -> object:
    return value if isinstance(value, bool) else _number(value)


Number = Annotated[Any, AfterValidator(_number)]
Metric = Annotated[Any, AfterValidator(_metric)]
Whole = Annotated[int, Field(ge=-_WHOLE, lt=_WHOLE)]


class _Open(BaseModel):
    """What is checked has the right type; what is not known is left alone."""

    model_config = {"extra": "allow", "strict": True}


class _Interval(_Open):
    mean: Number = None
    low: Number = None
    high: Number = None


class _Row(_Open):
    arm: str
    method: str = ""
    density: Number = None
    n: Whole = 0
    seeds: Whole = 0
    accuracy: _Interval | None = None
    difference: _Interval | None = None
    kept: Number = None
    training_flops: Number = None
    inference_flops: Number = None
    bytes: Number = None
    steps: Number = None
    latency: Number = None
    metrics: dict[str, _Interval] | None = None
    note: str | None = None


class _Layer(_Open):
    kept: Whole
    total: Whole
    shape: list[Whole] = []


class _Trial(_Open):
    key: str
    arm: str
    seed: Whole
    status: str
    error: str | None = None
    metrics: dict[str, Metric] = {}
    curves: dict[str, list[list[Number]]] = {}
    layers: dict[str, _Layer] = {}
    timings: dict[str, Number] = {}


class _Arm(_Open):
    name: str
    settings: dict[str, Any] = {}
    method: str = ""
    density: Number = None
    note: str | None = None


class _Claim(_Open):
    text: str
    verdict: str
    metric: str = ""
    estimate: Number = None
    low: Number = None
    high: Number = None
    adjusted_p: Number = None
    reason: str | None = None


class _Results(_Open):
    format: Whole
    name: str
    kind: str = ""
    preset: str | None = None
    about: str | None = None
    recipe: dict[str, Any] | None = None
    environment: dict[str, Any] | None = None
    columns: dict[str, str] | None = None
    latency: dict[str, Any] | None = None
    arms: list[_Arm] = []
    rows: list[_Row] = []
    trials: list[_Trial] = []
    claims: list[_Claim] = []


def find_results(run: Path | str) -> Path:
    """Return the results file of a run folder, or the file itself.

    Raises:
        StoreError: if there is nothing, or a folder without results; says what to do.
    """
    place = Path(run)
    try:
        if place.is_file():
            return place
        if (place / RESULTS).is_file():
            return place / RESULTS
        if not place.is_dir():
            raise StoreError(
                f"there is no run folder or results file at {visible(run, 300)!r}; a run leaves one under runs/, for "
                f"example runs/compare-digits-cnn"
            )
        others = sorted(path.name for path in place.glob("*.json"))
        unfinished = (place / "trials").is_dir()
    except OSError as error:
        raise StoreError(f"cannot look into {visible(run, 300)!r}: {error.strerror or error}; check the path") from error
    if unfinished:
        raise StoreError(f"{visible(run, 300)!r} holds trials but no {RESULTS} yet: start the command that made it again")
    if others:
        names = ", ".join(visible(name, 60) for name in others[:5])
        raise StoreError(f"{visible(run, 300)!r} holds no {RESULTS}; name one of its files: {names}")
    raise StoreError(f"{visible(run, 300)!r} holds no {RESULTS}: give the run folder of a comparison or a study")


def read_run(run: Path | str) -> tuple[Path, Results]:
    """Return the path and the content of a run's results, every field of the type that reports and exports rely on.

    Args:
        run: A run folder, its `results.json`, or a results file of `docs/results`.

    Raises:
        StoreError: if there is none.
        FormatError: if the file is damaged, foreign, or a field has another type; names the first.
    """
    path = find_results(run)
    found = read_results(path)
    try:
        _Results.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise FormatError(
            f"{visible(path, 300)!r} is damaged or foreign: {visible(where, 120)} = {visible(repr(first['input']), 80)}: "
            f"{_reason(first['msg'])}; make it again with `openwork`"
        ) from None
    return path, found


def _reason(message: str) -> str:
    text = visible(message.removeprefix("Value error, "), 200)
    return text[:1].lower() + text[1:]
