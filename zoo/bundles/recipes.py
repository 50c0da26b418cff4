"""Recipe rows: what the bundles of the zoo are made of, as data beside each domain.

`zoo/<domain>/recipes.yaml` holds groups of bundles that share fields; each bundle is one row:

    groups:
      - from: dense-convnet-digits
        method: bip
        recipe: {epochs: 10, lr: 0.05, batch: 64}
        bundles:
          bip-convnet-digits-s90: {summary: ..., options: {sparsity: 0.9}}
          bip-convnet-digits-s95: {summary: ..., options: {sparsity: 0.95}}

A row's own field replaces the group's; mappings (`options`, `recipe` ...) are merged. Another package adds
rows by the entry-point group `zoo.recipes`: a function that returns the path of such a file, under the name
of the domain.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from zoo.bundles.cardfile import read_yaml
from zoo.errors import ConfigError, UnknownNameError
from zoo.names import DOMAINS, is_model_name, match, suggestion
from zoo.registry import RECIPES

FILE = "recipes.yaml"
_MERGED = ("options", "recipe", "arguments", "data")


@dataclass(frozen=True)
class Row:
    """How one bundle is made. In the file `source` is called `from`, and slugs stand without the domain.

    Attributes:
        name: `domain/slug`.
        summary, citation, data, license: for the card; `data` has name, source and licence.
        maker: registered function that makes the model of one seed, see `zoo.bundles.make`.
        method: registered method; `dense` for none.
        source: name of the model to start from.
        start: whether every seed starts from the stored model, or from the source's own training with it.
        twin: name of the dense twin; by default that of the source, or the source itself.
        architecture, arguments: what is built, where there is no source.
        dataset: what it is trained on.
        options: of the method or the maker.
        recipe: epochs, rate, batch ...: how it is trained.
        seeds: how many, from 0; the first one's model is stored.
        figures: task, metrics and protocol of what is measured; by default what is on the twin's card.
        dtype: precision of the stored weights; by default that of training. A model whose class says
            `full_precision = True` computes on them in float32.
        share: whether only what differs from the source is stored.
        imported: the published file from which the weights are read (`zoo.bundles.card.Imported`).
        evidence: file of this repository that collects the values of every seed.
        formerly: slugs that the bundle had before; they go on finding it.
    """

    name: str
    summary: str
    citation: str
    data: Mapping[str, str] = field(default_factory=dict)
    license: str = "Apache-2.0"
    maker: str = "sparsify"
    method: str = "dense"
    source: str | None = None
    start: Literal["stored", "trained"] = "stored"
    twin: str | None = None
    architecture: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    dataset: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    seeds: int = 1
    figures: tuple[Mapping[str, Any], ...] = ()
    dtype: Literal["float16", "bfloat16", "float32"] | None = None
    share: bool = False
    imported: Mapping[str, str] | None = None
    evidence: str | None = None
    formerly: tuple[str, ...] = ()

    @property
    def domain(self) -> str:
        return self.name.partition("/")[0]

    @property
    def slug(self) -> str:
        return self.name.partition("/")[2]

    def method_options(self) -> dict[str, Any]:
        """The options as a method takes them: lists of the file are tuples."""
        return {key: tuple(one) if isinstance(one, list) else one for key, one in self.options.items()}

    def identity(self) -> dict[str, Any]:
        """What decides the weights of a seed, but for the source."""
        shown = ("maker", "method", "start", "architecture", "arguments", "dataset", "options", "recipe")
        found = {key: getattr(self, key) for key in shown}
        return found if self.imported is None else found | {"imported": dict(self.imported)}


@functools.cache
def rows() -> dict[str, Row]:
    """All rows by name: those of the domains, then those of other packages.

    Raises:
        ConfigError: a file that is malformed, or a bundle that has two rows.
    """
    found: dict[str, Row] = {}
    for domain, path in _files():
        for row in read_rows(path, domain):
            if row.name in found:
                raise ConfigError(f"{path}: {row.name} has a row already; give each bundle one")
            found[row.name] = row
    return found


def find_row(name: str) -> Row:
    """The row of a bundle, by the name that it has or had.

    Raises:
        UnknownNameError: there is none.
    """
    known = rows()
    if name in known:
        return known[name]
    for row in known.values():
        if name in row.formerly:
            return row
    raise UnknownNameError(f"No recipe makes {name!r}. {suggestion(name, known)}")


def select_rows(globs: tuple[str, ...]) -> list[Row]:
    """The rows that names and globs match, each once, sources and twins before what is made from them.

    Raises:
        UnknownNameError: a name or glob that matches no row.
    """
    known = rows()
    names: list[str] = []
    for glob in globs:
        if matched := match(known, glob):
            names.extend(matched)
        else:
            names.append(find_row(glob).name)
    chosen = [known[name] for name in dict.fromkeys(names)]
    return sorted(chosen, key=depth)


def depth(row: Row) -> int:
    """How many rows lie before this one: its source's, its twin's."""
    before = [rows()[name] for name in (row.source, row.twin) if name is not None and name in rows()]
    return 1 + max(map(depth, before), default=-1)


def read_rows(path: Path, domain: str) -> list[Row]:
    """The rows of a file.

    Raises:
        ConfigError: an unknown or missing field, or one of another type.
        CardError: no plain YAML.
    """
    groups = read_yaml(path).get("groups")
    if not isinstance(groups, list):
        raise ConfigError(f"{path}: expected a list under `groups`, received {type(groups).__name__}")
    return [row for group in groups for row in _group(group, path, domain)]


def _group(group: Any, path: Path, domain: str) -> Iterator[Row]:
    if not isinstance(group, dict) or not isinstance(group.get("bundles"), dict):
        raise ConfigError(f"{path}: each group needs a mapping `bundles` from slugs to their fields")
    shared = {key: value for key, value in group.items() if key != "bundles"}
    for slug, own in group["bundles"].items():
        yield _row(f"{domain}/{slug}", {**shared, **_merged(shared, own or {})}, path)


def _merged(shared: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """A row's fields, mappings with what the group has besides."""
    return {k: {**shared.get(k, {}), **v} if k in _MERGED else v for k, v in own.items()}


def _row(name: str, fields: dict[str, Any], path: Path) -> Row:
    if not is_model_name(name):
        raise ConfigError(f"{path}: {name!r} is no legal name of a bundle")
    domain = name.partition("/")[0]
    if "from" in fields:
        fields["source"] = fields.pop("from")
    for key in ("source", "twin"):
        if key in fields:
            fields[key] = f"{domain}/{fields[key]}"
    known = {one.name: one for one in dataclasses.fields(Row)}
    if unknown := fields.keys() - known.keys():
        word = sorted(unknown)[0]
        raise ConfigError(f"{path}: {name} has an unknown field {word!r}. {suggestion(word, known)}")
    if missing := [key for key in ("summary", "citation") if key not in fields]:
        raise ConfigError(f"{path}: {name} lacks {missing[0]!r}")
    if "figures" in fields:
        fields["figures"] = tuple(fields["figures"])
    fields["formerly"] = tuple(f"{domain}/{slug}" for slug in fields.get("formerly", ()))
    return Row(name=name, **fields)


def _files() -> Iterator[tuple[str, Path]]:
    for domain in DOMAINS:
        path = Path(__file__).parents[1] / domain / FILE
        if path.is_file():
            yield domain, path
    for domain in RECIPES.names():
        yield domain, Path(RECIPES.get(domain)())
