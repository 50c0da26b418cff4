"""`zoo reproduce slash`: slot attention with and without smoothed maps and shepherded slots.

`python -m zoo.vision.studies.slash FILE` draws the slots of both, trained for seed 0.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from scipy import stats

from zoo.shared.store.io import atomic_write
from zoo.shared.structure.relatives import seeded
from zoo.shared.train import Job, Recipe
from zoo.studies.cells import CellCache
from zoo.studies.figures import Columns
from zoo.studies.options import StudyOptions
from zoo.studies.study import Arm, Study, above
from zoo.studies.tables import Outcome, Plot, Series, Verdict
from zoo.studies.verdict import deviation
from zoo.studies.view import Row, Value, View
from zoo.vision.methods.slash import SlotModel
from zoo.vision.slots import RECIPE, Shepherded, indices, judged, seen, slot_loss
from zoo.vision.sprites import Sprites

PLAIN, SLASH = "slot attention", "SLASH"


@dataclass(frozen=True)
class SlotOptions(StudyOptions):
    """Options of the experiment.

    Args:
        seeds: how many, from 0.
        steps: of every arm.
        batch: pictures a step, a quarter of them with known centres.
        pictures: to train on.
        labelled: of them have known centres.
        size: of pictures.
    """

    seeds: int = 3
    steps: int = 800
    batch: int = 16
    pictures: int = 3000
    labelled: int = 300
    size: int = 12


def trained(make: dict[str, Any], options: SlotOptions, seed: int) -> SlotModel:
    """A model of an arm."""
    with seeded(seed):
        model = SlotModel(options.size, **make)
    drawn = Shepherded(options.steps, options.batch, options.pictures, options.labelled, options.size)
    job = Job(drawn, slot_loss, recipe=Recipe(epochs=1, **RECIPE), seed=seed)
    job.fit(model, macs=lambda: 0.0).run()
    return model.eval()


def measure(make: Any, options: SlotOptions, case: Row, cells: CellCache) -> Row:
    """Adjusted Rand index of slots and objects over the pixels of objects, and over all; error of
    pictures."""
    found = indices(trained(make, options, case["seed"]), judged(options.size))
    return {name: fmean(values) for name, values in found.items()}


def cases(options: SlotOptions) -> Iterator[Row]:
    """Both arms of a seed before the next seed."""
    for seed in range(options.seeds):
        yield from ({"arm": arm, "level": "sprites", "seed": seed} for arm in ARMS)


def spread(view: View) -> list[Verdict]:
    """Whether the figure varies less over seeds: the F-test of two variances."""
    with_, without = (view.values(arm) for arm in (SLASH, PLAIN))
    if min(len(with_), len(without)) < 2:
        return []
    ratio = (deviation(with_) / max(deviation(without), 1e-9)) ** 2
    chance = float(stats.f.cdf(ratio, len(with_) - 1, len(without) - 1))
    outcome: Outcome = "holds" if chance < 0.05 else "does not hold" if chance > 0.95 else "cannot be told"
    measured = f"deviation {deviation(with_):.1f} against {deviation(without):.1f} points, p {chance:.2g}"
    claim = "the index varies less over seeds with SLASH"
    return [Verdict(claim, "more stable", measured, outcome, paper=view.study.papers)]


def runs(view: View) -> Plot:
    """Every run of both arms."""
    series = [
        Series(arm, [float(seed) for seed in range(len(view.values(arm)))], view.values(arm), kind="points")
        for arm in view.arms()
    ]
    return Plot("runs", "Foreground index of every run", "seed", "adjusted Rand index (%)", series, "Points.")


def picture(options: SlotOptions, file: Path) -> None:
    """Eight pictures with the reconstructions and slots of both arms, trained for seed 0, as PNG."""
    import matplotlib.pyplot as plt

    test = Sprites(*(part[:8] for part in judged(options.size)))
    rows = [("picture", test.images.permute(0, 2, 3, 1)), ("objects", test.owners)]
    for name, arm in ARMS.items():
        drawn, slots = seen(trained(arm.make, options, 0), test)
        rows += [(f"{name}:\npicture", drawn.permute(0, 2, 3, 1).clamp(0, 1)), (f"{name}:\nslots", slots)]
    figure, axes = plt.subplots(len(rows), 8, figsize=(8, len(rows)))
    for (name, pictures), line in zip(rows, axes, strict=True):
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")
        for axis, one in zip(line, pictures, strict=True):
            axis.imshow(one.numpy(), cmap="tab10", vmin=0, vmax=9)
            axis.set(xticks=[], yticks=[])
    figure.tight_layout()
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=80)
    plt.close(figure)
    atomic_write(file, stream.getvalue())


ARMS = {PLAIN: Arm({}), SLASH: Arm({"kernel": 5, "points": True})}
ARI = Value("foreground", 100.0, 1, "points", 1)
STUDY = Study(
    "slash",
    "Slot attention with smoothed maps and shepherded slots",
    "Jinwoo Kim, Janghyuk Choi, Ho-Jin Choi, Seon Joo Kim: Shepherding Slots to Objects: Towards Stable and "
    "Robust Object-Centric Learning, CVPR 2023",
    SlotOptions,
    ARMS,
    cases,
    measure,
    papers=(64,),
    claims=[above(SLASH, PLAIN, 5.0, "strong on four data sets")],
    value=ARI,
    facts=spread,
    tables=[
        Columns(
            "Slots and objects",
            {
                "foreground index, %": ARI,
                "index of all pixels, %": Value("all", 100.0, 1),
                "squared error": Value("error", 1.0, 4),
            },
        )
    ],
    plots=[runs],
    notes=lambda options: [
        f"Two or three sprites on {options.size} x {options.size} noisy pixels, four slots of 24; "
        f"{options.steps} steps of {options.batch}, a quarter of them with known centres, from "
        f"{options.labelled} of {options.pictures} pictures. The paper trains 800 epochs at 128 pixels: here "
        "slots have hardly settled.",
        "Rates and widths were not tuned for either arm.",
    ],
)

if __name__ == "__main__":
    picture(SlotOptions(), Path(sys.argv[1]))
