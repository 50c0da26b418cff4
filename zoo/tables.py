"""Tables of $ZOO_DATA (`tables/`, `ctr/`): ratings of films, census rows, clicks on advertisements.

Licences: Adult is UCI's (CC BY 4.0); FilmTrust (Guo, Zhang, Yorke-Smith, IJCAI 2013) and Criteo's sample
state none, so no file of them is part of the zoo.
"""

from __future__ import annotations

import csv
import gzip
import io
import os
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from zoo.errors import MissingDataError

NUMERIC = ("age", "fnlwgt", "education-num", "capital-gain", "capital-loss", "hours-per-week")
ADULT_TRAIN = 32_561  # the usual training part comes first


class Ratings(NamedTuple):
    """What users gave to items: `users`, `items` from 0, `values` in stars; each pair once."""

    users: Int[np.ndarray, " n"]
    items: Int[np.ndarray, " n"]
    values: Float[np.ndarray, " n"]

    @property
    def shape(self) -> tuple[int, int]:
        """Users and items."""
        return int(self.users.max()) + 1, int(self.items.max()) + 1


class Clicks(NamedTuple):
    """Rows of categories with a label: `fields` [n, fields] of codes from 0, `sizes` [fields] of the
    vocabularies, `labels` of 0 and 1, `train` where a row is of the training part."""

    fields: Int[np.ndarray, "n fields"]
    sizes: Int[np.ndarray, " fields"]
    labels: Int[np.ndarray, " n"]
    train: Bool[np.ndarray, " n"]


def table_file(place: str) -> Path:
    """A file below $ZOO_DATA.

    Raises:
        DataError: ZOO_DATA is not set, or the file is not in it.
    """
    path = Path(os.environ.get("ZOO_DATA", ""), place)
    if not os.environ.get("ZOO_DATA") or not path.is_file():
        raise MissingDataError(f"{place} is not in ZOO_DATA: put it there, and set ZOO_DATA to the folder")
    return path


def _rows(place: str) -> list[dict[str, str]]:
    path = table_file(place)
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return list(csv.DictReader(io.StringIO(raw.decode())))


def _codes(values: list[str]) -> Int[np.ndarray, " n"]:
    return np.unique(values, return_inverse=True)[1].astype(np.int64)


@cache
def filmtrust() -> Ratings:
    """FilmTrust: 35,494 ratings of 2,071 films by 1,508 users, 0.5 to 4 stars; of a repeated pair the last.

    Raises:
        DataError: the file is not at hand.
    """
    last = {(row["user"], row["item"]): float(row["rating"]) for row in _rows("tables/filmtrust.csv.gz")}
    users, items = zip(*last, strict=True)
    return Ratings(_codes(list(users)), _codes(list(items)), np.array(list(last.values())))


def _quantiles(values: list[str], bins: int, known: Bool[np.ndarray, " n"]) -> list[str]:
    """Numbers as the number of the quantile they lie in, of those marked as known; missing ones as "?"."""
    numbers = np.array([float(v) if v not in ("", "?") else np.nan for v in values])
    edges = np.unique(np.nanquantile(numbers[known], np.arange(1, bins) / bins))
    return [
        "?" if np.isnan(v) else str(b) for v, b in zip(numbers, np.searchsorted(edges, numbers), strict=True)
    ]


def clicks_of(
    columns: dict[str, list[str]],
    labels: list[int],
    train: Bool[np.ndarray, " n"],
    numeric: tuple[str, ...],
    bins: int = 20,
    least: int = 1,
) -> Clicks:
    """Categories of columns of text: numeric ones by quantiles of the training part, values that it has fewer
    than `least` times as one category."""
    fields, sizes = [], []
    for name, values in columns.items():
        cells = np.array(_quantiles(values, bins, train) if name in numeric else values)
        seen, counts = np.unique(cells[train], return_counts=True)
        frequent = np.isin(cells, seen[counts >= least])
        codes = np.where(frequent, np.searchsorted(seen[counts >= least], cells), (counts >= least).sum())
        fields.append(codes.astype(np.int64))
        sizes.append(int((counts >= least).sum()) + 1)
    return Clicks(np.stack(fields, 1), np.array(sizes), np.array(labels), train)


@cache
def adult() -> Clicks:
    """UCI Adult: 48,842 people in 14 fields (numbers in 20 quantiles), label: income above 50,000 dollars;
    the usual training part of 32,561.

    Raises:
        DataError: the file is not at hand.
    """
    rows = _rows("tables/adult.csv.gz")
    columns = {name: [row[name] for row in rows] for name in rows[0] if name != "income"}
    train = np.arange(len(rows)) < ADULT_TRAIN
    return clicks_of(columns, [int(row["income"] == ">50K") for row in rows], train, NUMERIC)


@cache
def criteo() -> Clicks:
    """1,999 rows of Criteo's contest in 13 numeric and 26 categorical fields, label: click; every fifth row
    is for testing. To try a pipeline with: far too few to learn from.

    Raises:
        DataError: the file is not at hand.
    """
    rows = _rows("ctr/criteo_train_tiny.csv")
    names = [name for name in rows[0] if name not in ("Id", "Label")]
    columns = {name: [row[name] for row in rows] for name in names}
    train = np.arange(len(rows)) % 5 != 4
    numeric = tuple(name for name in names if name.startswith("I"))
    return clicks_of(columns, [int(row["Label"]) for row in rows], train, numeric, bins=10, least=4)
