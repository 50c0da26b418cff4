"""Reports: numbers, tables, plots, the page."""

from __future__ import annotations

import io
import math
import re
from html.parser import HTMLParser

import pytest
from rich.console import Console

from zoo.harness.runner import evaluate
from zoo.report import html, markdown, numbers
from zoo.report.plots import pareto_front, png, svg
from zoo.report.summary import summarise, twin_of
from zoo.report.terminal import show_study, show_table
from zoo.studies.tables import Plot, Result, Series, Table, Verdict


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (numbers.value(0.81234, 0.0123), "0.812 ± 0.012"),
        (numbers.value(81.234, 1.23), "81.2 ± 1.2"),
        (numbers.value(1234.5, 120.0), "1234 ± 120"),
        (numbers.value(0.0), "0"),
        (numbers.value(0.5, 0.0), "0.5000"),
        (numbers.value(math.inf), "inf"),
        (numbers.signed(-0.02), "−0.0200"),
        (numbers.signed(0.0), "0"),
        (numbers.percent(0.9), "90.0 %"),
        (numbers.percent(0.9967), "99.67 %"),
        (numbers.percent(1.0), "100.0 %"),
        (numbers.count(999), "999"),
        (numbers.count(740_000), "740k"),
        (numbers.count(3.2e9), "3.2G"),
        (numbers.size(12), "12 B"),
        (numbers.size(1_500_000), "1.5 MB"),
        (numbers.seconds(0.25), "250 ms"),
        (numbers.seconds(130), "2 min 10 s"),
    ],
)
def test_numbers(shown, expected):
    assert shown == expected


def test_pareto_front_by_hand():
    points = [(3.0, 0.9), (1.0, 0.5), (2.0, 0.4), (2.0, 0.8), (4.0, 0.9), (1.0, 0.5)]
    assert pareto_front(points, 1) == [(1.0, 0.5), (2.0, 0.8), (3.0, 0.9)]
    assert pareto_front(points, -1) == [(1.0, 0.5), (2.0, 0.4)]
    assert pareto_front([], 1) == []


@pytest.fixture
def records(toy_zoo):
    models = ["toy/dense-mlp", "toy/half-mlp", "toy/tenth-mlp"]
    return [record for task in ("toy/accuracy", "toy/loss") for record in evaluate(models, task)]


def test_summary_puts_each_model_beside_its_twin(records):
    accuracy, loss = summarise(records)
    assert (accuracy.task, loss.task) == ("toy/accuracy", "toy/loss")
    rows = [dict(zip(accuracy.table.columns, row, strict=True)) for row in accuracy.table.rows]
    assert [row["model"] for row in rows] == ["toy/dense-mlp", "toy/half-mlp", "toy/tenth-mlp"]
    twin = twin_of(records[-1], records)
    assert twin is not None and (twin.model, twin.task) == ("toy/dense-mlp", "toy/loss")
    assert rows[0]["against dense"] == ""
    assert rows[2]["against dense"].startswith("−")
    assert rows[1]["sparsity"] == "50.0 %"
    assert "loss (nats)" in loss.table.columns
    assert "lower is better" in loss.table.note


def test_plots_have_the_twin_the_front_and_units(records):
    [plot] = [plot for plot in summarise(records)[1].plots if plot.name.endswith("sparsity")]
    kinds = {series.label: series for series in plot.series}
    assert kinds["dense twin"].kind == "reference"
    assert kinds["toy/dense-mlp"].x == [0.0, 50.0, pytest.approx(90.0, abs=0.2)]
    assert kinds["toy/dense-mlp"].marks == ["1", "2", "3"]
    assert kinds["Pareto front"].x == sorted(kinds["Pareto front"].x)
    assert plot.y_label == "loss (nats)" and "%" in plot.x_label
    assert "Best: toy/" in plot.alt
    names = [plot.name.rpartition("-")[2] for plot in summarise(records)[0].plots]
    assert names == ["sparsity", "bytes", "flops", "seconds"]


def test_one_model_alone_has_a_table_but_no_plot(records):
    [summary] = summarise(records[:1])
    assert summary.plots == []
    assert len(summary.table.rows) == 1


class Page(HTMLParser):
    """Checks that tags balance; collects what would be fetched, and the labels of pictures."""

    VOID = ("meta", "br", "img", "link", "input", "hr")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.pictures: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        if tag not in self.VOID:
            self.open.append(tag)
        for name in ("src", "href", "xlink:href"):
            if name in values and not values[name].startswith("#"):
                self.fetched.append(values[name])
        if tag in ("script", "link", "iframe"):
            self.fetched.append(tag)
        if tag == "svg":
            assert values.get("role") == "img"
            self.pictures.append(values.get("aria-label"))
        if "id" in values:
            self.ids.append(values["id"])

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def read_page(text):
    page = Page()
    page.feed(text)
    assert page.open == []
    return page


def test_the_page_stands_alone(records):
    text = html.records_page(records)
    page = read_page(text)
    assert page.fetched == []
    assert not re.search(r"url\((?!#)", text)
    assert len(page.pictures) == 8
    assert all(label and "against" in label for label in page.pictures)
    assert len(set(page.ids)) == len(page.ids)
    for word in ('lang="en"', "prefers-color-scheme:dark", "toy/half-mlp", "zoo eval", "scope="):
        assert word in text
    # the colours of plots are variables that follow the theme
    assert "#0072b2" not in text.partition("<body>")[2]


def test_the_page_escapes_what_it_is_given(records):
    evil = [record.model_copy(update={"model": "<script>alert(1)</script>&"}) for record in records[3:]]
    assert "<script>" not in html.records_page(evil)
    table = Table("<b>", ["<i>"], [["<u>|\n"]])
    result = Result([table], [Verdict("<a>", "<p>", "m", "holds")], notes=["<n>"])
    text = html.study_page("<t>", "<l>", result, {"<k>": "<v>"})
    for tag in ("<b>", "<i>", "<u>", "<a>", "<n>", "<t>", "<l>", "<k>", "<v>"):
        assert tag not in text
    read_page(text)
    assert "<u>\\|  |" in markdown.table(table)


def test_svg_follows_the_theme_and_is_the_same_twice():
    series = [
        Series("a", [1, 10, 100], [1.0, 2.0, 3.0], [0.1, 0.1, 0.1]),
        Series("b", [1, 100], [2.0, 2.5], kind="points", marks=["x", "y"]),
        Series("teacher", [], [2.2], kind="reference"),
    ]
    plot = Plot("p", "Title & more", "cost (s)", "quality (%)", series, alt="A rises.", log_x=True)
    text = svg(plot)
    assert text == svg(plot)
    assert "var(--ink)" in text and "var(--series-2)" in text
    assert "<title>Title &amp; more</title><desc>A rises.</desc>" in text
    assert "cost (s)" in text and "quality (%)" in text
    read_page(text)
    assert png(plot) == png(plot)


def test_terminal_and_markdown(records):
    stream = io.StringIO()
    console = Console(file=stream, width=200)
    show_table(console, summarise(records)[0].table)
    assert "toy/tenth-mlp" in stream.getvalue() and "[" not in stream.getvalue()
    result = Result(
        [Table("T", ["a"], [["[red]x"]])],
        [Verdict("c", "p", "m", "does not hold", "2.0 points", "why")],
        [Plot("q", "Q", "x", "y", [Series("s", [0, 1], [0, 1])])],
    )
    show_study(console, result)
    assert "[red]x" in stream.getvalue() and "does not hold" in stream.getvalue()
    text = markdown.records_report(records)
    assert text.count("| toy/half-mlp |") == 2 and "Measured with zoo" in text
    report = markdown.study_report("E", result, facts={"Time": "1 s"}, plot_files={"q": "q.png"})
    for line in ("| c | p | m | does not hold | 2.0 points | why |", "![Q](q.png)", "- Time: 1 s"):
        assert line in report


def test_runs_on_one_point_share_its_mark(records):
    packed = [record.model_copy(update={"execution": "packed"}) for record in records[:3]]
    [plot] = [plot for plot in summarise([*records[:3], *packed])[0].plots if plot.name.endswith("bytes")]
    [points] = [series for series in plot.series if series.kind == "points"]
    assert len(points.x) == 3
    assert sorted(points.marks) == ["1, 4", "2, 5", "3, 6"]


@pytest.mark.parametrize(
    ("x", "log"),
    [
        ((5.0, 5.000000000000001), False),
        ((5.0, 5.000000000000001), True),
        ((0.0, 0.0), False),
        ((3.0,), False),
        ((3.0,), True),
    ],
)
def test_points_of_one_place_are_drawn(x, log):
    points = Series("dense", x, [1.0] * len(x), kind="points")
    line = Series("bound", [], [2.0], kind="reference")
    assert svg(Plot("p", "t", "x", "y", [points, line], alt="a against b", log_x=log)).startswith("<svg")
