"""Tables: codes, quantiles, rare values, the files where they are at hand."""

from __future__ import annotations

import os

import numpy as np
import pytest

from zoo import tables
from zoo.errors import DataError


def test_codes_of_columns_by_hand() -> None:
    train = np.array([True, True, True, True, False])
    columns = {"age": ["1", "2", "3", "?", "9"], "job": ["b", "a", "b", "a", "c"]}
    found = tables.clicks_of(columns, [0, 1, 0, 1, 0], train, ("age",), bins=2)
    # Halves of 1, 2, 3: up to 2, and above; "?" is a value of its own, "c" is not in the training part.
    assert found.fields.tolist() == [[0, 1], [0, 0], [1, 1], [2, 0], [1, 2]]
    assert found.sizes.tolist() == [4, 3]
    rare = tables.clicks_of({"job": ["a", "a", "b", "a", "a"]}, [0] * 5, train, (), least=2)
    assert rare.fields[:, 0].tolist() == [0, 0, 1, 0, 0] and rare.sizes.tolist() == [2]


@pytest.mark.skipif(not os.environ.get("ZOO_DATA"), reason="reads tables of ZOO_DATA")
def test_the_tables() -> None:
    ratings = tables.filmtrust()
    assert ratings.shape == (1508, 2071) and len(ratings.values) == 35_494
    assert ratings.values.min() == 0.5 and ratings.values.max() == 4
    clicks = tables.criteo()
    assert clicks.fields.shape == (1999, 39) and clicks.train.sum() == 1600
    assert (clicks.fields < clicks.sizes).all() and (clicks.fields >= 0).all()


def test_a_missing_table_is_refused(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("ZOO_DATA", str(tmp_path))
    with pytest.raises(DataError, match=r"tables/adult.csv.gz is not in ZOO_DATA"):
        tables.table_file("tables/adult.csv.gz")
