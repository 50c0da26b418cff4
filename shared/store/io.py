"""Files written whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from ..errors import StorageError


def atomic_write(path: str | os.PathLike[str], content: bytes | Callable[[IO[bytes]], object]) -> Path:
    """Write `content` (bytes, or a function that writes to a binary file) to `path` atomically.

    The bytes go to a temporary file in the same folder, are flushed to the disk and renamed over `path`.
    After a full disk, a kill or an error in the writer the old file is intact and the temporary one is gone
    (after a kill it may remain, under a name that starts with a dot).

    Raises:
        StorageError: the folder is missing or not writable, or the disk is full; it is an OSError, too.
    """
    path = Path(path)
    try:
        return _write(path, content)
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise unwritable(path, error) from error


def unwritable(path: Path, error: OSError) -> StorageError:
    """The error of a file or folder that cannot be written, with the number of the system's own."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    remedy = "free some space, or choose a folder on another disk" if full else "choose another folder"
    found = StorageError(
        f"{path}: cannot be written: {error.strerror or error}. What was there before is intact; {remedy}."
    )
    found.errno, found.strerror = error.errno, error.strerror
    return found


def require_writable(folder: str | os.PathLike[str], remedy: str) -> None:
    """Make a folder and try to write in it, before work is done whose result is to lie there.

    Raises:
        StorageError: it cannot be written; the message ends with the remedy.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))
    except OSError as error:
        raise StorageError(f"{folder}: cannot be written: {error.strerror or error}; {remedy}.") from error


def _write(path: Path, content: bytes | Callable[[IO[bytes]], object]) -> Path:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp made it private; the target follows the user's umask
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def sha256_file(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file in hexadecimal, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def write_json(path: str | os.PathLike[str], value: Any) -> Path:
    """Write `value` as JSON in one line, atomically; indented, large results would be a quarter larger.

    NaN and infinity are refused, since JSON has neither.
    """
    return atomic_write(path, (json.dumps(value, separators=(",", ":"), allow_nan=False) + "\n").encode())


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file."""
    with open(path, encoding="utf-8") as file:
        return json.load(file)
