"""`zoo reproduce lm-gaussian`: the regularisers one by one, from a noisy cloud."""

from __future__ import annotations

from functools import partial
from typing import Any

from zoo.neural3d.methods.lm_gaussian import LMGaussian
from zoo.neural3d.priors import affine, noisy_cloud
from zoo.neural3d.refine import scene_job
from zoo.neural3d.studies import common
from zoo.studies.cells import CellCache
from zoo.studies.study import Arm, Claim, Study
from zoo.studies.view import Row

PLAIN, DEPTH, NORMAL, ALL = "RGB only", "+ depth", "+ normals", "+ virtual views"


def measure(make: Any, options: common.FewOptions, case: Row, cells: CellCache) -> Row:
    """One training from a noisy cloud of distorted depth, and what it shows of held-out views."""
    views, seed = common.few_views(case["views"]), case["seed"]
    prior = affine(views.train, seed)
    scene = noisy_cloud(prior, options.count, seed, views.background)
    job = scene_job(prior, seed=seed, steps=options.steps)
    return common.quality(make().sparsify(scene, job).model, views.test)


ARMS = {
    PLAIN: Arm(partial(LMGaussian, depth=0.0, normal=0.0, virtual=0.0)),
    DEPTH: Arm(partial(LMGaussian, normal=0.0, virtual=0.0)),
    NORMAL: Arm(partial(LMGaussian, virtual=0.0)),
    ALL: Arm(LMGaussian),
}

STUDY = Study(
    "lm-gaussian",
    "LM-Gaussian: depth, normals and virtual views, one after the other, at three views",
    "Yu et al., LM-Gaussian: Boost Sparse-view 3D Gaussian Splatting with Large Model Priors, 2024",
    common.FewOptions,
    ARMS,
    lambda options: common.cases(ARMS, options),
    measure,
    papers=(23,),
    claims=[
        Claim("{where}: depth above RGB only", "+1.7 dB, Horse-16", DEPTH, PLAIN),
        Claim("{where}: normals above depth alone", "+0.28 dB, Horse-16", NORMAL, DEPTH),
        Claim("{where}: virtual views above both", "+1.3 dB, Horse-16", ALL, NORMAL),
        Claim("{where}: all above RGB only", "21.32 beside 18.04 dB, Horse-16", ALL, PLAIN),
    ],
    value=common.PSNR,
    varies=("seeds", "views"),
    data=common.content,
    by=("views",),
    titles=common.TITLES,
    tables=[lambda view: common.table(view, {"PSNR, dB": common.PSNR})],
    plots=[common.by_view],
)
