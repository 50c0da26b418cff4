"""What the studies of few views share: the views, figures, tables."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from zoo.neural3d.metrics import psnr
from zoo.neural3d.scene import GaussianScene
from zoo.neural3d.views import View, Views, load_views
from zoo.studies.study import Arm
from zoo.studies.tables import Plot, Series, Table
from zoo.studies.view import Row, Value
from zoo.studies.view import View as Rows

PSNR = Value("psnr", 1.0, 2, "dB", 2)
TITLES = {
    "shapes": "four balls, 3 views of an arc, 48 px",
    "livingroom": "rendered living room, 3 frames, 64 px",
    "shapes-ring": "four balls, 4 views around, 48 px",
    "lego": "lego, 4 views around, 50 px",
}


@dataclass(frozen=True)
class FewOptions:
    """Options of the experiment.

    Args:
        views: sets of views.
        seeds: how many, from 0.
        steps: of every arm.
        count: Gaussians to start from.
    """

    views: tuple[str, ...] = ("shapes", "livingroom")
    seeds: int = 3
    steps: int = 150
    count: int = 600


@cache
def few_views(name: str) -> Views:
    """A few views to train on and others between them, by name (`TITLES`)."""
    known = {"shapes": "shapes-arc", "shapes-ring": "shapes-ring", "lego": "lego-ring"}
    return load_views(known.get(name, "livingroom-frames"))


def quality(scene: GaussianScene, views: Sequence[View]) -> Row:
    """PSNR of each held-out view, and how well the rendered depth is ordered where the true one is known."""
    with torch.no_grad():
        seen = [scene.render(view.camera) for view in views]
    found: Row = {"psnr": [psnr(one.colour, view.image) for one, view in zip(seen, views, strict=True)]}
    orders = []
    for one, view in zip(seen, views, strict=True):
        if view.depth is not None:
            known = (view.depth > 0) & (one.alpha > 0.1)
            if int(known.sum()) > 2:
                orders.append(_spearman((one.depth / one.alpha.clamp_min(1e-3))[known], view.depth[known]))
    if orders:
        found["order"] = orders
    return found


def _spearman(one: Tensor, other: Tensor) -> float:
    ranks = torch.stack([values.argsort().argsort().double() for values in (one, other)])
    value = float(torch.corrcoef(ranks)[0, 1])
    return 0.0 if math.isnan(value) else value


def cases(arms: Mapping[str, Arm], options: FewOptions) -> Iterator[Row]:
    """Every arm on every set of views for every seed."""
    for views in options.views:
        for seed in range(options.seeds):
            for arm in arms:
                yield {"views": views, "arm": arm, "level": len(few_views(views).train), "seed": seed}


def content(options: Any, case: Row) -> list[Any]:
    """What a digest of a case's data is taken of."""
    views = few_views(case["views"])
    return [[view.image, view.camera.viewmat] for view in (*views.train, *views.test)]


def table(view: Rows, values: Mapping[str, Value]) -> Table:
    """Figures by arm."""
    body = [[arm, *(view.cell(arm, None, value) for value in values.values())] for arm in view.arms()]
    note = f"Mean ± deviation over seeds; {len(view.rows[0]['psnr'])} held-out views."
    return Table(view.title, ["arm", *values], body, note)


def by_view(view: Rows) -> Plot:
    """PSNR of each held-out view, the mean over seeds."""
    series = []
    for arm in view.arms():
        runs = [row["psnr"] for row in view.chosen(arm)]
        means = [sum(values) / len(values) for values in zip(*runs, strict=True)]
        series.append(Series(arm, list(range(1, len(means) + 1)), means))
    return Plot(
        f"views-{view.where['views']}",
        f"{view.title}: by held-out view",
        "held-out view",
        "PSNR, dB",
        series,
        f"PSNR of each held-out view of {view.title}, mean over seeds, a line for each arm.",
    )
