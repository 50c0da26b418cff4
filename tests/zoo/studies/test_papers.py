"""The committed verdicts and the table over all papers are what their rows give today."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path

import pytest

from zoo.cli.parsing import parse_with
from zoo.cli.studies import Reproduce
from zoo.report import markdown
from zoo.shared.store.io import read_json
from zoo.studies.papers import NOT_YET, PAPERS, in_short, links, overview, page, results
from zoo.studies.runner import _stored, _typed, get_study
from zoo.studies.tables import Table

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "benchmarks/results"
FILES = [path for path, _ in results(FOLDER)]


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(FOLDER)) for path in FILES])
def test_committed_verdicts_are_those_of_their_rows(path, monkeypatch):
    monkeypatch.chdir(ROOT)  # CHESS reads the results of the decoding benchmark
    stored = read_json(path)
    study = get_study(stored["study"])
    known = {field.name: field for field in dataclasses.fields(study.options)}
    options = study.options(**{k: _typed(v, known[k]) for k, v in stored["config"].items() if k in known})
    made = study.report(stored["result"]["rows"], options)
    shown = json.loads(json.dumps([dataclasses.asdict(verdict) for verdict in made.verdicts]))
    for old, new in zip(stored["result"]["verdicts"], shown, strict=True):
        assert {**old, "p": None} == {**new, "p": None}
        assert old["p"] == (None if new["p"] is None else pytest.approx(new["p"], rel=1e-6))
    text = path.with_suffix(".md").read_text(encoding="utf-8")
    for verdict in made.verdicts:
        assert verdict.claim in text and verdict.measured in text


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(FOLDER)) for path in FILES])
def test_one_arm_alone_is_reported(path, monkeypatch):
    """`zoo reproduce NAME --arms ONE`: whatever compares it with another is left out, and said."""
    monkeypatch.chdir(ROOT)
    study, stored, options = _stored(path)
    rows = stored["result"]["rows"]
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    for arm in {arms[0], arms[len(arms) // 2], arms[-1]}:
        made = study.report([row for row in rows if row["arm"] == arm], options)
        assert all(isinstance(note, str) for note in made.notes)


def test_what_needs_an_arm_that_was_not_run_is_left_out_and_said():
    study, stored, options = _stored(FOLDER / "cfsp.json")
    made = study.report([row for row in stored["result"]["rows"] if row["arm"] == "dense"], options)
    assert made.notes[-1].startswith("Left out: what is made of CFSP, repaired at 0.2")


def test_the_page_is_the_table_of_the_files():
    committed = (ROOT / "docs/papers.md").read_text(encoding="utf-8")
    table = overview(FOLDER)
    short = in_short(table, links(FOLDER, ROOT / "docs/papers.md"))
    assert committed == page(markdown.table(short), markdown.table(table))
    assert "[teddy](../benchmarks/results/teddy.md)" in committed
    assert "docs/papers.md" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_paper_has_a_row():
    rows = overview(FOLDER).rows
    for number, title in PAPERS.items():
        own = [row for row in rows if row[0] == f"{number}. {title}"]
        assert own and (len(own) == 1 or all(row[4] != NOT_YET for row in own))
    assert len(PAPERS) == 64
    assert all(row[6].startswith("zoo reproduce") for row in rows if row[4] != NOT_YET)


def test_each_row_says_what_was_tuned_and_whether_its_commit_was_kept():
    rows = overview(FOLDER).rows
    (bip,) = (row for row in rows if "'BiP 95%' is above 'gradual 95%'" in row[1])
    assert bip[8] and bip[7] == "2026-11-23, no commit kept"
    (noisy,) = (row for row in rows if "noise 0.5: 'sketched' is above 'SoftImpute'" in row[1])
    assert "sketched: rank, ridge on entries held back; SoftImpute: penalty" in noisy[8]
    assert noisy[7] == "2026-11-30"
    assert {row[8] for row in rows if row[1].startswith("'half the tokens'")} == {"nothing"}


def test_claims_are_counted_by_paper_and_verdict():
    rows = [["1. A", "c", "", "", verdict, "", "", ""] for verdict in ("holds", "invalid", "holds")]
    rows += [["2. B", "c", "", "", "does not hold", "", "", ""], ["3. C", "", "", "", NOT_YET, "", "", ""]]
    short = in_short(Table("all", [*"abcdefgh"], rows))
    assert short.columns == ["paper", "holds", "does not hold", "invalid"]
    assert short.rows == [["1. A", 2, "", 1], ["2. B", "", 1, ""], ["3. C", NOT_YET, "", ""]]


def test_the_queue_is_of_studies_with_options_that_they_have():
    lines = (ROOT / "benchmarks/queue.txt").read_text(encoding="utf-8").splitlines()
    queued = [words for line in lines if (words := shlex.split(line, comments=True))]
    assert len(queued) > 10
    for name, *words in queued:
        parse_with(Reproduce, get_study(name).options, words, f"reproduce {name}", "")


def test_readme_figures_of_decoding_are_those_of_the_files():
    text = (ROOT / "benchmarks/results/chess.md").read_text(encoding="utf-8")
    for path in sorted(FOLDER.glob("llm_decode-*.json")):
        for row in read_json(path)["rows"]:
            seconds = row["seconds"]
            if "dense" not in seconds:  # against another program: docs/performance.md
                continue
            ratio = f"{seconds['dense']['median'] / seconds['ours']['median']:.2f}x"
            assert ratio in text, (path.name, row["labels"], ratio)
