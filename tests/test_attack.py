"""The attack suite's own eyes: it counts what it should, and a reader that is wrong does not pass."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from tests.attack import bundles, kills, readers
from tests.attack.tally import Lost, Tally, Wrong
from zoo.shared.errors import FormatError
from zoo.shared.store.formats import load_packed

ROOT = Path(__file__).parents[1]


def test_the_readme_states_the_counts_of_the_last_long_run() -> None:
    result = json.loads((ROOT / "benchmarks" / "results" / "attack.json").read_text(encoding="utf-8"))
    total, text = result["total"], (ROOT / "README.md").read_text(encoding="utf-8")
    stated = ", ".join(
        f"{total[count]:,} {words}"
        for count, words in [
            ("tried", "tried"),
            ("refused", "refused by name"),
            ("served", "served bit for bit"),
            ("crashed", "crashed"),
            ("wrong", "wrong"),
            ("lost", "lost"),
        ]
    )
    assert stated in text and result["command"] in text
    assert total["crashed"] == total["wrong"] == total["lost"] == 0


def _raise(error: Exception) -> None:
    raise error


def test_every_end_is_counted() -> None:
    tally = Tally()
    for error in (FormatError("damaged"), ValueError("raw"), Wrong("other"), Lost("gone"), MemoryError()):
        tally.attempt("x", _raise, error)
    tally.attempt("x", int)
    counts = (tally.tried, tally.refused, tally.served, tally.crashed, tally.wrong, tally.lost, tally.failed)
    assert counts == (6, 1, 1, 2, 1, 1, 4)
    assert [note.split(":")[0] for note in tally.notes] == ["crashed", "wrong", "lost", "crashed"]


def test_a_reader_that_is_wrong_is_noticed(tmp_path, monkeypatch) -> None:
    def other(path):
        contents = load_packed(path)
        contents.tensors["bias"][0] += 1
        return contents

    assert readers.attack(1.0, 1, tmp_path, tmp_path / "t.json").failed == 0
    monkeypatch.setattr(readers, "load_packed", other)
    assert readers.attack(1.0, 1, tmp_path, tmp_path / "t.json").wrong > 0


def test_a_writer_that_is_not_atomic_is_noticed(tmp_path) -> None:
    path = tmp_path / "f"

    def write(number: int) -> None:
        path.unlink(missing_ok=True)
        path.write_bytes(bytes([number]) * 2_000_000)

    def read() -> int:
        values = set(path.read_bytes())
        if len(values) != 1:
            raise Wrong("a mixture")
        return values.pop()

    tally = Tally()
    for seed in range(30):
        tally.attempt("kill", kills._kill, write, read, random.Random(seed))
    assert tally.wrong + tally.lost > 0


@pytest.mark.parametrize("seed", range(3))
def test_arguments_are_changed_at_any_depth(seed) -> None:
    args = {"a": 1, "b": {"c": [1, 2, {"d": 3}]}}
    bundles._change(args, random.Random(seed))
    assert args != {"a": 1, "b": {"c": [1, 2, {"d": 3}]}}
