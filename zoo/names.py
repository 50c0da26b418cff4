"""Names of models, tasks and methods: what is legal, how they are matched, sorted and suggested.

A model is called `domain/slug` (`graph/teddy-gcn-cora-g30-w80`) and may be pinned as `domain/slug@1.2.0`.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path

from zoo.errors import ConfigError

DOMAINS = ("graph", "diffusion", "llm", "neural3d", "vision")

# Lower case only, so that a name is the same folder on every file system; no leading dot, no "..".
_WORD = r"[a-z0-9](?:[a-z0-9_-]|\.(?=[a-z0-9]))*"
_NAME = re.compile(rf"{_WORD}/{_WORD}")
_NUMBER = r"(?:0|[1-9][0-9]{0,8})"
_VERSION = re.compile(rf"{_NUMBER}\.{_NUMBER}\.{_NUMBER}")
_MAX_LENGTH = 128
_LIKELY, _SURE = 0.65, 0.9  # resemblance from which a name is suggested, and of one that has the typed word


def is_model_name(text: str) -> bool:
    """Whether `text` is a legal `domain/slug`."""
    return len(text) <= _MAX_LENGTH and _NAME.fullmatch(text) is not None


def name_for(domain: str, folder: Path) -> str:
    """The name of a model that is written to a folder: what is legal of the folder's own, `Mein Nétz` as
    `mein-netz`; `model` if nothing is."""
    plain = unicodedata.normalize("NFKD", folder.resolve().name).encode("ascii", "ignore").decode().lower()
    slug = re.sub(r"\.(?![a-z0-9])", "", re.sub(r"[^a-z0-9._-]+", "-", plain)).lstrip("-_.")
    return f"{domain}/{slug[: _MAX_LENGTH // 2].rstrip('-_.') or 'model'}"


def check_model_name(name: str) -> None:
    """Refuse a name that a card may not have.

    Raises:
        ConfigError: it is not legal.
    """
    if not is_model_name(name):
        raise ConfigError(
            f"--name {name}: expected domain/slug of a-z, 0-9, hyphens, dots and underscores, "
            "e.g. graph/teddy-gcn-cora-g30-w80"
        )


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
    return tuple(
        (0, int(part), "") if part[0] in "0123456789" else (1, 0, part)
        for part in re.split(r"([0-9]+)", text)
        if part
    )


def is_glob(text: str) -> bool:
    """Whether `text` has a wildcard."""
    return any(char in text for char in "*?[")


def match(names: Iterable[str], glob: str) -> list[str]:
    """The names that `glob` (`*`, `?`, `[...]`; `*` also crosses `/`) matches, in natural order."""
    return sorted((name for name in names if fnmatchcase(name, glob)), key=natural_key)


def near_misses(wanted: str, names: Iterable[str], limit: int = 3) -> list[str]:
    """Up to `limit` of `names` that someone who typed `wanted` probably meant, likeliest first.

    A glob is compared by its literal text. A forgotten or wrong domain does not hide the slug that was
    meant, and the beginning of a name, or one of its words ("squeezenet"), is enough.
    """
    pool = sorted(set(names), key=natural_key)
    literal = re.sub(r"[*?\[\]]+", "", wanted).lower()
    if not literal:
        return pool[:limit]
    likely = [(_resemblance(literal, name.lower()), -rank, name) for rank, name in enumerate(pool)]
    return [name for score, _, name in sorted(likely, reverse=True)[:limit] if score >= _LIKELY]


def _resemblance(typed: str, name: str) -> float:
    """From 0 to 1: of the whole names, of their slugs, or a little less of the beginning of the slug."""
    slug, own = typed.rpartition("/")[2], name.rpartition("/")[2]
    if not slug:
        return _ratio(typed, name)
    word = _SURE if f"-{slug}-" in f"-{own}-" else 0.0
    return max(_ratio(typed, name), _ratio(slug, own), 0.95 * _ratio(slug, own[: len(slug)]), word)


def _ratio(a: str, b: str) -> float:
    return difflib.SequenceMatcher(None, a, b, autojunk=False).ratio()


def suggestion(wanted: str, names: Iterable[str]) -> str:
    """One sentence: the near misses of `wanted`, or what there is, or that there is nothing."""
    pool = list(names)
    if not pool:
        return "None is registered."
    if glob := _glob_of_near_domain(wanted, pool):
        return f"Did you mean {glob!r}?"
    close = near_misses(wanted, pool)
    if close:
        return "Did you mean " + " or ".join(repr(name) for name in close) + "?"
    domain, slash, _ = wanted.partition("/")
    own = [name for name in pool if slash and name.startswith(f"{domain}/")]
    some = sorted(own or pool, key=natural_key)
    shown = ", ".join(repr(name) for name in some[:5])
    return f"There are {len(some)}: {shown}, ..." if len(some) > 5 else f"Known: {shown}."


def _glob_of_near_domain(wanted: str, pool: list[str]) -> str:
    """The glob `wanted` with the domain that was probably meant, if names match it then."""
    domain, _, rest = wanted.partition("/")
    known = {name.partition("/")[0] for name in pool if "/" in name}
    close = difflib.get_close_matches(domain, known, n=1) if rest and is_glob(rest) else []
    glob = f"{close[0]}/{rest}" if close else ""
    return glob if match(pool, glob) else ""


def check_known(kind: str, wanted: Iterable[str], names: Iterable[str]) -> None:
    """Refuse a name that is none of `names`.

    Raises:
        ConfigError: the first such name, of which `kind` says what it names, and what was probably meant.
    """
    known = list(names)
    for one in wanted:
        if one not in known:
            raise ConfigError(f"Unknown {kind} {one!r}. {suggestion(one, known)}")
