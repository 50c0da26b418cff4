"""`zoo reproduce superres-pruning`: ISS-P beside hard thresholding, one-shot magnitudes and a random mask, on
networks in the styles of EDSR and SwinIR."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

from zoo.errors import ConfigError
from zoo.harness.experiments import CellCache, Experiment, ExperimentResult, share
from zoo.harness.judging import deviation, judge, mean_cell
from zoo.harness.stats import Difference, paired_difference, seed_difference
from zoo.harness.tables import Plot, Series, Table, Verdict
from zoo.harness.tasks import get_task
from zoo.names import suggestion
from zoo.shared.masks import MaskSet, masks_of
from zoo.shared.pruning.budgets import check_sparsity
from zoo.vision.base import checked_device
from zoo.vision.iss_p import ISSP
from zoo.vision.upscalers import EDSR, SwinIR, Upscaler

VERSION = 1  # raise it when a cell means something else
SETS = ("Set5", "Set14")
BAR = "this zoo's bar"
DENSE, BICUBIC = "dense", "bicubic enlargement"
Row = dict[str, Any]

NETWORKS: dict[str, Callable[[], Upscaler]] = {
    "edsr": lambda: EDSR(blocks=4, width=16),
    "swinir": lambda: SwinIR(blocks=2, width=16, heads=2),
}
Choice = Literal["iss-p", "iht", "one-shot", "random"]
CHOICES: tuple[Choice, ...] = ("iss-p", "iht", "one-shot", "random")


@dataclass(frozen=True)
class SuperresConfig:
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


@dataclass(frozen=True)
class Arm:
    """One training, or none for bicubic enlargement."""

    network: str
    arm: str
    sparsity: float
    seed: int

    def measure(self, config: SuperresConfig) -> Row:
        """PSNR and SSIM of every test image."""
        start = NETWORKS[self.network]().to(checked_device(config.device))
        made, flops = start.fresh(self.seed), 0.0
        if self.arm != BICUBIC:
            choice: Choice = next((c for c in CHOICES if c == self.arm), "one-shot")
            method = ISSP(
                self.sparsity,
                choice,
                epochs=config.epochs,
                steps=config.steps,
                batch=config.batch,
                seed=self.seed,
                device=config.device,
            )
            made, cost = method.train(start)
            flops = cost.flops
        made = made.cpu().eval()
        row: Row = {"sparsity": (masks_of(made) or MaskSet({})).sparsity(), "training_flops": flops}
        for name in SETS:
            samples = get_task(f"vision/{name.lower()}-x{made.scale}").evaluate(made).samples
            row |= {f"{metric} {name}": values for metric, values in samples.items()}
        return row

    def run(self, config: SuperresConfig, cells: CellCache) -> Row:
        """The measurements, from the cells if they are there."""
        key = {
            "experiment": "superres-pruning",
            "version": VERSION,
            "epochs": config.epochs,
            "steps": config.steps,
            "batch": config.batch,
            "network": self.network,
            "arm": self.arm,
            "level": self.sparsity,
            "seed": self.seed,
        }
        found = cells.cell(key, partial(self.measure, config))
        return {"network": self.network, "arm": self.arm, "level": self.sparsity, "seed": self.seed, **found}


def arms(config: SuperresConfig) -> list[Arm]:
    """All trainings, every seed of an arm before the next arm."""
    out = []
    for network in config.networks:
        levels = [(DENSE, 0.0), *((c, s) for s in config.sparsities for c in CHOICES)]
        out += [Arm(network, arm, level, seed) for arm, level in levels for seed in range(config.seeds)]
        out.append(Arm(network, BICUBIC, 0.0, 0))
    return out


class SuperresPruning(Experiment):
    """ISS-P and what it is compared with."""

    name: ClassVar[str] = "superres-pruning"
    title: ClassVar[str] = "Pruning super-resolution networks: ISS-P beside its relatives"
    paper: ClassVar[str] = (
        "Wang et al. Iterative Soft Shrinkage Learning for Efficient Image Super-Resolution. ICCV 2023"
    )
    config_class: ClassVar[type] = SuperresConfig

    def run(
        self, config: SuperresConfig, cells: CellCache, progress: Callable[..., None] | None = None
    ) -> ExperimentResult:
        """Run what is missing and sum up."""
        work = [
            (f"{a.network} {a.arm} {a.sparsity:g} seed {a.seed}", partial(a.run, config, cells))
            for a in arms(config)
        ]
        return summarise(share(work, cells, progress), config)


def chosen(rows: Sequence[Row], network: str, arm: str, level: float) -> list[Row]:
    """The runs of an arm, by seed."""
    return [r for r in rows if (r["network"], r["arm"], r["level"]) == (network, arm, level)]


def means(runs: Sequence[Row], metric: str) -> list[float]:
    """The mean over images of each run."""
    return [statistics.fmean(run[metric]) for run in runs]


def summarise(rows: Sequence[Row], config: SuperresConfig) -> ExperimentResult:
    """Tables, verdicts and a plot.

    Args:
        rows: one per run: network, arm, level, seed, and the PSNR and SSIM of every image.
        config: what was run.
    """
    tables = [_table(rows, network, config) for network in config.networks]
    tables += [_images(rows, network, config) for network in config.networks]
    found = [v for network in config.networks for v in _verdicts(rows, network, config)]
    notes = [
        f"Trained on patches of T91 for {config.epochs * config.steps:,} steps of {config.batch}, whatever "
        "the arm; the last convolution starts at zero, so that every network begins as bicubic enlargement. "
        "PSNR in dB and SSIM on luma by torchmetrics, borders of 2 pixels cropped, small images made by "
        "MATLAB. "
        "Mean ± sample standard deviation over seeds; verdicts on Set5, paired by seed with a 95 % interval.",
        "These are small networks and short trainings: the published ones are a hundred times as large.",
    ]
    plots = [_plot(rows, network, config) for network in config.networks if len(config.sparsities) > 1]
    return ExperimentResult(tables, found, plots, list(rows), notes)


def _table(rows: Sequence[Row], network: str, config: SuperresConfig) -> Table:
    metrics = [f"{metric} {name}" for name in SETS for metric in ("psnr", "ssim")]
    levels = [(BICUBIC, 0.0), (DENSE, 0.0), *((c, s) for s in config.sparsities for c in CHOICES)]
    body = []
    for arm, level in levels:
        runs = chosen(rows, network, arm, level)
        cells = [mean_cell(means(runs, metric), 2 if "psnr" in metric else 4) for metric in metrics]
        flops = statistics.fmean(run["training_flops"] for run in runs) / 1e12
        body.append([arm, f"{level:.0%}", *cells, f"{flops:.2f}"])
    count = sum(p.numel() for p in NETWORKS[network]().parameters())
    title = f"{network} ({count:,} parameters), twice the size"
    columns = [
        "arm",
        "zeros",
        *(m.replace("psnr", "PSNR").replace("ssim", "SSIM") for m in metrics),
        "training TFLOPs",
    ]
    return Table(title, columns, body)


def _images(rows: Sequence[Row], network: str, config: SuperresConfig) -> Table:
    """ISS-P minus each other arm over the 19 images, each image's mean over seeds."""
    body = []
    for level in config.sparsities:
        first = _by_image(chosen(rows, network, "iss-p", level))
        for arm in CHOICES[1:]:
            found = paired_difference(first, _by_image(chosen(rows, network, arm, level)), resamples=2000)
            mark = " *" if found.seen else ""
            cell = f"{found.value:+.3f} [{found.low:+.3f}, {found.high:+.3f}]{mark}"
            body.append([f"ISS-P minus {arm}", f"{level:.0%}", cell])
    columns = ["difference", "zeros", "PSNR over Set5 and Set14 (dB)"]
    return Table(f"{network}, paired by image", columns, body, "95 % interval over 19 images. *: seen.")


def _by_image(runs: Sequence[Row]) -> list[float]:
    every = [[value for name in SETS for value in run[f"psnr {name}"]] for run in runs]
    return [statistics.fmean(values) for values in zip(*every, strict=True)]


def _over_seeds(rows: Sequence[Row], network: str, second: str, level: float) -> Difference | None:
    first = means(chosen(rows, network, "iss-p", level), "psnr Set5")
    other = means(chosen(rows, network, second, level if second in CHOICES else 0.0), "psnr Set5")
    return seed_difference(first, other * len(first) if second == BICUBIC else other)


def _verdicts(rows: Sequence[Row], network: str, config: SuperresConfig) -> list[Verdict]:
    claims = (
        ("is 0.05 dB above one-shot magnitude", "above (paper)", "one-shot", 0.05),
        ("is 0.05 dB above a random mask", BAR, "random", 0.05),
        ("is above hard thresholding", "above (paper)", "iht", None),
        ("is above bicubic enlargement", BAR, BICUBIC, None),
    )
    return [
        judge(
            f"{network}: ISS-P {text} at {level:.0%} zeros",
            published,
            _over_seeds(rows, network, second, level),
            at_least=bar,
            unit="dB",
            digits=2,
        )
        for level in config.sparsities
        for text, published, second, bar in claims
    ]


def _plot(rows: Sequence[Row], network: str, config: SuperresConfig) -> Plot:
    curves = []
    for arm in CHOICES:
        runs = [means(chosen(rows, network, arm, level), "psnr Set5") for level in config.sparsities]
        curves.append(
            Series(
                arm,
                [100 * level for level in config.sparsities],
                [statistics.fmean(r) for r in runs],
                [deviation(r) for r in runs],
            )
        )
    for name in (DENSE, BICUBIC):
        level = statistics.fmean(means(chosen(rows, network, name, 0.0), "psnr Set5"))
        curves.append(Series(name, [], [level], kind="reference"))
    return Plot(
        network,
        f"PSNR against sparsity, {network}, Set5",
        "zeros (%)",
        "PSNR on luma (dB)",
        curves,
        alt="One curve per way of choosing, with bands of one standard deviation over seeds.",
    )
