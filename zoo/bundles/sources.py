"""Where data and published weights come from, for cards."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from zoo.errors import ConfigError, DataError, MissingDataError
from zoo.registry import CONTENTS
from zoo.shared.store.identity import data_digest
from zoo.shared.store.io import sha256_file


@dataclass(frozen=True)
class Source:
    """What a card says of a data set: its title, where it is published, and under which licence."""

    title: str
    origin: str
    licence: str


def with_digest(domain: str, dataset: str | None, fields: Mapping[str, str]) -> dict[str, str]:
    """What a card says of its data, with the digest of a data set's content, the same that cells of studies
    are kept by; as it is where the domain knows no content by that name.

    Args:
        domain: of the model.
        dataset: name or file of what it was trained on.
        fields: name, source and licence.
    """
    if dataset is None or domain not in CONTENTS:
        return dict(fields)
    try:
        content = CONTENTS.get(domain)(dataset)
    except (
        ConfigError,
        DataError,
    ):  # of another kind than the domain's own: what was trained is not lost for that
        content = None
    digest = data_digest(content) if content is not None else ""
    rest = {key: value for key, value in fields.items() if key != "sha256"}
    return {**rest, "sha256": digest} if digest else rest


def published_file(imported: Mapping[str, str] | None) -> Path:
    """A file of weights that others published, checked.

    Args:
        imported: its place below $ZOO_DATA (`file`), `sha256` and `address`, as in a recipe row and on a card
            (`zoo.bundles.card.Imported`).

    Raises:
        ConfigError: no file is stated.
        DataError: ZOO_DATA is not set, or has another file there or none; the message says where to get it.
    """
    if imported is None:
        raise ConfigError("the recipe states no `imported`: file, sha256, address and licence of the weights")
    place, address, root = imported["file"], imported["address"], os.environ.get("ZOO_DATA")
    path = Path(root or "ZOO_DATA", place)
    if not root or not path.is_file():
        raise MissingDataError(
            f"{path} is not there. Get it from {address}, put it at {place} below a folder of your own, and "
            "set ZOO_DATA to that folder."
        )
    if (found := sha256_file(path)) != imported["sha256"]:
        raise DataError(
            f"{path} is another file than the one published: sha256 {found[:12]}..., expected "
            f"{imported['sha256'][:12]}.... Get it again from {address}."
        )
    return path
