"""Bundles on the Hugging Face hub, or on any server that speaks its protocol (`HF_ENDPOINT`).

A repository holds one bundle: `card.yaml` and the weights file that it names. If the bundle stands on another
one, that lies in the folder `base`, its dense twin in the folder `twin`; they are fetched where they are not
on the machine yet, and nothing else is. What arrives is compared with the cards before it is put, with one
rename, into the cache:

    $ZOO_CACHE/hub/<owner>--<name>/snapshots/<commit>/    the bundle as of one commit
    $ZOO_CACHE/hub/<owner>--<name>/refs/<revision>        the commit that a branch or tag was last seen at

The bare name on a card is bound to the repository that brought it first; see `zoo.bundles.bindings`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from zoo.bundles.bindings import bind, bound_to, repository_of
from zoo.bundles.card import CARD_FILE, parse_card
from zoo.bundles.cardfile import MAX_BYTES, read_yaml
from zoo.bundles.catalog import (
    BASE_FOLDER,
    HUB_PREFIX,
    TWIN_FOLDER,
    Bundle,
    base_of,
    cache_folder,
    find,
    find_named,
    open_bundle,
    twin_of,
)
from zoo.bundles.folders import publish_folder
from zoo.errors import BundleError, CardError, HubError, UnknownNameError
from zoo.shared.store.io import atomic_write

LOCK_TIMEOUT = 600  # seconds that a pull waits for another one of the same repository
_log = logging.getLogger("zoo")
_WORD = r"[A-Za-z0-9](?:[A-Za-z0-9_-]|\.(?!\.)){0,95}"
_REFERENCE = re.compile(rf"hf://({_WORD}/{_WORD})(?:@([A-Za-z0-9](?:[A-Za-z0-9_/-]|\.(?!\.)){{0,127}}))?")
_COMMIT = re.compile("[0-9a-f]{40}")


@dataclass(frozen=True)
class HubReference:
    """`hf://owner/name@revision`; the revision is a branch, a tag or a commit, `main` by default."""

    repository: str
    revision: str = "main"

    def __str__(self) -> str:
        return f"{HUB_PREFIX}{self.repository}@{self.revision}"

    @property
    def folder(self) -> Path:
        """Where the cache keeps what it has of the repository."""
        return cache_folder() / "hub" / self.repository.replace("/", "--")


@dataclass(frozen=True)
class Pushed:
    """What was uploaded, or would be: bytes by file name, and where they can be seen."""

    files: dict[str, int]
    url: str | None


def parse_reference(text: str) -> HubReference:
    """Read `hf://owner/name` or `hf://owner/name@revision`.

    Raises:
        HubError: anything else.
    """
    found = _REFERENCE.fullmatch(text)
    if found is None:
        raise HubError(f"{text!r} is no hub reference. Write hf://owner/name or hf://owner/name@revision.")
    return HubReference(found[1], found[2] or "main")


def is_offline(offline: bool | None = None) -> bool:
    """Whether the hub may not be asked: as told, else by `ZOO_OFFLINE` or `HF_HUB_OFFLINE`."""
    if offline is not None:
        return offline
    on = ("1", "on", "yes", "true")
    return any(os.environ.get(name, "").lower() in on for name in ("ZOO_OFFLINE", "HF_HUB_OFFLINE"))


def fetch(text: str, offline: bool | None = None) -> Bundle:
    """The bundle that `hf://owner/name@revision` stands for, from the cache or from the hub.

    A branch or tag is looked up on the hub each time; the files come from there once per commit. If the hub
    cannot be reached, the commit last seen is used and a warning logged. `zoo.bundles.store.load_bundle`
    checks
    the weights against the card again.

    Raises:
        HubError: no such repository, revision or bundle, a download that did not arrive whole or is not what
            its card says, no connection or offline mode without a copy in the cache, an unwritable cache.
    """
    reference = parse_reference(text)
    if is_offline(offline):
        cached = _cached(reference)
        if cached is None:
            raise HubError(
                f"{reference} is not in the cache {cache_folder()} and offline mode is on. "
                "Pull it once with a connection: without --offline, ZOO_OFFLINE and HF_HUB_OFFLINE."
            )
        return cached
    if _COMMIT.fullmatch(reference.revision) and (cached := _cached(reference)) is not None:
        return cached
    try:
        listing = listing_of(reference)
        if CARD_FILE not in listing.sizes:
            raise HubError(
                f"{reference}: the repository has no {CARD_FILE}, so it holds no bundle. To make a model of "
                f"another library sparse: zoo sparsify {reference} --method NAME --out DIR"
            )
    except Unreachable as error:
        cached = _cached(reference)
        if cached is None:
            raise HubError(f"{reference}: {error}. Check the connection and HF_ENDPOINT.") from error
        _log.warning("%s: %s; using the copy in the cache, %s", reference, error, cached.folder.name)
        return cached
    return _fetch_commit(reference, listing)


def pull(reference: str, offline: bool | None = None, rebind: bool = False) -> Bundle:
    """Bring a bundle into the cache and verify it there; a damaged copy is fetched anew.

    Args:
        reference: `hf://owner/name@revision`.
        offline: as for `fetch`.
        rebind: whether the model's bare name shall mean this repository from now on, also if it meant
            another one.

    Raises:
        HubError: as for `fetch`.
        BundleError: the copy in the cache is damaged and cannot be replaced offline.
    """
    bundle = fetch(reference, offline)
    try:
        _check_all(bundle)
    except BundleError:
        if is_offline(offline):
            raise
        (bundle.folder / CARD_FILE).unlink(missing_ok=True)  # without a card the cache has no such bundle
        bundle.weights.unlink(missing_ok=True)
        for inner in (BASE_FOLDER, TWIN_FOLDER):
            shutil.rmtree(bundle.folder / inner, ignore_errors=True)
        bundle = fetch(reference, offline)
        _check_all(bundle)
    if rebind:
        bind(bundle.card.name, parse_reference(reference).repository, cache_folder())
    return bundle


def _check_all(bundle: Bundle) -> Bundle | None:
    """Check a bundle and its base, which is returned; a public one comes from its own repository, at
    loading."""
    bundle.check()
    base = base_of(bundle)
    if base is not None:
        base.check()
    return base


def push(
    name: str | os.PathLike[str], reference: str, *, private: bool = False, dry_run: bool = False
) -> Pushed:
    """Upload a bundle, with its base and its dense twin where they are on this machine and not packaged with
    the zoo, to a repository of the hub, which is made if it is not there.

    Args:
        name: any name or path that `zoo.load` takes.
        reference: `hf://owner/name`, with a branch if it is not `main`.
        private: whether a repository that is made is private.
        dry_run: only verify the bundle and tell what would be uploaded.

    Raises:
        HubError: nobody is logged in, or the hub refuses.
        BundleError: the bundle is not what its card says.
    """
    target = parse_reference(reference)
    bundle = find(name)
    base = _check_all(bundle)
    paths = {path.name: path for path in (bundle.folder / CARD_FILE, bundle.weights)}
    if base is not None:
        paths |= {f"{BASE_FOLDER}/{path.name}": path for path in (base.folder / CARD_FILE, base.weights)}
    twin = _twin_to_push(bundle, base)
    if twin is not None:
        paths |= {f"{TWIN_FOLDER}/{path.name}": path for path in (twin.folder / CARD_FILE, twin.weights)}
    files = {name: path.stat().st_size for name, path in paths.items()}
    if dry_run:
        return Pushed(files, None)
    if is_offline():
        raise HubError(f"{target}: offline mode is on. Unset ZOO_OFFLINE and HF_HUB_OFFLINE to push.")
    import huggingface_hub

    if huggingface_hub.get_token() is None:
        raise HubError(f"{target}: nobody is logged in. Run `hf auth login`, or set HF_TOKEN.")
    api = _api()
    try:
        api.create_repo(target.repository, private=private, exist_ok=True)
        commit = api.create_commit(
            repo_id=target.repository,
            operations=[huggingface_hub.CommitOperationAdd(name, path) for name, path in paths.items()],
            revision=target.revision,
            commit_message=f"Add {bundle.card.reference}",
        )
    except _hub_errors() as error:
        raise HubError(f"{target}: the upload failed: {_one_line(error)}.") from error
    return Pushed(files, commit.commit_url)


def _twin_to_push(bundle: Bundle, base: Bundle | None) -> Bundle | None:
    """The dense twin, checked; None where everybody has it, it is the base, or it is not here."""
    if bundle.card.dense_twin is None:
        return None
    try:
        twin = twin_of(bundle)
    except (UnknownNameError, BundleError):
        _log.warning(
            "%s goes without %s, its dense twin, which is not here", bundle.card.name, bundle.card.dense_twin
        )
        return None
    packaged = Path(__file__).parents[1] in twin.folder.parents
    if twin == base or packaged or twin.card.base is not None:
        return None
    twin.check()
    return twin


class Unreachable(Exception):
    """The hub gave no answer, as opposed to a refusal."""


@dataclass(frozen=True)
class Listing:
    """What the hub says of one revision: its commit, and sizes by file name."""

    commit: str
    sizes: dict[str, int]


def _cached(reference: HubReference) -> Bundle | None:
    """The bundle in the cache, or None. Needs no right to write."""
    commit = reference.revision
    if not _COMMIT.fullmatch(commit):
        try:
            commit = _ref_file(reference).read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError):
            return None
    folder = reference.folder / "snapshots" / commit
    if not _COMMIT.fullmatch(commit) or not (folder / CARD_FILE).exists():
        return None
    return open_bundle(folder)


def _ref_file(reference: HubReference) -> Path:
    return reference.folder / "refs" / quote(reference.revision, safe="")


def _fetch_commit(reference: HubReference, listing: Listing) -> Bundle:
    folder = reference.folder / "snapshots" / listing.commit
    pinned = HubReference(reference.repository, listing.commit)
    try:
        if not (folder / CARD_FILE).exists():
            reference.folder.mkdir(parents=True, exist_ok=True)
            with locked(reference):
                # Of pulls that were killed: snapshots are written under the lock alone, references are not.
                for left in reference.folder.glob("snapshots/.*.tmp"):
                    shutil.rmtree(left)
                if not (folder / CARD_FILE).exists():  # another process may have been quicker
                    publish_folder(folder, lambda temporary: _download(pinned, listing, temporary))
        _claim_name(reference, open_bundle(folder))
        ref = _ref_file(reference)
        if reference.revision != listing.commit and _cached(reference) != open_bundle(folder):
            ref.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(ref, listing.commit.encode())
    except (OSError, BundleError) as error:
        raise HubError(f"{reference}: {error} Set ZOO_CACHE to a folder that can be written.") from error
    return open_bundle(folder)


@contextlib.contextmanager
def locked(reference: HubReference) -> Iterator[None]:
    """The repository's lock in the cache; waiting for another process is said, and ends."""
    from filelock import FileLock, Timeout

    path = reference.folder / "lock"
    lock = FileLock(path)
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            _log.warning(
                "%s: waiting up to %d s for another pull, which holds %s", reference, LOCK_TIMEOUT, path
            )
            lock.acquire(timeout=LOCK_TIMEOUT)
    except Timeout:
        raise HubError(
            f"{reference}: another process has held {path} for {LOCK_TIMEOUT} s. Wait for it or end it, then "
            "pull again."
        ) from None
    try:
        yield
    finally:
        lock.release()


def _claim_name(reference: HubReference, bundle: Bundle) -> None:
    """Bind the bundle's bare name to the repository, unless another one has it."""
    name, cache = bundle.card.name, cache_folder()
    bound = bound_to(name, cache)
    if bound is None:
        others = {
            repository_of(path.parent, cache)
            for path in (cache / "hub").glob(f"*/snapshots/*/{CARD_FILE}")
            if _has_name(path.parent, name)
        }
        bound = next(iter(sorted(filter(None, others - {reference.repository}))), reference.repository)
        bind(name, bound, cache)
    if bound != reference.repository:
        _log.warning(
            "%s calls itself %s, which is the name of %s%s here and stays so; load it as %s, or give it the "
            "name: zoo pull %s --rebind",
            reference,
            name,
            HUB_PREFIX,
            bound,
            reference,
            reference,
        )


def _has_name(folder: Path, name: str) -> bool:
    try:
        return open_bundle(folder).card.name == name
    except (CardError, BundleError):
        return False


def listing_of(reference: HubReference) -> Listing:
    """Ask the hub for a revision's commit and files."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        found = _api().model_info(reference.repository, revision=reference.revision, files_metadata=True)
    except GatedRepoError as error:
        raise HubError(f"{reference}: access must be asked for on the repository's page.") from error
    except RepositoryNotFoundError as error:
        raise HubError(
            f"{reference}: there is no such repository, or it is private. Check the name, or set HF_TOKEN."
        ) from error
    except RevisionNotFoundError as error:
        raise HubError(f"{reference}: the repository has no such branch, tag or commit.") from error
    except _hub_errors() as error:
        raise Unreachable(f"the hub cannot be reached: {_one_line(error)}") from error
    except Exception as error:  # an answer of any form, say of a captive portal, breaks the library anywhere
        raise _no_hub(reference, error) from error
    siblings = [(sibling.rfilename, sibling.size or 0) for sibling in found.siblings or []]
    if not all(isinstance(name, str) and type(size) is int and size >= 0 for name, size in siblings):
        raise _no_hub(reference, "it lists files without a name or a size")
    sizes = dict(siblings)
    if not isinstance(found.sha, str) or not _COMMIT.fullmatch(found.sha):
        raise HubError(f"{reference}: the server names no commit. Is HF_ENDPOINT a hub?")
    return Listing(found.sha, sizes)


def _no_hub(reference: HubReference, problem: object) -> HubError:
    return HubError(
        f"{reference}: the server does not answer like a hub ({_one_line(problem)}). Is the network behind a "
        "login page, or HF_ENDPOINT another server?"
    )


def _download(pinned: HubReference, listing: Listing, folder: Path) -> None:
    """Fetch card and weights into `folder`, and a base that is not at hand; leave nothing else in it."""
    bundle = _download_bundle(pinned, listing, folder, "")
    stated = bundle.card.base
    if stated is not None and not _is_at_hand(bundle):
        if f"{BASE_FOLDER}/{CARD_FILE}" not in listing.sizes:
            raise HubError(
                f"{pinned} stands on the weights of {stated.reference}, which are neither on this machine "
                f"nor in the repository's folder {BASE_FOLDER!r}. Pull that bundle first."
            )
        base = _download_bundle(pinned, listing, folder, f"{BASE_FOLDER}/").card
        if (base.reference, base.weights.sha256) != (stated.reference, stated.sha256):
            raise HubError(
                f"{pinned}: {BASE_FOLDER!r} holds other weights than those of {stated.reference}, on which "
                "the bundle stands. Nothing was kept; tell the repository's owner."
            )
    if f"{TWIN_FOLDER}/{CARD_FILE}" in listing.sizes and not _has_twin(bundle):
        twin = _download_bundle(pinned, listing, folder, f"{TWIN_FOLDER}/").card
        if bundle.card.dense_twin not in (twin.name, twin.reference) or twin.base is not None:
            raise HubError(
                f"{pinned}: {TWIN_FOLDER!r} holds {twin.reference}, the card's dense twin is "
                f"{bundle.card.dense_twin}. Nothing was kept; tell the repository's owner."
            )
    shutil.rmtree(folder / ".cache", ignore_errors=True)  # huggingface_hub's notes of the download


def _has_twin(bundle: Bundle) -> bool:
    """Whether a bundle needs no dense twin, or its name is known here: then that one counts."""
    if bundle.card.dense_twin is None:
        return True
    try:
        find_named(bundle.card.dense_twin)
    except (UnknownNameError, CardError, BundleError):
        return False
    return True


def _is_at_hand(bundle: Bundle) -> bool:
    try:
        base_of(bundle)
    except BundleError:
        return False
    return True


def _download_bundle(pinned: HubReference, listing: Listing, folder: Path, prefix: str) -> Bundle:
    """Fetch the card and the weights under `prefix` of a repository, and compare them."""
    name = f"{prefix}{CARD_FILE}"
    if listing.sizes[name] > MAX_BYTES:
        raise HubError(f"{pinned}: {name} has {listing.sizes[name]} bytes. Is it a card at all?")
    download_file(pinned, name, folder)
    card = parse_card(read_yaml(folder / name, f"{pinned}/{name}"), f"{pinned}/{name}")
    file = f"{prefix}{card.weights.file}"
    offered = listing.sizes.get(file)
    if offered is None:
        raise HubError(f"{pinned}: the repository lacks {file!r}, which its card names.")
    if offered != card.weights.bytes:
        raise HubError(
            f"{pinned}: {file} has {offered} bytes, but its card says {card.weights.bytes}. "
            "Nothing was kept; tell the repository's owner."
        )
    download_file(pinned, file, folder)
    bundle = Bundle(card, folder / prefix)
    try:
        bundle.check()
    except BundleError as error:
        raise HubError(
            f"{pinned}: {file} arrived with another hash or size than its card says. "
            "Nothing was kept; pull again, and tell the repository's owner if it happens twice."
        ) from error
    return bundle


def download_file(pinned: HubReference, name: str, folder: Path) -> None:
    import huggingface_hub

    try:
        huggingface_hub.hf_hub_download(
            pinned.repository,
            name,
            revision=pinned.revision,
            local_dir=folder,
            endpoint=os.environ.get("HF_ENDPOINT"),
        )
    except _hub_errors() as error:
        if isinstance(error, OSError) and _is_local(error):
            raise
        raise HubError(
            f"{pinned}: {name} did not arrive whole: {_one_line(error)}. Nothing was kept; pull again."
        ) from error
    except Exception as error:
        raise _no_hub(pinned, error) from error


def _api() -> Any:
    import huggingface_hub

    return huggingface_hub.HfApi(endpoint=os.environ.get("HF_ENDPOINT"))


def _hub_errors() -> tuple[type[Exception], ...]:
    """What huggingface_hub raises: its own errors, and those of the HTTP library it is built on."""
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

    return (OSError, HFValidationError, EntryNotFoundError, *HfHubHTTPError.__bases__)


def _is_local(error: OSError) -> bool:
    """Whether the disk is at fault and not the network."""
    return error.errno is not None and not isinstance(error, (ConnectionError, TimeoutError))


def _one_line(error: object) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."
