"""One self-contained HTML page: no scripts, no fonts or pictures from elsewhere, light and dark, readable in
print."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from zoo.harness.records import Record
from zoo.report import numbers
from zoo.report.plain import plain
from zoo.report.plots import PALETTE, svg
from zoo.report.summary import summarise
from zoo.report.terminal import BAD, GOOD, verdict_table
from zoo.studies.tables import Plot, Result, Table

# Lighter partners of `plots.PALETTE` for a dark ground, in the same order.
DARK_PALETTE = ("#56b4e9", "#ff9d5c", "#34d0a5", "#e6a3cb", "#e3c34a", "#9fd3f2", "#b59cf0", "#b4b4b4")


@dataclass(frozen=True)
class Section:
    """A part of the page: a heading, a sentence or two, tables and plots."""

    title: str
    lead: str = ""
    tables: Sequence[Table] = field(default_factory=list)
    plots: Sequence[Plot] = field(default_factory=list)


def records_page(records: Sequence[Record], *, title: str = "Sparse model zoo: evaluation") -> str:
    """The page of an evaluation: for each task a table, and plots of quality against cost."""
    sections = [
        Section(
            summary.task,
            "",
            [Table("", summary.table.columns, summary.table.rows, summary.table.note)],
            summary.plots,
        )
        for summary in summarise(records)
    ]
    lead = (
        f"Models: {len({r.model for r in records})}. Tasks: {len(sections)}. "
        "Each sparse model stands beside its dense twin, which has the same architecture, data and "
        "recipe; in the plots the twin's value is the dashed line. The thin stepped line joins the runs that "
        "none beats on both axes (the Pareto front). Numbers beside points are rows of the table."
    )
    facts: dict[str, str] = {}
    if records:
        env = records[0].environment
        facts = {
            "Machine": f"{env.cpu}, {env.cpus} CPUs, {env.threads} threads, {env.platform}",
            "Software": f"zoo {env.zoo}, torch {env.torch}, Python {env.python}",
            "Measured": " to ".join(
                sorted({min(r.created for r in records), max(r.created for r in records)})
            ),
            "Peak memory": numbers.size(max(r.peak_memory_bytes for r in records)),
            "Again": _command(records),
        }
    return page(title, lead, sections, facts)


def _command(records: Sequence[Record]) -> str:
    """What to type to measure the same again."""
    parts = ["zoo eval", *sorted({record.model for record in records})]
    parts += ["--task", *dict.fromkeys(record.task for record in records)]
    parts += ["--execution", *dict.fromkeys(record.execution for record in records)]
    return " ".join([*parts, "--report report.html"])


def study_page(title: str, lead: str, result: Result, facts: Mapping[str, str]) -> str:
    """The page of a study: verdicts, then tables and plots."""
    sections = [
        Section("Verdicts", "", [Table("", *_columns_rows(verdict_table(result)))]),
        *([Section("Notes", " ".join(result.notes))] if result.notes else []),
        Section("Results", "", result.tables, result.plots),
    ]
    return page(title, lead, sections, facts)


def escape(text: str) -> str:
    """Text of others as text of the page: neither markup nor marks of direction."""
    return html.escape(plain(text))


def page(title: str, lead: str, sections: Sequence[Section], facts: Mapping[str, str]) -> str:
    """The whole document."""
    contents = ""
    if len(sections) > 2:
        links = "".join(f'<li><a href="#s{i}">{escape(s.title)}</a></li>' for i, s in enumerate(sections))
        contents = f'<nav aria-label="Contents"><ul>{links}</ul></nav>'
    body = "".join(_section(section, f"s{i}") for i, section in enumerate(sections))
    listed = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in facts.items())
    footer = f"<footer><h2>How it was measured</h2><dl>{listed}</dl></footer>" if facts else ""
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<header><h1>{escape(title)}</h1><p>{escape(lead)}</p></header>\n{contents}\n"
        f"<main>{body}</main>\n{footer}\n</body>\n</html>\n"
    )


def _section(section: Section, identifier: str) -> str:
    lead = f"<p>{escape(section.lead)}</p>" if section.lead else ""
    tables = "".join(_table(table) for table in section.tables)
    plots = "".join(
        f"<figure>{svg(plot)}<figcaption>{escape(plot.alt)}</figcaption></figure>" for plot in section.plots
    )
    grid = f'<div class="plots">{plots}</div>' if plots else ""
    return f'<section id="{identifier}"><h2>{escape(section.title)}</h2>{lead}{tables}{grid}</section>\n'


def _table(table: Table) -> str:
    numeric = [all(_numeric(row[i]) for row in table.rows) for i in range(len(table.columns))]
    head = "".join(
        f'<th scope="col"{_class("n" if numeric[i] else "")}>{escape(column)}</th>'
        for i, column in enumerate(table.columns)
    )
    rows = "".join(
        "<tr>"
        + "".join(
            f"<td{_class(_cell_class(cell, numeric[i]))}>{escape(str(cell))}</td>"
            for i, cell in enumerate(row)
        )
        + "</tr>"
        for row in table.rows
    )
    caption = f"<caption>{escape(table.title)}</caption>" if table.title else ""
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    # tabindex: a table wider than the screen scrolls, also by keyboard.
    return (
        f'<div class="scroll" tabindex="0"><table>{caption}<thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>{note}"
    )


def _numeric(cell: object) -> bool:
    return not isinstance(cell, str) or not cell or cell[0] in "0123456789+−-"


def _cell_class(cell: object, numeric: bool) -> str:
    return "good" if cell in GOOD else "bad" if cell in BAD else "n" if numeric else ""


def _class(name: str) -> str:
    return f' class="{name}"' if name else ""


def _columns_rows(table: Table) -> tuple[list[str], list[list[str]], str]:
    return table.columns, table.rows, table.note


def _variables(ink: str, ground: str, faint: str, soft: str, link: str, palette: Sequence[str]) -> str:
    series = "".join(f"--series-{i + 1}:{colour};" for i, colour in enumerate(palette))
    return f"--ink:{ink};--ground:{ground};--faint:{faint};--soft:{soft};--link:{link};{series}"


_LIGHT = _variables("#1b1f24", "#ffffff", "#d3d8df", "#f4f6f8", "#0b5cad", PALETTE)
_DARK = _variables("#e7eaee", "#14171b", "#3b424b", "#1d2228", "#7cc0ff", DARK_PALETTE)

STYLE = f"""
:root{{{_LIGHT}}}
@media (prefers-color-scheme:dark){{:root{{{_DARK}}}}}
*{{box-sizing:border-box}}
body{{margin:0 auto;padding:2rem 1.25rem 4rem;max-width:78rem;color:var(--ink);background:var(--ground);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}}
h1{{font-size:1.7rem;line-height:1.2;margin:0 0 .5rem}}
h2{{font-size:1.2rem;margin:2.5rem 0 .6rem;padding-bottom:.25rem;border-bottom:1px solid var(--faint)}}
p,dl{{max-width:70ch}}
a{{color:var(--link)}}
nav ul{{display:flex;flex-wrap:wrap;gap:.3rem 1.2rem;padding:0;list-style:none}}
.scroll{{overflow-x:auto}}
table{{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums;margin:.4rem 0}}
caption{{text-align:left;font-weight:600;padding:.6rem 0 .3rem}}
th,td{{padding:.35rem .8rem .35rem 0;text-align:left;vertical-align:top;border-bottom:1px solid var(--faint)}}
th{{white-space:nowrap;font-weight:600;border-bottom-width:2px}}
td.n,th.n{{text-align:right;white-space:nowrap}}
td.good{{color:var(--series-3);font-weight:600}}
td.bad{{color:var(--series-2);font-weight:600}}
tbody tr:hover{{background:var(--soft)}}
.note,figcaption{{font-size:.85rem;opacity:.8}}
.plots{{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,26rem),1fr));gap:1.2rem;margin-top:1.2rem}}
figure{{margin:0;padding:1rem;border:1px solid var(--faint);border-radius:.5rem;background:var(--soft)}}
figure svg{{display:block;width:100%;height:auto}}
figcaption{{margin-top:.5rem}}
dt{{font-weight:600}}dd{{margin:0 0 .5rem;overflow-wrap:anywhere}}
@media print{{body{{max-width:none;padding:0}}figure,section table{{break-inside:avoid}}}}
"""
