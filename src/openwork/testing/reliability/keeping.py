"""R1, R16, R17, R18: what lies on disk is whole or refused, whatever kills, flips, cuts or forges it."""

from __future__ import annotations

import ast
import resource
import time
import zipfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch

import openwork
from openwork import atomic, saving
from openwork.core.rng import generator
from openwork.data import files as data_files
from openwork.data.entry import File
from openwork.errors import FormatError, OpenworkError
from openwork.runtime import files
from openwork.testing import faults
from openwork.testing.reliability import _children
from openwork.testing.reliability._formats import KINDS
from openwork.testing.reliability._rows import Measured, Part, Parts, Scale, complaints, none_wrong, total
from openwork.train import checkpoints
from openwork.train.state import Snapshot

SECONDS, MEGABYTES = 1.0, 200


def write_forever(kind: str, folder: str) -> None:
    """Write a checkpoint, or a model file, of two megabytes again and again."""
    weight = torch.randn(1024, 512, generator=generator(0, "reliability", "writer"))
    step = 0
    while True:
        if kind == "checkpoint":
            checkpoints.write(Path(folder), Snapshot(step, {"weight": weight + step}, {"step": step}))
        else:
            files.write_state(Path(folder) / "model.safetensors", {"weight": weight + step})
        step += 1


def killed_saves(kind: str, first: int, count: int) -> Part:
    """Kill `count` writers at random moments, and read what is left with the reader that the product has."""
    wrong: list[str] = []
    left = 0
    for seed in range(first, first + count):
        with _children.folder() as folder:
            child = _children.start(write_forever, kind, str(folder))
            while child.is_alive() and not any(not one.name.startswith(".") for one in folder.iterdir()):
                time.sleep(0.002)
            faults.kill_at_random(child, within=(0.0, 0.08), seed=seed)
            try:
                notes = checkpoints.newest(folder)[1] if kind == "checkpoint" else _model_notes(folder)
            except (FormatError, OSError) as error:
                notes = [str(error)]
            wrong += [f"kill {seed}: {note}" for note in notes]
            left += len(list(folder.glob(atomic.PREFIX + "*")))
    return {"cases": count, "wrong": wrong, "left": left}


def _model_notes(folder: Path) -> list[str]:
    files.read_state(folder / "model.safetensors")
    atomic.sweep(folder)
    return []


def _kills(scale: Scale) -> Parts:
    count, rounds = (25, 10) if scale == "long" else (3, 1)
    return {
        f"{kind} {k * count}-{(k + 1) * count - 1}": partial(killed_saves, kind, k * count, count)
        for k in range(rounds)
        for kind in ("checkpoint", "model")
    }


def _judge_kills(found: Mapping[str, Part]) -> Measured:
    bad = none_wrong(found, "kills")
    return Measured(f"{bad.value}, {total(found, 'left')} temporaries left", bad.passed, bad.detail)


def fuzz(kind: str, first: int, count: int) -> Part:
    """Read `count` mutants of a file; anything but openwork's own error or a sound value is wrong."""
    tested, wrong, slowest = KINDS[kind], list[str](), 0.0
    tally = {"refused": 0, "equal": 0, "other": 0}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with _children.folder() as folder:
        path = tested.write(folder)
        sound, data = tested.read(path), path.read_bytes()
        header = 8 + int.from_bytes(data[:8], "little") if path.suffix == ".safetensors" else None
        for number, mutant in enumerate(faults.mutate(data, count, seed=first, header=header)):
            path.write_bytes(mutant)
            began = time.process_time()
            try:
                tally["equal" if tested.read(path) == sound else "other"] += 1
            except OpenworkError:
                tally["refused"] += 1
            except Exception as error:
                wrong.append(f"mutant {number} of seed {first} raises {type(error).__name__}: {error}"[:200])
            slowest = max(slowest, time.process_time() - began)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    if tested.checked and tally["other"]:
        wrong.append(f"{tally['other']} mutants were read as other content")
    if slowest > SECONDS or grown > MEGABYTES:
        wrong.append(f"a mutant took {slowest:.2f} s, all together {grown:.0f} MB")
    return {"cases": count, "wrong": wrong, "slowest": slowest, "megabytes": grown, **tally}


def _fuzzed(kind: str, first: int, count: int) -> Part:
    ended = _children.call(fuzz, kind, first, count)
    if ended.code:
        return {"cases": count, "wrong": [f"the reader ended its process with status {ended.code}"]}
    found: Part = ended.value
    return found


def _mutants(scale: Scale) -> Parts:
    count, rounds = (10_000, 10) if scale == "long" else (120, 1)
    return {f"{kind} {k}": partial(_fuzzed, kind, k, count) for kind in KINDS for k in range(rounds)}


def _judge_mutants(found: Mapping[str, Part]) -> Measured:
    bad = none_wrong(found, "mutants crash a reader or are taken for something else")
    slowest = max(part.get("slowest", 0.0) for part in found.values())
    grown = max(part.get("megabytes", 0.0) for part in found.values())
    other = "" if not total(found, "other") else (
        f"{total(found, 'other'):,} mutants of formats without a digest (recipes, arrays) are other sound values"
    )  # fmt: skip
    value = f"{bad.value}; slowest {slowest:.2f} s, at most {grown:.0f} MB; {len(KINDS)} formats"
    return Measured(value, bad.passed, "; ".join(filter(None, (bad.detail, other))))


def flips(kind: str, count: int) -> Part:
    """Flip random bits, one at a time; a reader that gives other content is wrong."""
    tested, wrong, equal = KINDS[kind], list[str](), 0
    with _children.folder() as folder:
        path = tested.write(folder)
        sound, data = tested.read(path), path.read_bytes()
        for seed in range(count):
            path.write_bytes(data)
            bit = faults.flip_bit(path, seed=seed)
            with suppress(OpenworkError):
                if tested.read(path) == sound:
                    equal += 1  # a space of the JSON text, say: nothing that is read has changed
                else:
                    wrong.append(f"bit {bit} is not noticed")
    return {"cases": count, "wrong": wrong, "equal": equal}


def downloaded_flips(count: int) -> Part:
    """Flip random bits of a registered data file; one that still counts as intact is wrong."""
    wrong = []
    with _children.folder() as folder:
        path = KINDS["idx data"].write(folder)
        data = path.read_bytes()
        known = File(path.name, ("https://example.org/images.gz",), data_files.sha256(path), "", len(data))
        for seed in range(count):
            path.write_bytes(data)
            bit = faults.flip_bit(path, seed=seed)
            wrong += [f"bit {bit} is not noticed"] if data_files.intact(path, known) else []
    return {"cases": count, "wrong": wrong}


def _flips(scale: Scale) -> Parts:
    count = 4000 if scale == "long" else 60
    kinds: Parts = {kind: partial(flips, kind, count) for kind, one in KINDS.items() if one.checked}
    return {**kinds, "data file": partial(downloaded_flips, count)}


def _judge_flips(found: Mapping[str, Part]) -> Measured:
    bad = none_wrong(found, "flipped bits are read as other content")
    return Measured(f"{bad.value}; {total(found, 'equal')} of them change nothing that is read", bad.passed, bad.detail)


def forged() -> Part:
    """Lay a pickle that makes a folder under each name that openwork reads, and read it."""
    wrong, cases = [], 0
    with _children.folder() as folder:
        mark = folder / "mark"
        bomb = b"cposix\nmkdir\n(V" + str(mark).encode() + b"\ntR."
        for case, read in _readers(folder, bomb).items():
            cases += 1
            with suppress(OpenworkError):
                read()
            if mark.exists():
                wrong.append(f"{case} runs code")
                mark.rmdir()
    return {"cases": cases, "wrong": wrong}


def _readers(folder: Path, bomb: bytes) -> dict[str, Callable[[], object]]:
    """Write the forged files and return the calls that read them."""
    raw, zipped = folder / "raw.safetensors", folder / "zip.safetensors"
    raw.write_bytes(b"\x80\x02" + bomb)
    _zip(zipped, {"archive/data.pkl": bomb, "archive/version": b"3\n"})
    array = b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little")
    array += b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }".ljust(117) + b"\n" + bomb
    _zip(folder / "data.npz", {f"{x}_{part}.npy": array for x in "xy" for part in ("train", "test")})
    (folder / "recipe.yaml").write_bytes(b"data: !!python/object/apply:os.mkdir [" + str(folder / "mark").encode() + b"]\n")
    place = checkpoints.write(folder / "run", Snapshot(1, {"w": torch.ones(2)}, {"step": 1}))
    (place / checkpoints.TENSORS).write_bytes(bomb)
    calls: dict[str, Callable[[], object]] = {
        "a pickle as a model": partial(saving.load_state, raw),
        "a torch archive as a model": partial(saving.load_state, zipped),
        "a pickle loaded into a module": partial(saving.load, raw, torch.nn.Linear(2, 2)),
        "a pickle as a checkpoint's tensors": partial(checkpoints.read, place),
        "an array of objects": partial(KINDS["npz data"].read, folder / "data.npz"),
        "a recipe with a Python tag": partial(KINDS["recipe"].read, folder / "recipe.yaml"),
    }
    for name, kind in KINDS.items():
        own = folder / name
        own.mkdir()
        path = kind.write(own)
        path.write_bytes(bomb)
        calls[f"a pickle as {name}"] = partial(kind.read, path)
    return calls


def _zip(path: Path, members: Mapping[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


_UNSAFE = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "shelve", "marshal", "jsonpickle"}
_CALLS = {"torch.load", "joblib.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "pandas.read_pickle"}


def unpicklers(root: Path) -> Part:
    """Find the imports and calls in a source tree by which a file could be unpickled or run."""
    wrong, cases = [], 0
    for path in sorted(root.rglob("*.py")):
        cases += 1
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [one.name for one in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found = [name for name in names if name.partition(".")[0] in _UNSAFE]
            if isinstance(node, ast.Call) and _is_unsafe(node):
                found.append(ast.unparse(node)[:60])
            wrong += [f"{path.relative_to(root)}:{node.lineno} has {one}" for one in found]  # type: ignore[attr-defined]
    return {"cases": cases, "wrong": wrong}


def _is_unsafe(node: ast.Call) -> bool:
    allows = any(word.arg == "allow_pickle" and not _is(word.value, False) for word in node.keywords)
    unchecked = any(word.arg == "weights_only" and not _is(word.value, True) for word in node.keywords)
    return ast.unparse(node.func) in _CALLS or allows or unchecked


def _is(node: ast.expr, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def _pickles(_scale: Scale) -> Parts:
    return {"forged files": forged, "source": partial(unpicklers, Path(openwork.__file__).parent)}


def _judge_pickles(found: Mapping[str, Part]) -> Measured:
    ran = len(found.get("forged files", {}).get("wrong", []))
    reachable = len(found.get("source", {}).get("wrong", []))
    files_read, modules = (found.get(name, {}).get("cases", 0) for name in ("forged files", "source"))
    value = f"{ran} of {files_read} forged files run code; {reachable} unpicklers in {modules} modules"
    return Measured(value, ran + reachable == 0 and files_read > 0, complaints(found))


KILLS = _kills, _judge_kills
MUTANTS = _mutants, _judge_mutants
FLIPS = _flips, _judge_flips
PICKLES = _pickles, _judge_pickles
