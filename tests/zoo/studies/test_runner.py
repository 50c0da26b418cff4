"""Running a study of another package: results on disk, resuming, judging again."""

from __future__ import annotations

import ast
import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from zoo.errors import ConfigError, DataError, UnknownNameError
from zoo.registry import STUDIES
from zoo.report.plots import in_palette, png
from zoo.studies.options import StudyOptions
from zoo.studies.runner import command_of, get_study, judge_again, reproduce
from zoo.studies.tables import Plot, Series, Table

TOY = Path(__file__).parent / "toy_study.py"


def test_a_ragged_table_is_refused():
    with pytest.raises(ConfigError, match="2 columns, but a row of 1"):
        Table("t", ["a", "b"], [[1]])


def test_a_study_of_a_package_is_one_table():
    tree = ast.parse(TOY.read_text())
    study = next(n for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id == "STUDY")
    assert study.end_lineno - study.lineno < 20


def test_reproduce_writes_json_markdown_and_pictures(study_of_arithmetic, tmp_path):
    steps = []
    done = reproduce("arithmetic", out=tmp_path, progress=lambda *step: steps.append(step), seeds=3)
    names = ["arithmetic.json", "arithmetic-accuracy.png", "arithmetic.md"]
    assert [path.name for path in done.files] == names
    written = json.loads((tmp_path / "arithmetic.json").read_text())
    assert written["config"] == {"levels": [0.5, 0.9], "seeds": 3}
    assert written["command"] == "zoo reproduce arithmetic --seeds 3"
    assert written["cells"] == {"from_cache": 0, "computed": 18} and len(written["result"]["rows"]) == 18
    for cell in written["provenance"]["cells"].values():  # where every cell came from
        assert cell["code"] and cell["seconds"] >= 0 and cell["machine"] == 0 and "commit" in cell
    assert "torch" in written["provenance"]["machines"][0]
    assert [v["verdict"] for v in written["result"]["verdicts"]] == ["holds"] * 2 + ["does not hold"] * 2
    assert (tmp_path / "arithmetic-accuracy.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "arithmetic.md").read_text()
    assert "| claim | published | measured | verdict |" in text
    assert "](arithmetic-accuracy.png)" in text and "zoo reproduce arithmetic --seeds 3" in text
    assert len(steps) == 18
    again = reproduce("arithmetic", out=tmp_path, seeds=3)
    assert again.result == done.result
    assert json.loads((tmp_path / "arithmetic.json").read_text())["cells"]["computed"] == 0


def test_rows_are_judged_again_without_measuring(study_of_arithmetic, tmp_path):
    done = reproduce("arithmetic", out=tmp_path, seeds=3)
    path = tmp_path / "arithmetic.json"
    stored = json.loads(path.read_text())
    stored["result"]["verdicts"] = []
    for row in stored["result"]["rows"]:
        if row["arm"] == "ours":
            row["accuracy"] -= 0.6  # as if ours had been below chance
    stored["result"]["tables"].append({"title": "By hand", "columns": ["a"], "rows": [[1]], "note": ""})
    path.write_text(json.dumps(stored))
    judged = judge_again(path)
    assert [v.verdict for v in judged.result.verdicts][:2] == ["does not hold"] * 2
    assert [t.title for t in judged.result.tables] == ["Accuracy (%)", "By hand"]
    written = json.loads(path.read_text())
    assert written["created"] == stored["created"] and written["judged"] >= written["created"]
    assert written["provenance"] == stored["provenance"] and judged.options == done.options
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(DataError, match="no result of a study"):
        judge_again(tmp_path / "x.json")


def test_rows_that_were_measured_later_are_added(study_of_arithmetic, tmp_path):
    first = reproduce("arithmetic", out=tmp_path / "a", seeds=2, levels=(0.5,)).files[0]
    later = reproduce("arithmetic", out=tmp_path / "b", seeds=2, levels=(0.9,)).files[0]
    done = judge_again(first, more=later)
    whole = reproduce("arithmetic", out=tmp_path / "c", seeds=2, levels=(0.5, 0.9))
    assert done.options == whole.options and done.result.verdicts == whole.result.verdicts
    written = json.loads(first.read_text())
    assert [one["command"] for one in written["added"]] == ["zoo reproduce arithmetic --levels 0.9"]
    assert "zoo reproduce arithmetic --levels 0.9" in (tmp_path / "a" / "arithmetic.md").read_text()
    with pytest.raises(DataError, match="measured dense, 0.9, 0 again"):
        judge_again(first, more=later)
    assert json.loads(first.read_text()) == written
    changed = json.loads(later.read_text())
    for row in changed["result"]["rows"]:
        row["accuracy"] += 1.0
    later.write_text(json.dumps(changed))
    rows = judge_again(first, more=later, replace=True).result.rows
    new = {row["accuracy"] for row in changed["result"]["rows"]}
    assert len(rows) == len(whole.result.rows)
    assert {row["accuracy"] for row in rows if row["level"] == 0.9 and row["arm"] != "dense"} <= new


@dataclass(frozen=True)
class MoreSeeds(StudyOptions):
    levels: tuple[float, ...] = (0.5,)


def test_further_seeds_are_measured_alone_and_joined(study_of_arithmetic, tmp_path, monkeypatch):
    study = dataclasses.replace(study_of_arithmetic, options=MoreSeeds)
    monkeypatch.setitem(STUDIES._entries, "arithmetic", study)
    first = reproduce("arithmetic", out=tmp_path / "a", seeds=2).files[0]
    later = reproduce("arithmetic", out=tmp_path / "b", seeds=4, from_seed=2, cells=tmp_path / "other")
    assert {row["seed"] for row in later.result.rows} == {2, 3}
    done = judge_again(first, more=later.files[0])
    whole = reproduce("arithmetic", out=tmp_path / "c", seeds=4)
    assert done.options == whole.options == MoreSeeds(seeds=4)
    assert done.result.verdicts == whole.result.verdicts
    assert json.loads((tmp_path / "c" / "arithmetic.json").read_text())["cells"]["from_cache"] == 6
    written = json.loads(first.read_text())
    assert written["command"] == "zoo reproduce arithmetic --seeds 4"
    assert written["added"][0]["command"] == "zoo reproduce arithmetic --seeds 4 --from-seed 2"


def test_wrong_requests(study_of_arithmetic, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="no option 'seed'; it has: levels, seeds"):
        reproduce("arithmetic", out=tmp_path, seed=1)
    with pytest.raises(ConfigError, match="takes a Options"):
        reproduce("arithmetic", object(), out=tmp_path)
    with pytest.raises(ConfigError, match="not both"):
        reproduce("arithmetic", study_of_arithmetic.options(), out=tmp_path, seeds=1)
    with pytest.raises(UnknownNameError, match="arithmetic"):
        get_study("arithmetik")
    monkeypatch.setitem(STUDIES._entries, "wrong", TOY)
    with pytest.raises(ConfigError):
        get_study("wrong")


def test_the_command_names_what_is_not_the_default(study_of_arithmetic):
    options = study_of_arithmetic.options(levels=(0.5, 0.75))
    assert command_of(study_of_arithmetic, options) == "zoo reproduce arithmetic --levels 0.5 0.75"


def test_killed_and_run_again(study_of_arithmetic, study_environment, tmp_path, monkeypatch):
    """kill -9 between cells: the second run computes the rest and finds what an uninterrupted run finds."""
    log = tmp_path / "log"
    command = [sys.executable, "-m", "zoo", "reproduce", "arithmetic", "--seeds", "1"]
    command += ["--results", str(tmp_path / "r")]
    slow = study_environment | {"TOY_LOG": str(log), "TOY_SLEEP": "0.4"}
    process = subprocess.Popen(command, env=slow, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    cells = tmp_path / "zoo-cache" / "cells" / "arithmetic"
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline and len(list(cells.glob("[0-9a-f]*.safetensors"))) < 2:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    finished = len(list(cells.glob("[0-9a-f]*.safetensors")))
    assert 2 <= finished < 6
    assert not (tmp_path / "r").exists()
    log.unlink()
    monkeypatch.setenv("TOY_LOG", str(log))
    resumed = reproduce("arithmetic", out=tmp_path / "r", seeds=1)
    assert log.read_text().count("cell") == 6 - finished
    whole = reproduce("arithmetic", out=tmp_path / "w", cells=tmp_path / "fresh", seeds=1)
    assert resumed.result == whole.result


def test_pictures_are_in_a_palette_and_keep_their_digest() -> None:
    picture = png(Plot("a", "A", "x", "y", [Series("one", [1, 2], [3, 4])]))
    shown = Image.open(io.BytesIO(picture))
    assert shown.mode == "P" and len(shown.info["Plot"]) == 64
    assert len(in_palette(picture)) <= len(picture)
