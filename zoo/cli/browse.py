"""`zoo list` and `zoo show`: cards only; neither torch nor a domain's libraries are imported."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from zoo.bundles.card import Card, DenseFigure, Level, Metric, level_label
from zoo.cli import nothing_collected
from zoo.cli.console import note, print_json, stdout
from zoo.cli.parsing import Positional, metavar, parse
from zoo.errors import ConfigError
from zoo.report import numbers

if TYPE_CHECKING:
    from zoo.bundles.catalog import Bundle


@dataclass
class List:
    """List models, or what else the zoo knows by name."""

    glob: Annotated[str, Positional, metavar("GLOB")] = "*"
    """Which names, e.g. 'graph/*cora*' (quote it)."""

    kind: Literal["models", "tasks", "methods", "studies", "architectures", "finetuners"] = "models"
    """What to list."""

    domain: str | None = None
    """Only models of this domain: graph, llm, vision, diffusion, neural3d."""

    method: str | None = None
    """Only models of this method."""

    task: str | None = None
    """Only models with a figure on this task."""

    min_sparsity: float | None = None
    """Only models with at least this share of zeros, e.g. 0.8."""

    max_bytes: int | None = None
    """Only models of at most this size on disk."""

    picture: Path | None = None
    """Also draw quality against size of the models beside their dense twins into this .png file."""

    json: bool = False
    """Print JSON."""


@dataclass
class Show:
    """Show a model's card: figures beside its dense twin's, cost, training, data, licence."""

    name: Annotated[str, Positional, metavar("MODEL")]
    """A name, name@version, folder or hf://owner/name."""

    picture: Path | None = None
    """Also draw the model into this file; of scenes: .png beside the photographs, .gif turning."""

    json: bool = False
    """Print the whole card as JSON."""


def list_command(argv: Sequence[str]) -> int:
    """`zoo list`."""
    options = parse(List, argv, "list")
    if options.kind != "models":
        if options.picture is not None:
            raise ConfigError("--picture shows models; leave --kind out")
        return _list_names(options)
    from zoo.bundles.catalog import select

    with nothing_collected():
        bundles = select(
            options.glob,
            domain=options.domain,
            method=options.method,
            task=options.task,
            min_sparsity=options.min_sparsity,
            max_bytes=options.max_bytes,
        )
        cards = [bundle.card for bundle in bundles]
    if options.picture is not None:
        _draw_shelf(cards, options.picture)
    cards = shelf_order(cards)
    if options.json:
        print_json([_brief(card) for card in cards])
        return 0
    from zoo.report.terminal import show_table
    from zoo.studies.tables import Table

    parts = dropped_parts(cards)
    rows = [
        [
            card.name,
            card.method.name,
            *(_dropped(card, part) for part in parts),
            numbers.count(card.cost.parameters.kept),
            numbers.size(card.weights.bytes)
            + (f" + {numbers.size(on.bytes)}" if (on := card.stands_on) else ""),
            *_first_figure(card),
        ]
        for card in cards
    ]
    columns = ["model", "method", *parts, "parameters", "on disk", "measured", "dense twin"]
    note = f"{len(cards)} models. Next: zoo show MODEL" if cards else "No model is that small or that sparse."
    if any(card.stands_on for card in cards):
        note = f"On disk, a + b: its own file and that of the model on whose weights it stands. {note}"
    # What is on the screen at 80 columns: which model, how sparse, how good, how large.
    optional = (*reversed(parts[2:]), "dense twin", "parameters", "method", "on disk", *parts[1:2])
    show_table(stdout(), Table("", columns, rows, note, optional))
    return 0


def shelf_order(cards: list[Card]) -> list[Card]:
    """Networks that others published and what was made of them first, models of digits, on which things are
    only tried, last; otherwise as they come."""
    published = {card.name for card in cards if card.imported is not None}

    def place(card: Card) -> int:
        if "digits" in card.name.split("-"):
            return 2
        return 0 if card.name in published or card.dense_twin in published else 1

    return sorted(cards, key=place)


def dropped_parts(cards: list[Card]) -> list[str]:
    """The kinds of things of which some of these models drop a share (weights, edges, channels ...):
    weights, then what most of them have; each is a column of its own."""
    found = Counter(part for card in cards for part in card.sparsity.parts)
    return sorted(found, key=lambda part: (part != "weights", -found[part], part))


def _dropped(card: Card, part: str) -> str:
    """The share of a part; of a nested model from the first to the last level."""
    known = card.sparsity.parts.get(part)
    if known is None:
        return ""
    last = card.levels[-1].sparsity.parts.get(part) if card.levels else None
    if last is None:
        return numbers.percent(known.sparsity)
    return f"{100 * known.sparsity:.3g}–{100 * last.sparsity:.3g} %"


def show_command(argv: Sequence[str]) -> int:
    """`zoo show`."""
    options = parse(Show, argv, "show")
    from zoo.bundles.catalog import find

    bundle = find(options.name)
    card = bundle.card
    if options.picture is not None:
        _draw(bundle, options.picture)
    if options.json:
        print_json(card.to_dict())
        return 0
    from zoo.report.terminal import show_table

    console = stdout()
    console.print(f"[bold]{bundle.reference}[/bold]", highlight=False)
    console.print(card.summary, markup=False)
    for table in _card_tables(card):
        show_table(console, table)
    took, seed = card.training.seconds, {} if card.method.seed is None else {"seed": card.method.seed}
    facts = {
        "Architecture": f"{card.architecture.name} {_arguments(card.architecture.args)}",
        "Method": f"{card.method.name} {_arguments(card.method.hyperparameters | seed)}",
        "Dense twin": card.dense_twin or ("it is dense itself" if card.method.name == "dense" else "none"),
        "Made by": card.training.command + ("" if took is None else f"  ({numbers.seconds(took)})"),
        "With": " ".join(f"{name} {value}" for name, value in (card.training.environment or {}).items()),
        "Data": f"{card.data.name}, {card.data.source}, {card.data.licence}"
        + (f", sha256 {card.data.sha256}" if card.data.sha256 else ""),
        "Licence": card.license,
        "Imported": f"{card.imported.file} of {card.imported.address}, {card.imported.licence}, sha256 "
        f"{card.imported.sha256}"
        if card.imported
        else "",
        "Formerly": ", ".join(card.formerly),
        "Citation": card.citation.strip(),
        "Evidence": card.evidence or "",
        "Weights": f"{bundle.weights}, sha256 {card.weights.sha256}",
        "Stands on": f"{on.reference}, sha256 {on.identity['sha256']}" if (on := card.stands_on) else "",
    }
    for name, text in facts.items():
        if text:
            line = _fact(name, text, console.width if console.is_terminal else None)
            console.print(line, markup=False, soft_wrap=True)
    return 0


def _fact(name: str, text: str, width: int | None) -> str:
    """A line with its label; on a terminal folded between words, under the text's beginning."""
    line = f"{name + ':':<14}{text}"
    if width is None:
        return line
    return textwrap.fill(
        line, width, subsequent_indent=" " * 14, break_long_words=False, break_on_hyphens=False
    )


def _draw(bundle: Bundle, path: Path) -> None:
    from zoo.registry import PICTURES

    domain = bundle.card.domain
    if domain not in PICTURES:
        others = " and ".join(PICTURES.names())
        raise ConfigError(f"--picture: models of {domain} have none; those of {others} have")
    note(f"{PICTURES.get(domain)(bundle, path)}: {path}")


def _draw_shelf(cards: list[Card], path: Path) -> None:
    from zoo.report.plots import png
    from zoo.report.shelf import shelf_plot
    from zoo.shared.store.io import atomic_write

    if path.suffix != ".png":
        raise ConfigError(f"--picture {path}: give a name that ends in .png")
    atomic_write(path, png(shelf_plot(cards)))


def _list_names(options: List) -> int:
    from zoo import registry

    known = {
        "tasks": registry.TASKS,
        "methods": registry.METHODS,
        "studies": registry.STUDIES,
        "architectures": registry.ARCHITECTURES,
        "finetuners": registry.FINETUNERS,
    }
    names = known[options.kind].names(options.glob)
    if options.json:
        print_json(names)
    else:
        for name in names:
            print(name)
    return 0


def _first_figure(card: Card) -> tuple[str, str]:
    """The first figure of a card, and that of the dense twin."""
    if not card.metrics:
        return "not measured", ""
    metric = card.metrics[0]
    return (
        f"{metric.metric} {numbers.value(metric.value)}",
        numbers.value(metric.dense.value) if metric.dense else "",
    )


def _brief(card: Card) -> dict[str, Any]:
    return {
        "name": card.name,
        "version": card.version,
        "domain": card.domain,
        "method": card.method.name,
        "summary": card.summary,
        "sparsity": card.sparsity.overall,
        "parts": {name: part.sparsity for name, part in card.sparsity.parts.items()},
        "parameters": card.cost.parameters.model_dump(),
        "flops": card.cost.flops.model_dump() if card.cost.flops else None,
        "bytes": card.cost.bytes.model_dump(),
        "base": card.stands_on.model_dump() if card.stands_on else None,
        "metrics": [
            {
                "task": metric.task,
                "metric": metric.metric,
                "value": metric.value,
                "dense": metric.dense.value if metric.dense else None,
            }
            for metric in card.metrics
        ],
        "dense_twin": card.dense_twin,
    }


def _card_tables(card: Card) -> list[Any]:
    from zoo.studies.tables import Table

    metrics = []
    for metric in card.metrics:
        dense = metric.dense
        metrics.append(
            [
                metric.task,
                f"{metric.metric} ({metric.split})",
                numbers.value(metric.value, metric.stderr),
                numbers.value(dense.value) if dense else "",
                _over_seeds(metric),
                _over_seeds(dense) if dense else "",
            ]
        )
    columns = ["task", "metric", "this model", "dense twin", "mean ± spread (seeds)", "dense twin's"]
    measured = Table("Measured", columns, metrics)
    figures = [figure for metric in card.metrics for figure in (metric, metric.dense) if figure]
    if all(len(figure.per_seed) == 1 for figure in figures):  # the mean of one is the figure itself
        measured = replace(measured.without(columns[4]).without(columns[5]), note="One seed.")
    if not any(metric.dense for metric in card.metrics):
        measured = measured.without(columns[3]).without(columns[5])
    cost, flops = card.cost, card.cost.flops
    costs = [
        ["parameters", numbers.count(cost.parameters.dense), numbers.count(cost.parameters.kept)],
        *([["FLOPs per pass", numbers.count(flops.dense), numbers.count(flops.sparse)]] if flops else []),
        ["tensors", numbers.size(cost.bytes.dense), numbers.size(cost.bytes.sparse)],
        ["file on disk", "", numbers.size(cost.bytes.on_disk)],
    ]
    if card.stands_on is not None:
        costs.append(["its base's files", "", numbers.size(card.stands_on.bytes)])
    tables = [measured] if metrics else []
    tables.append(Table("Cost", ["", "dense", "sparse"], costs))
    if card.sparsity.parts:
        parts = [
            [name, f"{part.kept:,}", f"{part.total:,}", numbers.percent(part.sparsity), part.pattern]
            for name, part in card.sparsity.parts.items()
        ]
        tables.append(Table("Sparsity", ["part", "kept", "of", "sparsity", "pattern"], parts))
    if card.levels:
        tables.append(_levels(card))
    return tables


def _levels(card: Card) -> Any:
    """The levels of a nested model, each with the address that every command takes."""
    from zoo.studies.tables import Table

    metric = card.metrics[0]
    levels: list[Card | Level] = [card, *card.levels]
    rows = [
        [
            f"{card.name}#{level_label(level.sparsity.overall)}",
            numbers.count(level.cost.parameters.kept),
            numbers.size(level.cost.bytes.sparse),
            numbers.value(level.metrics[0].value, level.metrics[0].stderr),
            _over_seeds(level.metrics[0]),
        ]
        for level in levels
    ]
    columns = ["level", "parameters", "packed alone", metric.metric, "mean ± spread (seeds)"]
    return Table("Levels", columns, rows)


def _over_seeds(figure: Metric | DenseFigure) -> str:
    """Mean and spread over seeds; a single seed has no spread."""
    spread = "-" if figure.spread is None else numbers.value(figure.spread)
    return f"{numbers.value(figure.mean)} ± {spread} ({len(figure.per_seed)})"


_LONGEST = 100  # characters of an argument


def _arguments(values: dict[str, Any]) -> str:
    return " ".join(f"{key}={_short(str(value))}" for key, value in values.items())


def _short(text: str) -> str:
    """A value as a reader wants it; plans of what was cut run over pages, and `--json` has them."""
    return (
        text if len(text) <= _LONGEST else f"{text[:_LONGEST]}... ({len(text)} characters, whole by --json)"
    )
