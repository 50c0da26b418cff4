"""`zoo reproduce sparse-nerf`: ranking of depth beside nothing and beside depth on a wrong scale."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from zoo.neural3d.methods.sparse_nerf import SparseNeRF
from zoo.neural3d.priors import MOBILITY, expected_depth, known_depth, monotone, scattered
from zoo.neural3d.refine import picture_loss, refine, scene_job
from zoo.neural3d.scene import GaussianScene
from zoo.neural3d.studies import common
from zoo.neural3d.views import View
from zoo.studies.cells import CellCache
from zoo.studies.study import BAR, Arm, Claim, Study
from zoo.studies.view import Row, Value

PLAIN, RANKING, BOTH, WRONG = "RGB only", "ranking", "ranking + continuity", "L1 on the prior"


def plain_depth(model: nn.Module, view: View, weight: float = 0.5) -> Tensor:
    """The picture's loss and the distance of the depth from the prior as it is."""
    assert isinstance(model, GaussianScene)
    seen, prior = model.render(view.camera), known_depth(view)
    apart = (expected_depth(seen) - prior).abs()[prior > 0].mean()
    return picture_loss(seen.colour, view) + weight * apart / float(prior[prior > 0].mean())


def measure(make: Any, options: common.FewOptions, case: Row, cells: CellCache) -> Row:
    """One training, and what it shows of held-out views."""
    views = common.few_views(case["views"])
    job = scene_job(monotone(views.train, case["seed"]), seed=case["seed"], steps=options.steps)
    scene = scattered(views, options.count, case["seed"])
    if case["arm"] in (PLAIN, WRONG):
        scene = refine(
            scene, job if case["arm"] == PLAIN else job.replace(loss=plain_depth), mobility=MOBILITY
        )
    else:
        scene = make(near_is_larger=False).sparsify(scene, job).model
    return common.quality(scene, views.test)


ORDER = Value("order", 1.0, 3, "rank correlation", 3)
ARMS = {
    PLAIN: Arm(),
    RANKING: Arm(partial(SparseNeRF, continuity=0.0)),
    BOTH: Arm(SparseNeRF),
    WRONG: Arm(),
}

STUDY = Study(
    "sparse-nerf",
    "SparseNeRF: the order of depth as the only prior, at three views",
    "Wang et al., SparseNeRF: Distilling Depth Ranking for Few-shot Novel View Synthesis, ICCV 2023",
    common.FewOptions,
    ARMS,
    lambda options: common.cases(ARMS, options),
    measure,
    papers=(53,),
    claims=[
        Claim("{where}: ranking above RGB only by 0.5 dB", "LLFF-3 19.86 dB", RANKING, PLAIN, 0.5),
        Claim("{where}: with continuity above RGB only by 0.5 dB", "LLFF-3 19.86 dB", BOTH, PLAIN, 0.5),
        Claim("{where}: ranking above L1 on a wrong scale", BAR, RANKING, WRONG),
        Claim("{where}: depth better ordered than by RGB only", BAR, RANKING, PLAIN, value=ORDER),
    ],
    value=common.PSNR,
    varies=("seeds", "views"),
    data=common.content,
    by=("views",),
    titles=common.TITLES,
    tables=[lambda view: common.table(view, {"PSNR, dB": common.PSNR, "order of depth": ORDER})],
    plots=[common.by_view],
)
