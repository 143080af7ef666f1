"""What the pages show, as plain values ready for the templates: every name and number is text that can be read safely."""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openwork.errors import OpenworkError, StoreError
from openwork.report import html
from openwork.report.summary import main_metric
from openwork.report.text import NOTHING, finite, percent, scaled, significant, visible
from openwork.report.text import lines as text_lines
from openwork.web import reading
from openwork.web.entry import Entry, sentence, trials_of
from openwork.web.figures import curves, pictures

STATUS_ORDER = ("running", "failed", "diverged", "killed", "timeout", "begun", "ok")
SHOWN_SEEDS = 24
SHOWN_PICTURES = 12
LARGEST_MODEL, LARGEST_STATE = 2**29, 2**31
"""Bytes of a file of weights, and of the weights in it, beyond which there are no pictures."""


@dataclass(frozen=True)
class Trial:
    """A trial as a line of a table: `address` is empty where it has no folder."""

    key: str
    arm: str
    seed: int
    status: str
    value: str
    seconds: str
    share: float | None
    error: str


class Kept:
    """The last few things that took time to make, by key; used by many threads.

    Args:
        most: so many are kept.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._kept: OrderedDict[object, Any] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: object, make: Callable[[], Any]) -> Any:
        """Return what is kept under `key`, or make it, keep it and return it."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        made = make()
        with self._lock:
            self._kept[key] = made
            while len(self._kept) > self.most:
                self._kept.popitem(last=False)
        return made


def report(found: Mapping[str, Any], address: str) -> dict[str, Any]:
    """Return the parts of a run's report.

    Args:
        found: the results.
        address: below which its plots are.

    Raises:
        StoreError: if the results do not have the form that openwork writes.
    """
    try:
        return html.parts(found, figures=pictures(found, address))
    except Exception as error:  # of a file that nobody has seen yet; the page shows the rest
        raise StoreError(
            f"results.json does not have the form that openwork writes ({type(error).__name__}: {visible(error, 120)}); "
            "the same command writes it anew"
        ) from error


def trials(entry: Entry, found: Mapping[str, Any] | None, kept: Kept) -> list[Trial]:
    """Return all trials of a run: those of its results, then those that were begun and are not in them.

    Args:
        entry: the run.
        found: its results, if there are any.
        kept: where trials that have ended are kept, so that a run at work is not read whole at every look.
    """
    folders = set(trials_of(entry.folder))
    main = main_metric(found) if found else main_metric({})
    made = [_of_result(trial, main.name, main.share, folders) for trial in (found or {}).get("trials") or []]
    seen = {trial.key for trial in made}
    running = entry.status == "running"
    made += [_of_folder(entry.folder, key, running, kept) for key in sorted(folders - seen)]
    return made


def by_arm(found: Sequence[Trial]) -> list[tuple[str, list[Trial], int]]:
    """Return for each arm its name, its first trials by seed, and how many more there are."""
    arms: dict[str, list[Trial]] = {}
    for trial in found:
        arms.setdefault(trial.arm, []).append(trial)
    return [
        (arm, sorted(own, key=lambda t: t.seed)[:SHOWN_SEEDS], max(0, len(own) - SHOWN_SEEDS)) for arm, own in arms.items()
    ]


def result(entry: Entry, key: str, found: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the result of a trial from its own folder, or from the run's results; empty if there is none."""
    own = _files(entry.folder, key)[1]
    return own or next((one for one in (found or {}).get("trials") or [] if one["key"] == key), {})


def trial(entry: Entry, key: str, found: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return what the page of one trial shows.

    Raises:
        StoreError: if the run has no such trial.
    """
    spec, result, troubles = _files(entry.folder, key)
    if not result and found:
        result = next((one for one in found["trials"] if one["key"] == key), {})
    if not spec and not result:
        raise troubles[0] if troubles else StoreError("this run has no such trial")
    arm = spec.get("arm") if isinstance(spec.get("arm"), dict) else {}
    assert isinstance(arm, dict)
    seed = result.get("seed", spec.get("seed"))
    log = ""
    try:
        log = reading.log(entry.folder, key)
    except OpenworkError as error:
        troubles.append(error)
    running = not result and entry.status == "running"
    return {
        "key": key,
        "arm": visible(result.get("arm") or arm.get("name") or key, 120),
        "seed": visible(seed, 20),
        "status": visible(result.get("status") or ("running" if running else "begun"), 20),
        "running": running,
        "share": None if result else reading.progress(entry.folder, key),
        "error": text_lines(result["error"]) if result.get("error") else "",
        "metrics": [(visible(k, 60).replace("_", " "), metric(k, v)) for k, v in result.get("metrics", {}).items()],
        "figures": curves(result.get("curves", {}), f"/runs/{entry.id}/trials/{key}/curves"),
        "layers": _layers(entry.folder, key, result.get("layers", {})),
        "log": log,
        "settings": list(html.asked(_table(arm.get("settings")))),
        "recipe": list(html.asked(_table(spec.get("config")))),
        "recipe_text": _yaml(_table(spec.get("config"))),
        "machine": [(visible(k, 60), _short(visible(v, 200))) for k, v in _table(spec.get("identity")).items()],
        "details": [*_facts(result.get("details", {})), *_facts(result.get("timings", {}))],
        "troubles": [sentence(error) for error in troubles],
    }


def metric(name: str, value: object) -> str:
    """Return the value of a metric as text: shares in percent, other numbers with three digits."""
    share = name.endswith("accuracy") or name in ("density", "kept")
    return percent(value) if share else significant(value)


def model_file(folder: Path, key: str) -> Path | None:
    """Return the file of a trial's weights if there is one that a picture can be made of."""
    path = folder / "trials" / key / "model.safetensors"
    with contextlib.suppress(OSError):
        real = Path(os.path.realpath(path))
        if real == path and path.is_file() and path.stat().st_size <= LARGEST_MODEL:
            return path
    return None


def masks(path: Path, names: Sequence[str]) -> dict[str, str]:
    """Return pictures of the masks of the named weights of a model file, as SVG text by name.

    Raises:
        FormatError: if the file is damaged or too large.
        StoreError: if it cannot be read.
    """
    from openwork.report.pictures import mask_picture
    from openwork.runtime import files

    state, _ = files.read_state(path, limit=LARGEST_STATE)
    kept = [(name, (state[name] != 0).numpy()) for name in names if name in state and state[name].numel()]
    return {name: mask_picture(mask, name=name, ident=f"mask-{at}") for at, (name, mask) in enumerate(kept)}


def _files(folder: Path, key: str) -> tuple[dict[str, Any], dict[str, Any], list[OpenworkError]]:
    """Return a trial's specification and result, empty where they cannot be read, and why that is."""
    troubles: list[OpenworkError] = []
    found: list[dict[str, Any]] = []
    for name in ("spec.json", "result.json"):
        try:
            found.append(reading.read_object(folder, "trials", key, name, limit=reading.LARGEST_TRIAL))
        except OpenworkError as error:
            found.append({})
            if os.path.lexists(folder / "trials" / key / name):
                troubles.append(error)
    spec, result = found
    return reading.plain(spec), reading.trial(result) if result else {}, troubles


def _of_result(trial: Mapping[str, Any], main: str, share: bool, folders: set[str]) -> Trial:
    value, seconds = trial["metrics"].get(main), finite(trial["timings"].get("seconds"))
    return Trial(
        key=trial["key"] if trial["key"] in folders or reading.is_key(trial["key"]) else "",
        arm=visible(trial["arm"], 60),
        seed=trial["seed"],
        status=visible(trial["status"], 20),
        value=(f"{scaled(value)} %" if value is not None else NOTHING) if share else significant(value),
        seconds=NOTHING if seconds is None else f"{seconds:,.1f}",
        share=None,
        error=text_lines(trial["error"], 400) if trial["error"] else "",
    )


def _of_folder(folder: Path, key: str, running: bool, kept: Kept) -> Trial:
    try:
        facts = os.lstat(folder / "trials" / key / "result.json")
    except OSError:
        return _read(folder, key, running)
    return kept.get((folder, key, facts.st_mtime_ns, facts.st_size), lambda: _read(folder, key, running))  # type: ignore[no-any-return]


def _read(folder: Path, key: str, running: bool) -> Trial:
    spec, result, troubles = _files(folder, key)
    if result:
        return _of_result({**result, "key": key}, "accuracy", True, {key})
    arm = spec.get("arm") if isinstance(spec.get("arm"), dict) else {}
    assert isinstance(arm, dict)
    seed = spec.get("seed")
    share = reading.progress(folder, key) if running else None
    return Trial(
        key=key,
        arm=visible(arm.get("name") or NOTHING, 60),
        seed=seed if isinstance(seed, int) else 0,
        status="running" if share is not None else "begun",
        value=NOTHING,
        seconds=NOTHING,
        share=share,
        error=sentence(troubles[0]) if troubles else "",
    )


def _layers(folder: Path, key: str, layers: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the layers with the share that each keeps; `picture` numbers those whose mask can be drawn."""
    drawn = model_file(folder, key) is not None
    made = []
    for at, (name, layer) in enumerate(layers.items()):
        kept, total = finite(layer.get("kept")), finite(layer.get("total"))
        if kept is None or not total or not 0 <= kept <= total:
            continue
        shape = layer.get("shape")
        made.append(
            {
                "name": visible(name, 60),
                "shape": " × ".join(visible(size, 12) for size in shape[:6]) if isinstance(shape, list) else NOTHING,
                "kept": f"{kept:,.0f} of {total:,.0f}",
                "share": percent(kept / total),
                "width": round(100.0 * kept / total, 2),
                "picture": at if drawn and at < SHOWN_PICTURES and isinstance(shape, list) and len(shape) > 1 else None,
            }
        )
    return made


def _facts(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        shown = significant(value) if isinstance(value, float) else visible(value, 200)
        yield visible(name, 60).replace("_", " "), f"{value:,}" if type(value) is int else shown


def _short(text: str) -> str:
    """Return a digest's first twelve digits, other text as it is."""
    return text[:12] if re.fullmatch(r"[0-9a-f]{40,}", text) else text


def _yaml(config: Mapping[str, Any]) -> str:
    return html.recipe_text({"recipe": config}) if config else ""


def _table(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}
