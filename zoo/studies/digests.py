"""Digest of the code that decides a cell, and the commit.

The code of a function is the text of every definition of this project that it reaches by name, without
comments and docstrings: a change of a method makes its cells new, a change of a claim, a table or a docstring
in the same file does not. `zoo.shared.store.identity.code_digest` counts whole modules; by it each new word
in a study would throw away a night of training. What is looked up by a string at run time is not followed.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_PLACES = Path(__file__).parents[1]
#: Packages of this project that present, store or find things, and decide no value.
_SILENT = (
    "zoo.studies",
    "zoo.report",
    "zoo.cli",
    "zoo.bundles",
    "zoo.registry",
    "zoo.errors",
    "zoo.progress",
)


def code_digest(*things: Any) -> str:
    """Digest of all code of the project that functions, classes and partials of them reach; of plain options
    it is their text that counts. Arms, claims and studies are not followed: what an arm is made with is asked
    for by itself, and claims and tables decide no cell."""
    seen: dict[tuple[str, str], str] = {}
    plain: list[str] = []
    waiting = list(things)
    while waiting:
        thing = waiting.pop(0)
        if isinstance(thing, functools.partial):
            waiting += [thing.func, *thing.args, *thing.keywords, *thing.keywords.values()]
        elif isinstance(thing, list | tuple):
            waiting += thing
        elif callable(thing) and hasattr(thing, "__qualname__"):
            _reach(thing.__module__, thing.__qualname__.partition(".")[0], seen)
        else:
            plain.append(repr(thing))
    return _sha("\n".join([*plain, *(f"{key}:{seen[key]}" for key in sorted(seen))]).encode())


@functools.cache
def commit() -> str:
    """The commit of the checkout, with `+` if files differ from it; empty outside one."""

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(_PLACES), *words], capture_output=True, text=True, check=False, timeout=30
        )
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        found = git("rev-parse", "--short=12", "HEAD")
        return found + ("+" if found and git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.TimeoutExpired):  # no git on this machine
        return ""


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


@functools.cache
def _definitions(module: str) -> dict[str, ast.stmt]:
    """Top-level names of a module of the project and what defines them; none for others."""
    try:
        spec = importlib.util.find_spec(module)
    except (ValueError, ModuleNotFoundError):  # a script, or a name that is no module
        return {}
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return {}
    found: dict[str, ast.stmt] = {}
    for node in _statements(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom | ast.Import):
            for alias in node.names:
                found[(alias.asname or alias.name).partition(".")[0]] = node
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = _bare(node)
        elif isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                found |= {one.id: node for one in ast.walk(target) if isinstance(one, ast.Name)}
    return found


def _statements(tree: ast.Module) -> Iterator[ast.stmt]:
    """Top-level statements, those under `if` and `try` included."""
    waiting: list[ast.stmt] = list(tree.body)
    while waiting:
        node = waiting.pop(0)
        yield node
        if isinstance(node, ast.If | ast.Try):
            waiting[:0] = [*node.body, *node.orelse]


def _bare(node: ast.stmt) -> ast.stmt:
    """A definition without docstrings."""
    for one in ast.walk(node):
        body = getattr(one, "body", None)
        if isinstance(one, ast.FunctionDef | ast.ClassDef) and isinstance(body, list):
            first = body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and len(body) > 1:
                one.body = body[1:]
    return node


def _reach(module: str, name: str, seen: dict[tuple[str, str], str]) -> None:
    """Add a definition and all that it names in this project, or in the package of its own."""
    waiting, own = [(module, name)], ("zoo.", f"{module.partition('.')[0]}.")
    while waiting:
        module, name = waiting.pop()
        if (module, name) in seen or module.startswith(_SILENT) or module.startswith("zoo.harness.records"):
            continue
        known = _definitions(module)
        node = known.get(name)
        if node is None:
            continue
        if isinstance(node, ast.ImportFrom | ast.Import):
            waiting += _imported(module, node, name, own)
            continue
        if isinstance(node, ast.Assign | ast.AnnAssign) and _is_table(node):
            continue
        seen[module, name] = _sha(ast.dump(node).encode())
        for one in ast.walk(node):
            if isinstance(one, ast.Name) and one.id in known:
                waiting.append((module, one.id))
            elif isinstance(one, ast.ImportFrom | ast.Import):  # within a function
                for alias in one.names:
                    waiting += _imported(module, one, alias.asname or alias.name, own)
            elif isinstance(one, ast.Attribute) and isinstance(one.value, ast.Name):
                source = known.get(one.value.id)
                if isinstance(source, ast.ImportFrom | ast.Import):  # a function of an imported module
                    waiting += [
                        (f"{m}.{n}", one.attr) for m, n in _imported(module, source, one.value.id, own)
                    ]


def _is_table(node: ast.stmt) -> bool:
    """Whether arms, claims or a study are assigned."""
    calls = [one.func for one in ast.walk(node) if isinstance(one, ast.Call)]
    return any(isinstance(one, ast.Name) and one.id in ("Study", "Arm", "Claim") for one in calls)


def _imported(module: str, node: ast.stmt, name: str, own: tuple[str, ...]) -> list[tuple[str, str]]:
    """(module, name) that an import statement binds to a name, if the module is one of `own`."""
    if not isinstance(node, ast.ImportFrom):
        return []
    source = node.module or ""
    if node.level:
        spec = importlib.util.find_spec(module)
        package = (spec.parent or "") if spec else ""
        base = package.rsplit(".", node.level - 1)[0]
        source = f"{base}.{source}" if source else base
    if not f"{source}.".startswith(own):
        return []
    return [(source, alias.name) for alias in node.names if (alias.asname or alias.name) == name]
