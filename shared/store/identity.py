"""Digests of what decides a result: the code that runs, the state of a model, data, library versions.

    code_digest(Model, task)        source of their modules and of every module of ours that these import
    data_digest(tensor, path, ...)  values bit for bit; of a path, the content of the file or folder
    state_digest(model)             tensors, other attributes, hooks and the code of every part

Equal digests mean equal content; no name, address, id or version counter stands for it here.
What cannot be known (code without source, an object with hidden state) gives "", and whoever keeps results
under such a key must not keep this one.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import logging
import os
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .io import sha256_file
from .sources import UnknownCode, sources_of

_log = logging.getLogger("zoo")
_PLAIN = (type(None), bool, int, float, complex, str, bytes)
_NAMED = (enum.Enum, torch.dtype, torch.device, torch.layout, torch.memory_format, range, slice)
# `training` is set by whoever measures; `zoo_info` says where a model came from, not what it does.
_SKIPPED = {"training", "zoo_info"}
_HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: a class written in Python, whose state is in its attributes


def code_digest(*objects: object) -> str:
    """SHA-256 of the code that objects run; "" where some of it is unknown.

    Covered are the modules of each object's class and its bases (of a module also those of its parts, see
    `state_digest` for its attributes), all modules that these import from the same package or from folders
    outside site-packages, compiled libraries beside them, and the versions of the libraries they use.
    Unknown are functions typed into a session or made inside another function, code that was replaced at run
    time, and a file that was edited after the process had read it.

    Args:
        objects: classes, functions, modules, or instances, which stand for their class.
    """
    collected = _Content()
    try:
        for value in objects:
            if isinstance(value, nn.Module):
                for part in value.modules():
                    collected.code(type(part))
            elif isinstance(value, (type, types.ModuleType)) or _is_function(value):
                collected.code(value)
            else:
                collected.code(type(value))
        return collected.hexdigest()
    except UnknownCode as error:
        _log.info("No digest: %s", error)
        return ""


def data_digest(*values: object) -> str:
    """SHA-256 of values: tensors, arrays, plain values, and containers and objects of them.

    A `Path` stands for the content of its file, or of all files below its folder. "" where a value's content
    cannot be seen.
    """
    collected = _Content()
    try:
        for value in values:
            if isinstance(value, Path):
                collected.files(value)
            else:
                collected.add(value)
        return collected.hexdigest()
    except UnknownCode as error:
        _log.info("No digest: %s", error)
        return ""


def state_digest(value: object) -> str:
    """SHA-256 of all that an object, a model or a task say, is: its attributes and its code; "" if unknown.

    Of a model: parameters and buffers (also those that no state dict holds), which of them are tied, masks,
    every plain attribute, hooks, and the source of every part's class.
    """
    return data_digest([value])


class _Content:
    """A digest that is being collected."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._seen: dict[int, int] = {}
        self._held: list[object] = []  # an id stands for an object only as long as that is alive
        self._code: dict[str, str] = {}

    def hexdigest(self) -> str:
        for name, digest in sorted(self._code.items()):
            self._say("source", name, digest)
        return self._hash.hexdigest()

    def _say(self, *parts: object) -> None:
        for part in parts:
            raw = part if isinstance(part, bytes) else str(part).encode("utf-8", "surrogatepass")
            self._hash.update(len(raw).to_bytes(8, "little") + raw)

    def code(self, value: Any) -> None:
        """A class, function or module: its name, and the source of what it runs."""
        self._say("code", getattr(value, "__module__", ""), getattr(value, "__qualname__", repr(type(value))))
        self._code |= sources_of(value)

    def files(self, path: Path) -> None:
        """A file's content, or that of all files below a folder, by relative path."""
        found = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
        self._say("files", len(found))
        for file in found:
            self._say("" if file == path else file.relative_to(path).as_posix(), sha256_file(file))

    def add(self, value: Any) -> None:
        """Any value."""
        kind = type(value)
        if isinstance(value, _NAMED) or kind in _PLAIN:
            self._say(kind.__qualname__, repr(value))
            return
        if kind is tuple:  # equal constants may be one object or two
            self._several("tuple", value)
            return
        if id(value) in self._seen:  # a second name of the same object: ties and cycles
            self._say("again", self._seen[id(value)])
            return
        self._seen[id(value)] = len(self._seen)
        self._held.append(value)
        if isinstance(value, (Tensor, np.ndarray)):
            self._array(value)
        elif isinstance(value, (type, types.ModuleType)):
            self.code(value)
        elif isinstance(value, functools.partial):
            self._several("partial", (value.func, value.args, value.keywords))
        elif _is_function(value):
            self._function(value)
        elif isinstance(value, os.PathLike):
            self._say("path", os.fspath(value))
        elif isinstance(value, torch.Generator):
            self._several("generator", [value.get_state()])
        elif isinstance(value, Mapping):
            self._say(kind.__qualname__, len(value))
            self._several("items", [part for item in value.items() for part in item])
        elif isinstance(value, (set, frozenset)):
            self._several(kind.__qualname__, sorted(data_digest(item) or _unknown(item) for item in value))
        elif isinstance(value, (list, tuple)):
            self._several(kind.__qualname__, value)
        else:
            self._object(value)

    def _several(self, kind: str, values: Iterable[Any]) -> None:
        held = list(values)
        self._held.append(held)
        self._say(kind, len(held))
        for value in held:
            self.add(value)

    def _array(self, value: Tensor | np.ndarray) -> None:
        if isinstance(value, Tensor):
            self._say("tensor", value.dtype, tuple(value.shape), value.layout)
            if value.is_meta:
                return
            if value.layout != torch.strided or value.is_quantized:
                _unknown(value)
            raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        else:
            if value.dtype.hasobject:
                _unknown(value)
            self._say("array", value.dtype.str, value.shape)
            raw = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
        self._say(raw.tobytes())

    def _function(self, value: Any) -> None:
        """A function with what it closes over; a method with its object."""
        self.code(value)
        if (owner := getattr(value, "__self__", None)) is not None and not isinstance(
            owner, types.ModuleType
        ):
            self.add(owner)
        function = getattr(value, "__func__", value)
        if isinstance(function, types.FunctionType):
            cells = [cell.cell_contents for cell in function.__closure__ or ()]
            self._several("closure", [*cells, function.__defaults__, function.__kwdefaults__])

    def _object(self, value: Any) -> None:
        kind = type(value)
        native = [base for base in kind.__mro__ if not base.__flags__ & _HEAP_TYPE and base is not object]
        slots = [name for base in kind.__mro__ for name in getattr(base, "__slots__", ())]
        if native or not (hasattr(value, "__dict__") or slots):
            _unknown(value)
        self.code(kind)
        fields: Any = {name: getattr(value, name) for name in slots if hasattr(value, name)}
        fields |= getattr(value, "__dict__", {})
        if kind.__getstate__ is not object.__getstate__ and not dataclasses.is_dataclass(kind):
            fields = value.__getstate__()  # what copies of it start with: caches are left out
        if not isinstance(fields, dict):
            self.add(fields)
            return
        left_out = {"__weakref__", *(_SKIPPED if isinstance(value, nn.Module) else ())}
        fields = {name: part for name, part in fields.items() if name not in left_out}
        self._say("object", len(fields))
        for name, part in sorted(fields.items()):
            self._say(name)
            self.add(part)


def _is_function(value: object) -> bool:
    return isinstance(value, (types.FunctionType, types.MethodType, types.BuiltinFunctionType)) or hasattr(
        value, "__wrapped__"
    )


def _unknown(value: object) -> Any:
    raise UnknownCode(f"the content of a {type(value).__qualname__} cannot be seen")
