"""Cells: computed once, checked, shared among processes."""

from __future__ import annotations

import functools
import logging
import os
import subprocess
import sys

import pytest
import torch

from zoo.shared.errors import FormatError
from zoo.studies.cells import CellBusy, CellCache, share


def test_cells_are_computed_once(tmp_path):
    cells, calls = CellCache(tmp_path / "cells"), []

    def compute():
        calls.append(1)
        return {"accuracy": 0.5, "levels": (1, 2)}

    first = cells.cell({"seed": 0, "level": 0.5}, compute)
    again = CellCache(tmp_path / "cells").cell({"level": 0.5, "seed": 0}, compute)
    assert first == again == {"accuracy": 0.5, "levels": [1, 2]}  # what JSON makes of it, also the first time
    assert len(calls) == 1
    assert cells.cell({"seed": 1, "level": 0.5}, compute) and len(calls) == 2
    assert (cells.hits, cells.misses) == (0, 2)


def test_tensors_lie_in_the_cell(tmp_path):
    weights = {"w": torch.arange(5.0)}
    for _ in range(2):
        cells = CellCache(tmp_path)
        value, read = cells.tensors({"a": 1}, lambda: ({"accuracy": 1.0}, weights))
        assert value == {"accuracy": 1.0} and torch.equal(read["w"], weights["w"])
    assert cells.hits == 1


def test_where_a_cell_was_computed_is_kept(tmp_path):
    CellCache(tmp_path).cell({"a": 1}, lambda: 2)
    later = CellCache(tmp_path)
    later.cell({"a": 1}, lambda: 3)
    (made,) = later.used.values()
    assert made["key"] == {"a": 1} and made["seconds"] >= 0 and "torch" in made["machine"]
    assert isinstance(made["commit"], str)


@pytest.mark.parametrize("damage", ["empty", "truncated", "flipped", "foreign"])
def test_a_damaged_cell_is_named_and_computed_again(tmp_path, damage, caplog):
    cells = CellCache(tmp_path)
    cells.put({"a": 1}, "old", tensors={"w": torch.ones(100)})
    path = cells.path({"a": 1})
    raw = path.read_bytes()
    if damage == "foreign":
        cells.put({"a": 2}, "other")
        raw = cells.path({"a": 2}).read_bytes()
    changed = bytearray(raw)
    changed[-3] ^= 4
    shown = {"empty": b"", "truncated": raw[:-20], "flipped": bytes(changed), "foreign": raw}
    path.write_bytes(shown[damage])
    with caplog.at_level(logging.WARNING):
        assert cells.cell({"a": 1}, lambda: "new") == "new"
    assert str(path) in caplog.text and "computed again" in caplog.text
    assert cells.get({"a": 1}) == "new"


def test_what_json_can_not_say_is_refused_before_it_is_stored(tmp_path):
    cells = CellCache(tmp_path)
    with pytest.raises(FormatError, match="no JSON"):
        cells.cell({"a": 1}, lambda: float("nan"))
    assert list(tmp_path.iterdir()) == []


def test_processes_on_one_folder_divide_the_work(tmp_path):
    here, there, order = CellCache(tmp_path), CellCache(tmp_path), []
    there.sharing = True
    claim = there._claim({"cell": 0})
    claim.__enter__()  # another process is computing cell 0 ...

    def make(index):
        def compute():
            order.append(index)
            if index == 2:  # ... and finishes it while this one computes cell 2
                there.put({"cell": 0}, "theirs")
                claim.__exit__(None, None, None)
            return "ours"

        return here.cell({"cell": index}, compute)

    work = [(f"cell {index}", functools.partial(make, index)) for index in range(3)]
    steps = []
    assert share(work, here, lambda *step: steps.append(step)) == ["theirs", "ours", "ours"]
    assert order == [1, 2] and (here.hits, here.misses) == (1, 2)
    assert [step[0] for step in steps] == [1, 2, 3] and steps[-1] == (3, 3, "cell 0")


def test_a_claim_ends_with_its_process(tmp_path):
    code = (
        "import sys, time; from zoo.studies.cells import CellCache\n"
        "cells = CellCache(sys.argv[1]); cells.sharing = True\n"
        "with cells._claim({'cell': 0}):\n    print('claimed', flush=True)\n    time.sleep(60)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, env=environment, text=True
    )
    cells = CellCache(tmp_path)
    cells.sharing = True
    try:
        assert holder.stdout.readline() == "claimed\n"
        with pytest.raises(CellBusy):
            cells.cell({"cell": 0}, lambda: "ours")
    finally:
        holder.kill()
        holder.communicate()
    assert cells.cell({"cell": 0}, lambda: "ours") == "ours"
