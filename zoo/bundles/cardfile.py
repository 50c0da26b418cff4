"""YAML for cards: read without surprises and without danger, written so that a person can read it.

Only what YAML 1.2 calls a plain value is understood: `2:4`, `no` and `2026-01-01` stay the strings that they
look like, and `1e-3` is a number (YAML 1.1 reads 124, False, a date and a string). Aliases, tags, duplicate
keys, deep nesting and large files are refused before anything is built, since a card needs none of them.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import yaml

from zoo.errors import CardError

MAX_BYTES = 256 << 10  # the largest real cards have a few kB
MAX_DEPTH = 16
MAX_TAGS = 1 << 16  # texts whose tags are remembered
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

_STRING, _INTEGER = "tag:yaml.org,2002:str", "tag:yaml.org,2002:int"
_PLAIN = [
    ("tag:yaml.org,2002:null", r"~|null|Null|NULL|", [*"~nN", ""]),
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", [*"tTfF"]),
    (_INTEGER, r"[-+]?[0-9]{1,40}", [*"-+0123456789"]),
    (
        "tag:yaml.org,2002:float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        [*"-+.0123456789"],
    ),
]


class _CardLoader(_Loader):
    """Plain values only. Cards repeat their keys and numbers, so that each text is understood once."""

    yaml_implicit_resolvers: dict[Any, Any] = {}
    tags: dict[tuple[Any, ...], str] = {}

    def resolve(self, *node: Any) -> str:
        """The tag of a node's kind, text and style."""
        found = self.tags.get(node)
        if found is None:
            if len(self.tags) > MAX_TAGS:
                self.tags.clear()
            found = self.tags[node] = str(super().resolve(*node))
        return found


class _CardDumper(yaml.SafeDumper):
    yaml_implicit_resolvers: dict[Any, Any] = {}

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)  # list items stand below their key, not beside it


# Aliases, anchors, tags, and what ends a line for YAML but not for `re`.
_SIGNS = ("*", "&", "!", "\t", "\r", "\x85", "\u2028", "\u2029")
_BEFORE = re.compile(r"^[ ?:-]*", re.MULTILINE)  # what may stand before the first word of a nested block


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
    style = "|" if "\n" in value else None
    if not value.replace("\n", "").isprintable():
        style = '"'  # escaped: the other styles lose U+0085 and its like
    return dumper.represent_scalar(_STRING, value, style=style)


for _tag, _pattern, _first in _PLAIN:
    for _class in (_CardLoader, _CardDumper):
        _class.add_implicit_resolver(_tag, re.compile(rf"(?:{_pattern})\Z"), _first)
_CardDumper.add_representer(str, _text)


def load_yaml(text: str | bytes, source: str) -> dict[str, Any]:
    """Read one YAML mapping of plain values.

    Args:
        text: the document, UTF-8 if bytes.
        source: what it is called in messages, e.g. its path.

    Raises:
        CardError: not UTF-8, not YAML, more than `MAX_BYTES` or `MAX_DEPTH`, an alias, a tag, a duplicate
            key, more than one document, or not a mapping.
    """
    if len(text) > MAX_BYTES:
        raise CardError(f"{source}: {len(text)} bytes, a card has at most {MAX_BYTES}. Is it a card at all?")
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        if not _is_harmless(text):
            _refuse_dangerous(text, source)
        value = _load(text)
    except CardError:
        raise  # a ValueError, too
    except UnicodeDecodeError as error:
        raise CardError(
            f"{source}: not UTF-8 text ({error.reason} at byte {error.start}). Is it a card at all?"
        ) from error
    except yaml.YAMLError as error:
        raise CardError(f"{source}: not a YAML card: {_one_line(error)}.") from error
    except ValueError as error:  # numbers that YAML allows and Python does not
        raise CardError(f"{source}: not a YAML card: {error}.") from error
    if not isinstance(value, dict):
        raise CardError(f"{source}: expected a mapping of fields, received {type(value).__name__}.")
    return value


def read_yaml(path: str | os.PathLike[str], source: str | None = None) -> dict[str, Any]:
    """Read a YAML file as `load_yaml` does, without reading more than its limit; `source` is its path."""
    try:
        with Path(path).open("rb") as file:
            return load_yaml(file.read(MAX_BYTES + 1), source or str(path))
    except OSError as error:
        raise CardError(f"{path}: cannot be read: {error.strerror or error}.") from error


def dump_yaml(value: dict[str, Any]) -> str:
    """Write plain values as YAML that `load_yaml` reads back unchanged, keys in the order given."""
    return yaml.dump(value, Dumper=_CardDumper, sort_keys=False, allow_unicode=True, width=100)


def _load(text: str) -> Any:
    loader = _CardLoader(text)
    try:
        node = loader.get_single_node()
        return None if node is None else _plain(loader, node)
    finally:
        loader.dispose()


def _plain(loader: Any, node: Any) -> Any:
    """The value of a node; PyYAML's own way there, which also serves aliases, takes three times as long."""
    kind = type(node)
    if kind is yaml.ScalarNode:
        if node.tag == _STRING:
            return node.value
        # decimal: the library would read 010 as 8, as YAML 1.1 has it
        return int(node.value) if node.tag == _INTEGER else loader.construct_object(node)
    if kind is yaml.SequenceNode:
        return [_plain(loader, item) for item in node.value]
    found: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        key = _plain(loader, key_node)
        if not isinstance(key, (str, int)) or isinstance(key, bool):
            raise yaml.constructor.ConstructorError(None, None, "a key that is no name", key_node.start_mark)
        if key in found:
            raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} twice", key_node.start_mark)
        found[key] = _plain(loader, value_node)
    return found


def _is_harmless(text: str) -> bool:
    """Whether a text cannot hold what `_refuse_dangerous` looks for, which takes as long as reading it.

    An alias needs `*`, a tag `!`, a collection in brackets `[` or `{`. A nested block begins in a column
    further right, or, as a list below its key, in the same one: no deeper than twice the columns in which
    blocks begin.
    """
    if any(sign in text for sign in _SIGNS):
        return False
    before = set(_BEFORE.findall(text))
    columns = {0} | {len(line) for line in before}
    columns |= {column for line in before for column, sign in enumerate(line) if sign != " "}
    return 2 * len(columns) + text.count("[") + text.count("{") <= MAX_DEPTH


def _refuse_dangerous(text: str, source: str) -> None:
    """Walk over the events, which builds nothing, so that a bomb is met before it goes off."""
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        mark = event.start_mark
        line = f"{source}:{mark.line + 1}" if mark is not None else source
        if isinstance(event, yaml.AliasEvent):
            raise CardError(f"{line}: a YAML alias, which a card may not have. Write the value out.")
        tag = getattr(event, "tag", None)
        if tag is not None:
            raise CardError(f"{line}: a YAML tag {tag!r}, which a card may not have. Write a plain value.")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > MAX_DEPTH:
            raise CardError(f"{line}: nested deeper than {MAX_DEPTH} levels. Is it a card at all?")


def _one_line(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or " ".join(str(error).split())
    return f"{problem} (line {mark.line + 1})" if mark is not None else problem
