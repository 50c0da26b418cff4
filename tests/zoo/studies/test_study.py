"""Claims on rows: pairing, means over levels, controls that must beat chance, tuning on test data."""

from __future__ import annotations

import dataclasses
import functools

import pytest

from zoo.errors import ConfigError
from zoo.studies import digests
from zoo.studies.digests import code_digest
from zoo.studies.figures import BySample, Columns, Curves, Grid, mean_of, when
from zoo.studies.study import Arm, Claim, Study, Tuned, above, grid, shown
from zoo.studies.view import Value, View


@dataclasses.dataclass(frozen=True)
class Options:
    rates: tuple[float, ...] = (0.1, 0.2)


def study(claims=(), **fields):
    arms = {
        "good": Arm(),
        "bad": Arm(control="chance"),
        "peeked": Arm(tuned=Tuned("penalty", "test images", (1, 2))),
        "tuned": Arm(tuned=Tuned("rate", "validation images", "rates")),
        "chance": Arm(),
        "fixed": Arm(once=True),
        "dense": Arm(flat=True),
    }
    return Study("s", "S", "p", Options, arms, lambda o: [], lambda *a: {}, claims=claims, **fields)


def rows(**arms):
    """Two levels and three seeds, about a mean for each arm."""
    made = []
    for arm, mean in arms.items():
        for level in [""] if arm == "dense" else [0.5, 0.9]:
            for seed in [0] if arm == "fixed" else range(3):
                wiggle = 0 if arm == "fixed" else (0.001, 0.0, 0.002)[seed] * (1 + (arm == "good"))
                row = {"arm": arm, "level": level, "seed": seed, "accuracy": mean + wiggle}
                made.append(row)
    return made


def outcomes(claims, **arms):
    return study(claims).report(rows(**arms), Options()).verdicts


def test_a_claim_for_every_level_in_words():
    found = outcomes([Claim("good at {level}", "yes", "good", "bad")], good=0.9, bad=0.8, chance=0.1)
    assert [(v.claim, v.verdict) for v in found] == [("good at 50 %", "holds"), ("good at 90 %", "holds")]
    assert found[0].measured.startswith("+10.1")


def test_an_arm_without_seeds_or_levels_stands_for_all():
    claims = [Claim("f {level}", "", "good", "fixed"), Claim("d {level}", "", "good", "dense")]
    found = outcomes(claims, good=0.9, fixed=0.5, dense=0.95)
    assert [v.verdict for v in found] == ["holds", "holds", "does not hold", "does not hold"]
    assert "(3 seeds)" in found[0].measured


def test_a_mean_over_levels_takes_those_that_both_have():
    data = [row for row in rows(good=0.9, bad=0.8, chance=0.1)]
    data = [r for r in data if not (r["arm"] == "bad" and r["level"] == 0.9)]
    claim = Claim("mean", "", "good", "bad", at=(0.5, 0.9), mean=True)
    (verdict,) = study([claim]).report(data, Options()).verdicts
    assert verdict.measured.startswith("+10.1")


def test_what_was_not_run_is_not_claimed():
    assert outcomes([Claim("x", "", "good", "bad")], good=0.9) == []


def test_a_control_must_beat_chance():
    claim = [Claim("x", "", "good", "bad", at=(0.5,))]
    (worse,) = outcomes(claim, good=0.9, bad=0.2, chance=0.3)
    assert worse.verdict == "invalid" and worse.note == "the control bad does not beat chance"
    (alone,) = outcomes(claim, good=0.9, bad=0.2)
    assert alone.verdict == "cannot be told"
    assert alone.note == "chance, which the control bad must beat, was not run"
    noisy = rows(good=0.9, bad=0.31, chance=0.3)
    for row in noisy:
        if row["arm"] == "chance":
            row["accuracy"] += (0.05, -0.05, 0.0)[row["seed"]]
    (unclear,) = study(claim).report(noisy, Options()).verdicts
    assert unclear.verdict == "cannot be told" and "is not shown to beat chance" in unclear.note
    against_chance = [Claim("x", "", "bad", "chance", at=(0.5,))]
    assert outcomes(against_chance, bad=0.2, chance=0.3)[0].verdict == "does not hold"


def test_an_arm_tuned_on_test_data_makes_its_claims_invalid():
    (verdict,) = outcomes([Claim("x", "", "peeked", "chance", at=(0.5,))], peeked=0.9, chance=0.1)
    assert verdict.verdict == "invalid" and verdict.note == "peeked: penalty was chosen on test images"


def test_what_was_tuned_is_a_table():
    tables = study().report(rows(tuned=0.5, peeked=0.5), Options()).tables
    assert tables[-1].title == "What was tuned"
    assert tables[-1].rows == [
        ["peeked", "penalty", "test images", "1, 2"],
        ["tuned", "rate", "validation images", "0.1, 0.2"],
    ]


def test_groups_are_families_of_their_own():
    data = [{**row, "graph": name} for name in ("g", "h") for row in rows(good=0.9, bad=0.8, chance=0.1)]
    both = [Claim("{where}: x", "", "good", "bad", at=(0.5,))]
    only = [Claim("{where}: y", "", "good", "bad", at=(0.5,), only={"graph": "h"})]
    made = study(both + only, by=("graph",), titles={"g": "Graph"}).report(data, Options())
    assert [v.claim for v in made.verdicts] == ["Graph: x", "h: x", "h: y"]
    assert made.verdicts[1].p == pytest.approx(2 * made.verdicts[0].p)


def test_logarithms_and_lower_is_better():
    value = Value("perplexity", 1.0, 2, "nats", 3, lower=True, log=True)
    data = [
        {"arm": arm, "level": 0.5, "seed": seed, "perplexity": base * 2.718281828**seed}
        for arm, base in (("good", 10.0), ("bad", 20.0), ("chance", 40.0))
        for seed in range(3)
    ]
    (verdict,) = study([Claim("x", "", "good", "bad")], value=value).report(data, Options()).verdicts
    assert verdict.measured.startswith("+0.693") and verdict.verdict == "holds"


def test_grid_and_curves():
    view = View(study(), rows(good=0.5, dense=0.9), Options(), {})
    table = Grid("T {where}")(view)
    assert table.columns == ["arm", "50 %", "90 %", ""]
    assert table.rows[0] == ["good", "50.2 ± 0.2", "50.2 ± 0.2", ""]
    assert table.rows[1] == ["dense", "", "", "90.1 ± 0.1"]
    plot = Curves("p", "P", "x", "y", references=("dense",))(view)
    assert [s.label for s in plot.series] == ["good", "dense"] and plot.series[0].x == [50.0, 90.0]
    assert plot.series[1].kind == "reference"


def test_columns_have_a_figure_each():
    data = [{**row, "cost": 2.0 + row["seed"]} for row in rows(good=0.5, dense=0.9)]
    view = View(study(), data, Options(), {"graph": "g"})
    columns = {
        "accuracy": Value(),
        "cost": mean_of("cost", "{:.2f}"),
        "arm, level": lambda v, a, lv: f"{a} {lv}",
    }
    table = Columns("T {where}", columns, levels=(0.5,), heading="zeros")(view)
    assert table.title == "T g" and table.columns == ["arm", "zeros", "accuracy", "cost", "arm, level"]
    assert table.rows[0] == ["good", "50 %", "50.2 ± 0.2", "3.00", "good 0.5"]
    assert table.rows[1][2] == "90.1 ± 0.1", "a flat arm stands for every level"
    assert Columns("T", columns, arms=("bad",))(view) is None
    assert mean_of("nothing")(view, "good", 0.5) == ""


def test_differences_by_sample_take_each_samples_mean_over_seeds():
    data = [
        {
            "arm": arm,
            "level": 0.5,
            "seed": seed,
            "accuracy": base + seed / 10,
            "each": [base, base + seed, 3.0],
        }
        for arm, base in (("good", 2.0), ("bad", 1.0))
        for seed in (0, 1, 2)
    ]
    view = View(study(value=Value("accuracy", 1.0)), data, Options(), {})
    table = BySample("bad", lambda row: row["each"], "Against bad", "Note.", digits=2)(view)
    (row,) = table.rows  # the arm itself has no row; samples differ by 1, 1 and 0 in every seed
    assert row[0] == "good" and row[1].startswith("+0.67 [")
    assert table.note == "Note. *: seen over samples; **: over seeds as well."
    data = [{**row, "each": [value + 5 * (row["arm"] == "good") for value in row["each"]]} for row in data]
    (row,) = BySample("bad", lambda row: row["each"], "T")(View(view.study, data, Options(), {})).rows
    assert row[1].endswith(" **")


def test_points_lie_at_the_mean_of_a_figure_and_are_numbered_or_marked():
    data = [{**row, "cost": 10.0 * (row["seed"] + 1)} for row in rows(good=0.5, bad=0.4)]
    view = View(study(), data, Options(), {})
    one = Curves("p", "P", "x", "y", x=Value("cost", 0.1), levels=[0.5], points=True)(view)
    assert [(s.label, s.x, s.marks) for s in one.series] == [
        ("1: good", [2.0], ["1"]),
        ("2: bad", [2.0], ["2"]),
    ]
    beside = Curves("p", "P", "", "y", x=None, levels=[0.5], points=True)(view)
    assert [(each.label, list(each.x)) for each in beside.series] == [("good", [0.0]), ("bad", [1.0])]
    both = Curves("p", "P", "x", "y", x=Value("cost", 0.1), points=True)(view)
    assert both.series[0].marks == ["50 %", "90 %"] and both.series[0].kind == "points"
    assert when(lambda view: False, lambda view: one)(view) is None


def test_a_contrast_is_of_the_seeds_that_all_have():
    data = rows(good=0.5, bad=0.4, chance=0.1)
    data = [row for row in data if (row["arm"], row["seed"]) != ("chance", 2)]
    found = View(study(), data, Options(), {}).contrast([("good", 0.5), ("chance", 0.9)], [("bad", 0.5)])
    assert found == {0: pytest.approx(50.2 + 10.1 - 40.1), 1: pytest.approx(50 + 10 - 40)}


def test_facts_and_claims_in_the_words_of_their_arms():
    view = View(study(papers=(3,)), rows(good=0.9), Options(), {"graph": "g"})
    made = [view.fact("{where}: it", "yes", "1", holds) for holds in (True, False, None)]
    assert [v.verdict for v in made] == ["holds", "does not hold", "not measured"]
    assert (
        made[0].claim == "g: it"
        and made[0].paper == (3,)
        and view.fact("", "", "", True, paper=()).paper == ()
    )
    claims = [
        above("good", "bad", 1.0),
        above("good", "bad", -0.5, "close", at=(0.5,)),
        above("good", "bad", at=(0.9,)),
    ]
    found = outcomes(claims, good=0.9, bad=0.8, chance=0.1)
    assert [v.claim for v in found] == [
        "'good' is 1.0 points or more above 'bad' at 50 %",
        "'good' is 1.0 points or more above 'bad' at 90 %",
        "'good' is less than 0.5 points below 'bad'",
        "'good' is above 'bad'",
    ]
    assert found[2].published == "close"


def test_a_coordinate_may_not_hide_a_digest():
    with pytest.raises(ConfigError, match="'data' is the name of a digest; name it otherwise"):
        study().key(Options(), {"arm": "good", "data": "cora", "seed": 0})


def test_cases_of_a_grid():
    cases = list(grid(study().arms, [0.5], 2, ["good", "fixed"], graph="g"))
    assert [(c["arm"], c["seed"], c["graph"]) for c in cases] == [
        ("good", 0, "g"),
        ("good", 1, "g"),
        ("fixed", 0, "g"),
    ]
    assert shown(0.125) == "12.5 %" and shown("2:4") == "2:4"


SOURCE = '''
"""Doc."""
from zoo.studies.study import Arm, Study
from {package}.other import helper

FACTOR = 2

def measure(x):
    """Says {doc}."""
    return helper(x) * FACTOR

def unrelated():
    return {unrelated}

TABLE = {{"a": Arm(measure)}}
'''


def digest_of(tmp_path, monkeypatch, package, doc="a", unrelated=1, other="x + 1", factor=2):
    folder = tmp_path / package
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    text = SOURCE.format(package=package, doc=doc, unrelated=unrelated).replace("R = 2", f"R = {factor}")
    (folder / "main.py").write_text(text)
    (folder / "other.py").write_text(f"def helper(x):\n    return {other}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import importlib

    digests._definitions.cache_clear()
    module = importlib.import_module(f"{package}.main")
    seen = {}
    digests._reach(module.__name__, "measure", seen)
    return {name: value for (_, name), value in seen.items()}


def test_code_is_what_is_reached_and_nothing_else(tmp_path, monkeypatch):
    first = digest_of(tmp_path, monkeypatch, "paka")
    assert set(first) == {"measure", "helper", "FACTOR"}
    assert digest_of(tmp_path, monkeypatch, "pakb", doc="b", unrelated=2) == first
    assert digest_of(tmp_path, monkeypatch, "pakc", other="x + 2")["helper"] != first["helper"]
    assert digest_of(tmp_path, monkeypatch, "pakd", factor=3)["FACTOR"] != first["FACTOR"]


def test_options_of_an_arm_count():
    one, other = (functools.partial(grid, seeds=seeds) for seeds in (1, 2))
    assert code_digest(one) != code_digest(other) and code_digest(one) == code_digest(one)
    assert code_digest(grid, ("a", 1)) != code_digest(grid, ("a", 2))
