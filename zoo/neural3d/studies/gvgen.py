"""`zoo reproduce gvgen`: volumes of a fixed number of Gaussians fitted to real views, with and without the
pool."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from zoo.errors import ConfigError
from zoo.neural3d.methods.gvgen import VolumeFit, boxed
from zoo.neural3d.refine import mean_psnr
from zoo.neural3d.views import load_views
from zoo.studies.cells import CellCache
from zoo.studies.figures import Grid
from zoo.studies.study import Arm, Claim, Study
from zoo.studies.tables import Verdict
from zoo.studies.view import Row, Value
from zoo.studies.view import View as Rows


@dataclass(frozen=True)
class VolumeOptions:
    """Options.

    Args:
        seeds: how many, from 0.
        views: of `zoo.neural3d.views.load_views`.
        width: of the box round the object, in units of the views.
        side: nodes of the volume along an axis.
        steps: of a training.
    """

    seeds: int = 3
    views: str = "lego-100"
    width: float = 2.6
    side: int = 12
    steps: int = 800

    def __post_init__(self) -> None:
        if min(self.seeds, self.steps) < 1 or self.side < 2 or not self.width > 0:
            raise ConfigError("give at least one seed and step, two nodes, and a width above 0")


def measure(make: VolumeFit, options: VolumeOptions, case: Row, cells: CellCache) -> Row:
    """PSNR of held-out views, and how many Gaussians there are."""
    views = load_views(options.views)
    train, test = (boxed(part, views.centre, options.width) for part in (views.train, views.test))
    method = replace(make, side=options.side, steps=options.steps, seed=case["seed"])
    volume = method.fit(train, views.background)
    offset = volume.offsets.detach().abs().amax(1)
    return {
        "psnr": mean_psnr(volume, test),
        "gaussians": len(volume),
        "nodes": len(volume.nodes.unique()),
        "moved": float((offset > 0.25 / (options.side - 1)).float().mean()),
        "opaque": float((volume.opacities.detach().sigmoid() > 0.1).float().mean()),
    }


def cases(options: VolumeOptions) -> Iterator[Row]:
    """All arms of a seed before the next seed."""
    for seed in range(options.seeds):
        yield from ({"arm": arm, "level": options.views, "seed": seed} for arm in ARMS)


def _counts(view: Rows) -> list[Verdict]:
    wanted = view.options.side**3
    rows = view.chosen(FULL)
    exact = all(row["gaussians"] == row["nodes"] == wanted for row in rows)
    measured = ", ".join(str(row["gaussians"]) for row in rows)
    return [
        Verdict(
            f"the pool keeps the count: {wanted} Gaussians, one a node",
            "exactly 32,768 of 32^3",
            measured,
            "holds" if exact else "does not hold",
            paper=(48,),
        )
    ]


FULL, NO_POOL, NO_OFFSETS = "candidate pool", "no pool", "no offsets"
ARMS = {
    FULL: Arm(VolumeFit()),
    NO_POOL: Arm(VolumeFit(pool=False)),
    NO_OFFSETS: Arm(VolumeFit(pool=False, offsets=False)),
}
STUDY = Study(
    "gvgen",
    "GVGEN: volumes of Gaussians with a candidate pool",
    "Xianglong He et al.: GVGEN: Text-to-3D Generation with Volumetric Representation, ECCV 2024",
    VolumeOptions,
    ARMS,
    cases,
    measure,
    papers=(48,),
    claims=[
        Claim("the pool is better than none", "30.12 against 29.68 dB", FULL, NO_POOL),
        Claim("it is better than no offsets by 1 dB", "30.12 against 27.14 dB", FULL, NO_OFFSETS, bar=1.0),
        Claim("offsets alone are better than none", "29.68 against 27.14 dB", NO_POOL, NO_OFFSETS),
    ],
    value=Value("psnr", 1.0, 2, "dB", 2),
    facts=_counts,
    tables=[
        Grid("Held-out PSNR (dB)"),
        Grid("Gaussians", value=Value("gaussians", 1.0, 0)),
        Grid("Share that is opaque (%)", value=Value("opaque", 100.0, 1)),
    ],
    notes=lambda options: [
        f"{options.views}, {options.side}^3 nodes, {options.steps} steps (the released code: 32^3, 20,000). "
        "The fitting is what is studied; volumes from text are in the study gvgen-text.",
    ],
)
