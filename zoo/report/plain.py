"""Text of others, such as a card's, without what would steer the terminal or page that shows it."""

from __future__ import annotations

import unicodedata

# Control characters (line break and tab apart), and marks that turn the direction of writing, so that other
# letters are seen than a text has. U+007F to U+009F hold the one-byte forms of escape sequences.
_CONTROL = [*range(0x20), *range(0x7F, 0xA0)]
_DIRECTION = [0x061C, 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A)]
_TABLE = {code: None for code in _CONTROL + _DIRECTION if chr(code) not in "\n\t"}


# What the zoo itself prints and ASCII lacks.
_ASCII = {"±": "+-", "–": "-", "─": "-", "×": "x", "…": "...", "≥": ">=", "≤": "<="}


def as_ascii(error: UnicodeError) -> tuple[str, int]:
    """Handler of `codecs.register_error`: what is closest among the characters that every stream has."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    found = error.object[error.start : error.end]
    return "".join(_ASCII.get(one) or _base(one) for one in found), error.end


def _base(letter: str) -> str:
    bare = unicodedata.normalize("NFKD", letter).encode("ascii", "ignore").decode()
    return bare or "?"


def plain(text: str) -> str:
    """The text without control characters and marks of direction; line breaks and tabs stay."""
    return text.translate(_TABLE)
