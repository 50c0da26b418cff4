"""Folders of other libraries' models on a hub: what `zoo sparsify hf://owner/name` starts from.

Only safetensors and the texts beside them are fetched, one file after the other into

    $ZOO_CACHE/hub/<owner>--<name>/models/<commit>/

Files that arrived stay, so that a download that broke goes on where it was; a file `.complete` says that all
are there. Pickled weights are never fetched.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from urllib.parse import quote

from zoo.bundles.card import CARD_FILE
from zoo.bundles.hub import (
    HubReference,
    Unreachable,
    download_file,
    is_offline,
    listing_of,
    locked,
    parse_reference,
)
from zoo.errors import HubError
from zoo.shared.store.io import atomic_write

WANTED = (".safetensors", ".json", ".txt", ".model", ".jinja")
COMPLETE, REF = ".complete", "model-refs"


def fetch_folder(
    text: str,
    offline: bool | None = None,
    progress: Callable[..., None] | None = None,
    expected_bytes: int | None = None,
) -> Path | None:
    """The folder of the model in a repository; None if that holds a bundle of the zoo.

    Args:
        text: `hf://owner/name` or `hf://owner/name@revision`.
        offline: whether the hub may not be asked; None leaves it to `ZOO_OFFLINE` and `HF_HUB_OFFLINE`.
        progress: called as (done, all files, name).
        expected_bytes: of all files together, where they are known before they are fetched.

    Raises:
        HubError: no such repository, no safetensors in it, a name that leaves the folder, a disk that is too
            small, a download that broke, or offline without a copy.
    """
    reference = parse_reference(text)
    seen = reference.folder / REF / quote(reference.revision, safe="")
    if is_offline(offline) or (reference.folder / "models" / reference.revision / COMPLETE).is_file():
        return _known(reference, seen)  # a commit does not change
    try:
        listing = listing_of(reference)
    except Unreachable as error:
        if (folder := _known(reference, seen)) is not None:
            return folder
        raise HubError(f"{reference}: {error}. Check the connection and HF_ENDPOINT.") from error
    if CARD_FILE in listing.sizes:
        return None
    sizes = {name: size for name, size in listing.sizes.items() if PurePosixPath(name).suffix in WANTED}
    _check(reference, sizes, list(listing.sizes))
    if expected_bytes is not None and (offered := sum(sizes.values())) != expected_bytes:
        raise HubError(
            f"{reference} has files of {offered:,} bytes, expected {expected_bytes:,}; not fetched"
        )
    folder = reference.folder / "models" / listing.commit
    if not (folder / COMPLETE).is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with locked(reference):
            missing = sum(size for name, size in sizes.items() if not (folder / name).is_file())
            if missing > (free := shutil.disk_usage(folder).free):
                raise HubError(f"{reference} wants {missing:,} bytes more, and {folder} has {free:,} free")
            pinned = HubReference(reference.repository, listing.commit)
            for done, name in enumerate(sorted(sizes)):
                if progress is not None:
                    progress(done, len(sizes), name)
                download_file(pinned, name, folder)
            atomic_write(folder / COMPLETE, b"")
    seen.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(seen, listing.commit.encode())
    return folder


def _known(reference: HubReference, seen: Path) -> Path | None:
    """The folder of the commit last seen, if all of it is here; None leaves the word to the bundles."""
    commit = seen.read_text(encoding="ascii").strip() if seen.is_file() else reference.revision
    folder = reference.folder / "models" / commit
    return folder if (folder / COMPLETE).is_file() else None


def _check(reference: HubReference, sizes: dict[str, int], offered: list[str]) -> None:
    for name in sizes:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name or path.parts[0].startswith("."):
            raise HubError(f"{reference} lists {name!r}, a name outside of its folder; nothing was fetched")
    if not any(name.endswith(".safetensors") for name in sizes):
        others = ", ".join(sorted(offered)[:3]) or "nothing"
        raise HubError(
            f"{reference} has no safetensors (it has {others}). Pickled weights are not loaded: convert them "
            "with the library that made them, and give the folder"
        )
