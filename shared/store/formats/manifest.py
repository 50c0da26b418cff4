"""The manifest of a packed file: parsed, and held against the arrays that are really there."""

from __future__ import annotations

import os
import zlib
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from ...errors import PatternError
from ...masks.patterns import Pattern, pattern_from_dict
from .coding import Index, payload_range
from .container import DTYPES, Container, check_name, fail, is_count, read_shape, strict_json

# A small file may stand for a large tensor (all of it dropped), but not for one that fills the memory of
# whoever opens it: dense tensors of at most 256 MiB, or 256 times the size of the file and at most 1 GiB more
# than it, whichever is more. ZOO_MAX_UNPACKED, in bytes, replaces that.
FREE_BYTES = 256 << 20
MAX_EXPANSION = 256
MAX_EXCESS = 1 << 30
LIMIT_VARIABLE = "ZOO_MAX_UNPACKED"

DENSE_FIELDS = {"dtype", "shape", "encoding"}
CODED_FIELDS = DENSE_FIELDS | {"kept", "index"}


@dataclass(frozen=True)
class Entry:
    """One tensor of the manifest.

    Attributes:
        encoding: `dense` (one array), `bits` (a boolean tensor, coded as a mask), `sparse` (index and kept
            values) or `same` (another name of the tensor `same_as`).
        index: description of the mask's code (`bits` and `sparse`).
        kept: number of kept entries (`bits` and `sparse`).
        pattern: pattern of the tensor's mask, None without a mask.
    """

    encoding: str
    dtype: str = ""
    shape: tuple[int, ...] = ()
    index: Index | None = None
    kept: int = 0
    pattern: Pattern | None = None
    same_as: str | None = None


@dataclass(frozen=True)
class Manifest:
    """A checked manifest: each entry's arrays exist with the types and lengths that it needs."""

    tensors: dict[str, Entry]
    extras: dict[str, Entry]
    metadata: dict[str, Any]
    raw: dict[str, Any]


def parse_manifest(container: Container, format_name: str, version: int) -> Manifest:
    """Parse the manifest of `container`, check it, and hand the container its checksums.

    Raises:
        FormatError: no manifest, another version, a damaged manifest, or one that does not fit the arrays.
    """
    raw = _read(container, format_name, version)
    sections: dict[str, dict[str, Entry]] = {}
    expected: set[str] = set()
    for section in ("tensor", "extra"):
        sections[section] = {}
        for name, value in raw[f"{section}s"].items():
            try:
                if problem := check_name(name):
                    raise ValueError(f"its name {problem}")
                entry = _entry(value, raw["tensors"] if section == "tensor" else {})
                expected |= _check_arrays(container, section, name, entry)
            except (ValueError, PatternError) as error:
                fail(
                    container.path,
                    f"{section} {name!r}: {error}",
                    "the file is damaged or was written by something else",
                )
            sections[section][name] = entry
    _check_cover(container, expected, raw["crc32"])
    _check_expansion(container, [*sections["tensor"].values(), *sections["extra"].values()])
    container.checksums.update(raw["crc32"])
    return Manifest(sections["tensor"], sections["extra"], raw["metadata"], raw)


def _read(container: Container, format_name: str, version: int) -> dict[str, Any]:
    path, stored = container.path, container.metadata
    if stored.get("format") != format_name:
        fail(
            path, f"is safetensors, but not a {format_name} file", "read it with safetensors.torch.load_file"
        )
    if stored.get("version") != str(version):
        fail(
            path,
            f"has version {stored.get('version')!r} of {format_name}; this package reads {version}",
            "install a newer version of the package",
        )
    try:
        text = stored["manifest"]
        if int(stored["manifest_crc32"], 16) != zlib.crc32(text.encode()):
            raise ValueError("its checksum does not match")
        manifest = strict_json(text)
        if not isinstance(manifest, dict) or set(manifest) != {"tensors", "extras", "metadata", "crc32"}:
            raise ValueError("it does not consist of tensors, extras, metadata and crc32")
        if not all(isinstance(part, dict) for part in manifest.values()):
            raise ValueError("tensors, extras, metadata or crc32 is not an object")
    except (KeyError, ValueError) as error:
        fail(path, f"the manifest cannot be read ({error})", "the file is damaged; fetch it again")
    return manifest


def _fields(entry: dict[str, Any], expected: set[str]) -> None:
    if set(entry) != expected:
        raise ValueError(f"its manifest entry has fields {sorted(entry)}, expected {sorted(expected)}")


def _pattern(value: object) -> Pattern:
    if not isinstance(value, dict):
        raise ValueError("its pattern is not an object")
    try:
        return pattern_from_dict(value)
    except (TypeError, KeyError) as error:
        raise ValueError(f"its pattern cannot be read ({error})") from None


def _entry(value: object, tensors: dict[str, Any]) -> Entry:
    if not isinstance(value, dict):
        raise ValueError("its manifest entry is not an object")
    encoding = value.get("encoding")
    if encoding == "same":
        _fields(value, {"encoding", "of"} | ({"pattern"} & set(value)))
        first = value["of"]
        if not isinstance(first, str) or not isinstance(tensors.get(first), dict):
            raise ValueError(f"it is said to be the same as {first!r}, which is not there")
        masked = "pattern" in value
        if tensors[first].get("encoding") == "same" or (masked and "pattern" not in tensors[first]):
            raise ValueError(f"it cannot be {first!r}, which is itself a second name or has no mask")
        return Entry("same", same_as=first, pattern=_pattern(value["pattern"]) if masked else None)
    fields = {"dense": DENSE_FIELDS, "bits": CODED_FIELDS, "sparse": CODED_FIELDS | {"pattern"}}
    if not isinstance(encoding, str) or encoding not in fields:
        raise ValueError(f"unknown encoding {encoding!r}; a newer version of this package may know it")
    _fields(value, fields[encoding])
    dtype, shape = value["dtype"], read_shape(value["shape"])
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}")
    if encoding == "dense":
        return Entry("dense", dtype, shape)
    if not is_count(value["kept"]) or not isinstance(value["index"], dict):
        raise ValueError("kept is not a count or index is not an object")
    if encoding == "bits" and dtype != "BOOL":
        raise ValueError(f"encoding bits is for BOOL, not {dtype}")
    pattern = _pattern(value["pattern"]) if encoding == "sparse" else None
    return Entry(encoding, dtype, shape, value["index"], value["kept"], pattern)


def _check_array(container: Container, key: str, dtypes: tuple[str, ...], least: int, most: int) -> None:
    info = container.arrays.get(key)
    if info is None:
        raise ValueError(f"its array {key!r} is missing")
    if info.dtype not in dtypes or len(info.shape) != 1 or not least <= info.shape[0] <= most:
        length = least if least == most else f"{least} to {most}"
        raise ValueError(
            f"its array {key!r} is {info.dtype} of shape {list(info.shape)}, expected "
            f"{' or '.join(dtypes)} with {length} entries"
        )


def _check_arrays(container: Container, section: str, name: str, entry: Entry) -> set[str]:
    """Check the arrays that an entry needs and return their keys."""
    if entry.encoding == "same":
        return set()
    if entry.index is None:
        key = f"{section}/{name}"
        info = container.arrays.get(key)
        if info is None or (info.dtype, info.shape) != (entry.dtype, entry.shape):
            raise ValueError(f"its array {key!r} is missing or of another type or shape")
        return {key}
    keys = set()
    dtypes, least, most = payload_range(entry.index, entry.shape)
    if dtypes:
        keys.add(f"{section}.index/{name}")
        _check_array(container, f"{section}.index/{name}", dtypes, least, most)
    if not 0 <= entry.kept <= prod(entry.shape):
        raise ValueError(f"it keeps {entry.kept} entries of shape {list(entry.shape)}")
    if entry.encoding == "sparse":
        keys.add(f"{section}.values/{name}")
        _check_array(container, f"{section}.values/{name}", (entry.dtype,), entry.kept, entry.kept)
    if entry.pattern is not None:
        entry.pattern.check_shape(entry.shape)
    return keys


def _check_cover(container: Container, expected: set[str], checksums: dict[str, Any]) -> None:
    """Every array belongs to an entry and has a checksum; nothing else is in the file."""
    for what, keys in (("checksums", set(checksums)), ("arrays", set(container.arrays))):
        if keys != expected:
            odd = sorted(keys ^ expected)[0]
            fail(
                container.path,
                f"the {what} do not match the manifest ({odd!r} is missing or too many)",
                "the file is damaged or was changed by another program",
            )
    if not all(is_count(value) for value in checksums.values()):
        fail(container.path, "a checksum is not a non-negative integer", "the file is damaged")


def _check_expansion(container: Container, entries: list[Entry]) -> None:
    # One byte more per entry of a coded tensor: its mask as booleans.
    total = sum(
        prod(entry.shape) * (DTYPES[entry.dtype][1] + (entry.index is not None))
        for entry in entries
        if entry.encoding != "same"
    )
    check_unpacked(container.path, total, container.size)


def check_unpacked(path: Path, total: int, size: int) -> None:
    """Refuse a file of `size` bytes that unpacks to too many.

    Raises:
        FormatError: `total` is more than is allowed without asking.
    """
    given = os.environ.get(LIMIT_VARIABLE)
    allowed = max(FREE_BYTES, min(MAX_EXPANSION * size, size + MAX_EXCESS))
    if given is not None:
        if not given.isascii() or not given.isdecimal():
            fail(path, f"{LIMIT_VARIABLE} is {given!r}, no number of bytes", "set it to one, or unset it")
        allowed = int(given)
    if total > allowed:
        fail(
            path,
            f"its {size} bytes unpack to {total}, more than the {allowed} allowed",
            f"if you trust it, set {LIMIT_VARIABLE}={total}",
        )
