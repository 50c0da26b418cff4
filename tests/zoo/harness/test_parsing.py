"""Options typed twice, and tables on narrow screens."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest
from rich.console import Console

from zoo.cli.parsing import Positional, metavar, parse, parse_with
from zoo.errors import ConfigError
from zoo.report import terminal
from zoo.report.terminal import show_table
from zoo.studies.tables import Table


@dataclass
class Own:
    models: Annotated[tuple[str, ...], Positional, metavar("MODEL")]
    task: tuple[str, ...] = ()
    report: tuple[Path, ...] | None = None
    seed: int = 0
    fresh: bool = False


@dataclass
class Part:
    text: tuple[str, ...] = ()
    rate: float = 0.5


@pytest.mark.parametrize(
    "argv",
    [
        ["m", "n", "--task", "a", "--task", "b", "--seed", "3"],
        ["m", "n", "--task=a", "--seed", "3", "--task", "b"],
        ["--fresh", "m", "n", "--task", "a", "--seed=3", "--task=b"],
        ["m", "n", "--task", "a", "b", "--seed", "3"],
    ],
)
def test_values_of_an_option_typed_twice_add_up(argv):
    read = parse(Own, argv, "toy")
    assert (read.models, read.task, read.seed) == (("m", "n"), ("a", "b"), 3)


def test_options_that_may_be_left_out_and_those_of_a_part_add_up():
    own, part = parse_with(
        Own, Part, ["m", "--report", "x", "--report", "y", "--text", "a", "--text", "b"], "toy"
    )
    assert own.report == (Path("x"), Path("y")) and part.text == ("a", "b")


@pytest.mark.parametrize(
    "argv", [["--seed", "1", "--seed", "2"], ["--rate=1", "--rate=1"], ["--fresh", "--fresh"]]
)
def test_an_option_of_one_value_is_given_once(argv):
    with pytest.raises(ConfigError, match=f"{argv[0].partition('=')[0]} is given twice; give it once"):
        parse_with(Own, Part, ["m", *argv], "toy")


@dataclass
class Needy:
    model: Annotated[str, Positional, metavar("MODEL")]
    """A name."""
    out: Path
    """A folder for what is made, which is long enough to be folded into two lines of the message of the
    parser."""


def test_what_is_missing_is_named_with_its_help():
    with pytest.raises(ConfigError) as refused:
        parse(Needy, [], "try")
    assert str(refused.value) == (
        "zoo try needs MODEL (A name) and --out PATH (A folder for what is made, which is long enough to be "
        "folded into two lines of the message of the parser); see `zoo try --help`"
    )
    with pytest.raises(ConfigError, match=r"zoo try needs --out PATH \(A folder .*\); see"):
        parse(Needy, ["x"], "try")


@pytest.mark.parametrize("typed", [["x", "--oat", "y"], ["--oat", "x"], ["--oat=y", "x"]])
def test_a_misspelt_option_is_named_before_what_is_missing(typed):
    with pytest.raises(ConfigError, match="Unrecognized option --oat; did you mean --out?"):
        parse(Needy, typed, "try")


def test_names_stay_whole_on_a_narrow_screen():
    name = "vision/fast-sparse-convnet-mobilenet-digits-s90"
    table = Table("", ["model", "method", "bytes"], [[name, "fast-convnets", "10 kB"]], "", ("method",))
    for width, shown in ((60, False), (100, True)):
        console = Console(file=io.StringIO(), width=width)
        show_table(console, table)
        text = console.file.getvalue()
        assert name in text and "10 kB" in text
        assert ("fast-convnets" in text) == shown
        assert (f"Left out at {width} columns: method" in text) == (not shown)


def test_long_names_of_rows_do_not_starve_what_is_said_of_them():
    names = [f"graph/digits: accuracy, dense twin, mean of {seeds} seeds" for seeds in (4, 5)]
    rows = [[name, "0.9779", "0.9781", "FAILED", "compared"] for name in names]
    console = Console(file=io.StringIO(), width=80)
    show_table(console, Table("", ["figure", "on the card", "found", "", "how"], rows, ""))
    shown = console.file.getvalue()
    assert all(shown.count(value) == 2 for value in ("0.9779", "0.9781", "FAILED", "compared"))
    assert "accuracy" in shown and max(map(len, shown.splitlines())) <= 80


@pytest.mark.parametrize("title", ["", "a title"])
def test_tables_that_fit_look_like_those_that_do_not(title):
    """Lines of known widths are what rich draws, also with wide signs and several lines."""
    rows = [
        ["graph/a", "1.5", "ok", "日本"],
        ["graph/bb", "± 20", "failed", "two\nlines here"],
        ["c", "", "x", "käse"],
    ]
    table = Table(title, ["model", "figure", "", "note"], rows, "")
    lines = terminal._lines(table, terminal._widths(terminal._widest(table)))
    shown = []
    for text, options in ((terminal._drawn(table), {}), (lines, {"no_wrap": True, "crop": False})):
        console = Console(file=io.StringIO(), width=100, force_terminal=True, color_system="standard")
        console.print(text, **options)
        shown.append(console.file.getvalue())
    plain = [re.sub(r"\x1b\[[0-9;]*m", "", text) for text in shown]
    assert plain[0] == plain[1]
    assert all("\x1b[32mok    \x1b[0m" in text and "\x1b[31mfailed\x1b[0m" in text for text in shown)


def test_figures_and_comparisons_keep_their_names_whole_at_80_columns():
    from zoo.harness.compare import Comparison, comparison_table
    from zoo.studies.stats import Difference

    names = [f"vision/{kind}-resnet20-cifar10-s80" for kind in ("magnitude", "dense")]
    difference = Difference(-0.01, -0.02, 0.001, 0.03, 0.02, 0.95, 500, 0.005)
    table = comparison_table(
        [Comparison("vision/cifar10-true", "accuracy", *names, 0.9, 0.91, difference, 1, None)]
    )
    out = io.StringIO()
    show_table(Console(file=out, width=80), table)
    text = out.getvalue()
    assert " verdict" in text and "95% interval" in text and names[0] in text
    assert "Left out at 80 columns" in text
