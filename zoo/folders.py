"""Folders written whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from zoo.cards import CARD_FILE
from zoo.errors import BundleError


def publish_folder(folder: Path, write: Callable[[Path], object], overwrite: bool = False) -> Path:
    """Fill a bundle's folder by `write(temporary folder)` and put it in place with one rename.

    The temporary folder lies beside `folder` under a name that starts with a dot, and its files are
    flushed to the disk before the rename. An old bundle is moved aside, not deleted, until the new one
    is in its place; it comes back if that fails.

    Raises:
        BundleError: the folder exists and may not be replaced, holds files that are no bundle's, or
            cannot be written. What `write` raises is passed on. In each case the old folder is intact.
    """
    folder = Path(os.path.abspath(folder))
    _refuse(folder, overwrite)
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


def _refuse(folder: Path, overwrite: bool) -> None:
    if not os.path.lexists(folder):
        return
    if not folder.is_dir() or folder.is_symlink():
        raise BundleError(f"{folder}: exists and is not a folder. Choose another one.")
    names = sorted(path.name for path in folder.iterdir())
    foreign = [n for n in names if n != CARD_FILE and not n.endswith(".safetensors")]
    if foreign:
        raise BundleError(f"{folder}: holds {foreign[0]!r}, no part of a bundle. Choose another folder.")
    if names and not overwrite:
        raise BundleError(f"{folder}: holds a bundle already. Pass overwrite=True or choose another folder.")


def _flush(folder: Path) -> None:
    for path in [*folder.iterdir(), folder]:
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
    aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".old"))
    folder.rename(aside)  # replaces the empty folder that mkdtemp made
    try:
        temporary.rename(folder)
    except BaseException:
        aside.rename(folder)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _unwritable(folder: Path, error: OSError) -> BundleError:
    return BundleError(
        f"{folder}: cannot be written: {error.strerror or error}. What was there before is intact; "
        "free the disk or choose another folder."
    )
