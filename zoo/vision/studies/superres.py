"""`zoo reproduce superres-pruning`: ISS-P beside hard thresholding, one-shot magnitudes and a random mask, on
networks in the styles of EDSR and SwinIR."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from zoo.errors import ConfigError
from zoo.harness.tasks import get_task
from zoo.methods.contract import default_recipe
from zoo.methods.iss_p import ISSP
from zoo.names import suggestion
from zoo.shared.masks import MaskSet, masks_of
from zoo.shared.pruning.budgets import check_sparsity
from zoo.shared.train import Recipe
from zoo.studies.cells import CellCache
from zoo.studies.figures import Curves
from zoo.studies.stats import paired_difference
from zoo.studies.study import BAR, Arm, Claim, Study, grid
from zoo.studies.tables import Plot, Table
from zoo.studies.view import Row, Value, View
from zoo.vision.domain import make_job
from zoo.vision.upscalers import EDSR, SwinIR, Upscaler

SETS = ("Set5", "Set14")
DENSE, BICUBIC = "dense", "bicubic enlargement"
Choice = Literal["iss-p", "iht", "one-shot", "random"]
CHOICES: tuple[Choice, ...] = ("iss-p", "iht", "one-shot", "random")
NETWORKS: dict[str, Callable[[], Upscaler]] = {
    "edsr": lambda: EDSR(blocks=4, width=16),
    "swinir": lambda: SwinIR(blocks=2, width=16, heads=2),
}


@dataclass(frozen=True)
class SuperresOptions:
    """Options.

    Args:
        networks: edsr (4 blocks of 16 channels) and swinir (2 blocks of width 16).
        sparsities: shares of zeros of every inner layer.
        seeds: how many, from 0.
        epochs: of `steps` steps, the dense networks' as well.
        steps: per epoch.
        batch: patches per step.
        device: where to train: cpu, cuda or cuda:1, say; cells are the same on every device.
    """

    networks: tuple[str, ...] = tuple(NETWORKS)
    sparsities: tuple[float, ...] = (0.9,)
    seeds: int = 3
    epochs: int = 6
    steps: int = 50
    batch: int = 8
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in self.networks:
            if name not in NETWORKS:
                raise ConfigError(f"Unknown network {name!r}. {suggestion(name, NETWORKS)}")
        if not self.networks or not self.sparsities or self.seeds < 1:
            raise ConfigError("give at least one network, one sparsity and one seed")
        for sparsity in self.sparsities:
            if not check_sparsity(sparsity):
                raise ConfigError("sparsity 0 is the dense network, which is always trained; leave it out")


def measure(make: Choice | None, options: SuperresOptions, case: Row, cells: CellCache) -> Row:
    """PSNR and SSIM of every test image after one training, or none for bicubic enlargement."""
    start, flops = NETWORKS[case["network"]](), 0.0
    made: Any = start.fresh(case["seed"])
    if make is not None:
        recipe = Recipe(**{**default_recipe(ISSP), "epochs": options.epochs, "batch": options.batch})
        job = make_job("t91", recipe=recipe, seed=case["seed"], device=options.device, model=start)
        job = job.replace(batches=replace(job.batches, steps=options.steps))
        made = ISSP(case["level"], make).sparsify(start, job).model
        flops = job.cost.flops
    made.eval()
    row: Row = {"sparsity": (masks_of(made) or MaskSet({})).sparsity(), "training_flops": flops}
    for name in SETS:
        samples = get_task(f"vision/{name.lower()}-x{made.scale}").evaluate(made).samples
        row |= {f"{metric} {name}": values for metric, values in samples.items()}
    return row


def cases(options: SuperresOptions) -> Iterator[Row]:
    """All trainings, every seed of an arm before the next arm."""
    for network in options.networks:
        yield from grid(ARMS, [0.0], options.seeds, [DENSE], network=network)
        yield from grid(ARMS, options.sparsities, options.seeds, CHOICES, network=network)
        yield from grid(ARMS, [0.0], 1, [BICUBIC], network=network)


def quality(view: View) -> Table:
    """PSNR and SSIM of each arm, and what its training cost."""
    figures = [Value(f"{m} {name}", 1.0, n) for name in SETS for m, n in (("psnr", 2), ("ssim", 4))]
    body = []
    for arm, level in [
        (BICUBIC, 0.0),
        (DENSE, 0.0),
        *((c, s) for s in view.options.sparsities for c in CHOICES),
    ]:
        flops = statistics.fmean(row["training_flops"] for row in view.chosen(arm, level)) / 1e12
        body.append([arm, f"{level:.0%}", *(view.cell(arm, level, one) for one in figures), f"{flops:.2f}"])
    count = sum(p.numel() for p in NETWORKS[view.where["network"]]().parameters())
    heads = [one.name.replace("psnr", "PSNR").replace("ssim", "SSIM") for one in figures]
    title = f"{view.title} ({count:,} parameters), twice the size"
    return Table(title, ["arm", "zeros", *heads, "training TFLOPs"], body)


def by_image(view: View) -> Table:
    """ISS-P minus each other arm over the 19 images, each image's mean over seeds."""
    body = []
    for level in view.options.sparsities:
        first = _images(view, "iss-p", level)
        for arm in CHOICES[1:]:
            found = paired_difference(first, _images(view, arm, level), resamples=2000)
            cell = f"{found.value:+.3f} [{found.low:+.3f}, {found.high:+.3f}]{' *' * found.seen}"
            body.append([f"ISS-P minus {arm}", f"{level:.0%}", cell])
    columns = ["difference", "zeros", "PSNR over Set5 and Set14 (dB)"]
    return Table(f"{view.title}, paired by image", columns, body, "95 % interval over 19 images. *: seen.")


def _images(view: View, arm: str, level: float) -> list[float]:
    every = [[value for name in SETS for value in run[f"psnr {name}"]] for run in view.chosen(arm, level)]
    return [statistics.fmean(values) for values in zip(*every, strict=True)]


def plot(view: View) -> Plot | None:
    """PSNR against sparsity, where there are several."""
    if len(view.options.sparsities) < 2:
        return None
    title = "PSNR against sparsity, {where}, Set5"
    references = (DENSE, BICUBIC)
    curves = Curves(view.title, title, "zeros (%)", "PSNR on luma (dB)", CHOICES, references=references)
    return curves(view)


_AT = "{where}: ISS-P is %s at {level} zeros"
ARMS = {
    DENSE: Arm("one-shot", flat=True),
    BICUBIC: Arm(once=True, flat=True),
    "iss-p": Arm("iss-p"),
    "iht": Arm("iht", control="random"),
    "one-shot": Arm("one-shot", control="random"),
    "random": Arm("random"),
}
STUDY = Study(
    "superres-pruning",
    "Pruning super-resolution networks: ISS-P beside its relatives",
    "Wang et al. Iterative Soft Shrinkage Learning for Efficient Image Super-Resolution. ICCV 2023",
    SuperresOptions,
    ARMS,
    cases,
    measure,
    papers=(3,),
    claims=[
        Claim(_AT % "0.05 dB above one-shot magnitude", "above (paper)", "iss-p", "one-shot", 0.05),
        Claim(_AT % "0.05 dB above a random mask", BAR, "iss-p", "random", 0.05),
        Claim(_AT % "above hard thresholding", "above (paper)", "iss-p", "iht"),
        Claim(_AT % "above bicubic enlargement", BAR, "iss-p", BICUBIC),
    ],
    value=Value("psnr Set5", 1.0, 2, "dB", 2),
    varies=("networks", "sparsities", "seeds", "device"),
    by=("network",),
    tables=[quality, by_image],
    plots=[plot],
    notes=lambda options: [
        f"Trained on patches of T91 for {options.epochs * options.steps:,} steps of {options.batch}, "
        f"whatever the arm; the last convolution starts at zero, so that every network begins as bicubic "
        f"enlargement. PSNR in dB and SSIM on luma by torchmetrics, borders of 2 pixels cropped, small "
        f"images made by MATLAB. Mean ± sample standard deviation over seeds; verdicts on Set5, paired by "
        "seed with a 95 % interval.",
        "These are small networks and short trainings: the published ones are a hundred times as large.",
        "No arm was tuned: all have one recipe.",
    ],
)
