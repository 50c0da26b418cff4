"""`zoo reproduce coherent-gs`: depths that a decoder moves together beside free ones."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

from zoo.neural3d.methods.coherent_gs import CoherentGS, PairedViews, flows_between
from zoo.neural3d.priors import affine, scattered
from zoo.neural3d.refine import scene_job
from zoo.neural3d.studies import common
from zoo.studies.cells import CellCache
from zoo.studies.study import BAR, Arm, Claim, Study
from zoo.studies.view import Row, Value

FREE, RAY, DECODER = "free in space", "free along the ray", "decoder"


@dataclasses.dataclass(frozen=True)
class CoherentOptions(common.FewOptions):
    """Options of the experiment, as for the other studies of few views but for `count`: there is a
    Gaussian for
    every pixel.

    Args:
        align: steps of the alignment.
    """

    align: int = 200


def measure(make: Any, options: CoherentOptions, case: Row, cells: CellCache) -> Row:
    """One training from a distorted prior with true flow, and what it shows of held-out views."""
    views, seed = common.few_views(case["views"]), case["seed"]
    prior = affine(views.train, seed)
    job = scene_job(prior, seed=seed, steps=options.steps)
    job = job.replace(batches=PairedViews(prior, flows_between(views.train)))
    made = make(align=options.align).sparsify(scattered(views, 10, seed), job)
    errors = []
    for view, given, (scale, shift) in zip(
        views.train, prior, made.extras["affine/scale-and-shift"].T.tolist(), strict=True
    ):
        assert view.depth is not None and given.depth is not None
        known = view.depth > 0
        apart = (scale * given.depth + shift - view.depth).abs() / view.depth.clamp_min(1e-6)
        errors.append(float(apart[known].mean()))
    return {**common.quality(made.model, views.test), "affine": errors, "count": len(made.model.means)}


AFFINE = Value("affine", 100.0, 2, "% of the depth", 2, lower=True)
ARMS = {name: Arm(partial(CoherentGS, motion=motion)) for name, motion in ((FREE, "free"), (RAY, "ray"))}
ARMS[DECODER] = Arm(CoherentGS)

STUDY = Study(
    "coherent-gs",
    "CoherentGS: a Gaussian a pixel, moved along its ray by a decoder, at three views",
    "Paliwal et al., CoherentGS: Sparse Novel View Synthesis with Coherent 3D Gaussians, ECCV 2024",
    CoherentOptions,
    ARMS,
    lambda options: common.cases(ARMS, options),
    measure,
    papers=(45,),
    claims=[
        Claim("{where}: decoder above free depths by 0.5 dB", "20.33 beside 16.68 dB", DECODER, RAY, 0.5),
        Claim("{where}: decoder above Gaussians free in space", "3DGS 14.99 dB", DECODER, FREE),
        Claim("{where}: affine maps recovered to 5 %", BAR, DECODER, bar=-5.0, value=AFFINE),
    ],
    value=common.PSNR,
    varies=("seeds", "views", "count"),
    data=common.content,
    by=("views",),
    titles=common.TITLES,
    tables=[lambda view: common.table(view, {"PSNR, dB": common.PSNR, "error of aligned depth, %": AFFINE})],
    plots=[common.by_view],
    notes=lambda options: [
        "The prior is the true depth under a random affine map of each view, the flow is that of the true "
        "depth: what a good estimator of flow would give."
    ],
)
