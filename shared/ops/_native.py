"""Finds, loads and calls the native library (see CMakeLists.txt for how it is built).

The library has a plain C interface: tensors go in as addresses and sizes. Nothing here checks tensors; the
op that calls has done so before it asks for an address.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch

from ..errors import OpError

ABI_VERSION = 11  # zoo_abi_version() in native/src/runtime.cpp
LEVELS = ("portable", "avx2", "avx512")
FOLDER = Path(__file__).parent

_log = logging.getLogger("zoo.shared.ops")
_TYPES: dict[str, Any] = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "d": ctypes.c_double}


class NativeMissing(Exception):
    """The library was not built, or cannot be loaded; the text says why."""


def _path(level: str) -> Path:
    folder = Path(os.environ.get("ZOO_NATIVE_DIR") or FOLDER)  # another build, such as one with a sanitizer
    return folder / f"_zoo_native_{level}{'.dll' if sys.platform == 'win32' else '.so'}"


def _open(level: str) -> ctypes.CDLL:
    path = _path(level)
    if not path.exists():
        raise NativeMissing(
            f"{path.name} is not in {path.parent}: it was not built (no C++ compiler at install time?)"
        )
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise NativeMissing(f"{path.name} cannot be loaded: {error}") from error
    library.zoo_abi_version.restype = ctypes.c_int64
    version = library.zoo_abi_version()
    if version != ABI_VERSION:
        raise NativeMissing(
            f"{path.name} has interface {version}, this code needs {ABI_VERSION}: build it again"
        )
    return library


def _share_threads(library: ctypes.CDLL) -> None:
    """Let the kernels run on torch's own OpenMP team; without one they start threads of their own.

    ZOO_OWN_THREADS=1 leaves them theirs, for the thread sanitizer, which cannot see into OpenMP's barriers.
    """
    if os.environ.get("ZOO_OWN_THREADS") == "1":
        return
    name = {"darwin": "libtorch_cpu.dylib", "win32": "torch_cpu.dll"}.get(sys.platform, "libtorch_cpu.so")
    path = Path(torch.__file__).parent / "lib" / name
    if not path.exists():
        return
    # Looking a symbol up through torch's library finds the OpenMP runtime that torch itself is linked with,
    # and not another copy that some other package may have brought along.
    runtime = ctypes.CDLL(str(path))
    try:
        entries = [runtime.GOMP_parallel, runtime.omp_get_thread_num, runtime.omp_get_num_threads]
    except AttributeError:
        return
    library.zoo_set_openmp(*(ctypes.cast(entry, ctypes.c_void_p) for entry in entries))


def _offered() -> list[str]:
    """Instruction sets that this CPU has and that were built, the best first."""
    levels = {"AVX2": 1, "AVX512": 2}.get(torch.backends.cpu.get_cpu_capability(), 0)
    return [level for level in reversed(LEVELS[: levels + 1]) if _path(level).exists()]


@functools.cache
def _load() -> tuple[ctypes.CDLL, str]:
    offered = _offered()
    wanted = os.environ.get("ZOO_ISA") or (offered[0] if offered else "portable")
    if offered and wanted not in offered:
        raise NativeMissing(f"ZOO_ISA={wanted!r}: this CPU and build offer {', '.join(offered)}")
    library = _open(wanted)
    _share_threads(library)
    return library, wanted


@functools.cache
def missing() -> str | None:
    """Why there is no native library, or None when there is one. The reason is logged once."""
    try:
        _load()
    except NativeMissing as reason:
        _log.warning(
            "native kernels are off, the plain PyTorch reference runs instead (slower, same results): %s. "
            "With a C++ compiler, `python -m zoo.shared.ops.build` builds them.",
            reason,
        )
        return str(reason)
    return None


def available() -> bool:
    """True when the native kernels can be used on this machine."""
    return missing() is None


def isa() -> str:
    """Instruction set in use: "portable", "avx2" or "avx512". Raises NativeMissing without a library."""
    return _load()[1]


# Of `enum Code` in native/include/zoo/export.hpp.
BAD_POINTER, BAD_INDEX, NO_MEMORY = 1, 2, 3


def refuse(code: int, entry: Callable[..., int]) -> NoReturn:
    """Raise what a code other than 0 of an exported function means."""
    name = getattr(entry, "__name__", "a native kernel")
    if code == NO_MEMORY:
        raise MemoryError(f"{name}: out of memory for what the kernel needs beside its result")
    if code in (BAD_POINTER, BAD_INDEX):
        pointer = "its pointer does not rise from 0 to the number of entries"
        what = (
            pointer
            if code == BAD_POINTER
            else "an entry of it lies outside of what it counts, or is not in order"
        )
        raise OpError(
            f"{name}: an index was changed after it was made: {what}. Pack again, or load it again."
        )
    raise OpError(f"{name} failed inside (code {code}): the threads that it asked for could not be started")


def _checked(code: int, entry: Callable[..., int], _: object) -> int:
    if code:
        refuse(code, entry)
    return code


@functools.cache
def function(name: str, signature: str) -> Callable[..., int]:
    """The exported C function `name`, which raises OpError or MemoryError where it fails.

    `signature` has a letter per argument: p address, i int64, d double.
    """
    entry = _entry(name, signature)
    entry.errcheck = _checked
    return entry


@functools.cache
def value(name: str, signature: str) -> Callable[..., int]:
    """The exported C function `name` as it is: for one that returns a number, or a code that is looked at."""
    return _entry(name, signature)


@functools.cache
def bare(name: str) -> Callable[..., int]:
    """The exported C function `name` for calls that are made often: it takes what `address` and `number`
    return (or None), which is made once for what stays, and returns its code or number.
    """
    return _named(name)


address: Callable[[int], Any] = ctypes.c_void_p.from_param
number: Callable[[int], Any] = ctypes.c_int64.from_param


def _entry(name: str, signature: str) -> Any:
    entry = _named(name)
    entry.argtypes = [_TYPES[letter] for letter in signature]
    return entry


def _named(name: str) -> Any:
    try:
        entry = _load()[0][name]  # an object of its own in every call, unlike the attribute
    except AttributeError as error:
        raise NativeMissing(
            f"the native library has no {name}: it is older than this code, build it again"
        ) from error
    entry.restype = ctypes.c_int64
    return entry


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as contiguous fp32, which the kernels read; itself where it is that already."""
    if tensor.dtype is not torch.float32:
        tensor = tensor.float()
    return tensor if tensor.is_contiguous() else tensor.contiguous()


_INFINITY = {
    torch.float32: 0x7F800000,
    torch.bfloat16: 0x7F80,
    torch.float16: 0x7C00,
    torch.float64: 0x7FF0000000000000,
}


def finite(tensor: torch.Tensor) -> bool:
    """Whether no entry is infinite or NaN."""
    if tensor.device.type != "cpu" or not available() or not tensor.is_contiguous():
        return bool(torch.isfinite(tensor).all())
    size, infinity = tensor.element_size(), _INFINITY[tensor.dtype]
    return value("zoo_finite", "piii")(tensor.data_ptr(), tensor.numel(), size, infinity) == 1


def finite_like(tensor: torch.Tensor) -> Callable[[torch.Tensor], bool]:
    """`finite` of contiguous tensors on the device and of the dtype of this one."""
    if tensor.device.type != "cpu" or not available():
        return finite
    entry, size, infinity = bare("zoo_finite"), number(tensor.element_size()), number(_INFINITY[tensor.dtype])
    return lambda other: entry(address(other.data_ptr()), number(other.numel()), size, infinity) == 1


def threads() -> int:
    """Threads that a kernel may use now: torch's setting."""
    return torch.get_num_threads()
