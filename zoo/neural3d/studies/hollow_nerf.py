"""`zoo reproduce hollow-nerf`: trained saliency beside no mask, the true surface and a random mask."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from zoo.neural3d.fields import HashField, field_job
from zoo.neural3d.hull import cube, shell, visual_hull
from zoo.neural3d.methods.hollow_nerf import HollowNeRF, hollow
from zoo.neural3d.refine import mean_psnr
from zoo.neural3d.views import Views, load_views
from zoo.shared.masks import masks_of
from zoo.shared.store.formats import save_packed
from zoo.shared.train import Job
from zoo.studies.cells import CellCache
from zoo.studies.digests import code_digest
from zoo.studies.study import BAR, Arm, Claim, Study, Tuned
from zoo.studies.tables import Plot, Series, Table
from zoo.studies.view import Row, Value, View

DENSE, HOLLOW = "no mask", "HollowNeRF"
ORACLE, RANDOM = "mask of the surface", "random mask"
#: Where each set of views lies: centre and half side of the cube. Not the shapes: their held-out views chose
#: the method's settings.
CUBES: dict[str, tuple[tuple[float, float, float], float]] = {"lego-50": ((0.0, 0.0, 0.33), 1.2)}
#: A field of the size of these pictures.
SMALL: dict[str, Any] = {"levels": 6, "finest": 64, "hidden": 16, "samples": 32}
JUDGED = 8  # held-out views


@dataclass(frozen=True)
class HollowOptions:
    """Options of the experiment.

    Args:
        views: sets of views.
        seeds: how many, from 0.
        steps: of every arm.
        batch: rays a step.
        log2_size: logarithm of the entries of a level of the hash table.
        side: cells of the saliency grid on a side.
        bound: on the mean saliency.
    """

    views: tuple[str, ...] = tuple(CUBES)
    seeds: int = 3
    steps: int = 600
    batch: int = 128
    log2_size: int = 12
    side: int = 32
    bound: float = 0.04

    def field(self, name: str, seed: int, **changes: Any) -> HashField:
        """A fresh field around the views."""
        centre, half = CUBES[name]
        given = {"centre": centre, "half": half, "log2_size": self.log2_size}
        return HashField(**SMALL).like(seed, **{**given, **changes})

    def job(self, case: Row) -> Job:
        """Training of a case."""
        views = views_of(case["views"]).train
        return field_job(views, seed=case["seed"], steps=self.steps, batch=self.batch)


@cache
def views_of(name: str) -> Views:
    """Views by name, with every so many of the test views."""
    found = load_views(name)
    test = found.test[:: max(1, len(found.test) // JUDGED)][:JUDGED]
    return Views(found.name, found.train, test, found.background)


@cache
def surface_cells(name: str, cells: int) -> Tensor:
    """Cells [cells, cells, cells] that the hull of all training masks ends in, at twice the resolution."""
    (centre, half), views = CUBES[name], views_of(name).train
    inside = visual_hull(views, cube(torch.tensor(centre), half, 2 * cells))
    fine = shell(inside.reshape((2 * cells,) * 3)).float()
    return functional.max_pool3d(fine[None, None], 2)[0, 0] > 0


def grown(cells: Tensor) -> Tensor:
    """Cells with all their neighbours."""
    return functional.max_pool3d(cells.float()[None, None], 3, 1, 1)[0, 0] > 0


def figures(field: HashField, options: HollowOptions, case: Row) -> Row:
    """What is measured of a trained field."""
    test = views_of(case["views"]).test
    with torch.no_grad():
        field(test[0].camera)
        start = time.process_time()
        for view in test:
            field(view.camera)
        spent = time.process_time() - start
    masks = masks_of(field)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "field.safetensors"
        save_packed(path, dict(field.state_dict()), masks or None, {}, {})
        size = path.stat().st_size
    found: Row = {
        "psnr": mean_psnr(field, test),
        "ms": 1000 * spent / len(test),
        "bytes": size,
        "parameters": sum(p.numel() for p in field.parameters()),
    }
    if masks:
        keep, surface = masks["saliency"].keep, surface_cells(case["views"], options.side)
        found["kept"] = float(keep.double().mean())
        found["recall"] = float((keep & surface).sum() / surface.sum())
        found["entries"] = float(masks["table"].keep.double().mean())
    return found


def trained_hollow(options: HollowOptions, case: Row, cells: CellCache) -> tuple[Row, Tensor]:
    """Figures of HollowNeRF's field, and which cells it kept."""
    own = {k: getattr(options, k) for k in ("steps", "batch", "log2_size", "side", "bound")}
    key = {
        "study": "hollow-nerf",
        "cell": HOLLOW,
        **own,
        "views": case["views"],
        "seed": case["seed"],
        "code": code_digest(trained_hollow, HollowNeRF),
    }

    def compute() -> tuple[Row, dict[str, Tensor]]:
        method = HollowNeRF(bound=options.bound, cells=options.side)
        job = options.job(case)
        field = method.sparsify(options.field(case["views"], case["seed"]), job).model
        assert isinstance(field, HashField) and field.saliency is not None
        return figures(field, options, case), {"keep": (field.saliency != 0).to(torch.uint8)}

    found, tensors = cells.tensors(key, compute)
    return found, tensors["keep"].bool()


def measure(make: Any, options: HollowOptions, case: Row, cells: CellCache) -> Row:
    """One training, and what its field is worth."""
    arm, seed = case["arm"], case["seed"]
    if arm == HOLLOW:
        return trained_hollow(options, case, cells)[0]
    job = options.job(case)
    if arm == DENSE:
        field = options.field(case["views"], seed)
        job.fit(field, macs=lambda: 0.0).run()
        return figures(field.eval(), options, case)
    keep = grown(surface_cells(case["views"], options.side))
    if arm == RANDOM:
        kept = trained_hollow(options, case, cells)[1]
        order = torch.randperm(kept.numel(), generator=torch.Generator().manual_seed(seed))
        keep = kept.flatten()[order].reshape(kept.shape)
    field = options.field(case["views"], seed, saliency=options.side)
    masks = hollow(field, keep)
    fit = job.fit(field, macs=lambda: 0.0)
    with masks.attach(field, fit.optimizer):
        fit.run()
    return figures(field.eval(), options, case)


def cases(options: HollowOptions) -> Iterator[Row]:
    """Every arm on every set of views, HollowNeRF before the random mask of its size."""
    for views in options.views:
        for seed in range(options.seeds):
            for arm in ARMS:
                yield {"views": views, "arm": arm, "level": options.log2_size, "seed": seed}


def table(view: View) -> Table:
    """All figures by arm."""
    values = [PSNR, KEPT, RECALL, ENTRIES, BYTES, TIME]
    columns = ["arm", "PSNR, dB", "cells kept, %", "surface cells among them, %", "table entries kept, %"]
    body = [[arm, *(view.cell(arm, None, value) for value in values)] for arm in view.arms()]
    note = (
        "Mean ± deviation over seeds, held-out views. Bytes: the packed file, saliency included. Time: "
        "processor time of a view, one thread, on a machine with other work."
    )
    return Table(view.title, [*columns, "kB", "ms a view"], body, note)


def picture(view: View) -> Plot:
    """Quality against bytes."""
    series = []
    for arm in view.arms():
        rows = view.chosen(arm)
        series.append(Series(arm, [r["bytes"] / 1e3 for r in rows], [r["psnr"] for r in rows], kind="points"))
    name = view.where["views"]
    return Plot(
        f"quality-{name}",
        f"{view.title}: quality against size",
        "packed file, kB",
        "PSNR of held-out views, dB",
        series,
        f"PSNR against bytes of every run on {view.title}; the arms are colours.",
    )


PSNR = Value("psnr", 1.0, 2, "dB", 2)
KEPT = Value("kept", 100.0, 1, "% of the cells", 1, lower=True)
RECALL = Value("recall", 100.0, 1, "% of the surface's cells", 1)
ENTRIES = Value("entries", 100.0, 1, "%", 1)
BYTES = Value("bytes", 1e-3, 1, "kB", 1, lower=True)
TIME = Value("ms", 1.0, 0, "ms", 0, lower=True)
ARMS = {arm: Arm() for arm in (DENSE, ORACLE, RANDOM)} | {
    HOLLOW: Arm(
        tuned=Tuned(
            "rate of the saliency, when its bound begins and when it is hardened, by hand",
            "held-out views of the shapes, seed 0, a scene that is not measured",
            ("saliency_rate", "start", "trained", "steps"),
        )
    )
}

STUDY = Study(
    "hollow-nerf",
    "HollowNeRF: a saliency grid that empties space, on the same steps as a field without",
    "Xie et al., HollowNeRF: Pruning Hashgrid-Based NeRFs with Trainable Collision Mitigation, ICCV 2023",
    HollowOptions,
    ARMS,
    cases,
    measure,
    papers=(4,),
    claims=[
        Claim(
            "{where}: within 0.3 dB of a field without mask and with as many entries",
            "34.85 dB with 6.48 M parameters beside 33.86 with 11.49 M, Chair, 300,000 steps",
            HOLLOW,
            DENSE,
            -0.3,
        ),
        Claim("{where}: above a random mask of as many cells", BAR, HOLLOW, RANDOM),
        Claim("{where}: keeps at most 15 % of the cells", "bound 4 %", HOLLOW, bar=-15.0, value=KEPT),
        Claim("{where}: with at least 95 % of the surface's cells", BAR, HOLLOW, bar=95.0, value=RECALL),
        Claim("{where}: a view takes less time than without mask", BAR, HOLLOW, DENSE, value=TIME),
        Claim("{where}: the file is smaller than without mask", BAR, HOLLOW, DENSE, value=BYTES),
        Claim("{where}: a mask of the true surface is above", "upper bound", ORACLE, HOLLOW),
    ],
    value=PSNR,
    varies=("seeds", "views"),
    data=lambda options, case: [[view.image, view.camera.viewmat] for view in views_of(case["views"]).train],
    by=("views",),
    titles={"lego-50": "lego, 50 px"},
    tables=[table],
    plots=[picture],
)
