"""Models of other libraries on a hub as the base of a bundle, which then holds masks and little else.

The card names repository, commit, and the hash of every file. The files lie in the bundle's folder `base`
or in the
cache, where `zoo pull hf://owner/name@commit` puts them and where loading looks for them; what they hold
is made into tensors by the card's domain (`zoo.registry.BASE_READERS`), or taken as the safetensors name it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file

from zoo.bundles.card import PublicBase
from zoo.bundles.catalog import BASE_FOLDER, HUB_PREFIX, Bundle, find
from zoo.bundles.foreign import WANTED, fetch_folder
from zoo.bundles.hub import parse_reference
from zoo.errors import BundleError, ConfigError, HubError
from zoo.registry import BASE_READERS
from zoo.shared.masks import MaskSet
from zoo.shared.store.formats import PackedContents
from zoo.shared.store.io import sha256_file


@dataclass(frozen=True)
class PublicModel:
    """A public model at hand.

    Attributes:
        stated: which one, as cards say it.
        folder: of its files.
    """

    stated: PublicBase
    folder: Path

    def check(self) -> None:
        """Compare every file with its hash.

        Raises:
            BundleError: one is missing or another.
        """
        for name, digest in self.stated.files.items():
            path = self.folder / name
            if not path.is_file():
                raise BundleError(f"{self.folder} lacks {name} of {self.stated.reference}. {self._remedy()}")
            if sha256_file(path) != digest:
                raise BundleError(
                    f"{path} is not that of {self.stated.reference}: its sha256 is another. {self._remedy()}"
                )

    def contents(self, domain: str) -> PackedContents:
        """What its files hold, once they have been checked, in the words of a domain.

        Raises:
            BundleError: a file is missing or another.
        """
        self.check()
        if domain in BASE_READERS:
            read: Callable[[Path], PackedContents] = BASE_READERS.get(domain)
            return read(self.folder)
        files = [self.folder / name for name in self.stated.files if name.endswith(".safetensors")]
        tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
        return PackedContents(tensors, MaskSet({}), {}, {})

    def _remedy(self) -> str:
        return f"Remove that folder, then: zoo pull {self.stated.reference}"


Base = Bundle | PublicModel | str | os.PathLike[str]


def public_model(reference: str, offline: bool | None = None) -> PublicModel:
    """The public model at an address, fetched if need be, its files hashed as they are now.

    Args:
        reference: `hf://owner/name@revision`.
        offline: as for `zoo.load`.

    Raises:
        HubError: it cannot be fetched.
        ConfigError: a bundle of the zoo is there.
    """
    folder = fetch_folder(reference, offline)
    if folder is None:
        raise ConfigError(f"{reference} is no model of another library that is at hand; zoo pull {reference}")
    inside = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.suffix in WANTED)
    names = [path.as_posix() for path in inside if not any(part.startswith(".") for part in path.parts)]
    files = {name: sha256_file(folder / name) for name in names}
    size = sum((folder / name).stat().st_size for name in files)
    repository = parse_reference(reference).repository
    return PublicModel(
        PublicBase(repository=repository, revision=folder.name, files=files, bytes=size), folder
    )


def public_base_of(bundle: Bundle, offline: bool | None = None) -> PublicModel | None:
    """The public model on which a bundle stands; None for other bundles. Its files are not looked at yet.

    Raises:
        BundleError: it is neither on this machine nor can it be fetched.
    """
    stated = bundle.card.public_base
    if stated is None:
        return None
    if (bundle.folder / BASE_FOLDER).is_dir():
        return PublicModel(stated, bundle.folder / BASE_FOLDER)
    missing = (
        f"{bundle.card.name} holds masks for {stated.reference}, which is not on this machine. Where a hub "
        f"can be "
        f"reached: zoo pull {stated.reference}; or put its files into {bundle.folder / BASE_FOLDER}"
    )
    try:
        folder = fetch_folder(stated.reference, offline, expected_bytes=stated.bytes)
    except HubError as error:
        raise BundleError(f"{missing}. ({error})") from error
    if folder is None:
        raise BundleError(missing)
    return PublicModel(stated, folder)


def base_for(base: Base) -> Bundle | PublicModel:
    """What `base=` of saving means: a bundle, its name or path, a public model or its address."""
    if isinstance(base, (Bundle, PublicModel)):
        return base
    text = os.fspath(base)
    if text.startswith(HUB_PREFIX) and fetch_folder(text) is not None:
        return public_model(text)
    return find(text)
