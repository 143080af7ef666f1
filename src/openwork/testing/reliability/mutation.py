"""Mutants of a module: one comparison, constant or operator changed at a time, each put before the module's tests."""

from __future__ import annotations

import ast
import contextlib
import copy
import importlib
import io
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from openwork.core.rng import derive

SECONDS = 60.0
"""A mutant whose tests take longer counts as noticed: it made something endless."""
_COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
_OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult,
    ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.BitXor: ast.BitAnd,
}  # fmt: skip


def files_of(root: Path, module: str) -> list[str]:
    """Return the test files of a module of core."""
    return sorted(str(path.relative_to(root)) for path in (root / "tests" / "core").glob(f"test_{module}*.py"))


def mutants(source: str) -> list[tuple[str, ast.Module]]:
    """Return (what was changed, tree) of every mutant of a source; messages, docstrings and annotations are left alone."""
    tree = ast.parse(source)
    found = []
    for number in range(len(list(_places(tree)))):
        mutant = copy.deepcopy(tree)
        found += [(told, copy.deepcopy(mutant)) for told in _changed(list(_places(mutant))[number])]
    return [(told, ast.fix_missing_locations(mutant)) for told, mutant in found]


def survey(root: str, module: str, tests: list[str], count: int) -> dict[str, Any]:
    """Put up to `count` mutants of `openwork.core.<module>`, drawn at random, before its tests; each in a fork.

    To be called in a process that has not imported openwork.core from elsewhere than `root`, and has one thread.
    """
    os.chdir(root)
    sys.path.insert(0, root)
    path = Path(root) / "src" / "openwork" / "core" / f"{module}.py"
    source = path.read_text(encoding="utf-8")
    drawn = mutants(source)
    random.Random(derive(0, "reliability", "mutants", module)).shuffle(drawn)
    if not tests:
        return {"cases": 0, "killed": 0, "all": len(drawn), "wrong": ["it has no tests of its own"], "survivors": []}
    if _fork(lambda: _tested(module, path, ast.parse(source), tests)) != 0:
        return {"cases": 0, "killed": 0, "all": len(drawn), "wrong": ["its tests fail without a change"], "survivors": []}
    survivors = []
    for told, tree in drawn[:count]:
        if _fork(partial(_tested, module, path, tree, tests)) == 0:
            survivors.append(told)
    tried = len(drawn[:count])
    return {"cases": tried, "killed": tried - len(survivors), "all": len(drawn), "wrong": [], "survivors": survivors}


def _tested(module: str, path: Path, tree: ast.Module, tests: list[str]) -> int:
    """Put the mutant in the module's place, in every module that has names of it, and run the tests."""
    import pytest

    name = f"openwork.core.{module}"
    old = importlib.import_module(name)
    importlib.import_module("openwork.sparsifier")  # modules that hold names of this one get the mutant's
    before = dict(vars(old))
    exec(compile(tree, str(path), "exec"), vars(old))
    for other in [one for key, one in sys.modules.items() if key.startswith("openwork") and one is not old]:
        for key, value in list(vars(other).items()):
            if key in before and before[key] is value and vars(old).get(key) is not value:
                setattr(other, key, vars(old)[key])
    return int(pytest.main(["-q", "-x", "-p", "no:cacheprovider", "--no-header", *tests]))


def _fork(work: Any) -> int:
    """Return what `work` returns in a fork of this process, 1 if it raises or takes too long."""
    pid = os.fork()
    if pid == 0:
        code = 1
        with contextlib.suppress(BaseException):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            sys.stdout = sys.stderr = io.TextIOWrapper(os.fdopen(null, "wb"))
            code = work()
        os._exit(code)
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return 1


def _places(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes that can be changed, in a fixed order; what only words, types and names depend on is passed over."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.JoinedStr | ast.Raise | ast.arg | ast.AnnAssign) or _is_docstring(node):
            continue
        if isinstance(node, ast.FunctionDef):
            parts: list[ast.AST] = [*node.body, *node.args.defaults, *filter(None, node.args.kw_defaults)]
            for part in parts:
                yield from _places(ast.Module([part], []) if isinstance(part, ast.stmt) else ast.Expression(part))  # type: ignore[arg-type]
            continue
        if isinstance(node, ast.Compare | ast.BoolOp | ast.BinOp | ast.UnaryOp) or _is_number(node):
            yield node
        yield from _places(node)


def _changed(node: ast.AST) -> Iterator[str]:
    """Change a node in place and say what was done; one change a yield, each from the original."""
    line, before = getattr(node, "lineno", 0), ast.unparse(node)

    def told() -> str:
        return f"line {line}: {before} -> {ast.unparse(node)}"

    if isinstance(node, ast.Compare):
        old = node.ops[0]
        node.ops[0] = _COMPARISONS[type(old)]()
        yield told()
        node.ops[0] = old
    elif isinstance(node, ast.BoolOp):
        old_op = node.op
        node.op = ast.Or() if isinstance(old_op, ast.And) else ast.And()
        yield told()
        node.op = old_op
    elif (
        isinstance(node, ast.BinOp)
        and type(node.op) in _OPERATORS
        and not isinstance(node.left, ast.Constant | ast.JoinedStr)
    ):
        old_operator = node.op
        node.op = _OPERATORS[type(old_operator)]()
        yield told()
        node.op = old_operator
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.Invert):
        old_unary = node.op
        node.op = ast.UAdd() if isinstance(old_unary, ast.Invert) else ast.Not()
        if isinstance(old_unary, ast.Not):
            inner = node.operand
            node.operand = ast.UnaryOp(ast.Not(), inner)
            yield told()
            node.operand = inner
        node.op = old_unary
    elif isinstance(node, ast.Constant):
        value: Any = node.value
        for new in (
            [not value] if isinstance(value, bool) else [value + 1, value - 1][: 1 if isinstance(value, float) else 2]
        ):
            node.value = new
            yield told()
        node.value = value


def _is_number(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, bool | int | float)


def _is_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
