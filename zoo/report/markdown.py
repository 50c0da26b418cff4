"""Markdown reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from zoo.harness.records import Record
from zoo.report.summary import summarise
from zoo.report.terminal import verdict_table
from zoo.studies.tables import Result, Table


def table(content: Table) -> str:
    """A pipe table under its title; pipes and line breaks in cells are escaped."""
    lines = [f"### {content.title}", "", _row(content.columns), _row(["---"] * len(content.columns))]
    lines += [_row([str(cell) for cell in row]) for row in content.rows]
    return "\n".join(lines + (["", content.note] if content.note else [])) + "\n"


def records_report(records: Sequence[Record], *, title: str = "Evaluation") -> str:
    """The tables of an evaluation, with the machine it ran on."""
    parts = [f"# {title}\n"]
    parts += [table(summary.table) for summary in summarise(records)]
    if records:
        parts.append(f"{environment_line(records[0])}\n")
    return "\n".join(parts)


def study_report(
    title: str, result: Result, *, facts: Mapping[str, str], plot_files: Mapping[str, str]
) -> str:
    """A study: verdicts first, then tables, plots and what is needed to repeat it.

    Args:
        title: of the page.
        result: what the study found.
        facts: name -> text, listed at the end (command, machine, time).
        plot_files: name of the plot -> path of its picture, relative to the report.
    """
    parts = [f"# {title}\n", table(verdict_table(result))]
    parts += [f"{note}\n" for note in result.notes]
    parts += [table(content) for content in result.tables]
    for plot in result.plots:
        parts.append(f"![{plot.alt or plot.title}]({plot_files[plot.name]})\n")
    parts.append("\n".join(f"- {name}: {text}" for name, text in facts.items()) + "\n")
    return "\n".join(parts)


def environment_line(record: Record) -> str:
    """Machine and versions in one sentence."""
    env = record.environment
    return (
        f"Measured with zoo {env.zoo}, torch {env.torch}, Python {env.python} on {env.cpu} "
        f"({env.cpus} CPUs, {env.threads} threads), {env.platform}, {record.created}."
    )


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
