"""`zoo reproduce superres-pruning`: ISS-P beside hard thresholding, one-shot magnitudes and a random mask, on
networks in the styles of EDSR and SwinIR."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from zoo.errors import ConfigError
from zoo.harness.tasks import get_task
from zoo.methods.contract import default_recipe
from zoo.methods.iss_p import ISSP
from zoo.names import check_known
from zoo.shared.masks import MaskSet, masks_of
from zoo.shared.pruning.budgets import check_sparsity
from zoo.shared.train import Recipe
from zoo.studies.cells import CellCache
from zoo.studies.figures import BySample, Columns, Curves, mean_of, when
from zoo.studies.options import StudyOptions
from zoo.studies.study import BAR, Arm, Claim, Study, grid
from zoo.studies.view import Row, Value, View
from zoo.vision.domain import make_job
from zoo.vision.upscalers import EDSR, SwinIR, Upscaler

SETS, _METRICS = ("Set5", "Set14"), (("psnr", 2), ("ssim", 4))
DENSE, BICUBIC = "dense", "bicubic enlargement"
Choice = Literal["iss-p", "iht", "one-shot", "random"]
CHOICES: tuple[Choice, ...] = ("iss-p", "iht", "one-shot", "random")
NETWORKS: dict[str, Callable[[], Upscaler]] = {
    "edsr": lambda: EDSR(blocks=4, width=16),
    "swinir": lambda: SwinIR(blocks=2, width=16, heads=2),
}


@dataclass(frozen=True)
class SuperresOptions(StudyOptions):
    """Options.

    Args:
        networks: edsr (4 blocks of 16 channels) and swinir (2 blocks of width 16).
        sparsities: shares of zeros of every inner layer.
        epochs: of `steps` steps, the dense networks' as well.
        steps: per epoch.
        batch: patches per step.
        device: where to train: cpu, cuda or cuda:1, say; cells are the same on every device.
    """

    networks: tuple[str, ...] = tuple(NETWORKS)
    sparsities: tuple[float, ...] = (0.9,)
    epochs: int = 6
    steps: int = 50
    batch: int = 8
    device: str = "cpu"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_known("network", self.networks, NETWORKS)
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


def _images(run: Row) -> list[float]:
    return [value for name in SETS for value in run[f"psnr {name}"]]


def _title(view: View) -> str:
    count = sum(p.numel() for p in NETWORKS[view.where["network"]]().parameters())
    return f"{view.title} ({count:,} parameters), twice the size"


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
    tables=[
        Columns(
            _title,
            {
                **{f"{m.upper()} {k}": Value(f"{m} {k}", 1.0, n) for k in SETS for m, n in _METRICS},
                "training TFLOPs": mean_of("training_flops", "{:.2f}", 1e-12),
            },
            levels=lambda view: view.levels(),
            heading="zeros",
        ),
        BySample(
            "iss-p",
            _images,
            "{where}: PSNR minus that of ISS-P (dB), paired by image",
            "95 % interval over the 19 images of Set5 and Set14.",
            CHOICES,
            lambda view: view.options.sparsities,
            3,
        ),
    ],
    plots=[
        when(
            lambda view: len(view.options.sparsities) > 1,
            Curves(
                "{slug}",
                "PSNR against sparsity, {where}, Set5",
                "zeros (%)",
                "PSNR on luma (dB)",
                CHOICES,
                references=(DENSE, BICUBIC),
            ),
        )
    ],
    notes=lambda options: [
        f"Trained on patches of T91 for {options.epochs * options.steps:,} steps of {options.batch}, "
        f"whatever the arm; the last convolution starts at zero, so that every network begins as bicubic "
        f"enlargement. PSNR in dB and SSIM on luma by torchmetrics, borders of 2 pixels cropped, small "
        f"images made by MATLAB. Mean ± sample standard deviation over seeds; verdicts on Set5, paired by "
        "seed with a 95 % interval.",
        "These are small networks and short trainings: the published ones are a hundred times as large.",
        "No arm was tuned: all have one recipe.",
        "Random masks stand from the first step, magnitudes are cut after 60 % of the steps: in so short a "
        "training the steps after the cut are worth more than the choice, so that one-shot magnitude is no "
        "control here. The comparison with a random mask counts; at its spread eight seeds would show "
        "0.05 dB.",
    ],
)
