"""Strict reading and writing of safetensors files.

The public `safetensors` library reads what is written here (a test holds both against each other). Reading is
done by hand for three reasons: each byte range is read only when asked for, every fault becomes a
`FormatError` that names the culprit, and duplicate keys, gaps and overlaps are refused before anything is
allocated.
"""

from __future__ import annotations

import json
import os
import stat
import struct
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import IO, Any, NoReturn

import numpy as np
import torch

from ...errors import FormatError
from ..io import atomic_write

# Name in the file -> (torch dtype, bytes per element).
DTYPES: dict[str, tuple[torch.dtype, int]] = {
    "BOOL": (torch.bool, 1),
    "U8": (torch.uint8, 1),
    "I8": (torch.int8, 1),
    "F8_E4M3": (torch.float8_e4m3fn, 1),
    "F8_E5M2": (torch.float8_e5m2, 1),
    "U16": (torch.uint16, 2),
    "I16": (torch.int16, 2),
    "F16": (torch.float16, 2),
    "BF16": (torch.bfloat16, 2),
    "U32": (torch.uint32, 4),
    "I32": (torch.int32, 4),
    "F32": (torch.float32, 4),
    "U64": (torch.uint64, 8),
    "I64": (torch.int64, 8),
    "F64": (torch.float64, 8),
}
DTYPE_NAMES: dict[torch.dtype, str] = {dtype: name for name, (dtype, _) in DTYPES.items()}

# The specification allows 100 MB, which Python's JSON turns into gigabytes; this is room for 30,000 tensors.
MAX_HEADER = 10_000_000
MAX_ELEMENTS = 1 << 40

# First bytes of files that people hand over by mistake, and what to do about each.
_FOREIGN: tuple[tuple[bytes, str], ...] = (
    (
        b"PK\x03\x04",
        "a zip archive, as torch.save writes (pickle inside); load it with "
        "torch.load(weights_only=True) and save it with save_packed",
    ),
    (b"\x80\x02", "a pickle; it is not opened because it can run code; save tensors with save_packed"),
    (b"\x80\x03", "a pickle; it is not opened because it can run code; save tensors with save_packed"),
    (b"\x80\x04", "a pickle; it is not opened because it can run code; save tensors with save_packed"),
    (b"\x80\x05", "a pickle; it is not opened because it can run code; save tensors with save_packed"),
    (b"version https://git-lfs", "a Git LFS pointer; fetch the file itself with `git lfs pull`"),
    (b"\x1f\x8b", "gzip data; unpack it first"),
    (b"GGUF", "a GGUF file; convert it to safetensors first"),
    (b"\x93NUMPY", "a NumPy file; save its array with save_packed"),
    (b"\x89HDF", "an HDF5 file; convert it to safetensors first"),
    (b"<", "a web page or XML; the download went wrong, fetch the file again"),
)


@dataclass(frozen=True)
class ArrayInfo:
    """Type, shape and byte range (counted from the end of the header) of one stored array."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Array:
    """An array to be written: its raw little-endian bytes in C order."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    raw: np.ndarray

    @property
    def crc32(self) -> int:
        return zlib.crc32(self.raw.data)


@dataclass(frozen=True)
class Container:
    """The checked header of a safetensors file. Nothing stays open; `read` opens the file again."""

    path: Path
    size: int
    data_start: int
    arrays: Mapping[str, ArrayInfo]
    metadata: Mapping[str, str]
    checksums: dict[str, int] = field(default_factory=dict)

    def read(self, key: str) -> np.ndarray:
        """The raw bytes of one array as uint8, checked against its checksum; only these bytes are read."""
        info = self.arrays[key]
        raw = np.empty(info.end - info.start, dtype=np.uint8)
        with open(self.path, "rb") as file:
            if os.fstat(file.fileno()).st_size != self.size:
                fail(self.path, "changed on disk since it was opened", "open it again")
            file.seek(self.data_start + info.start)
            got = file.readinto(raw.data) if raw.size else 0
        if got != raw.size:
            fail(self.path, f"ends within {key!r}", "fetch the file again")
        if zlib.crc32(raw.data) != self.checksums[key]:
            fail(
                self.path,
                f"the checksum of {key!r} does not match: its bytes are damaged",
                "fetch the file again",
            )
        return raw


def fail(path: Path, problem: str, remedy: str) -> NoReturn:
    """Raise the FormatError of a file."""
    raise FormatError(f"{path}: {problem}; {remedy}")


def strict_json(text: str | bytes) -> Any:
    """JSON without duplicate keys, NaN or infinity. Raises ValueError, also for nesting without end."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError("a key occurs twice")
        return result

    def no_constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is not a JSON number")

    try:
        return json.loads(text, object_pairs_hook=unique, parse_constant=no_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def check_name(name: str) -> str | None:
    """What is wrong with a tensor's name, or None. Names may end up as paths and in logs."""
    if not 0 < len(name) <= 1024:
        return "is empty or longer than 1024 characters"
    if any(ord(c) < 32 or ord(c) == 127 or 0xD800 <= ord(c) <= 0xDFFF for c in name) or "\\" in name:
        return "holds a control character, a surrogate or a backslash"
    if any(part in ("", ".", "..") for part in name.split("/")):
        return "looks like a path"
    return None


def is_count(value: object) -> bool:
    """Whether a JSON value is a non-negative integer (True and False are not)."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def read_shape(value: object) -> tuple[int, ...]:
    """A shape from JSON. Raises ValueError for anything that no tensor could have."""
    if not isinstance(value, list) or len(value) > 32 or not all(is_count(v) for v in value):
        raise ValueError("its shape is not a short list of non-negative integers")
    # Zero-sized tensors with an absurd dimension are refused too: torch cannot hold them.
    if prod(max(v, 1) for v in value) > MAX_ELEMENTS:
        raise ValueError(f"its shape {value} has more than 2**40 elements")
    return tuple(value)


def _array_info(key: str, entry: object) -> ArrayInfo:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError("its entry does not have exactly dtype, shape and data_offsets")
    dtype, offsets = entry["dtype"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"its dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(is_count(v) for v in offsets):
        raise ValueError("its data_offsets are not two non-negative integers")
    shape = read_shape(entry["shape"])
    expected = prod(shape) * DTYPES[dtype][1]
    if offsets[1] - offsets[0] != expected:
        raise ValueError(
            f"{dtype} of shape {list(shape)} takes {expected} bytes, its data_offsets span "
            f"{offsets[1] - offsets[0]}"
        )
    return ArrayInfo(dtype, shape, offsets[0], offsets[1])


def _parse_header(path: Path, header: bytes) -> tuple[dict[str, ArrayInfo], dict[str, str]]:
    try:
        entries = strict_json(header.decode("utf-8"))
        if not isinstance(entries, dict):
            raise ValueError("it is not a JSON object")
    except ValueError as error:
        fail(
            path, f"its safetensors header cannot be read ({error})", "the file is damaged or of another kind"
        )
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        fail(path, "__metadata__ does not map names to strings", "the file is damaged or of another kind")
    arrays = {}
    for key, entry in entries.items():
        try:
            if problem := check_name(key):
                raise ValueError(f"its name {problem}")
            arrays[key] = _array_info(key, entry)
        except ValueError as error:
            fail(path, f"array {key!r}: {error}", "the file is damaged")
    return arrays, metadata


def _explain_foreign(path: Path, size: int, start: bytes) -> NoReturn:
    for magic, meaning in _FOREIGN:
        if start.startswith(magic):
            raise FormatError(f"{path}: not safetensors but {meaning}")
    if size < 10:
        fail(path, f"has {size} bytes, too few for a safetensors file", "it is truncated; fetch it again")
    fail(
        path,
        f"declares a header of {int.from_bytes(start[:8], 'little')} bytes in a file of {size}",
        "it is truncated or not a safetensors file",
    )


def read_container(path: str | os.PathLike[str]) -> Container:
    """Read and check the header of a safetensors file: nothing but the header is read.

    Raises:
        FormatError: not a safetensors file, truncated, with trailing bytes, gaps or overlaps between arrays,
            duplicate keys, impossible shapes, or names that look like paths.
        OSError: the file is not there or not readable.
    """
    path = Path(path)
    if not stat.S_ISREG(path.stat().st_mode):
        fail(path, "is not a regular file", "give the path of a safetensors file")
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(32)
        header_size = int.from_bytes(start[:8], "little")
        if MAX_HEADER < header_size <= size - 8 and start[8:9] == b"{":
            fail(path, f"has a header of {header_size} bytes, more than {MAX_HEADER}", "split its tensors")
        if not 2 <= header_size <= size - 8 or start[8:9] != b"{":
            _explain_foreign(path, size, start)
        file.seek(8)
        header = file.read(header_size)
    arrays, metadata = _parse_header(path, header)
    data_start, position = 8 + header_size, 0
    for key, info in sorted(arrays.items(), key=lambda item: (item[1].start, item[1].end)):
        if info.start != position:
            fail(
                path,
                f"array {key!r} starts at byte {info.start} of the data, not at {position}",
                "a gap or an overlap: the file is damaged",
            )
        position = info.end
    if data_start + position != size:
        fail(
            path,
            f"has {size} bytes where its header describes {data_start + position}",
            "it is truncated or was appended to; fetch it again",
        )
    return Container(path, size, data_start, arrays, metadata)


def write_container(
    path: str | os.PathLike[str], arrays: Iterable[Array], metadata: Mapping[str, str]
) -> tuple[int, int]:
    """Write a safetensors file atomically. Returns its size and that of its header.

    Wide types come first, so that each array starts at a multiple of its element's size and can be mapped.
    """
    ordered = sorted(arrays, key=lambda array: -DTYPES[array.dtype][1])
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    position = 0
    for array in ordered:
        end = position + array.raw.size
        entries[array.key] = {"dtype": array.dtype, "shape": [*array.shape], "data_offsets": [position, end]}
        position = end
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    if len(header) > MAX_HEADER:
        fail(
            Path(path),
            f"the header takes {len(header)} bytes, more than the {MAX_HEADER} allowed",
            "store less metadata or fewer tensors",
        )

    def write(file: IO[bytes]) -> None:
        file.write(struct.pack("<Q", len(header)) + header)
        for array in ordered:
            file.write(array.raw.data)

    atomic_write(path, write)
    return 8 + len(header) + position, 8 + len(header)
