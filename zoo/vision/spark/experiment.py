"""`zoo reproduce spark`: pre-training without labels against training from scratch, and what masking does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch

from zoo.errors import ConfigError
from zoo.harness.experiments import CellCache, Experiment, ExperimentResult, share
from zoo.names import suggestion
from zoo.shared.measure.modes import eval_mode
from zoo.vision.base import checked_device
from zoo.vision.data import SOURCES
from zoo.vision.spark import summary
from zoo.vision.spark.encoder import SparKEncoder, occupancy
from zoo.vision.spark.masking import draw_cells, kept_cells
from zoo.vision.spark.modules import VisibleConv2d
from zoo.vision.spark.study import ARMS, SCRATCH, Setting, Tuning, pretrained, probed, tuned

#: What is usual for each set: network, cells, labels.
DEFAULTS: dict[str, dict[str, Any]] = {
    "digits": {
        "depth": 8,
        "width": 16,
        "cell": 4,
        "ratio": 0.5,
        "decoder": 32,
        "pretrain_epochs": 30,
        "pretrain_lr": 3e-3,
        "pretrain_batch": 64,
        "batch": 32,
        "few": 100,
        "few_epochs": 60,
        "all_epochs": 15,
    },
    "cifar10-jpeg": {
        "depth": 20,
        "width": 32,
        "cell": 4,
        "ratio": 0.6,
        "decoder": 128,
        "pretrain_epochs": 60,
        "pretrain_lr": 2e-3,
        "pretrain_batch": 512,
        "batch": 256,
        "few": 2000,
        "few_epochs": 120,
        "all_epochs": 15,
    },
}


@dataclass(frozen=True)
class SparKConfig:
    """Options; a number left at 0 is the usual one for the images.

    Args:
        dataset: digits or cifar10-jpeg.
        arms: scratch, SparK, no re-masking, single scale; by default all.
        seeds: which.
        device: where to train: cpu, cuda or cuda:1, say.
        pretrain_epochs, pretrain_batch: passes over the images without labels, and images per step.
        few: how many images have a label in the first fine-tuning; all have one in the second.
        few_epochs, all_epochs: passes of either.
        batch: images per step of fine-tuning.
        lrs: peaks of the learning rate of fine-tuning; each arm takes the one with the best validation
            accuracy over seeds.
        cell: side of a hidden square.
        ratio: share of hidden cells.
        depth, width: of the network.
        decoder: width of the decoder at the coarsest map, which costs the most of a pre-training.
        train_images, test_images: the first so many; 0 takes all.
    """

    dataset: str = "digits"
    arms: tuple[str, ...] = (SCRATCH, *ARMS)
    seeds: tuple[int, ...] = (0, 1, 2)
    device: str = "cpu"
    pretrain_epochs: int = 0
    pretrain_batch: int = 0
    few: int = 0
    few_epochs: int = 0
    all_epochs: int = 0
    batch: int = 0
    lrs: tuple[float, ...] = (0.03, 0.1)
    cell: int = 0
    ratio: float = 0.0
    depth: int = 0
    width: int = 0
    decoder: int = 0
    train_images: int = 0
    test_images: int = 0

    def __post_init__(self) -> None:
        if self.dataset not in DEFAULTS:
            raise ConfigError(f"Unknown image set {self.dataset!r}. {suggestion(self.dataset, DEFAULTS)}")
        for arm in self.arms:
            if arm not in (SCRATCH, *ARMS):
                raise ConfigError(f"Unknown arm {arm!r}. {suggestion(arm, (SCRATCH, *ARMS))}")
        if not self.arms or not self.seeds or not self.lrs:
            raise ConfigError("give at least one arm, one seed and one learning rate")
        checked_device(self.device)

    def value(self, name: str) -> Any:
        """An option, or what is usual for the images."""
        return getattr(self, name, 0) or DEFAULTS[self.dataset][name]

    def setting(self) -> Setting:
        """What the arms share."""
        names = (
            "depth",
            "width",
            "cell",
            "ratio",
            "decoder",
            "pretrain_epochs",
            "pretrain_lr",
            "pretrain_batch",
            "batch",
        )
        return Setting(
            self.dataset,
            **{name: self.value(name) for name in names},
            weight_decay=5e-4,
            train_images=self.train_images,
            test_images=self.test_images,
        )

    def tunings(self, arm: str) -> Iterator[Tuning]:
        """The fine-tunings of an arm: with few labels, and but for the ablations with all."""
        for lr in self.lrs:
            yield Tuning(self.value("few"), self.value("few_epochs"), lr)
            if arm in (SCRATCH, "SparK"):
                yield Tuning(0, self.value("all_epochs"), lr)


class SparKStudy(Experiment):
    """Masked pre-training on one processor or GPU, scaled down."""

    name: ClassVar[str] = "spark"
    title: ClassVar[str] = "SparK: masked-image pre-training of a convnet on its visible sites"
    paper: ClassVar[str] = (
        "Tian et al., Designing BERT for Convolutional Networks: Sparse and Hierarchical Masked Modeling. "
        "ICLR 2023."
    )
    config_class: ClassVar[type] = SparKConfig

    def run(
        self, config: SparKConfig, cells: CellCache, progress: Callable[..., None] | None = None
    ) -> ExperimentResult:
        """Run what is missing and sum up."""
        setting = config.setting()
        kept_cells(_cells_of(setting), setting.ratio)
        rows = share(list(_work(config, setting, cells)), cells, progress) + occupancies(setting)
        return summary.summarise(rows, config.value("few"), protocol(config))


def _work(
    config: SparKConfig, setting: Setting, cells: CellCache
) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Every pre-training and fine-tuning, all arms of a seed before the next seed."""
    for seed in config.seeds:
        for arm in config.arms:
            if arm != SCRATCH:
                yield (
                    f"pre-training {arm}, seed {seed}",
                    partial(_pretraining_row, setting, arm, seed, cells, config.device),
                )
            for labels in (config.value("few"), 0):
                yield (
                    f"linear probe of {arm}, {labels or 'all'} labels, seed {seed}",
                    partial(_probe_row, setting, arm, labels, seed, cells, config.device),
                )
            for tuning in config.tunings(arm):
                yield (
                    f"{arm}, {tuning.labels or 'all'} labels, seed {seed}",
                    partial(_tuning_row, setting, arm, tuning, seed, cells, config.device),
                )


def _pretraining_row(setting: Setting, arm: str, seed: int, cells: CellCache, device: str) -> dict[str, Any]:
    found = pretrained(setting, arm, seed, cells, device)[1]
    return {"what": "pre-training", "arm": arm, "seed": seed, **found}


def _probe_row(
    setting: Setting, arm: str, labels: int, seed: int, cells: CellCache, device: str
) -> dict[str, Any]:
    found = probed(setting, arm, labels, seed, cells, device)
    return {"what": "probe", "arm": arm, "seed": seed, "labels": labels, **found}


def _tuning_row(
    setting: Setting, arm: str, tuning: Tuning, seed: int, cells: CellCache, device: str
) -> dict[str, Any]:
    found = tuned(setting, arm, tuning, seed, cells, device)[1]
    return {
        "what": "fine-tuning",
        "arm": arm,
        "seed": seed,
        "labels": tuning.labels,
        "epochs": tuning.epochs,
        "lr": tuning.lr,
        **found,
    }


def occupancies(setting: Setting, images: int = 64) -> list[dict[str, Any]]:
    """Share of non-zero sites after each convolution of a fresh network in eval mode (whose norms keep a zero
    a zero), with masks and without."""
    data = setting.data()
    shape = data.train.images.shape
    encoder = SparKEncoder(setting.model(0), (shape[2], shape[3]), setting.cell, shape[1])
    shown = data.normalised(data.train.images[:images])
    cells = draw_cells(len(shown), encoder.grid, setting.ratio, torch.Generator().manual_seed(0))
    layers = [
        name
        for name, module in encoder.model.named_modules()
        if isinstance(module, VisibleConv2d) and module.kernel_size != (1, 1)
    ]
    rows = []
    with eval_mode(encoder):
        for label, mode in (("re-masked", "masked"), ("not re-masked", "plain")):
            shares = occupancy(encoder, shown, cells, layers, mode)  # type: ignore[arg-type]
            for depth, (layer, share) in enumerate(zip(layers, shares, strict=True), start=1):
                rows.append(
                    {"what": "occupancy", "arm": label, "layer": layer, "depth": depth, "share": share}
                )
    return rows


def _cells_of(setting: Setting) -> int:
    height, width = setting.data().train.images.shape[2:]
    return (height // setting.cell) * (width // setting.cell)


def protocol(config: SparKConfig) -> str:
    """What was trained on what, in a sentence or two."""
    setting = config.setting()
    count = sum(p.numel() for p in setting.model(0).parameters())
    images = f"{config.train_images:,}" if config.train_images else "all"
    cells = _cells_of(setting)
    hidden = cells - kept_cells(cells, setting.ratio)
    return (
        f"{SOURCES[config.dataset].title}: ResNet-{setting.depth} (width {setting.width}, {count:,} "
        f"parameters), {hidden} of {cells} cells of {setting.cell}x{setting.cell} hidden; pre-training on "
        f"{images} training images without labels, {setting.pretrain_epochs} epochs, Adam, batch "
        f"{setting.pretrain_batch}, peak rate {setting.pretrain_lr:g}; fine-tuning and training from scratch "
        f"alike: SGD, batch {setting.batch}, {config.value('few'):,} labels for "
        f"{config.value('few_epochs')} epochs or all for {config.value('all_epochs')}, peak rate the better "
        f"of {', '.join(f'{lr:g}' for lr in config.lrs)} on the validation images; {len(config.seeds)} "
        "seeds, each with a pre-training of its own."
    )
