"""A study in a package of somebody else: one table."""

import dataclasses
import os
import time

from zoo.studies.figures import Curves, Grid
from zoo.studies.study import Arm, Claim, Study, grid
from zoo.studies.view import Value


@dataclasses.dataclass(frozen=True)
class Options:
    """Options.

    Args:
        levels: shares of zeros.
        seeds: how many.
    """

    levels: tuple[float, ...] = (0.5, 0.9)
    seeds: int = 2


def measured(make, options, case, cells):
    """An accuracy by arithmetic, noted in a log."""
    time.sleep(float(os.environ.get("TOY_SLEEP", "0")))
    if "TOY_LOG" in os.environ:
        with open(os.environ["TOY_LOG"], "a") as log:
            log.write(f"cell {case['arm']} {case['level']} {case['seed']}\n")
    return {"accuracy": make - case["level"] / 10 + case["seed"] ** 2 / 100}


ARMS = {"dense": Arm(0.9), "ours": Arm(0.8), "random": Arm(0.3)}
STUDY = Study(
    "arithmetic",
    "A study of arithmetic",
    "Nobody, Journal of Toys 1 (2026)",
    Options,
    ARMS,
    lambda options: grid(ARMS, options.levels, options.seeds),
    measured,
    claims=[
        Claim("ours beats chance at {level}", "yes", "ours", "random"),
        Claim("ours is within a point of dense at {level}", "yes", "ours", "dense", bar=-1.0),
    ],
    value=Value("accuracy"),
    tables=[Grid("Accuracy (%)")],
    plots=[Curves("accuracy", "Accuracy against zeros", "zeros (%)", "accuracy (%)")],
)
