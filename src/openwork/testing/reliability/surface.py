"""R30 to R33: the public names, work without a network, a fresh installation, and how fast a command starts."""

from __future__ import annotations

import importlib
import inspect
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import openwork
from openwork import atomic, registry
from openwork.lab.store import read_json
from openwork.testing import faults
from openwork.testing.reliability import _children
from openwork.testing.reliability._rows import Measured, Part, Parts, Scale, complaints

SNAPSHOT = Path("tests") / "reliability" / "api.json"
START, GREEN = 0.3, 60.0
HOMES = ("openwork", "openwork.data", "openwork.models", "openwork.nn", "openwork.testing", "openwork.testing.faults")
"""Modules whose public names are promised; every module's `__all__`, or what it defines itself."""


def signatures() -> dict[str, str]:
    """Return name -> signature of everything public: functions, classes with their methods, constants by type."""
    found: dict[str, str] = {}
    for home in HOMES:
        module = importlib.import_module(home)
        names = getattr(module, "__all__", None) or [n for n, v in vars(module).items() if _own(module, n, v)]
        for name in sorted({*names, *(registry.entries() if home == "openwork" else ())}):
            _add(found, f"{home}.{name}", getattr(module, name))
    return dict(sorted(found.items()))


def _own(module: Any, name: str, value: Any) -> bool:
    return not name.startswith("_") and getattr(value, "__module__", None) == module.__name__ and callable(value)


def _add(found: dict[str, str], name: str, value: Any) -> None:
    if inspect.ismodule(value):
        found[name] = "module"
    elif inspect.isclass(value):
        found[name] = f"class{_signature(value)}"
        for own, thing in inspect.getmembers(value):
            if not own.startswith("_") and getattr(thing, "__module__", "").startswith("openwork") and callable(thing):
                found[f"{name}.{own}"] = _signature(thing)
    elif callable(value):
        found[name] = _signature(value)
    else:
        found[name] = type(value).__name__


def _signature(value: Any) -> str:
    """Return names, kinds and defaults of the parameters; annotations read differently from one Python to another."""
    try:
        given = inspect.signature(value)
    except (TypeError, ValueError):
        return "(...)"
    plain = [
        one.replace(annotation=inspect.Parameter.empty, default=_default(one.default)) for one in given.parameters.values()
    ]
    return str(inspect.Signature(plain))


def _default(value: Any) -> Any:
    if value is inspect.Parameter.empty or isinstance(value, bool | int | float | str | type(None) | tuple):
        return value
    return _Named(getattr(value, "__qualname__", None) or type(value).__name__)


class _Named:
    """Prints as a name."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return self.name


def write_snapshot(path: str | Path) -> None:
    """Write the signatures of this moment to `path`: what is public now is promised from now on."""
    atomic.write_json(path, {"version": openwork.__version__, "names": signatures()})


def compared(path: Path | None) -> Part:
    """Compare the signatures with the snapshot: what is gone, changed or new without being written down."""
    known = None if path is None else read_json(path)
    if known is None:
        return {"cases": 0, "wrong": ["there is no snapshot: write it with write_snapshot, or run this in a checkout"]}
    before, now = known["names"], signatures()
    wrong = [f"{name} is gone" for name in before if name not in now]
    wrong += [
        f"{name} was {before[name]} and is {now[name]}" for name in before if name in now and now[name] != before[name]
    ]
    wrong += [f"{name} is new" for name in now if name not in before]
    return {"cases": len(before), "wrong": wrong}


def _names(_scale: Scale) -> Parts:
    root = _children.checkout()
    return {"signatures": partial(compared, None if root is None else root / SNAPSHOT)}


def _judge_names(found: Mapping[str, Part]) -> Measured:
    part = found["signatures"]
    value = f"{len(part['wrong'])} silent changes of {part['cases']} public names"
    return Measured(value, not part["wrong"] and part["cases"] > 0, complaints(found))


def command(words: tuple[str, ...], expected: int = 0, timeout: float = 900.0) -> Part:
    """Run an openwork command, its children included, without a network, in a folder of its own."""
    with _children.folder() as folder:
        environment = {**faults.offline_environment(folder / "start"), "OPENWORK_CACHE": str(folder / "cache")}
        environment["PYTHONPATH"] = os.pathsep.join([str(folder / "start"), _children.environment()["PYTHONPATH"]])
        if expected:
            environment.pop("OPENWORK_DATA", None)
        done = subprocess.run(
            [sys.executable, "-m", "openwork", *words], cwd=folder, env=environment, capture_output=True, text=True,
            check=False, timeout=timeout,
        )  # fmt: skip
    said = done.stderr.strip()
    clear = "Traceback" not in said and (not expected or "error:" in said)
    wrong = (
        []
        if done.returncode == expected and clear
        else [f"openwork {' '.join(words)}: status {done.returncode}: {said[-300:]}"]
    )
    return {"cases": 1, "wrong": wrong}


def _commands(scale: Scale) -> Parts:
    fetch: Parts = {"data get": partial(command, ("data", "get", "fashion-mnist"), 2)}
    shown: Parts = {"list": partial(command, ("list",)), **fetch}
    if scale == "short":
        return shown
    small = ("--model", "mlp-16", "--methods", "dense,rigl", "--density", "0.1", "--seeds", "1", "--steps", "20", "--quiet")
    return {
        **shown,
        "show": partial(command, ("show", "granet")),
        "data list": partial(command, ("data", "list")),
        "doctor": partial(command, ("doctor",)),
        "compare": partial(command, ("compare", "--data", "digits", *small)),
        "study": partial(command, ("study", "granet", "--preset", "smoke", "--quiet")),
    }


def _judge_commands(found: Mapping[str, Part]) -> Measured:
    bad = [name for name, part in found.items() if part["wrong"]]
    works = [name for name in found if name not in bad and name != "data get"]
    value = f"{len(works)} of {len(found) - 1} commands work without a network; data get says so and ends with status 2"
    return Measured(value, not bad, complaints(found))


def here() -> Part:
    """Run `openwork doctor` in this installation."""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "openwork", "doctor"],
        env=_children.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    green = done.returncode == 0 and "ok" in done.stdout
    return {
        "seconds": time.monotonic() - began,
        "wrong": [] if green else [(done.stdout + done.stderr)[-300:]],
        "told": _told(),
    }


def fresh(python: str) -> Part:
    """Install openwork into a new virtual environment of an interpreter, by pip alone, and run `openwork doctor` there."""
    root = _children.checkout()
    with _children.folder() as folder:
        told = subprocess.run([python, "--version"], capture_output=True, text=True, check=False).stdout.strip()
        environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
        own = str(folder / "venv" / "bin" / "python")
        steps = [
            [python, "-m", "venv", str(folder / "venv")],
            [own, "-m", "pip", "install", "--quiet", str(root or f"openwork=={openwork.__version__}")],
        ]
        for words in steps:
            done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False, cwd=folder)
            if done.returncode:
                return {
                    "seconds": 0.0,
                    "wrong": [f"{told}: {' '.join(words[1:4])} fails: {done.stderr[-300:]}"],
                    "told": told,
                }
        began = time.monotonic()
        done = subprocess.run(
            [str(folder / "venv" / "bin" / "openwork"), "doctor"], env=environment, capture_output=True, text=True,
            check=False, cwd=folder,
        )  # fmt: skip
        seconds = time.monotonic() - began
    return {"seconds": seconds, "wrong": [] if done.returncode == 0 else [(done.stdout + done.stderr)[-300:]], "told": told}


def _told() -> str:
    return f"Python {sys.version.split()[0]}"


def _installations(scale: Scale) -> Parts:
    if scale == "short":
        return {"this installation": here}
    import shutil

    found = {name: shutil.which(name) for name in ("python3.11", "python3.12", "python3.13")}
    return {name: partial(fresh, path) for name, path in found.items() if path} or {"this": partial(fresh, sys.executable)}


def _judge_installations(found: Mapping[str, Part]) -> Measured:
    good = [name for name, part in found.items() if not part["wrong"]]
    slowest = max(part["seconds"] for part in found.values())
    missing = [one for one in ("3.11", "3.12", "3.13") if not any(one in part["told"] for part in found.values())]
    value = f"doctor green in {slowest:.1f} s on {', '.join(found[name]['told'] for name in good) or 'none'}"
    remains = [complaints(found), f"not on this machine: Python {', '.join(missing)}" if missing else ""]
    reached = len(good) == len(found) and slowest <= GREEN and (not missing or "this installation" in found)
    return Measured(value, reached, "; ".join(filter(None, remains)))


_PROBE = (
    "import sys\n"
    "sys.argv = ['openwork', *sys.argv[1:]]\n"
    "from openwork.cli import main\n"
    "try:\n    main()\n"
    "except SystemExit:\n    pass\n"
    "print('\\n' + ','.join(n for n in ('torch', 'numpy', 'scipy', 'matplotlib') if n in sys.modules) + ';')\n"
)


def started(words: tuple[str, ...], repeats: int) -> Part:
    """Time a command from start to end, and look at what it imported.

    Raises:
        AssertionError: if it fails, or imports torch.
    """
    environment = _children.environment()
    probe = subprocess.run(
        [sys.executable, "-c", _PROBE, *words], env=environment, capture_output=True, text=True, check=False
    )
    imported = probe.stdout.rpartition("\n\n")[2].strip().splitlines()[-1:] or ["?"]
    heavy = [name for name in imported[0].rstrip(";").split(",") if name]
    if probe.returncode or "torch" in heavy or "?" in heavy:
        raise AssertionError(f"openwork {' '.join(words)} imports {heavy}, status {probe.returncode}: {probe.stderr[-300:]}")
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "openwork", *words], env=environment, capture_output=True, check=True)
        times.append(time.perf_counter() - began)
    return {"cases": repeats, "seconds": statistics.median(times), "heavy": heavy, "best": min(times)}


def _starts(scale: Scale) -> Parts:
    repeats = 11 if scale == "long" else 2
    return {f"openwork {word}": partial(started, (word,), repeats) for word in ("--help", "list")}


def _judge_starts(found: Mapping[str, Part]) -> Measured:
    told = ", ".join(f"{name} {part['seconds']:.2f} s" for name, part in found.items())
    slow = [name for name, part in found.items() if part["seconds"] > START]
    heavy = sorted({name for part in found.values() for name in part["heavy"]})
    remains = [f"{name} takes {found[name]['seconds']:.2f} s (best {found[name]['best']:.2f})" for name in slow]
    remains += [f"imports {', '.join(heavy)}"] if heavy else []
    return Measured(f"{told}; torch is not imported", not slow, "; ".join(remains))


NAMES = _names, _judge_names
OFFLINE = _commands, _judge_commands
INSTALL = _installations, _judge_installations
START_UP = _starts, _judge_starts
