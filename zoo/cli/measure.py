"""`zoo eval`, `zoo compare`, `zoo verify`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from zoo.cli import CHECK_FAILED, ENVIRONMENT, OK
from zoo.cli.console import note, print_json, stdout
from zoo.cli.parsing import Positional, metavar, parse
from zoo.errors import ConfigError
from zoo.progress import progress_bar
from zoo.shared.store.io import atomic_write

Execution = Literal["masked", "packed"]


@dataclass
class Eval:
    """Evaluate models on tasks. Finished runs are kept: after a kill the same command goes on where it stood.

    Several processes share the runs: `accelerate launch --cpu --num_processes 2 -m zoo eval ...`.
    """

    models: Annotated[tuple[str, ...], Positional, metavar("MODEL")]
    """Names, quoted globs, folders, hf://owner/name, or package.module:callable."""

    task: tuple[str, ...] = ()
    """Tasks by name or glob; by default those on each model's card."""

    data: str | None = None
    """Data set by name, file or folder, instead of tasks; of the models' domain."""

    execution: tuple[Execution, ...] = ("masked",)
    """How to run: masked (dense tensors with zeros), packed (zeros skipped), or both."""

    twins: bool = False
    """Evaluate the dense twins too; implied by --report."""

    seed: int = 0
    """Seed of whatever a task draws."""

    fresh: bool = False
    """Measure again even what is known."""

    out: Path | None = None
    """Folder for one JSON record per run."""

    report: tuple[Path, ...] = ()
    """Write a report: FILE.html (one page with plots), FILE.md, or both."""

    json: bool = False
    """Print the records as JSON."""


@dataclass
class Compare:
    """Compare models on the same samples; the first is the reference. One model alone meets its dense twin.

    Exit code 1 if --margin is given and a model is not shown to be within it.
    """

    models: Annotated[tuple[str, ...], Positional, metavar("MODEL")]
    """Two or more names, globs or folders; or one that has a dense twin."""

    task: str | None = None
    """On which task; by default all that the cards share."""

    metric: str | None = None
    """Which metric; by default the task's primary one."""

    execution: Execution = "masked"
    """How to run."""

    margin: float | None = None
    """By how much a model may be worse than the reference, in the metric's unit."""

    confidence: float = 0.95
    """Level of the intervals."""

    seed: int = 0
    """Seed of the evaluation and of the bootstrap."""

    fresh: bool = False
    """Measure again even what is known."""

    json: bool = False
    """Print JSON."""


@dataclass
class Verify:
    """Measure every figure on a card again: quality, the dense twin's, sparsity, parameters, FLOPs, bytes,
    hash.

    Exit code 1 if a figure does not come back, 3 if one could not be checked: data, a dense twin, or what is
    known of other seeds than the stored model's is not on this machine.
    """

    models: Annotated[tuple[str, ...], Positional, metavar("MODEL")]
    """Names, quoted globs, or folders."""

    tolerance: float = 1e-4
    """Allowed relative difference of measured quality (other machines round differently); counts must be
    exact."""

    seeds: bool = False
    """Train the model of every seed again by its recipe and measure it: hours for the larger bundles."""

    failed_only: bool = False
    """Show only what failed or could not be checked."""

    json: bool = False
    """Print JSON."""


def eval_command(argv: Sequence[str]) -> int:
    """`zoo eval`."""
    options = parse(Eval, argv, "eval")
    _require_models(options.models, "eval")
    for path in options.report:
        if path.suffix not in (".html", ".md"):
            raise ConfigError(f"--report {path}: a report is a .html or .md file")
    from zoo.harness.runner import evaluate
    from zoo.harness.workers import workers
    from zoo.report import html, markdown
    from zoo.report.summary import summarise
    from zoo.report.terminal import show_table

    first = workers().index == 0
    with progress_bar(quiet=not first) as progress:
        records = evaluate(
            options.models,
            _task_on(options) or options.task or None,
            options.execution,
            twins=options.twins or bool(options.report),
            seed=options.seed,
            use_cache=False if options.fresh else None,
            out=options.out,
            progress=progress,
        )
    if not first:
        return OK
    if options.json:
        print_json([record.model_dump() for record in records])
    else:
        console = stdout()
        for summary in summarise(records):
            show_table(console, summary.table)
    for path in options.report:
        text = html.records_page(records) if path.suffix == ".html" else markdown.records_report(records)
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, text.encode())
        note(f"report: {path}")
    return OK


def _task_on(options: Eval) -> str | None:
    """The task that is measured on the data that were named, if any were."""
    if options.data is None:
        return None
    from zoo.harness.subjects import find_bundles
    from zoo.registry import MEASURED

    domain = find_bundles(options.models)[0].card.domain
    if options.task or domain not in MEASURED:
        known = ", ".join(MEASURED.names())
        raise ConfigError(f"--data goes without --task, and with models of the domains {known}")
    task: str | None = MEASURED.get(domain)(options.data)[0]
    if task is None:
        raise ConfigError(
            f"--data {options.data}: models only train on it; leave it out to measure the card's"
        )
    return task


def compare_command(argv: Sequence[str]) -> int:
    """`zoo compare`."""
    options = parse(Compare, argv, "compare")
    _require_models(options.models, "compare")
    from zoo.harness.compare import compare, comparison_table
    from zoo.report.terminal import show_table

    with progress_bar() as progress:
        comparisons = compare(
            options.models,
            options.task,
            metric=options.metric,
            execution=options.execution,
            margin=options.margin,
            confidence=options.confidence,
            seed=options.seed,
            use_cache=False if options.fresh else None,
            progress=progress,
        )
    if options.json:
        rows = [
            dataclasses.asdict(one) | {"verdict": one.verdict, "within_margin": one.within_margin}
            for one in comparisons
        ]
        print_json(rows)
    else:
        show_table(stdout(), comparison_table(comparisons))
    return CHECK_FAILED if any(one.within_margin is False for one in comparisons) else OK


def verify_command(argv: Sequence[str]) -> int:
    """`zoo verify`."""
    options = parse(Verify, argv, "verify")
    _require_models(options.models, "verify")
    if not (math.isfinite(options.tolerance) and options.tolerance >= 0):
        raise ConfigError(f"--tolerance is {options.tolerance}; give a small number such as 1e-4")
    from zoo.harness.verify import verification_table, verify
    from zoo.report.terminal import show_table

    with progress_bar() as progress:
        verifications = verify(
            options.models, tolerance=options.tolerance, seeds=options.seeds, progress=progress
        )
    failed = sum(len(one.failed) for one in verifications)
    unknown = sum(len(one.unknown) for one in verifications)
    code = CHECK_FAILED if failed else ENVIRONMENT if unknown else OK
    if options.json:
        print_json([_verification(one) for one in verifications])
        return code
    console = stdout()
    for one in verifications:
        if not (options.failed_only and one.ok):
            show_table(console, verification_table(one, failed_only=options.failed_only))
    hows = [check.how for one in verifications for check in one.checks if check.ok is not None]
    models = "1 model" if len(verifications) == 1 else f"{len(verifications)} models"
    note(
        f"{models}: {hows.count('measured')} figures measured again, "
        f"{hows.count('compared')} compared with other statements, {failed} failed, "
        f"{unknown} could not be checked"
    )
    return code


def _verification(one: Any) -> dict[str, Any]:
    return {"model": one.model, "ok": one.ok, "checks": [dataclasses.asdict(check) for check in one.checks]}


def _require_models(models: Sequence[str], command: str) -> None:
    if not models:
        raise ConfigError(f"name at least one model, e.g. `zoo {command} 'graph/*'`; `zoo list` shows them")
