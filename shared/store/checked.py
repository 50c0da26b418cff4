"""Tensors and facts in one safetensors file that proves itself when it is read.

The file carries a CRC-32 of every tensor, the identity of what it belongs to, and a seal over all that
describes the tensors. A flipped bit anywhere, a missing tensor, a truncated file and the file of another run
are named and refused; nothing of such a file is given out. Checkpoints, cells and records are such files.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..errors import FormatError, IdentityError, StorageError
from .formats.container import DTYPE_NAMES, DTYPES, Array, Container, read_container, write_container
from .io import unwritable

_KEYS = {"checksums", "facts", "identity", "seal"}


def identity_of(facts: Mapping[str, Any]) -> str:
    """SHA-256 over plain values in a canonical order: what a stored state must agree with to be used."""
    return hashlib.sha256(json.dumps(dict(facts), sort_keys=True, default=str).encode()).hexdigest()


def write_checked(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    facts: Mapping[str, Any] | None = None,
    *,
    identity: str = "",
) -> Path:
    """Write tensors by name, and facts that JSON can hold, atomically.

    Args:
        path: the file; its folder is made if it is missing.
        tensors: on any device; scalars and empty tensors too.
        facts: numbers, strings, lists and dictionaries of them; NaN and infinity are refused.
        identity: of the run or the cell that may read it again, see `identity_of`.

    Raises:
        FormatError: a tensor whose type or name safetensors cannot hold, or facts that are no JSON.
        StorageError: the disk is full, or the folder cannot be written.
    """
    path = Path(path)
    arrays = [_array(path, name, tensor) for name, tensor in tensors.items()]
    try:
        told = json.dumps(dict(facts or {}), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise FormatError(f"{path}: the facts are no JSON ({error}); give plain, finite values") from error
    metadata = {
        "checksums": json.dumps({array.key: array.crc32 for array in arrays}),
        "facts": told,
        "identity": identity,
    }
    shapes = {array.key: (array.dtype, array.shape) for array in arrays}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_container(path, arrays, {**metadata, "seal": _seal(metadata, shapes)})
    except OSError as error:
        raise error if isinstance(error, StorageError) else unwritable(path, error) from error
    return path


def read_checked(
    path: str | os.PathLike[str], *, identity: str = ""
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and facts of a file that `write_checked` wrote, every byte of it verified.

    Raises:
        IdentityError: it belongs to another run.
        FormatError: it is truncated, damaged, lacks a tensor, or is of another kind.
        OSError: it is not there or not readable.
    """
    container = read_container(path)
    metadata = container.metadata
    if set(metadata) != _KEYS:
        _damaged(container, f"its metadata are {sorted(metadata)}, not {sorted(_KEYS)}")
    shapes = {key: (info.dtype, info.shape) for key, info in container.arrays.items()}
    try:
        checksums, facts = json.loads(metadata["checksums"]), json.loads(metadata["facts"])
    except ValueError:
        _damaged(container, "its metadata cannot be read")
    if isinstance(checksums, dict) and (missing := sorted(set(checksums) - set(shapes))):
        _damaged(container, f"the tensor {missing[0]!r} is missing")
    if metadata["seal"] != _seal(metadata, shapes) or set(checksums) != set(shapes):
        _damaged(container, "its seal does not match its header")
    if metadata["identity"] != identity:
        raise IdentityError(
            f"{path} belongs to another run: its options, data or model differ from these. Delete it to "
            "start anew, or give the options it was written with"
        )
    container.checksums.update(checksums)
    return {key: _tensor(container, key) for key in container.arrays}, facts


def _seal(metadata: Mapping[str, str], shapes: Mapping[str, tuple[str, tuple[int, ...]]]) -> str:
    described = [{k: metadata[k] for k in sorted(_KEYS - {"seal"})}, sorted(shapes.items())]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()


def _array(path: Path, name: str, tensor: Tensor) -> Array:
    if tensor.dtype not in DTYPE_NAMES or tensor.layout != torch.strided:
        raise FormatError(
            f"{path}: tensor {name!r} is {tensor.dtype}, {tensor.layout}, which safetensors cannot hold; "
            "convert it first"
        )
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return Array(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), flat.view(torch.uint8).numpy())


def _tensor(container: Container, key: str) -> Tensor:
    info = container.arrays[key]
    raw = container.read(key)
    if not raw.size:
        return torch.empty(info.shape, dtype=DTYPES[info.dtype][0])
    return torch.from_numpy(raw).view(DTYPES[info.dtype][0]).reshape(info.shape)


def _damaged(container: Container, problem: str) -> NoReturn:
    raise FormatError(f"{container.path}: {problem}: the file is damaged; delete it to start anew")
