"""Which source files a class or function runs, found without importing anything.

A module's imports are read from its syntax tree. Modules of this package, and those outside site-packages,
are followed; an installed library stands for itself by its version and the list of its files' hashes.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.machinery
import importlib.metadata
import os
import platform
import re
import sys
import time
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .io import sha256_file

_OWN = __name__.partition(".")[0]  # followed wherever it is installed
_ADDRESS = re.compile(r"([A-Za-z_]\w*(?:\.\w+)+):[A-Za-z_]\w*")  # "package.module:object", imported by need


class UnknownCode(Exception):
    """The code, or the content, that decides a result cannot be known."""


def sources_of(value: Any) -> dict[str, str]:
    """Name -> digest of each file and library that a class, function or module runs.

    Raises:
        UnknownCode: some of it has no source, or is not what its file says.
    """
    found: dict[str, str] = {"python": platform.python_version()}
    waiting = list(dict.fromkeys(_modules_of(value, found)))
    while waiting:
        name = waiting.pop()
        if name in found or name.partition(".")[0] in sys.stdlib_module_names:
            continue
        place = _place(name)
        if place is None:
            raise UnknownCode(f"the module {name!r} has no source file")
        if _is_library(name, place):
            found[name.partition(".")[0]] = _library(name.partition(".")[0])
            continue
        source = _read(place, *_stamp(place))
        found[name] = source.sha256 + _overridden(name, place, source)
        package = name if place.name == "__init__.py" else name.rpartition(".")[0]
        for library in place.parent.glob("*.so"):
            found[f"{package}/{library.name}"] = _file_sha256(library, *_stamp(library))
        for wanted, attributes in source.imports:
            target = _absolute(wanted, package)
            inside = [f"{target}.{attribute}" for attribute in attributes]
            waiting.extend(m for m in (target, *inside) if m and _place(m) is not None)
        if place.name != "__init__.py":  # there such addresses only register
            waiting.extend(m for m in source.addresses if _place(m) is not None)
    return found


def _modules_of(value: Any, found: dict[str, str]) -> Iterator[str]:
    """The modules that define a class with its bases, or a function; `found` gains what replaces methods."""
    if isinstance(value, types.ModuleType):
        yield value.__name__
        return
    if not isinstance(value, type):
        function = _unwrap(value)
        if isinstance(function, types.FunctionType):
            _check_function(function)
            yield function.__module__
        elif (home := getattr(function, "__module__", None)) is not None:
            yield home
        elif not isinstance(function, types.BuiltinFunctionType):
            raise UnknownCode(f"a {type(value).__qualname__} has no module")
        return
    for base in value.__mro__:
        home = base.__module__
        if home.partition(".")[0] in sys.stdlib_module_names and home != "__main__":
            continue
        yield home
        if (place := _place(home)) is None or _is_library(home, place):
            continue
        if "<locals>" in base.__qualname__:
            raise UnknownCode(f"{base.__qualname__} is made inside a function")
        for name, member in vars(base).items():
            function = _unwrap(getattr(member, "__func__", getattr(member, "fget", member)))
            if isinstance(function, types.FunctionType):
                owner = function.__globals__.get("__name__", "")
                if owner != home:  # a method that was replaced, taken from elsewhere, or generated
                    _check_function(function)
                    if _find(owner, tuple(sys.path)) is not None:
                        yield owner
                    else:
                        generated = Path(function.__code__.co_filename)
                        found[f"{home}:{base.__qualname__}.{name}"] = _file_sha256(
                            generated, *_stamp(generated)
                        )
                elif function.__code__.co_filename not in (str(place), "<string>") and not _same_file(
                    function.__code__.co_filename, place
                ):
                    raise UnknownCode(f"{base.__qualname__}.{name} is not from {place}")
                if function.__name__ != name and not name.startswith("__"):
                    found[f"{home}:{base.__qualname__}.{name}"] = f"{owner}:{function.__qualname__}"


def _check_function(function: types.FunctionType) -> None:
    place = _place(function.__module__ or "")
    if place is None or not _same_file(function.__code__.co_filename, place):
        raise UnknownCode(f"{function.__qualname__} has no source file")


def _unwrap(value: Any) -> Any:
    while hasattr(value, "__wrapped__"):
        value = value.__wrapped__
    return value


def _same_file(name: str, place: Path) -> bool:
    return os.path.exists(name) and os.path.samefile(name, place)


def _place(name: str) -> Path | None:
    """The source file of a module, which need not be loaded; None for what has none."""
    loaded = sys.modules.get(name)
    if loaded is not None:
        file = getattr(loaded, "__file__", None)
        return Path(file) if file and os.path.exists(file) else None
    return _find(name, tuple(sys.path))


@functools.lru_cache(maxsize=4096)
def _find(name: str, path: tuple[str, ...]) -> Path | None:
    root, *rest = name.split(".")
    loaded = sys.modules.get(root)
    folders = list(getattr(loaded, "__path__", [])) if loaded is not None else None
    if folders is None:
        spec = importlib.machinery.PathFinder.find_spec(root, list(path))
        if spec is None:
            return None
        if not rest:
            return Path(spec.origin) if spec.origin and os.path.exists(spec.origin) else None
        folders = list(spec.submodule_search_locations or [])
    for folder in folders:
        inner = Path(folder, *rest)
        for candidate in (inner / "__init__.py", inner.with_suffix(".py")):
            if candidate.is_file():
                return candidate
    return None


def _is_library(name: str, place: Path) -> bool:
    """Whether a module belongs to an installed library that its version stands for."""
    installed = {"site-packages", "dist-packages"} & set(place.parts)
    return name.partition(".")[0] != _OWN and (bool(installed) or place.suffix != ".py")


@functools.lru_cache(maxsize=1024)
def _library(name: str) -> str:
    """Version of an installed library, with the digest of the list of its files where there is one."""
    try:
        distribution = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        owners = _owners().get(name)
        if not owners:
            return str(getattr(sys.modules.get(name), "__version__", "")) or "unversioned"
        distribution = importlib.metadata.distribution(owners[0])
    record = distribution.read_text("RECORD") or ""
    return f"{distribution.version} {hashlib.sha256(record.encode()).hexdigest()}"


@functools.lru_cache(maxsize=1)
def _owners() -> dict[str, list[str]]:
    return dict(importlib.metadata.packages_distributions())


@dataclass(frozen=True)
class _Source:
    """A source file: its digest, what it imports (module, names taken from it), the addresses in its strings,
    what it defines at the top, and the plain constants there."""

    sha256: str
    imports: tuple[tuple[str, tuple[str, ...]], ...]
    addresses: tuple[str, ...]
    defines: frozenset[str]
    constants: tuple[tuple[str, Any], ...]


def _stamp(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_mtime_ns, found.st_size


@functools.lru_cache(maxsize=4096)
def _file_sha256(path: Path, changed: int, size: int) -> str:
    return sha256_file(path)


@functools.lru_cache(maxsize=4096)
def _read(path: Path, changed: int, size: int) -> _Source:
    """Read and parse a source file, once as long as it is the same."""
    raw = path.read_bytes()
    try:
        tree = ast.parse(raw)
    except (SyntaxError, ValueError) as error:
        raise UnknownCode(f"{path} cannot be parsed: {error}") from None
    imports: list[tuple[str, tuple[str, ...]]] = []
    addresses: list[str] = []
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            waiting.extend(node.orelse)  # imported by type checkers only
            continue
        if isinstance(node, ast.Import):
            imports.extend((alias.name, ()) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names = tuple(alias.name for alias in node.names)
            imports.append(("." * node.level + (node.module or ""), names))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            addresses.extend(found[1] for found in [_ADDRESS.fullmatch(node.value)] if found)
        waiting.extend(ast.iter_child_nodes(node))
    functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    defines = frozenset(node.name for node in tree.body if isinstance(node, functions))
    constants: dict[str, Any] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            constants |= {t.id: node.value.value for t in node.targets if isinstance(t, ast.Name)}
    return _Source(
        hashlib.sha256(raw).hexdigest(), tuple(imports), tuple(addresses), defines, tuple(constants.items())
    )


def _absolute(name: str, package: str) -> str:
    """The full name of an import; `..x` counts from `package`."""
    bare = name.lstrip(".")
    level = len(name) - len(bare)
    if not level:
        return bare
    parts = package.split(".")
    base = ".".join(parts[: len(parts) - level + 1])
    return f"{base}.{bare}".strip(".")


def _overridden(name: str, place: Path, source: _Source) -> str:
    """What differs in the loaded module from its file: constants that were set to other values.

    Raises:
        UnknownCode: a function or class was replaced, or the file was edited after it was loaded.
    """
    loaded = sys.modules.get(name)
    if loaded is None:
        return ""
    here = vars(loaded)
    for defined in source.defines:
        value = here.get(defined)
        if isinstance(value, (types.FunctionType, type)) and value.__module__ != name:
            raise UnknownCode(f"{name}.{defined} was replaced")
    if place.stat().st_mtime > _started() + _SLACK:
        _check_loaded(name, here, place)
    changed = {
        key: here[key]
        for key, value in source.constants
        if isinstance(value, (bool, int, float, str))
        and type(here.get(key)) in (bool, int, float, str)
        and here[key] != value
    }
    return repr(sorted(changed.items())) if changed else ""


def _check_loaded(name: str, here: dict[str, Any], place: Path) -> None:
    """A file that is younger than the process: every function in memory must be one that the file has."""
    on_disk: set[types.CodeType] = set()
    waiting = [compile(place.read_bytes(), str(place), "exec", dont_inherit=True)]
    while waiting:
        code = waiting.pop()
        on_disk.add(code)
        waiting.extend(part for part in code.co_consts if isinstance(part, types.CodeType))
    for value in list(here.values()):
        if getattr(value, "__module__", None) != name:
            continue
        members = vars(value).values() if isinstance(value, type) else [value]
        for member in members:
            function = _unwrap(getattr(member, "__func__", getattr(member, "fget", member)))
            if not isinstance(function, types.FunctionType):
                continue
            if _same_file(function.__code__.co_filename, place) and function.__code__ not in on_disk:
                raise UnknownCode(f"{place} was edited after {function.__qualname__} had been loaded")


@functools.lru_cache(maxsize=1)
def _started() -> float:
    """When this process started, in seconds of the epoch; elsewhere than on Linux, when this was imported."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        boot = next(
            int(line.split()[1])
            for line in Path("/proc/stat").read_text().splitlines()
            if line.startswith("btime ")
        )
    except (OSError, ValueError, IndexError, StopIteration):
        return _IMPORTED
    return boot + ticks / os.sysconf("SC_CLK_TCK")


_IMPORTED = time.time()
_SLACK = 2.0  # seconds; the start is known to a second, and nothing is imported in the first
