"""`zoo reproduce pruning-benchmark`: every unstructured method on one dense start, with equal epochs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from zoo.errors import ConfigError
from zoo.harness.experiments import CellCache, Experiment, ExperimentResult, share
from zoo.names import suggestion
from zoo.shared.pruning.budgets import check_sparsity
from zoo.vision import verdicts
from zoo.vision.arms import ARMS, Setting, arm_cell, continued_cell, dense_cell
from zoo.vision.base import checked_device
from zoo.vision.data import SOURCES

WIDTH_SPARSITY = 0.9  # at which the gap of random pruning to dense is followed over widths
MAIN_ARMS = ("global magnitude", "global magnitude, floor", "uniform magnitude", "random mask")
WIDTH_ARMS = ("random, ERK", "global magnitude")


@dataclass(frozen=True)
class BenchmarkConfig:
    """Options of the benchmark; the defaults are those for digits.

    Args:
        dataset: digits (a small convolutional net), cifar10-jpeg or cifar10-true (ResNet-20).
        arms: which; by default all.
        sparsities: shares of zeros.
        outer: further shares of zeros, at which only global magnitude, its minimum threshold, uniform
            magnitude and the random mask are run.
        seeds: how many, from 0.
        width: of the network; 0 for the usual one (ResNet-20's 16; 1 for the small net).
        widths: factors of it at which random pruning is compared with dense.
        dense_epochs: epochs of the dense start.
        epochs: epochs of every arm after it; arms from fresh weights get both together.
        lr: peak learning rate of training from fresh weights; half of it is that of fine-tuning.
        batch: images per step.
        train_images: use the first so many training images; 0 for all.
        test_images: use the first so many test images; 0 for all.
        pretrained: start from the published ResNet-20 in ZOO_DATA, which was trained on true pixels, so that
            `dense_epochs` count for arms from fresh weights only; its own training is not in the cost.
        device: where to train: cpu, cuda or cuda:1, say. Start the command several times at once and the
            processes divide the work; cells are the same on every device.
    """

    dataset: str = "digits"
    arms: tuple[str, ...] = ()
    sparsities: tuple[float, ...] = (0.8, 0.9, 0.95, 0.98)
    outer: tuple[float, ...] = ()
    seeds: int = 3
    width: float = 0.0
    widths: tuple[float, ...] = (0.5, 2.0)
    dense_epochs: int = 12
    epochs: int = 6
    lr: float = 0.1
    batch: int = 64
    train_images: int = 0
    test_images: int = 0
    pretrained: bool = False
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.dataset not in SOURCES:
            raise ConfigError(f"Unknown image set {self.dataset!r}. {suggestion(self.dataset, SOURCES)}")
        for arm in self.arms:
            if arm not in ARMS:
                raise ConfigError(f"Unknown arm {arm!r}. {suggestion(arm, ARMS)}")
        if not self.sparsities or self.seeds < 1:
            raise ConfigError("give at least one sparsity and one seed")
        for sparsity in self.levels:
            check_sparsity(sparsity)
        if self.pretrained and (self.dataset != "cifar10-true" or self.width not in (0, 16) or self.widths):
            raise ConfigError(
                "the pretrained ResNet-20 has width 16 and saw true pixels: use --dataset cifar10-true, the "
                "usual width, and --widths without values"
            )
        if self.width < 0 or min(self.widths, default=1) <= 0:
            raise ConfigError(f"widths are positive; received {self.width} and {self.widths}")
        for arm in self.arms or ARMS:  # what an arm refuses is refused now, and not hours later
            ARMS[arm](self.levels[-1], self.setting(), 0)

    @property
    def levels(self) -> tuple[float, ...]:
        """All shares of zeros, rising."""
        return tuple(sorted({*self.sparsities, *self.outer}))

    def setting(self, factor: float = 1.0) -> Setting:
        """What the arms share, at a multiple of the width."""
        usual = 1.0 if self.dataset == "digits" else 16.0
        return Setting(
            self.dataset,
            (self.width or usual) * factor,
            self.dense_epochs,
            self.epochs,
            self.lr,
            self.lr / 2,
            self.batch,
            self.train_images,
            self.test_images,
            self.pretrained,
            self.device,
        )


@dataclass(frozen=True)
class Job:
    """One cell."""

    setting: Setting
    factor: float
    arm: str
    sparsity: float
    seed: int

    def run(self, cells: CellCache) -> dict[str, Any]:
        """The cell's figures as a flat row."""
        if self.arm == "dense":
            values = dense_cell(self.setting, self.seed, cells)[1]
        elif self.arm == "dense, trained on":
            values = continued_cell(self.setting, self.seed, cells)
        else:
            values = arm_cell(self.setting, self.arm, self.sparsity, self.seed, cells)
        return {"arm": self.arm, "level": self.sparsity, "seed": self.seed, "width": self.factor, **values}


def jobs(config: BenchmarkConfig) -> Iterator[Job]:
    """All cells, every seed of a level before the next level."""
    main = config.setting()
    for seed in range(config.seeds):
        yield Job(main, 1.0, "dense", 0.0, seed)
        yield Job(main, 1.0, "dense, trained on", 0.0, seed)
    arms = config.arms or tuple(ARMS)
    main_arms = tuple(arm for arm in arms if arm in MAIN_ARMS)
    for sparsity in config.levels:
        for arm in arms if sparsity in config.sparsities else main_arms:
            for seed in range(config.seeds):
                yield Job(main, 1.0, arm, sparsity, seed)
    for factor in config.widths:
        for seed in range(config.seeds):
            setting = config.setting(factor)
            yield Job(setting, factor, "dense, trained on", 0.0, seed)
            for arm in WIDTH_ARMS:
                yield Job(setting, factor, arm, WIDTH_SPARSITY, seed)


class PruningBenchmark(Experiment):
    """All unstructured methods of the domain on one dense start."""

    name: ClassVar[str] = "pruning-benchmark"
    title: ClassVar[str] = "Unstructured pruning methods on one dense start, with equal epochs"
    paper: ClassVar[str] = (
        "Gupta et al., arXiv 2209.14624 (global magnitude); Liu et al., ICLR 2022 (random pruning); Frankle "
        "et al., ICML 2020 (tickets); Zhang et al., arXiv 2104.08700 (jackpots); Zhang et al., NeurIPS 2022 "
        "(BiP); Zimmer et al., ICLR 2024 (soups); Evci et al., ICML 2020 (RigL); Mocanu et al. 2018 (SET)"
    )
    config_class: ClassVar[type] = BenchmarkConfig

    def run(
        self, config: BenchmarkConfig, cells: CellCache, progress: Callable[..., None] | None = None
    ) -> ExperimentResult:
        """Run what is missing and sum up."""
        checked_device(config.device)
        work = [
            (f"{job.arm} {job.sparsity:g} seed {job.seed}", partial(job.run, cells)) for job in jobs(config)
        ]
        rows = share(work, cells, progress)
        return verdicts.summarise(rows, config.dataset, config.levels, protocol(config))


def protocol(config: BenchmarkConfig) -> str:
    """What was trained on what, in a sentence."""
    setting = config.setting()
    model = setting.model(0)
    count = sum(p.numel() for p in model.parameters())
    net = "ResNet-20" if config.dataset != "digits" else "a net of four convolutions"
    images = f"{config.train_images:,} training images" if config.train_images else "all training images"
    tested = f"the first {config.test_images:,} test images" if config.test_images else "all test images"
    start = f"dense start of {config.dense_epochs} epochs"
    if config.pretrained:
        start = "published weights as the dense start (their training is not in the cost)"
    return (
        f"{SOURCES[config.dataset].title}: {net} (width {setting.width:g}, {count:,} parameters), {images}, "
        f"{tested}; {start}, {config.epochs} more epochs for every arm, batch {config.batch}, {config.seeds} "
        "seeds."
    )
