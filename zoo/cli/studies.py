"""`zoo reproduce`: run a paper's study, judge its rows again, or list what all of them found."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from zoo.cli import CHECK_FAILED, OK
from zoo.cli.console import note, print_json, stdout
from zoo.cli.parsing import command_line, is_help, parse, parse_with
from zoo.errors import ConfigError, DataError
from zoo.progress import progress_bar
from zoo.shared.errors import SparseError


@dataclass
class Reproduce:
    """Options of `zoo reproduce NAME` itself; the study's own are added."""

    results: Path = Path("results")
    """Folder for NAME.json, NAME.md and the plots."""

    cells: Path | None = None
    """Folder of finished work, from which an interrupted run goes on; by default in the cache."""

    report: Path | None = None
    """Also write one HTML page."""

    json: bool = False
    """Print the result as JSON."""


@dataclass
class Again:
    """Judge the rows of a result file again: new tables, verdicts and plots, nothing is measured."""

    from_results: Path
    """A NAME.json that `zoo reproduce` wrote; it and what is beside it are replaced."""

    add: Path | None = None
    """Another NAME.json of the study, measured later: its rows of further arms or seeds are added."""

    replace: bool = False
    """With `--add`: rows of the same arm, level and seed take the place of the earlier ones."""

    json: bool = False
    """Print the result as JSON."""


@dataclass
class Overview:
    """One table over all papers: claim, published, measured, verdict, command, date."""

    list: bool = False
    """List the papers instead of running a study."""

    results: Path = Path("benchmarks/results")
    """Folder with the results of studies."""

    markdown: Path | None = None
    """Write the table as Markdown here."""

    json: bool = False
    """Print it as JSON."""


@dataclass
class Queue:
    """Run studies one after another; what is finished is kept, so that a queue that was stopped goes on."""

    queue: Path
    """File with a line for each: NAME and options, as after `zoo reproduce`; # begins a comment."""


def reproduce_command(argv: Sequence[str]) -> int:
    """`zoo reproduce NAME ...`, or with `--queue FILE`, `--from-results FILE` or `--list`."""
    from zoo.registry import STUDIES

    if any(word.partition("=")[0] == "--queue" for word in argv[:1]):
        return _queue(argv)
    if "--list" in argv:
        return _list(argv)
    if any(word.partition("=")[0] == "--from-results" for word in argv):
        if is_help(argv[-1:]):
            argv = argv[-1:]
        return _again([word for index, word in enumerate(argv) if index or word.startswith("-")])
    if not argv or argv[0].startswith("-"):
        usage = (
            f"usage: zoo reproduce NAME ...   with NAME one of: {', '.join(STUDIES.names()) or 'none'}\n"
            "       zoo reproduce --queue FILE          (run studies one after another)\n"
            "       zoo reproduce --from-results FILE   (judge measured rows again)\n"
            "       zoo reproduce --list                (one table over all papers)"
        )
        if is_help(argv):
            print(f"{usage}\n\nzoo reproduce NAME --help shows the options of a study.")
            return OK
        raise ConfigError(usage.partition("\n")[0])
    from zoo.report.terminal import show_study
    from zoo.studies.runner import get_study, reproduce

    study = get_study(argv[0])
    description = f"{study.title}. Paper: {study.paper}"
    options, own = parse_with(Reproduce, study.options, argv[1:], f"reproduce {argv[0]}", description)
    with progress_bar() as progress:
        done = reproduce(argv[0], own, out=options.results, cells=options.cells, progress=progress)
    if options.json:
        print_json(dataclasses.asdict(done.result))
    else:
        show_study(stdout(), done.result)
    files = list(done.files)
    if options.report is not None:
        from zoo.report.html import study_page
        from zoo.shared.store.io import atomic_write

        facts = {"Command": command_line("reproduce", argv), "Time": f"{done.seconds:.0f} s"}
        page = study_page(study.title, f"Paper: {study.paper}", done.result, facts)
        options.report.parent.mkdir(parents=True, exist_ok=True)
        files.append(atomic_write(options.report, page.encode()))
    note(f"{done.seconds:.0f} s; written: {', '.join(str(file) for file in files)}")
    return OK


def _queue(argv: Sequence[str]) -> int:
    path = parse(Queue, argv, "reproduce").queue
    if not path.is_file():
        raise DataError(f"{path} is no file of studies; give one with a line NAME --OPTION ... for each")
    lines = [words for line in path.read_text().splitlines() if (words := shlex.split(line, comments=True))]
    failed = 0
    for number, words in enumerate(lines, 1):
        note(f"{number} of {len(lines)}: zoo reproduce {shlex.join(words)}")
        try:
            reproduce_command(words)
        except SparseError as error:  # the others do not wait for it
            failed += 1
            note(f"not run: {error}")
    return CHECK_FAILED if failed else OK


def _again(argv: Sequence[str]) -> int:
    from zoo.report.terminal import show_study
    from zoo.studies.runner import judge_again

    options = parse(Again, argv, "reproduce")
    done = judge_again(options.from_results, more=options.add, replace=options.replace)
    if options.json:
        print_json(dataclasses.asdict(done.result))
    else:
        show_study(stdout(), done.result)
    note(f"judged again, nothing measured; written: {', '.join(str(file) for file in done.files)}")
    return OK


def _list(argv: Sequence[str]) -> int:
    from zoo.report import markdown
    from zoo.report.terminal import show_table
    from zoo.shared.store.io import atomic_write
    from zoo.studies.papers import in_short, links, overview, page

    options = parse(Overview, argv, "reproduce")
    table = overview(options.results)
    if options.json:
        print_json([dict(zip(table.columns, row, strict=True)) for row in table.rows])
    else:
        show_table(stdout(), table)
    if options.markdown is not None:
        pages = links(options.results, options.markdown)
        text = page(markdown.table(in_short(table, pages)), markdown.table(table))
        note(f"written: {atomic_write(options.markdown, text.encode())}")
    return OK
