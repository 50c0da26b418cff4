"""The texts of the zoo as documents, each split by document into training, validation and test.

- `embedded`: seven plays of Shakespeare, packaged with this module (public domain); needs no file and no
  network, and is the same everywhere.
- `shakespeare`: nine plays, from `$ZOO_DATA/text/tinyshakespeare.txt`; the same validation and test plays.
- `tinystories`: the stories of `$ZOO_DATA/text/tinystories-2MiB.txt`.
- `wikitext2`: articles of WikiText-2 (`wiki.valid.txt`, `wiki.test.txt`). Its training part is not among the
  files, so that the validation part is what a model here may be trained on; the test part is the usual one.

No document is in two splits: plays, stories and articles are never cut across splits, and repeated documents
are dropped.
"""

from __future__ import annotations

import functools
import json
import lzma
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from zoo.errors import DataError, MissingDataError, UnknownNameError
from zoo.names import suggestion
from zoo.shared.store.io import sha256_file

EMBEDDED = Path(__file__).parent / "texts" / "shakespeare.txt.xz"

# First words of each play in tinyshakespeare, in the order of the file, which names no play.
_PLAYS = {
    "Coriolanus": "First Citizen:\nBefore we proceed any further",
    "Richard III": "GLOUCESTER:\nNow is the winter of our discontent",
    "Richard II": "KING RICHARD II:\nOld John of Gaunt",
    "Romeo and Juliet": "SAMPSON:\nGregory, o' my word",
    "Henry VI, part 3": "WARWICK:\nI wonder how the king escaped our hands",
    "The Winter's Tale": "ARCHIDAMUS:\nIf you shall chance",
    "Measure for Measure": "DUKE VINCENTIO:\nEscalus.",
    "The Taming of the Shrew": "LUCENTIO:\nTranio, since for the great desire",
    "The Tempest": "Master:\nBoatswain!",
}
_VALIDATION, _TEST = "The Tempest", "The Taming of the Shrew"
# Two plays are left out of the packaged text, which thus takes less than 300 KB.
_NOT_EMBEDDED = ("The Winter's Tale", "Measure for Measure")
_BETWEEN_PLAYS = "\n\f\n"
_PASSAGE = 2000  # characters after which a passage of a play ends, at the next speech

_SHA256 = {
    "tinyshakespeare.txt": "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    "tinystories-2MiB.txt": "5352b299dcb1a32898b2d779b145b5a05f3e1265953fd21c264c9f9f9c9ae33d",
    "wiki.test.txt": "d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0",
    "wiki.valid.txt": "f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8",
}


@dataclass(frozen=True)
class Corpus:
    """A text split by document, and what a card says of it."""

    name: str
    title: str
    origin: str
    licence: str
    train: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]

    def split(self, name: str) -> tuple[str, ...]:
        """The documents of a split."""
        if name not in ("train", "validation", "test"):
            raise DataError(f"There are the splits train, validation and test. Received: {name!r}.")
        documents: tuple[str, ...] = getattr(self, name)
        return documents


def corpus(name: str) -> Corpus:
    """The text of that name, or of a .txt or .jsonl file (see `read_documents`).

    Of every twenty documents of a file the first is for testing, the eleventh for validation.

    Raises:
        UnknownNameError: there is none.
        DataError: its file is not there, cannot be read or, of a known text, is not the known one.
    """
    if name in _READERS:
        return _known(name)
    if Path(name).suffix in (".txt", ".jsonl"):
        found = read_documents(name)
        train = tuple(one for index, one in enumerate(found) if index % 20 not in (0, 10)) or tuple(found)
        return Corpus(name, name, name, "not stated", train, tuple(found[10::20]), tuple(found[::20]))
    raise UnknownNameError(
        f"Unknown text {name!r}. {suggestion(name, _READERS)} A file's name ends in .txt or .jsonl."
    )


@functools.cache
def _known(name: str) -> Corpus:
    return _READERS[name]()


def read_documents(path: str | os.PathLike[str]) -> list[str]:
    """The documents of a UTF-8 file.

    A .jsonl file has one object with the key `text` on each line. Those of a .txt file are separated by
    `<|endoftext|>`; without any, paragraphs are joined to passages of about two thousand characters.

    Raises:
        DataError: a file that cannot be read, or that holds no document.
    """
    try:
        content = Path(path).read_text(encoding="utf-8")
        if Path(path).suffix == ".jsonl":
            texts = [json.loads(line)["text"] for line in content.splitlines() if line.strip()]
        else:
            texts = content.split("<|endoftext|>") if "<|endoftext|>" in content else _passages(content)
    except FileNotFoundError as error:
        raise DataError(f"{path}: there is no such file.") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} cannot be read as UTF-8 text: {error or type(error).__name__}. Give a .txt file in "
            'UTF-8, or a .jsonl file whose lines are objects with "text".'
        ) from error
    if not (found := [text.strip() for text in texts if str(text).strip()]):
        raise DataError(f"{path} holds no text.")
    return found


def words(document: str) -> int:
    """Words of a document: what stands between blanks. The unit of word-level perplexity."""
    return len(document.split())


def pack_embedded(text: str) -> bytes:
    """The packaged text out of all of tinyshakespeare."""
    kept = [play for title, play in _split_plays(text).items() if title not in _NOT_EMBEDDED]
    return lzma.compress(_BETWEEN_PLAYS.join(kept).encode(), preset=9 | lzma.PRESET_EXTREME)


def _embedded() -> Corpus:
    titles = [title for title in _PLAYS if title not in _NOT_EMBEDDED]
    texts = lzma.decompress(EMBEDDED.read_bytes()).decode().split(_BETWEEN_PLAYS)
    return _plays(
        "embedded", "Seven plays of Shakespeare, packaged with the zoo", dict(zip(titles, texts, strict=True))
    )


def _shakespeare() -> Corpus:
    return _plays(
        "shakespeare",
        "Nine plays of Shakespeare (tinyshakespeare)",
        _split_plays(_read("tinyshakespeare.txt")),
    )


def _plays(name: str, title: str, plays: dict[str, str]) -> Corpus:
    passages = {play: tuple(_passages(text)) for play, text in plays.items()}
    train = [passage for play in passages if play not in (_VALIDATION, _TEST) for passage in passages[play]]
    return Corpus(
        name,
        title,
        "karpathy/char-rnn data/tinyshakespeare (plays by William Shakespeare)",
        "public domain",
        tuple(train),
        passages[_VALIDATION],
        passages[_TEST],
    )


def _split_plays(text: str) -> dict[str, str]:
    starts = [text.find(opening) for opening in _PLAYS.values()]
    if -1 in starts or starts != sorted(starts):
        raise DataError(
            "tinyshakespeare.txt lacks the opening of a play; fetch karpathy/char-rnn's file again."
        )
    ends = [*starts[1:], len(text)]
    return {title: text[start:end].strip() for title, start, end in zip(_PLAYS, starts, ends, strict=True)}


def _passages(play: str) -> list[str]:
    """A play as runs of whole speeches of about `_PASSAGE` characters."""
    passages: list[list[str]] = [[]]
    for speech in play.split("\n\n"):
        if sum(map(len, passages[-1])) >= _PASSAGE:
            passages.append([])
        passages[-1].append(speech)
    return ["\n\n".join(speeches) for speeches in passages]


def _tinystories() -> Corpus:
    """Of every twenty stories the first is for testing, the eleventh for validation; the last is cut off."""
    found = [story.strip() for story in _read("tinystories-2MiB.txt").split("<|endoftext|>")[:-1]]
    stories = list(dict.fromkeys(story for story in found if story))
    return Corpus(
        "tinystories",
        "TinyStories (2 MiB excerpt; every twentieth story held out for testing)",
        "gusjengis/toy-RNN data/tinystories_sample.txt, from roneneldan/TinyStories",
        "not stated there (data set: CDLA-Sharing-1.0)",
        tuple(story for index, story in enumerate(stories) if index % 20 not in (0, 10)),
        tuple(stories[10::20]),
        tuple(stories[::20]),
    )


def _wikitext2() -> Corpus:
    """Of every ten articles of the validation part the tenth is held out."""
    articles = _articles(_read("wiki.valid.txt"))
    return Corpus(
        "wikitext2",
        "WikiText-2 (trained on its validation part, tested on its test part)",
        "pytorch/examples word_language_model/data/wikitext-2",
        "CC BY-SA 3.0 (Wikipedia)",
        tuple(article for index, article in enumerate(articles) if index % 10 != 9),
        tuple(articles[9::10]),
        tuple(_articles(_read("wiki.test.txt"))),
    )


def _articles(text: str) -> list[str]:
    """Articles begin with a title of one equals sign: ` = Robert Boulter = `."""
    starts = [match.start() for match in re.finditer(r"^ = [^=\n]+ = $", text, re.MULTILINE)]
    ends = [*starts[1:], len(text)]
    return [text[start:end].strip() for start, end in zip(starts, ends, strict=True)]


def _read(file: str) -> str:
    root = os.environ.get("ZOO_DATA")
    path = Path(root or "ZOO_DATA") / "text" / file
    if not root or not path.is_file():
        raise MissingDataError(
            f"{path} is not there. Set ZOO_DATA to the folder of the data; the text `embedded` needs no file."
        )
    if (found := sha256_file(path)) != _SHA256[file]:
        raise DataError(
            f"{path} is not the known text: SHA-256 {found[:16]}... instead of {_SHA256[file][:16]}..."
        )
    return path.read_text(encoding="utf-8")


_READERS: dict[str, Callable[[], Corpus]] = {
    "embedded": _embedded,
    "shakespeare": _shakespeare,
    "tinystories": _tinystories,
    "wikitext2": _wikitext2,
}
