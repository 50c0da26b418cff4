"""The packed file of a sparse model: tensors, masks, extras and metadata. Layout in docs/format.md."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ...errors import FormatError, MaskError, PatternError
from ...masks import Mask, MaskSet
from ...masks.patterns import Pattern
from .coding import MaskCode, decode_mask, encode_mask
from .container import (
    DTYPE_NAMES,
    DTYPES,
    Array,
    Container,
    check_name,
    fail,
    read_container,
    write_container,
)
from .manifest import Entry, Manifest, parse_manifest

FORMAT = "zoo-packed"
VERSION = 1


@dataclass(frozen=True)
class EntryReport:
    """What one tensor takes: how it is coded, its bytes in the file (header apart) and as a dense tensor."""

    encoding: str
    bytes: int
    dense_bytes: int


@dataclass(frozen=True)
class PackedReport:
    """What `save_packed` wrote. Sizes in bytes; `bytes` is the whole file, header included.

    `dense_bytes` is what `tensors` take as dense tensors. Extras are left out of it: a dense model stores no
    edge mask and no threshold, and would look larger for them.
    """

    path: Path
    bytes: int
    header_bytes: int
    dense_bytes: int
    tensors: Mapping[str, EntryReport]
    extras: Mapping[str, EntryReport]


@dataclass(frozen=True)
class PackedContents:
    """Everything in a packed file, on the CPU. Tied tensors are one tensor under several names."""

    tensors: dict[str, Tensor]
    masks: MaskSet
    extras: dict[str, Tensor]
    metadata: dict[str, Any]


# -- writing


def _raw(where: str, tensor: Tensor) -> tuple[str, np.ndarray]:
    """File dtype and bytes (uint8, C order) of a tensor."""
    if tensor.layout != torch.strided or tensor.is_meta or tensor.dtype not in DTYPE_NAMES:
        raise FormatError(
            f"{where}: {tensor.dtype}, {tensor.layout} on {tensor.device} cannot be stored; "
            f"pass a dense tensor with values, of {', '.join(DTYPES)}"
        )
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return DTYPE_NAMES[tensor.dtype], flat.view(torch.uint8).numpy()


def _words(raw: np.ndarray, dtype: str) -> np.ndarray:
    """The same bytes as one integer per element, so that no value is ever interpreted."""
    return raw.view(f"i{DTYPES[dtype][1]}")


class _Writer:
    """Collects arrays and manifest entries of one section (`tensor` or `extra`)."""

    def __init__(self, section: str, arrays: list[Array]) -> None:
        self.section = section
        self.arrays = arrays
        self.entries: dict[str, dict[str, Any]] = {}
        self.reports: dict[str, EntryReport] = {}

    def _array(self, role: str, name: str, dtype: str, shape: tuple[int, ...], raw: np.ndarray) -> None:
        self.arrays.append(Array(f"{self.section}{role}/{name}", dtype, shape, raw))

    def _index(self, name: str, code: MaskCode) -> None:
        if code.payload is not None:
            raw = np.ascontiguousarray(code.payload).view(np.uint8)
            self._array(".index", name, code.dtype, (code.payload.size,), raw)

    def _report(self, name: str, encoding: str, tensor: Tensor, before: int) -> None:
        stored = sum(array.raw.size for array in self.arrays[before:])
        self.reports[name] = EntryReport(encoding, stored, tensor.numel() * tensor.element_size())

    def add(self, name: str, tensor: Tensor, mask: Mask | None) -> None:
        """Store one tensor: coded by its mask, as bits where it is boolean, else plainly."""
        where, before = f"{self.section} {name!r}", len(self.arrays)
        if problem := check_name(name):
            raise FormatError(f"{where}: the name {problem}; give it another")
        dtype, raw = _raw(where, tensor)
        shape = tuple(tensor.shape)
        entry: dict[str, Any] = {"dtype": dtype, "shape": list(shape)}
        if mask is not None:
            keep = mask.keep.detach().cpu().contiguous().numpy()
            code = encode_mask(keep, mask.pattern)
            values = _kept_values(where, tensor, keep, _words(raw, dtype))
            self._index(name, code)
            self._array(".values", name, dtype, (values.size,), values.view(np.uint8))
            entry |= {
                "encoding": "sparse",
                "kept": values.size,
                "index": code.index,
                "pattern": mask.pattern.to_dict(),
            }
        elif dtype == "BOOL":
            keep = raw.view(np.bool_).reshape(shape)
            code = encode_mask(keep)
            self._index(name, code)
            entry |= {"encoding": "bits", "kept": int(np.count_nonzero(keep)), "index": code.index}
        else:
            self._array("", name, dtype, shape, raw)
            entry["encoding"] = "dense"
        self.entries[name] = entry
        coding = f"{entry['encoding']}/{entry['index']['code']}" if "index" in entry else "dense"
        self._report(name, coding, tensor, before)

    def tie(self, name: str, tensor: Tensor, first: str, mask: Mask | None) -> None:
        """Let `name` stand for the tensor stored as `first`."""
        entry: dict[str, Any] = {"encoding": "same", "of": first}
        if mask is not None:
            entry["pattern"] = mask.pattern.to_dict()
        self.entries[name] = entry
        self._report(name, "same", tensor, len(self.arrays))


def _kept_values(where: str, tensor: Tensor, keep: np.ndarray, words: np.ndarray) -> np.ndarray:
    flat = keep.reshape(-1)
    # Zero by value: masking a negative weight by multiplication leaves -0.0, which is as good a zero as any.
    dropped = torch.from_numpy(~flat) & (tensor.detach().cpu().reshape(-1) != 0)
    if bool(dropped.any()):
        raise MaskError(
            f"{where}: {int(dropped.sum())} of the entries that its mask drops are not zero and "
            "would be lost; apply the mask first (MaskSet.apply_) or save without it"
        )
    return words[flat]


def _storage(tensor: Tensor) -> tuple[Any, ...] | None:
    """Equal for two names of one tensor, also when a mapping makes tensors by need and lets go of them: as
    long as the reference is held, no other storage takes the place of one that is gone."""
    if tensor.layout != torch.strided or tensor.is_meta or not tensor.numel():
        return None
    storage = StorageWeakRef(tensor.untyped_storage())
    return storage, tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def _same_mask(a: Mask | None, b: Mask | None) -> bool:
    """Whether a tensor masked by `a` may serve a second name masked by `b` (which may leave it unsaid)."""
    return b is None or (a is not None and a.pattern == b.pattern and a.equal(b))


def _check_masks(tensors: Mapping[str, Tensor], masks: Mapping[str, Mask]) -> None:
    for name, mask in masks.items():
        if name not in tensors:
            raise MaskError(
                f"a mask is given for {name!r}, which is not among the {len(tensors)} tensors; "
                "store it as an extra or leave it out"
            )
        if mask.keep.shape != tensors[name].shape:
            raise MaskError(
                f"the mask of {name!r} has shape {list(mask.keep.shape)}, its tensor "
                f"{list(tensors[name].shape)}; build the mask for this tensor"
            )


def save_packed(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    masks: Mapping[str, Mask | Tensor] | None = None,
    extras: Mapping[str, Tensor] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> PackedReport:
    """Write tensors, their masks, extras and metadata to one packed safetensors file, atomically.

    Entries that a mask keeps are stored bit for bit, also where they are zero or NaN; entries that it drops
    are not stored and come back as +0. Two names of one tensor are stored once. The same content gives the
    same bytes.

    Args:
        path: the file to write; an old one is replaced only when the new one is complete.
        tensors: name -> tensor of any float, integer or boolean type.
        masks: name -> mask (or boolean tensor), for some of `tensors`.
        extras: name -> tensor that belongs to the model but not to its state (edge masks, thresholds).
        metadata: anything that JSON can hold.

    Raises:
        MaskError: a mask without its tensor, of another shape, or with non-zero values under its zeros.
        FormatError: a tensor type, a name or metadata that cannot be stored.
        OSError: the folder is not writable or the disk is full; the old file is intact.
    """
    given, extras = dict(MaskSet(masks or {}).items()), extras or {}
    _check_masks(tensors, given)
    arrays: list[Array] = []
    body, rest = _Writer("tensor", arrays), _Writer("extra", arrays)
    stored: dict[tuple[Any, ...], str] = {}
    for name, tensor in tensors.items():
        key = _storage(tensor)
        first = stored.get(key) if key is not None else None
        if first is not None and not check_name(name) and _same_mask(given.get(first), given.get(name)):
            body.tie(name, tensor, first, given.get(name))
        else:
            body.add(name, tensor, given.get(name))
            if key is not None:
                stored[key] = name
    for name, tensor in extras.items():
        rest.add(name, tensor, None)
    manifest = _manifest_text(path, body.entries, rest.entries, dict(metadata or {}), arrays)
    written, header = write_container(
        path,
        arrays,
        {
            "format": FORMAT,
            "version": str(VERSION),
            "manifest": manifest,
            "manifest_crc32": f"{zlib.crc32(manifest.encode()):08x}",
        },
    )
    dense = sum(report.dense_bytes for report in body.reports.values() if report.encoding != "same")
    return PackedReport(Path(path), written, header, dense, body.reports, rest.reports)


def _manifest_text(
    path: str | os.PathLike[str],
    tensors: dict[str, Any],
    extras: dict[str, Any],
    metadata: dict[str, Any],
    arrays: list[Array],
) -> str:
    sections = {
        "tensors": tensors,
        "extras": extras,
        "metadata": metadata,
        "crc32": {array.key: array.crc32 for array in arrays},
    }
    try:
        text = json.dumps(sections, separators=(",", ":"), allow_nan=False)
        if json.loads(text)["metadata"] != metadata:
            raise ValueError("it changes when written (keys must be strings, sequences must be lists)")
    except (TypeError, ValueError, RecursionError) as error:
        raise FormatError(
            f"{path}: the metadata cannot be stored as JSON: {error}; pass plain strings, "
            "numbers, lists and dictionaries"
        ) from None
    return text


# -- reading


class PackedFile:
    """A packed file whose header has been checked; tensors are read one by one when asked for.

    Each access reads the bytes of that tensor alone and checks them against their checksums. No file stays
    open.
    """

    def __init__(self, container: Container, manifest: Manifest) -> None:
        self._container = container
        self._manifest = manifest
        self.path = container.path
        self.bytes = container.size
        self.metadata = manifest.metadata

    @property
    def manifest(self) -> dict[str, Any]:
        """The manifest as stored: `tensors`, `extras`, `metadata` and `crc32`."""
        return self._manifest.raw

    def keys(self) -> list[str]:
        """Names of the tensors, in stored order."""
        return list(self._manifest.tensors)

    def masked(self) -> list[str]:
        """Names of the tensors that have a mask."""
        return [name for name, entry in self._manifest.tensors.items() if entry.pattern is not None]

    def extras(self) -> list[str]:
        """Names of the extras, in stored order."""
        return list(self._manifest.extras)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, known without reading it."""
        return self._source(name)[1].shape

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor, known without reading it."""
        return DTYPES[self._source(name)[1].dtype][0]

    def tensor(self, name: str) -> Tensor:
        """One tensor, dense, on the CPU. Raises FormatError if it is not there or its bytes are damaged."""
        return self._dense("tensor", *self._source(name))

    def mask(self, name: str) -> Mask | None:
        """The mask of one tensor, or None where it has none; the values are not read."""
        pattern = self._entry(name).pattern
        if pattern is None:
            return None
        source, entry = self._source(name)
        return self._checked_mask(name, self._keep("tensor", source, entry), pattern)

    def extra(self, name: str) -> Tensor:
        """One extra tensor. Raises FormatError if there is none of that name or its bytes are damaged."""
        if name not in self._manifest.extras:
            raise FormatError(f"{self.path}: no extra {name!r}; it has {self.extras()}")
        return self._dense("extra", name, self._manifest.extras[name])

    def read_all(self) -> PackedContents:
        """Every tensor, mask and extra."""
        tensors: dict[str, Tensor] = {}
        masks: dict[str, Mask] = {}
        keeps: dict[str, np.ndarray | None] = {}
        for name in self.keys():
            source, entry = self._source(name)
            if source == name:
                keeps[name] = self._keep("tensor", name, entry) if entry.index is not None else None
                tensors[name] = self._dense("tensor", name, entry, keeps[name])
            else:
                tensors[name] = tensors[source]
            pattern, keep = self._entry(name).pattern, keeps[source]
            if pattern is not None and keep is not None:
                masks[name] = (
                    masks[source]
                    if source in masks and source != name
                    else self._checked_mask(name, keep, pattern)
                )
        extras = {name: self.extra(name) for name in self.extras()}
        return PackedContents(tensors, MaskSet(masks), extras, self.metadata)

    # Entries were checked against the container when the file was opened, so that what is left to go wrong
    # below is the content of the arrays.

    def _entry(self, name: str) -> Entry:
        if name not in self._manifest.tensors:
            fail(self.path, f"no tensor {name!r} among its {len(self.keys())}", "keys() lists them")
        return self._manifest.tensors[name]

    def _source(self, name: str) -> tuple[str, Entry]:
        """The name and entry under which a tensor is stored: another one's where tensors are tied."""
        entry = self._entry(name)
        source = name if entry.same_as is None else entry.same_as
        return source, self._manifest.tensors[source]

    def _keep(self, section: str, name: str, entry: Entry) -> np.ndarray:
        assert entry.index is not None
        key = f"{section}.index/{name}"
        try:
            info = self._container.arrays.get(key)
            payload = None if info is None else self._container.read(key).view(f"u{DTYPES[info.dtype][1]}")
            keep = decode_mask(entry.index, payload, entry.shape)
            kept = int(np.count_nonzero(keep))
            if kept != entry.kept:
                raise ValueError(f"its index keeps {kept} entries, {entry.kept} values are stored")
        except FormatError:
            raise
        except ValueError as error:
            raise FormatError(f"{self.path}: {section} {name!r}: {error}; the file is damaged") from None
        return keep

    def _checked_mask(self, name: str, keep: np.ndarray, pattern: Pattern) -> Mask:
        try:
            return Mask(torch.from_numpy(keep), pattern)
        except PatternError as error:
            fail(
                self.path,
                f"the mask of {name!r} breaks its declared pattern ({error})",
                "the file is damaged",
            )

    def _dense(self, section: str, name: str, entry: Entry, keep: np.ndarray | None = None) -> Tensor:
        if entry.encoding == "dense":
            return _tensor(self._read(f"{section}/{name}", entry.dtype), entry)
        keep = self._keep(section, name, entry) if keep is None else keep
        if entry.encoding == "bits":
            return torch.from_numpy(keep)
        values = _words(self._read(f"{section}.values/{name}", entry.dtype), entry.dtype)
        words = np.zeros(keep.size, dtype=values.dtype)
        words[keep.reshape(-1)] = values
        return _tensor(words, entry)

    def _read(self, key: str, dtype: str) -> np.ndarray:
        raw = self._container.read(key)
        if dtype == "BOOL" and raw.size and raw.max() > 1:
            raise FormatError(f"{self.path}: {key!r} holds booleans other than 0 and 1; the file is damaged")
        return raw


def _tensor(array: np.ndarray, entry: Entry) -> Tensor:
    dtype = DTYPES[entry.dtype][0]
    if not array.size:  # NumPy gives empty arrays strides that torch cannot view
        return torch.empty(entry.shape, dtype=dtype)
    return torch.from_numpy(array).view(dtype).reshape(entry.shape)


def open_packed(path: str | os.PathLike[str]) -> PackedFile:
    """Open a packed file: its header and manifest are read and checked whole, its tensors are not read yet.

    Raises:
        FormatError: truncated, damaged, of another kind or of an unknown version.
        OSError: the file is not there or not readable.
    """
    container = read_container(path)
    return PackedFile(container, parse_manifest(container, FORMAT, VERSION))


def load_packed(path: str | os.PathLike[str]) -> PackedContents:
    """Read a whole packed file. Raises as `open_packed`, and FormatError where any byte is damaged."""
    return open_packed(path).read_all()
