"""Where bundles are found, by path or by name. Reads cards only: listing imports neither torch nor a domain.

A name is looked for, in this order, as a path, in what ships with the package (`zoo/<domain>/cards/<slug>/`),
in the folders of `ZOO_PATH`, in the local cache, and, as `hf://owner/name@revision`, on the hub. The first
place that has the name decides; within it the newest version wins, unless `name@1.2.0` pins one. A name that
nothing has is looked for among those that bundles had before (`formerly` on their cards).
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path

from zoo.bundles.bindings import may_use, repository_of
from zoo.bundles.card import CARD_FILE, Card, level_label, read_card
from zoo.errors import BundleError, CardError, ConfigError, UnknownNameError
from zoo.names import (
    DOMAINS,
    is_glob,
    is_model_name,
    natural_key,
    near_misses,
    split_version,
    suggestion,
    version_key,
)
from zoo.shared.store.io import sha256_file

HUB_PREFIX = "hf://"
BASE_FOLDER = "base"  # a bundle fetched from a hub keeps its base in this folder
TWIN_FOLDER = "twin"  # and its dense twin in this one
_LIBRARIES_FILES = ("config.json", "model_index.json")  # of transformers, timm and diffusers
_LEVEL = re.compile(r"(.+)#(0?\.\d{1,6}|0)")
_log = logging.getLogger("zoo")


@dataclass(frozen=True)
class Bundle:
    """A model at rest: its card and the folder that holds it."""

    card: Card
    folder: Path
    level: int | None = None  # of a nested model, whose card is then that of the level alone

    def at(self, sparsity: float) -> Bundle:
        """One level of a nested model; of another one it is the only level.

        Raises:
            UnknownNameError: it has no level of that sparsity.
        """
        return self.at_level(self.card.level_at(sparsity))

    def at_level(self, number: int) -> Bundle:
        """A level by its number, 0 for the least sparse one."""
        return Bundle(self.card.at(number), self.folder, number) if self.card.levels else self

    @property
    def label(self) -> str:
        """The name, with `#sparsity` of a further level."""
        return self.card.name + self._suffix()

    @property
    def reference(self) -> str:
        """`name@version`, with `#sparsity` of a further level."""
        return self.card.reference + self._suffix()

    def _suffix(self) -> str:
        return f"#{level_label(self.card.sparsity.overall)}" if self.level else ""

    @property
    def weights(self) -> Path:
        """Path of the weights file. The card's schema allows a bare file name only."""
        return self.folder / self.card.weights.file

    def check(self) -> None:
        """Compare the weights file with the size and the hash on the card.

        Raises:
            BundleError: it is missing, no regular file, or not the one that the card describes.
        """
        stated, remedy = self.card.weights, f"Fetch or save {self.card.name} again."
        try:
            found = self.weights.stat()
            if not stat.S_ISREG(found.st_mode):
                raise BundleError(f"{self.weights}: not a regular file. {remedy}")
            if found.st_size != stated.bytes:
                raise BundleError(
                    f"{self.weights}: {found.st_size} bytes, but its card says {stated.bytes}; it is "
                    f"truncated or another model's. {remedy}"
                )
            digest = sha256_file(self.weights)
        except OSError as error:
            problem = error.strerror or error
            raise BundleError(f"{self.weights}: cannot be read: {problem}. {remedy}") from error
        if digest != stated.sha256:
            raise BundleError(
                f"{self.weights}: sha256 {digest[:12]}..., but its card says {stated.sha256[:12]}...; it is "
                f"damaged or another model's. {remedy}"
            )


def open_bundle(folder: str | os.PathLike[str]) -> Bundle:
    """The bundle in `folder`, its card validated, its weights not yet looked at.

    Raises:
        BundleError: there is no card.
        CardError: the card breaks the schema.
    """
    path = Path(folder)
    try:
        found = (path / CARD_FILE).stat()
    except OSError as error:
        raise BundleError(f"{path}: no bundle here ({CARD_FILE}: {error.strerror or error}).") from error
    return Bundle(_read_cached(path / CARD_FILE, found.st_mtime_ns, found.st_size, found.st_ino), path)


@lru_cache(maxsize=4096)
def _read_cached(path: Path, changed: int, size: int, inode: int) -> Card:
    """The card, read once as long as its file is the same."""
    return read_card(path)


CACHE_REMEDY = "Set ZOO_CACHE to a folder that can be written"


def cache_folder() -> Path:
    """`$ZOO_CACHE`, or `~/.cache/sparse-model-zoo`."""
    chosen = os.environ.get("ZOO_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "sparse-model-zoo"


def find(name: str | os.PathLike[str], version: str | None = None, offline: bool | None = None) -> Bundle:
    """The bundle that a path, a name, `name@version` or `hf://owner/name@revision` stands for; with `#0.9` at
    the end the level of a nested model that has this sparsity.

    Args:
        name: what to look for.
        version: the version wanted, the same as a pin in the name.
        offline: whether the hub may not be asked; None leaves it to `ZOO_OFFLINE` and `HF_HUB_OFFLINE`.

    Raises:
        UnknownNameError: no place has it; the message has near misses or the versions there are.
        CardError, BundleError: it is there and broken.
        HubError: it cannot be fetched.
    """
    text = os.fspath(name)
    if not text:
        raise UnknownNameError("A model has no empty name. `zoo list` shows the names.")
    if (found := _LEVEL.fullmatch(text)) and not _is_there(Path(text)):
        return find(found[1], version, offline).at(float(found[2]))
    if text.startswith(HUB_PREFIX):
        from zoo.bundles.hub import fetch

        return _require_version(fetch(text, offline=offline), version)
    path = Path(text).expanduser()
    if _is_there(path / CARD_FILE):
        return _require_version(open_bundle(path), version)
    if path.name == CARD_FILE and _is_there(path):
        return _require_version(open_bundle(path.parent), version)
    if isinstance(name, os.PathLike) or path.is_absolute() or text.startswith(("./", "../", "~")):
        raise BundleError(_no_bundle(path))
    if is_glob(text):
        raise UnknownNameError(f"{text!r} is a pattern, one name is wanted. See `zoo list {text!r}`.")
    wanted, pin = split_version(text)
    if pin is not None and version is not None and pin != version:
        raise ConfigError(f"{text!r} pins a version, received version={version!r}, too. Give one of them.")
    try:
        return _find_by_name(wanted, pin if pin is not None else version)
    except UnknownNameError:
        if _is_there(path) and path.is_dir():
            raise BundleError(_no_bundle(path)) from None
        raise


def _is_there(path: Path) -> bool:
    """Whether a path exists; what is too long or too odd for the system to be one, does not."""
    try:
        return path.exists()
    except OSError:
        return False


def _no_bundle(path: Path) -> str:
    """What is said of a place without a card."""
    problem = f"{path}: no bundle here (no {CARD_FILE})."
    if any((path / one).is_file() for one in _LIBRARIES_FILES):
        return f"{problem} It looks like another library's model, which `zoo sparsify {path}` takes."
    beside = (
        suggestion(path.name, there) if (there := [one.parent.name for one in _cards_in(path.parent)]) else ""
    )
    return f"{problem} Give the folder that holds it. {beside}".rstrip()


def _cards_in(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"*/{CARD_FILE}"))


def find_named(reference: str) -> Bundle:
    """The bundle of a name or `name@version` in the known places: what a card may point to.

    Unlike `find` it takes neither paths nor addresses of hubs, since cards are other people's.

    Raises:
        UnknownNameError: no place has it.
        CardError, BundleError: it is there and broken.
    """
    return _find_by_name(*split_version(reference))


def base_of(bundle: Bundle) -> Bundle | None:
    """The bundle that holds what the weights file of another one leaves out; None if it leaves out nothing.

    It is looked for in the folder `base` of the bundle, beside the bundle, and by its name like any model;
    only the very weights file that the card names will do.

    Raises:
        BundleError: it is not on this machine, has other weights, or stands on another bundle itself.
    """
    stated = bundle.card.base
    if stated is None:
        return None
    found = _base_nearby(bundle)
    if found is None:
        try:
            found = _find_by_name(stated.name, stated.version)
        except UnknownNameError as error:
            raise BundleError(
                f"{bundle.card.name} stands on the weights of {stated.reference}, which are not on this "
                f"machine. Put that bundle's folder beside {bundle.folder} or into a folder of ZOO_PATH."
            ) from error
    if found.card.weights.sha256 != stated.sha256:
        raise BundleError(
            f"{bundle.card.name} stands on {stated.reference} with the sha256 {stated.sha256[:12]}..., "
            f"{found.folder} has {found.card.weights.sha256[:12]}.... Put the right one beside "
            f"{bundle.folder}, or save the model on this one."
        )
    if (under := found.card.stands_on) is not None:
        raise BundleError(
            f"{bundle.card.name} stands on {stated.reference}, which stands on {under.reference} "
            f"itself; only one level is allowed. Save it again on {under.reference}."
        )
    return found


def twin_of(bundle: Bundle) -> Bundle:
    """The dense twin that a card names: its base, the one that came with it, a bundle beside it, or by name.

    Raises:
        BundleError: the card names none.
        UnknownNameError: it is not on this machine.
    """
    name = bundle.card.dense_twin
    if not name:
        raise BundleError(f"{bundle.card.name} is dense itself and has no dense twin")
    with contextlib.suppress(BundleError):
        base = base_of(bundle)
        if base is not None and name in (base.card.name, base.card.reference):
            return base
    beside = [path.parent for path in _cards_in(bundle.folder.parent)]
    for folder in (bundle.folder / TWIN_FOLDER, *beside):
        with contextlib.suppress(CardError, BundleError):
            found = open_bundle(folder)
            if name in (found.card.name, found.card.reference):
                return found
    return find_named(name)


def _base_nearby(bundle: Bundle) -> Bundle | None:
    stated, beside = bundle.card.base, _cards_in(bundle.folder.parent)
    for folder in (bundle.folder / BASE_FOLDER, *(path.parent for path in beside)):
        try:
            found = open_bundle(folder)
        except (CardError, BundleError):  # nothing there, or another one that is broken
            continue
        card = found.card
        if stated and (card.reference, card.weights.sha256) == (stated.reference, stated.sha256):
            return found
    return None


def select(
    glob: str = "*",
    *,
    domain: str | None = None,
    method: str | None = None,
    task: str | None = None,
    min_sparsity: float | None = None,
    max_bytes: int | None = None,
) -> list[Bundle]:
    """The bundles on this machine that match, in natural order of their names; the newest version of each.

    Args:
        glob: `*`, `?` and `[...]` over names; with an `@`, over `name@version` and then over every version.
        domain: only this domain.
        method: only models of this method, as on the card or its part after the slash.
        task: only models measured on this task.
        min_sparsity: only models with at least this overall sparsity.
        max_bytes: only models of at most this many bytes on disk, a base included.

    Raises:
        UnknownNameError: no name matches the glob, or no model at all is of that domain, method or task.
        ConfigError: a bound out of range.
    """
    if min_sparsity is not None and not 0 <= min_sparsity <= 1:
        raise ConfigError(f"min_sparsity is a share between 0 and 1, received {min_sparsity}.")
    if max_bytes is not None and max_bytes < 0:
        raise ConfigError(f"max_bytes counts bytes, received {max_bytes}.")
    everything = list(_installed())
    if "@" in glob:
        matching = [bundle for bundle in everything if fnmatchcase(bundle.card.reference, glob)]
    else:
        matching = _newest(bundle for bundle in everything if fnmatchcase(bundle.card.name, glob))
    if not matching and (name := _present_name(glob, everything)) is not None:
        matching = _newest(bundle for bundle in everything if bundle.card.name == name)
    if not matching and glob != "*":
        names = {bundle.card.reference if "@" in glob else bundle.card.name for bundle in everything}
        if glob.startswith((".", "/", "~")):
            raise UnknownNameError(
                f"Lists are of names, and {glob!r} looks like a folder: `zoo show {glob}` shows the model "
                "in it."
            )
        raise UnknownNameError(f"No model matches {glob!r}. {suggestion(glob, names)}")
    for kind, wanted, values in (
        ("domain", domain, lambda card: [card.domain]),
        ("method", method, lambda card: [card.method.name]),
        ("task", task, lambda card: [metric.task for metric in card.metrics]),
    ):
        if wanted is not None:
            matching = _filtered(matching, everything, kind, wanted, values)
    return sorted(
        (
            bundle
            for bundle in matching
            if (min_sparsity is None or bundle.card.sparsity.overall >= min_sparsity)
            and (max_bytes is None or bundle.card.bytes_needed <= max_bytes)
        ),
        key=lambda bundle: (natural_key(bundle.card.name), version_key(bundle.card.version)),
    )


def list_models(
    glob: str = "*",
    *,
    domain: str | None = None,
    method: str | None = None,
    task: str | None = None,
    min_sparsity: float | None = None,
    max_bytes: int | None = None,
) -> list[str]:
    """Names of the models on this machine; the arguments and errors are those of `select`.

    A glob with an `@` gives `name@version`, otherwise the names alone are given.
    """
    bundles = select(
        glob, domain=domain, method=method, task=task, min_sparsity=min_sparsity, max_bytes=max_bytes
    )
    return [bundle.card.reference if "@" in glob else bundle.card.name for bundle in bundles]


def card(name: str | os.PathLike[str], version: str | None = None, offline: bool | None = None) -> Card:
    """The card of a model; arguments and errors as for `find`."""
    return find(name, version, offline).card


def _places(name: str | None = None) -> Iterator[list[Path]]:
    """The folders of bundles, place by place. With a name, a packaged model's is looked up directly."""
    package = Path(__file__).parents[1]
    if name is None:
        found = [path for domain in DOMAINS for path in package.glob(f"{domain}/cards/*/{CARD_FILE}")]
        yield sorted(path.parent for path in found)
    elif is_model_name(name):
        domain, _, slug = name.partition("/")
        folder = package / domain / "cards" / slug
        yield [folder] if (folder / CARD_FILE).exists() else []
    for text in filter(None, os.environ.get("ZOO_PATH", "").split(os.pathsep)):
        root = Path(text).expanduser()
        if not root.is_dir():
            raise ConfigError(f"ZOO_PATH names {text!r}, which is not a folder. Correct or unset ZOO_PATH.")
        found = [path for depth in ("", "*/", "*/*/") for path in root.glob(f"{depth}{CARD_FILE}")]
        yield sorted(path.parent for path in found if not _is_hidden(path.relative_to(root)))
    yield sorted(
        path.parent
        for path in (cache_folder() / "hub").glob(f"*/snapshots/*/{CARD_FILE}")
        if not _is_hidden(path.relative_to(cache_folder()))
    )


def _is_hidden(path: Path) -> bool:
    """Whether it lies in a folder that is still being written."""
    return any(part.startswith(".") for part in path.parts)


def _installed() -> Iterator[Bundle]:
    """Every readable bundle of every place; a name that an earlier place has hides those of later ones."""
    seen: set[str] = set()
    for folders in _places():
        here = []
        for folder in folders:
            try:
                bundle = open_bundle(folder)
            except (CardError, BundleError) as error:  # one broken bundle must not hide the others
                _log.warning("Left out of the list: %s", error)
                continue
            if may_use(bundle.card.name, folder, cache_folder()):
                here.append(bundle)
        yield from (bundle for bundle in here if bundle.card.name not in seen)
        seen.update(bundle.card.name for bundle in here)


def _newest(bundles: Iterable[Bundle]) -> list[Bundle]:
    best: dict[str, Bundle] = {}
    for bundle in bundles:
        old = best.get(bundle.card.name)
        if old is None or version_key(bundle.card.version) > version_key(old.card.version):
            best[bundle.card.name] = bundle
    return list(best.values())


def _filtered(
    matching: list[Bundle],
    everything: list[Bundle],
    kind: str,
    wanted: str,
    values: Callable[[Card], list[str]],
) -> list[Bundle]:
    def fits(bundle: Bundle) -> bool:
        return any(wanted in (value, value.rpartition("/")[2]) for value in values(bundle.card))

    if not any(map(fits, everything)):
        known = {value for bundle in everything for value in values(bundle.card)}
        raise UnknownNameError(f"No model has the {kind} {wanted!r}. {suggestion(wanted, known)}")
    return [bundle for bundle in matching if fits(bundle)]


def _find_by_name(name: str, version: str | None) -> Bundle:
    others: set[str] = set()
    broken: CardError | BundleError | None = None
    for folders in _places(name):
        found = []
        for folder in folders:
            try:
                bundle = open_bundle(folder)
            except (CardError, BundleError) as error:
                if folder.name == name.rpartition("/")[2]:
                    broken = error
                continue
            if bundle.card.name == name and may_use(name, folder, cache_folder()):
                others.add(bundle.card.version)
                found.append(bundle)
        if version is not None:
            found = [bundle for bundle in found if bundle.card.version == version]
        if found:
            _one_repository(name, found)
            return _only(sorted(found, key=lambda bundle: version_key(bundle.card.version))[-1], found)
    if broken is not None:
        raise broken
    if others:
        there = ", ".join(sorted(others, key=version_key))
        raise UnknownNameError(f"Model {name!r} has no version {version!r} here. There is {there}.")
    everything = list(_installed())
    if (present := _present_name(name, everything)) is not None:
        return _find_by_name(present, version)
    here = [one.parent.name for one in _cards_in(Path())]  # a folder of the user's may be meant
    names = {bundle.card.name for bundle in everything}
    raise UnknownNameError(f"Unknown model {name!r}. {suggestion(name, [*near_misses(name, here), *names])}")


def _present_name(former: str, everything: Iterable[Bundle]) -> str | None:
    """What the bundle that was once called `former` is called now; the user is told. None if none was.

    Raises:
        UnknownNameError: several bundles had this name.
    """
    found = {
        bundle.card.name
        for bundle in everything
        if former in bundle.card.formerly and may_use(former, bundle.folder, cache_folder())
    }
    if len(found) > 1:
        raise UnknownNameError(f"{former!r} was the name of {' and of '.join(sorted(found))}. Say which one.")
    for name in found:
        _log.warning("%s is called %s now. The old name still works; write the new one.", former, name)
        return name
    return None


def _one_repository(name: str, found: list[Bundle]) -> None:
    """Refuse a name that several repositories claim and that is bound to none (a cache of an older zoo)."""
    sources = {repository_of(bundle.folder, cache_folder()) for bundle in found}
    if len(sources) > 1:
        names = " and ".join(sorted(f"{HUB_PREFIX}{source}" for source in sources))
        raise BundleError(f"{name} comes from {names}. Say which one: zoo pull REFERENCE --rebind.")


def _only(newest: Bundle, found: list[Bundle]) -> Bundle:
    """`newest`, unless another bundle of that name and version has other weights."""
    for other in found:
        same = other.card.reference == newest.card.reference
        if same and other.card.weights.sha256 != newest.card.weights.sha256:
            raise BundleError(
                f"{newest.card.reference} is there twice with different weights: {newest.folder} and "
                f"{other.folder}. Load one by its path, or remove the other."
            )
    return newest


def _require_version(bundle: Bundle, version: str | None) -> Bundle:
    if version is not None and bundle.card.version != version:
        raise BundleError(
            f"{bundle.folder}: version {bundle.card.version} of {bundle.card.name}, but {version} was asked "
            "for. Leave the version out or give another path."
        )
    return bundle
