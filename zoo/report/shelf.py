"""The shelf in one picture: how much of its dense twin's quality and size each bundle has."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from zoo.bundles.card import Card
from zoo.errors import ConfigError
from zoo.harness.tasks import get_task
from zoo.studies.tables import Plot, Series

_log = logging.getLogger("zoo")

# One bundle far above the others would press them all onto a line: it stands here, with its figure beside it.
_HIGHEST = 1.25


def shelf_plot(cards: Iterable[Card]) -> Plot:
    """Quality against size of all bundles that have a dense twin, both as shares of the twin's, from the
    cards alone.

    The quality is the card's first metric over the twin's value, or the twin's over its own where lower is
    better; above 1.25 a point stands at 1.25 and says its share. The size is that of the packed tensors.

    Raises:
        UnknownNameError: a card's task is not registered here.
    """
    points: dict[str, list[tuple[float, float]]] = {}
    for card in cards:
        metric = next(iter(card.metrics), None)
        if metric is None or metric.dense is None or not (metric.value > 0 and metric.dense.value > 0):
            continue
        quality = metric.value / metric.dense.value
        try:
            task = get_task(metric.task)
        except ConfigError as error:  # a domain whose packages are not installed
            _log.warning("%s is left out of the picture: %s", card.name, error)
            continue
        if task.direction(metric.metric) < 0:
            quality = 1 / quality
        points.setdefault(card.domain, []).append((card.cost.bytes.sparse / card.cost.bytes.dense, quality))
    series = [
        Series(
            f"{domain} ({len(found)})",
            [x for x, _ in found],
            [min(y, _HIGHEST) for _, y in found],
            kind="points",
            marks=[f"\N{UPWARDS ARROW} {y:.1f}" if y > _HIGHEST else "" for _, y in found],
        )
        for domain, found in sorted(points.items())
    ]
    series.append(Series("the dense twin", [], [1.0], kind="reference"))
    return Plot(
        "shelf",
        "Sparse models of the zoo beside their dense twins",
        "size of the packed tensors, share of the dense twin's",
        "quality, share of the dense twin's",
        series,
        alt="One point for each sparse bundle: how much of the dense twin's quality is left at which size.",
        log_x=True,
    )
