"""Names of models, tasks and methods: what is legal, how they are matched, sorted and suggested.

A model is called `domain/slug` (`graph/teddy-gcn-cora-g30-w80`) and may be pinned as `domain/slug@1.2.0`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from fnmatch import fnmatchcase

DOMAINS = ("graph", "diffusion", "llm", "neural3d", "vision")

# Lower case only, so that a name is the same folder on every file system; no leading dot, no "..".
_WORD = r"[a-z0-9](?:[a-z0-9_-]|\.(?=[a-z0-9]))*"
_NAME = re.compile(rf"{_WORD}/{_WORD}")
_NUMBER = r"(?:0|[1-9][0-9]{0,8})"
_VERSION = re.compile(rf"{_NUMBER}\.{_NUMBER}\.{_NUMBER}")
_MAX_LENGTH = 128


def is_model_name(text: str) -> bool:
    """Whether `text` is a legal `domain/slug`."""
    return len(text) <= _MAX_LENGTH and _NAME.fullmatch(text) is not None


def is_version(text: str) -> bool:
    """Whether `text` is a version such as `1.2.0`."""
    return _VERSION.fullmatch(text) is not None


def version_key(version: str) -> tuple[int, ...]:
    """Sort key of a version: `1.10.0` comes after `1.9.0`."""
    return tuple(int(part) for part in version.split("."))


def split_version(reference: str) -> tuple[str, str | None]:
    """`name@1.2.0` -> `("name", "1.2.0")`; without a pin the second part is None."""
    name, at, version = reference.partition("@")
    return name, version if at else None


def natural_key(text: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key under which `w8` comes before `w80` and `w80` before `w100`."""
    return tuple((0, int(part), "") if part[0] in "0123456789" else (1, 0, part)
                 for part in re.split(r"([0-9]+)", text) if part)


def is_glob(text: str) -> bool:
    """Whether `text` has a wildcard."""
    return any(char in text for char in "*?[")


def match(names: Iterable[str], glob: str) -> list[str]:
    """The names that `glob` (`*`, `?`, `[...]`; `*` also crosses `/`) matches, in natural order."""
    return sorted((name for name in names if fnmatchcase(name, glob)), key=natural_key)


def near_misses(wanted: str, names: Iterable[str], limit: int = 3) -> list[str]:
    """Up to `limit` of `names` that someone who typed `wanted` probably meant, likeliest first.

    A glob is compared by its literal text. A forgotten or wrong domain does not hide the slug that was meant.
    """
    pool = sorted(set(names), key=natural_key)
    literal = re.sub(r"[*?\[\]]+", "", wanted).lower()
    if not literal:
        return pool[:limit]
    by_name = {name.lower(): name for name in pool}
    found = [by_name[key] for key in difflib.get_close_matches(literal, by_name, n=limit, cutoff=0.6)]
    slug = literal.rpartition("/")[2]
    by_slug: dict[str, list[str]] = {}
    for name in pool:
        by_slug.setdefault(name.lower().rpartition("/")[2], []).append(name)
    for key in difflib.get_close_matches(slug, by_slug, n=limit, cutoff=0.6):
        found.extend(by_slug[key])
    found.extend(name for name in pool if slug and slug in name.lower())
    return list(dict.fromkeys(found))[:limit]


def suggestion(wanted: str, names: Iterable[str]) -> str:
    """One sentence: the near misses of `wanted`, or what there is, or that there is nothing."""
    pool = list(names)
    if not pool:
        return "None is registered."
    close = near_misses(wanted, pool)
    if close:
        return "Did you mean " + " or ".join(repr(name) for name in close) + "?"
    some = sorted(pool, key=natural_key)
    shown = ", ".join(repr(name) for name in some[:5])
    return f"There are {len(some)}: {shown}, ..." if len(some) > 5 else f"Known: {shown}."
