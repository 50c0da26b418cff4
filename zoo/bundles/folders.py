"""Folders written whole or not at all."""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from zoo.bundles.card import CARD_FILE
from zoo.errors import BundleError, ConfigError, UnwritableBundleError
from zoo.shared.store.io import require_writable


def publish_folder(folder: Path, write: Callable[[Path], object], overwrite: bool = False) -> Path:
    """Fill a bundle's folder by `write(temporary folder)` and put it in place with one rename.

    The temporary folder lies beside `folder` under a name that starts with a dot, and its files are
    flushed to the disk before the rename. An old bundle changes places with the new one in one step where
    the system can do that (Linux), and is moved aside and deleted last elsewhere.

    Raises:
        BundleError: the folder exists and may not be replaced, or holds files that are no bundle's.
        UnwritableBundleError: it cannot be written. What `write` raises is passed on. In each case the old
            folder is intact.
    """
    folder = Path(os.path.abspath(folder))
    refuse_folder(folder, overwrite)
    return put_folder(folder, write)


def refuse_taken(source: Path, out: Path, holds: str, overwrite: bool) -> None:
    """Refuse an output folder of a model of another library, before any work is done for it.

    Args:
        source: the folder that is read.
        out: the folder that is to be written.
        holds: file that every folder of such a model has; one without it is somebody's other files.
        overwrite: whether a model's folder that is there may be replaced.

    Raises:
        ConfigError: it is the source, is there already, or is no folder of such a model.
    """
    if out.resolve() == source.resolve():
        raise ConfigError(f"{out} is the source itself; give another --out")
    if not os.path.lexists(out):
        return
    if not overwrite:
        raise ConfigError(f"{out} is there already; give another --out, or --overwrite")
    if out.is_symlink() or not (out / holds).is_file():
        raise ConfigError(f"{out} holds no {holds}: it is not replaced, not even by --overwrite")


def put_folder(folder: Path, write: Callable[[Path], object]) -> Path:
    """Fill a folder as `publish_folder` does, in the place of whatever is there: see `refuse_taken`.

    Raises:
        UnwritableBundleError: it cannot be written; the old folder is intact.
    """
    folder = Path(os.path.abspath(folder))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".tmp"))
    except OSError as error:
        raise _unwritable(folder, error) from error
    try:
        write(temporary)
        _flush(temporary)
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)  # mkdtemp made it private
        _swap(temporary, folder)
    except OSError as error:
        raise _unwritable(folder, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def refuse_place(folder: Path) -> None:
    """Refuse a folder that cannot come to be.

    Raises:
        BundleError: a file is where a folder above it should be.
        StorageError: the folder above it cannot be written, or its disk is full.
    """
    above = next((path for path in folder.absolute().parents if path.exists()), None)
    if above is not None and not above.is_dir():
        raise BundleError(f"{folder} cannot be written: {above} is a file, no folder. Choose another place.")
    if above is not None:
        require_writable(above, "free some space, or choose another folder")


def refuse_folder(folder: Path, overwrite: bool) -> None:
    """Refuse a folder for a bundle, before any work is done for it.

    Raises:
        BundleError: it has files that are no bundle's, or a bundle that may not be replaced.
    """
    refuse_place(folder)
    if not os.path.lexists(folder):
        return
    if not folder.is_dir() or folder.is_symlink():
        raise BundleError(f"{folder}: exists and is not a folder. Choose another one.")
    names = sorted(path.name for path in folder.iterdir())
    foreign = [n for n in names if n != CARD_FILE and not n.endswith(".safetensors")]
    if foreign:
        raise BundleError(f"{folder}: holds {foreign[0]!r}, no part of a bundle. Choose another folder.")
    if names and not overwrite:
        raise BundleError(
            f"{folder}: holds a bundle already. Pass overwrite=True, in the shell --overwrite, or choose "
            "another folder."
        )


def _flush(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _swap(temporary: Path, folder: Path) -> None:
    """Rename `temporary` to `folder`; a folder in the way is kept aside until that has worked."""
    if not folder.exists():
        temporary.rename(folder)
        return
    if _exchange(temporary, folder):
        return
    aside = temporary.with_suffix(".old")  # as unique as the temporary folder
    folder.rename(aside)
    try:
        temporary.rename(folder)
    except BaseException:
        aside.rename(folder)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Let two folders change places in one step; False where the system or the file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return renameat2 is not None and not renameat2(here, bytes(first), here, bytes(second), exchange)


def _unwritable(folder: Path, error: OSError) -> UnwritableBundleError:
    return UnwritableBundleError(
        f"{folder}: cannot be written: {error.strerror or error}. What was there before is intact; "
        "free the disk or choose another folder."
    )
