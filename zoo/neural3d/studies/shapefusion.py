"""`zoo reproduce shapefusion`: edits of regions of toy shapes, what they leave alone, how they join it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from zoo.errors import ConfigError
from zoo.harness.tasks import Progress, TaskResult
from zoo.neural3d.methods.shapefusion import Components, ShapeFusion, SpiralNet, shapes, sphere
from zoo.neural3d.networks import NetworkTask
from zoo.neural3d.spirals import ball
from zoo.studies.cells import CellCache
from zoo.studies.figures import Columns, Curves, mean_of
from zoo.studies.study import BAR, Arm, Claim, Study
from zoo.studies.tables import Verdict
from zoo.studies.view import Row, Value, View

EDITS, HOPS, PULL = 30, 3, 0.15  # held-out shapes; edges round the anchor; how far it is pulled out
SAMPLES = 2
KNOWN = 1000  # shapes that the components are taken of


@dataclass(frozen=True)
class EditOptions:
    """Options.

    Args:
        seeds: how many, from 0.
        levels: of the sphere's refinement, 162 vertices at 2.
        steps: of a training.
        batch: shapes of a step.
        components: numbers of principal components, chosen by the seam on other shapes.
    """

    seeds: int = 3
    levels: int = 2
    steps: int = 300
    batch: int = 16
    components: tuple[int, ...] = (10, 20, 40, 80)

    def __post_init__(self) -> None:
        if min(self.seeds, self.levels, self.steps, self.batch, *self.components) < 1:
            raise ConfigError("give at least one seed, level, step, shape and component")


class Edit(NamedTuple):
    """A shape, the mask of what is sampled, the anchor and where it goes."""

    shape: Tensor
    mask: Tensor
    anchor: int
    to: Tensor


@cache
def edits(levels: int, seed: int = 10_000) -> list[Edit]:
    """Edits of shapes that no training sees: a random vertex pulled outwards."""
    mesh, generator = sphere(levels), torch.Generator().manual_seed(seed)
    found = []
    for shape in shapes(mesh.rest, EDITS, generator):
        anchor = int(torch.randint(len(mesh.rest), (), generator=generator))
        mask = ball(mesh.edges, len(mesh.rest), anchor, HOPS)
        mask[anchor] = False
        found.append(
            Edit(shape, mask, anchor, shape[anchor] + PULL * functional.normalize(shape[anchor], dim=0))
        )
    return found


def judged(edit: Edit, made: Tensor, levels: int) -> Row:
    """How the samples [n, v, 3] of an edit join the rest, in units of how real shapes do; how far vertices
    outside moved; how far samples differ; how far the anchor is from where it was put."""
    mesh = sphere(levels)
    border = mesh.edges[edit.mask[mesh.edges].sum(1) == 1]

    def jump(places: Tensor) -> Tensor:
        along = places[..., border[:, 0], :] - places[..., border[:, 1], :]
        return (along - (mesh.rest[border[:, 0]] - mesh.rest[border[:, 1]])).norm(dim=-1).mean(-1)

    outside = ~edit.mask
    outside[edit.anchor] = False
    return {
        "jump": float(jump(made).mean()),
        "usual": float(jump(edit.shape)),
        "moved": float((made - edit.shape)[:, outside].norm(dim=2).mean()),
        "same": all(torch.equal(one[outside], edit.shape[outside]) for one in made),
        "differ": float((made[0] - made[-1])[edit.mask].norm(dim=1).mean()),
        "anchor": float((made[:, edit.anchor] - edit.to).norm(dim=1).mean()),
    }


def together(rows: list[Row]) -> Row:
    """Means over edits; the seam's ratio is one of means, since single usual jumps may be small."""
    mean = {name: sum(float(row[name]) for row in rows) / len(rows) for name in rows[0]}
    return {**mean, "seam": mean["jump"] / mean["usual"], "same": all(row["same"] for row in rows)}


def sampled(model: nn.Module, levels: int, seed: int) -> list[Row]:
    """What a network's samples are like."""
    assert isinstance(model, SpiralNet)
    generator = torch.Generator().manual_seed(seed)
    return [judged(one, model.edit(*one, SAMPLES, generator), levels) for one in edits(levels)]


def components(options: EditOptions, seed: int, paste: bool) -> Row:
    """The same of principal components, of as many as have the best seam on other edits; `paste` puts back
    what is outside."""
    mesh = sphere(options.levels)
    known = shapes(mesh.rest, KNOWN, torch.Generator().manual_seed(seed))

    def run(some: list[Edit], count: int) -> Row:
        fitted, rows = Components.of(known, count), []
        for one in some:
            made = fitted.edit(*one)
            if paste:
                made = torch.where(one.mask[:, None], made, one.shape)
                made[one.anchor] = one.to
            rows.append(judged(one, made[None], options.levels))
        return together(rows)

    others = edits(options.levels, 20_000)
    best = min(options.components, key=lambda count: abs(run(others, count)["seam"] - 1))
    return {**run(edits(options.levels), best), "components": best}


class RegionEdits(NetworkTask):
    """30 edits of held-out shapes, two samples each: the jump over the seam in units of that of real shapes
    at the same edges (1 is best), and how far the two samples differ, in radii."""

    name, primary, higher_is_better = "neural3d/region-edits", "jump", False
    network = SpiralNet

    def measured_on(self) -> Any:
        return [[one.shape, one.mask, one.anchor, one.to] for one in edits(2)]

    def example(self, model: SpiralNet) -> tuple[Any, ...]:
        """A shape with nothing masked, at the last time."""
        places = torch.zeros(1, *model.rest.shape)
        return places, torch.zeros(places.shape[:2], dtype=torch.bool), places.new_ones(1)

    def direction(self, metric: str) -> int:
        """Samples should differ, and join their surroundings."""
        return 1 if metric == "differ" else -1

    def evaluate(self, model: nn.Module, *, progress: Progress | None = None) -> TaskResult:
        """Measure a network."""
        rows = sampled(self.fitting(model), 2, 0)
        usual = sum(row["usual"] for row in rows) / len(rows)
        return TaskResult.from_samples(
            {"jump": [row["jump"] / usual for row in rows], "differ": [row["differ"] for row in rows]}
        )


def measure(make: Any, options: EditOptions, case: Row, cells: CellCache) -> Row:
    """Seam, movement outside, and difference of samples."""
    if isinstance(make, bool):
        return components(options, case["seed"], make)
    model = ShapeFusion(options.levels, options.steps, options.batch).fit(case["seed"])
    return together(sampled(model, options.levels, case["seed"]))


def cases(options: EditOptions) -> Iterator[Row]:
    """All arms of a seed before the next seed."""
    for seed in range(options.seeds):
        yield from ({"arm": arm, "level": "edits", "seed": seed} for arm in ARMS)


def untouched(view: View) -> list[Verdict]:
    """Whether every bit outside the mask is kept in every run."""
    rows = view.chosen(FUSION)
    text = f"{sum(row['same'] for row in rows)} of {len(rows)} runs of {EDITS} edits, {SAMPLES} samples each"
    holds = all(row["same"] for row in rows) if rows else None
    return [view.fact("vertices outside the mask keep every bit", "they stay unchanged", text, holds)]


FUSION, PCA, PASTED = "ShapeFusion", "principal components", "principal components, rest put back"
ARMS = {FUSION: Arm(ShapeFusion)}
for _name, _paste in ((PCA, False), (PASTED, True)):
    ARMS[_name] = Arm(_paste)
SEAM = Value("seam", 1.0, 3, "times the usual jump", 2, lower=True)
MOVED = Value("moved", 1000.0, 2, "thousandths", 2, lower=True)
DIFFER = Value("differ", 1000.0, 1, "thousandths", 1)
STUDY = Study(
    "shapefusion",
    "ShapeFusion: edits of regions of shapes that leave the rest alone",
    "Rolandos Alexandros Potamias et al.: ShapeFusion: A 3D diffusion model for localized shape editing, "
    "ECCV 2024",
    EditOptions,
    ARMS,
    cases,
    measure,
    papers=(34,),
    claims=[
        Claim("the jump over the seam is at most 1.5 times the usual one", BAR, FUSION, bar=-1.5),
        Claim("the seam is better than that of components with the rest put back", BAR, FUSION, PASTED),
        Claim(
            "two samples differ by more than ten thousandths of the radius",
            "diverse",
            FUSION,
            bar=10.0,
            value=DIFFER,
        ),
        Claim("components move what is outside, diffusion does not", BAR, FUSION, PCA, value=MOVED),
    ],
    value=SEAM,
    varies=("seeds", "device"),
    facts=untouched,
    tables=[
        Columns(
            "Edits",
            {
                "jump over the seam (1: as in real shapes)": SEAM,
                "moved outside (thousandths of the radius)": MOVED,
                "samples differ (thousandths)": DIFFER,
                "anchor off (thousandths)": Value("anchor", 1000.0, 2),
                "components": mean_of("components"),
            },
        )
    ],
    plots=[
        Curves(
            "seams",
            "Edits: the seam and what moves outside",
            "moved outside (thousandths of the radius)",
            "jump over the seam (1: as in real shapes)",
            x=MOVED,
            levels=("edits",),
            points=True,
            alt="One point an arm, with the deviation over seeds.",
        )
    ],
    notes=lambda options: [
        f"{EDITS} held-out shapes of a toy family on {len(sphere(options.levels).rest)} vertices; a random "
        f"vertex pulled out by {PULL} radii, the ball of {HOPS} edges round it sampled anew. {options.steps} "
        f"steps of {options.batch} new shapes. Components of {KNOWN} shapes, their number among "
        f"{options.components} chosen by the seam on other edits, which flatters them there.",
        "The jump is the mean change of the edges over the seam from those of the sphere.",
    ],
)
