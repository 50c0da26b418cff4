"""Experiments: cells, results on disk, resuming."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from zoo.errors import ConfigError, UnknownNameError
from zoo.harness.experiments import CellBusy, CellCache, get_experiment, reproduce, share
from zoo.harness.tables import Table
from zoo.registry import EXPERIMENTS


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


@pytest.mark.parametrize("content", [b"", b'{"key"', b"[1]", b"\xff\xfe", b'{"key": {"a": 2}, "value": 1}'])
def test_an_unreadable_or_foreign_cell_is_computed_again(tmp_path, content):
    cells = CellCache(tmp_path)
    cells.put({"a": 1}, "old")
    cells.path({"a": 1}).write_bytes(content)
    assert cells.cell({"a": 1}, lambda: "new") == "new"
    assert cells.get({"a": 1}) == "new"


def test_what_json_can_not_say_is_refused_before_it_is_stored(tmp_path):
    cells = CellCache(tmp_path)
    with pytest.raises(ValueError, match="not JSON compliant"):
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
        "import sys, time; from zoo.harness.experiments import CellCache\n"
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


def test_a_ragged_table_is_refused():
    with pytest.raises(ConfigError, match="2 columns, but a row of 1"):
        Table("t", ["a", "b"], [[1]])


def test_reproduce_writes_json_markdown_and_pictures(toy, tmp_path):
    steps = []
    done = reproduce("toy", out=tmp_path, progress=lambda *step: steps.append(step), seeds=1)
    assert [path.name for path in done.files] == ["toy.json", "toy-accuracy.png", "toy.md"]
    written = json.loads((tmp_path / "toy.json").read_text())
    assert written["config"] == {"seeds": 1, "levels": [0.5, 0.9]}
    assert written["cells"] == {"from_cache": 0, "computed": 2}
    assert len(written["result"]["rows"]) == 2
    assert written["result"]["verdicts"][0]["verdict"] in ("holds", "does not hold")
    assert (tmp_path / "toy-accuracy.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "toy.md").read_text()
    assert "| claim | published | measured | verdict |" in text
    assert "](toy-accuracy.png)" in text and "A note." in text and "zoo reproduce toy" in text
    assert len(steps) == 2
    again = reproduce("toy", out=tmp_path, seeds=1)
    assert again.result == done.result
    assert json.loads((tmp_path / "toy.json").read_text())["cells"] == {"from_cache": 2, "computed": 0}


def test_wrong_requests(toy, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="no option 'seed'; it has: seeds, levels"):
        reproduce("toy", out=tmp_path, seed=1)
    with pytest.raises(ConfigError, match="takes a ToyConfig"):
        reproduce("toy", object(), out=tmp_path)
    with pytest.raises(ConfigError, match="not both"):
        reproduce("toy", toy.ToyConfig(), out=tmp_path, seeds=1)
    with pytest.raises(UnknownNameError, match="toy"):
        get_experiment("tyo")
    monkeypatch.setitem(EXPERIMENTS._entries, "wrong", toy.Finetune)
    with pytest.raises((ConfigError, TypeError)):
        get_experiment("wrong")


def test_killed_and_run_again(toy, toy_environment, tmp_path, monkeypatch):
    """kill -9 between cells: the second run computes the rest and finds what an uninterrupted run finds."""
    log = tmp_path / "log"
    command = [sys.executable, "-m", "zoo", "reproduce", "toy", "--seeds", "3"]
    command += ["--results", str(tmp_path / "r")]
    slow = toy_environment | {"TOY_LOG": str(log), "TOY_SLEEP": "0.4"}
    process = subprocess.Popen(command, env=slow, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    cells = tmp_path / "zoo-cache" / "cells" / "toy"
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline and len(list(cells.glob("[0-9a-f]*.json"))) < 2:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    finished = len(list(cells.glob("[0-9a-f]*.json")))
    assert 2 <= finished < 6
    assert not (tmp_path / "r").exists()
    log.unlink()
    monkeypatch.setenv("TOY_LOG", str(log))
    resumed = reproduce("toy", out=tmp_path / "r", seeds=3)
    assert log.read_text().count("cell") == 6 - finished
    whole = reproduce("toy", out=tmp_path / "w", cells=tmp_path / "fresh", seeds=3)
    assert resumed.result == whole.result
