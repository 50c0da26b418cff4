"""Which repository of a hub a bare name of the cache belongs to: the one that brought it first.

A card states its own name and version, so that any repository can claim any name. The claim is good under the
repository's own address (`hf://owner/name`); the bare name stays with the first repository until the user
gives it to another:

    $ZOO_CACHE/hub/names/<domain>--<slug>        owner/name
"""

from __future__ import annotations

from pathlib import Path

from zoo.shared.store.io import atomic_write


def repository_of(folder: Path, cache: Path) -> str | None:
    """The repository from which a folder of the cache came; None for other folders."""
    try:
        first, kind, *_ = folder.relative_to(cache / "hub").parts
    except ValueError:
        return None
    owner, dashes, name = first.partition("--")
    return f"{owner}/{name}" if dashes and kind == "snapshots" else None


def bound_to(name: str, cache: Path) -> str | None:
    """The repository to which a name is bound, if it is."""
    try:
        return _file(name, cache).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None


def bind(name: str, repository: str, cache: Path) -> None:
    """Give a bare name to a repository."""
    file = _file(name, cache)
    file.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(file, repository.encode())


def may_use(name: str, folder: Path, cache: Path) -> bool:
    """Whether the bundle in a folder may be found by its bare name."""
    repository, bound = repository_of(folder, cache), bound_to(name, cache)
    return repository is None or bound is None or repository == bound


def _file(name: str, cache: Path) -> Path:
    return cache / "hub" / "names" / name.replace("/", "--")
