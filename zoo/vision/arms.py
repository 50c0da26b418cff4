"""The arms of the pruning benchmark: which method with which options, and one run of each as a cell.

All arms of a seed share initial weights, data order and recipe. Those that prune a trained network start from
the same dense one and get `epochs` more; those that train sparse from the start get the epochs of both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from safetensors.torch import load_file, save

from zoo.harness.experiments import CellCache
from zoo.shared.masks import MaskSet, masks_of
from zoo.shared.store.io import atomic_write
from zoo.vision.base import VisionMethod, clone
from zoo.vision.bip import BiP
from zoo.vision.data import Images, Split, load_images
from zoo.vision.jackpots import LotteryJackpot
from zoo.vision.magnitude import MagnitudePruning
from zoo.vision.models import Classifier, ConvNet, ResNet, pretrained_resnet, reinitialised
from zoo.vision.random_pruning import DynamicSparse, RandomPruning
from zoo.vision.soups import SparseSoup
from zoo.vision.tickets import LotteryTicket
from zoo.vision.train import Cost, Recipe, Trainer, clock, correct

CELL_VERSION = 1  # raise it when a cell means something else


@dataclass(frozen=True)
class Setting:
    """What all arms share.

    Args:
        dataset: name of the images.
        width: of the network: ResNet-20's first stage for CIFAR-10, a factor of the small net's for digits.
        dense_epochs: of the dense training.
        epochs: what every arm gets after it.
        lr: of the dense training and of training from fresh weights.
        finetune_lr: of what goes on from the dense network.
        batch: images per step.
        train_images, test_images: the first so many; 0 takes all.
        pretrained: start from the published ResNet-20 instead of a dense training.
        device: where to train; it is no part of what a cell means.
    """

    dataset: str = "digits"
    width: float = 1.0
    dense_epochs: int = 20
    epochs: int = 10
    lr: float = 0.1
    finetune_lr: float = 0.05
    batch: int = 64
    train_images: int = 0
    test_images: int = 0
    pretrained: bool = False
    device: str = "cpu"

    def model(self, seed: int) -> Classifier:
        """The network with fresh weights."""
        usual = ConvNet().wider(self.width) if self.dataset == "digits" else ResNet(20, round(self.width))
        return reinitialised(usual.to(self.device), seed)

    def data(self) -> Images:
        """The images that train and test it."""
        data = load_images(self.dataset)
        if self.train_images:
            data = data.subset(self.train_images)
        if self.test_images:
            kept = Split(data.test.images[: self.test_images], data.test.labels[: self.test_images])
            data = replace(data, test=kept)
        return data.to(self.device)

    def key(self, **rest: Any) -> dict[str, Any]:
        """A cell's key."""
        own = asdict(self)
        del own["device"]
        if not own.pop("pretrained"):  # cells of earlier versions, which had no such option, stay valid
            return {"experiment": "pruning", "version": CELL_VERSION, **own, **rest}
        return {"experiment": "pruning from pretrained", "version": CELL_VERSION, **own, **rest}


Make = Callable[[float, Setting, int], VisionMethod]


def _tuned(method: type[VisionMethod], **options: Any) -> Make:
    """An arm that goes on from the dense network."""

    def make(sparsity: float, setting: Setting, seed: int) -> VisionMethod:
        shared = {"epochs": setting.epochs, "lr": setting.finetune_lr, "batch": setting.batch}
        return method(**{"sparsity": sparsity, "seed": seed, **shared, **options})

    return make


def _fresh(method: type[VisionMethod], **options: Any) -> Make:
    """An arm that trains fresh weights, for the epochs of dense training and fine-tuning together."""

    def make(sparsity: float, setting: Setting, seed: int) -> VisionMethod:
        shared = {"epochs": setting.dense_epochs + setting.epochs, "lr": setting.lr, "batch": setting.batch}
        return method(**{"sparsity": sparsity, "seed": seed, **shared, **options})

    return make


def _soup(sparsity: float, setting: Setting, seed: int) -> VisionMethod:
    """In two phases, or in one where there is one epoch only."""
    return _tuned(SparseSoup, phases=min(2, setting.epochs))(sparsity, setting, seed)


def _ticket(sparsity: float, setting: Setting, seed: int) -> VisionMethod:
    """Each round is as long as the dense training, as the method has it: the cost says so."""
    return LotteryTicket(sparsity, epochs=setting.dense_epochs, lr=setting.lr, batch=setting.batch, seed=seed)


FLOOR = 0.0005

ARMS: dict[str, Make] = {
    "global magnitude": _tuned(MagnitudePruning),
    "global magnitude, floor": _tuned(MagnitudePruning, floor=FLOOR),
    "global magnitude, gradual": _tuned(MagnitudePruning, gradual=True),
    "uniform magnitude": _tuned(MagnitudePruning, allocation="uniform"),
    "ERK magnitude": _tuned(MagnitudePruning, allocation="erk"),
    "LAMP": _tuned(MagnitudePruning, allocation="lamp"),
    "random mask": _tuned(MagnitudePruning, allocation="uniform", score="random"),
    "random mask, ERK": _tuned(MagnitudePruning, allocation="erk", score="random"),
    "jackpot": _tuned(LotteryJackpot, lr=0.1),
    "BiP": _tuned(BiP),
    "soup of 3": _soup,
    "random, uniform": _fresh(RandomPruning, ratio="uniform"),
    "random, uniform+": _fresh(RandomPruning, ratio="uniform+"),
    "random, ER": _fresh(RandomPruning, ratio="er"),
    "random, ERK": _fresh(RandomPruning, ratio="erk"),
    "random, ERK+": _fresh(RandomPruning, ratio="erk+"),
    "random, SNIP ratio": _fresh(RandomPruning, ratio="snip"),
    "random, GraSP ratio": _fresh(RandomPruning, ratio="grasp"),
    "SET": _fresh(DynamicSparse, growth="set"),
    "RigL": _fresh(DynamicSparse, growth="rigl"),
    "lottery ticket": _ticket,
}

#: Arms that train fresh weights: the dense training is no part of their cost.
FROM_SCRATCH = tuple(name for name in ARMS if name.startswith("random, ")) + ("SET", "RigL", "lottery ticket")


def dense_cell(setting: Setting, seed: int, cells: CellCache) -> tuple[Classifier, dict[str, Any]]:
    """The dense network of a seed, and its figures."""
    key = setting.key(arm="dense", seed=seed)
    file = cells.path(key).with_suffix(".safetensors")

    def compute() -> dict[str, Any]:
        model = pretrained_resnet().to(setting.device) if setting.pretrained else setting.model(seed)
        trainer = _trainer(setting, setting.data(), seed)
        if not setting.pretrained:
            trainer.fit(model).run()
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(file, save({k: v.cpu().contiguous() for k, v in model.state_dict().items()}))
        return report(model, trainer.data, trainer.cost)

    if not file.exists():
        cells.path(key).unlink(missing_ok=True)
    found = cells.cell(key, compute)
    model = setting.model(seed)
    model.load_state_dict(load_file(file))
    return model, found


def continued_cell(setting: Setting, seed: int, cells: CellCache) -> dict[str, Any]:
    """The dense network trained on for as long as the arms are."""

    def compute() -> dict[str, Any]:
        model, before = dense_cell(setting, seed, cells)
        trainer = _trainer(setting, setting.data(), seed)
        trainer.fit(model, epochs=setting.epochs, lr=setting.finetune_lr).run()
        return _with_start(report(model, trainer.data, trainer.cost), before)

    return dict(cells.cell(setting.key(arm="dense, trained on", seed=seed), compute))


def arm_cell(setting: Setting, arm: str, sparsity: float, seed: int, cells: CellCache) -> dict[str, Any]:
    """One run of an arm."""

    def compute() -> dict[str, Any]:
        method = ARMS[arm](sparsity, setting, seed)
        model, before = dense_cell(setting, seed, cells)
        trainer = Trainer(setting.data(), method.recipe(), seed)
        start = clock(trainer.data.device)
        made = method.prune(clone(model), trainer).model
        trainer.cost.seconds = clock(trainer.data.device) - start  # choosing masks takes time, too
        found = report(made, trainer.data, trainer.cost)
        return found if arm in FROM_SCRATCH else _with_start(found, before)

    return dict(cells.cell(setting.key(arm=arm, sparsity=sparsity, seed=seed), compute))


def report(model: Classifier, data: Images, cost: Cost) -> dict[str, Any]:
    """The figures of a finished network; which test images it gets right as bits in hexadecimal."""
    right = correct(model, data, data.test).cpu()
    masks = masks_of(model) or MaskSet({})
    return {
        "accuracy": float(right.double().mean()),
        "correct": np.packbits(right.numpy()).tobytes().hex(),
        "images": len(right),
        "sparsity": masks.sparsity(),
        "empty_layers": sum(mask.kept == 0 for mask in masks.values()),
        "flops": cost.flops,
        "seconds": cost.seconds,
        "device": data.device.type,
    }


def unpacked(row: dict[str, Any]) -> np.ndarray:
    """Which test images were right, as 0 and 1."""
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(row["correct"]), np.uint8))
    return bits[: row["images"]].astype(float)


def _with_start(found: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """Figures whose cost includes that of the dense start."""
    total = {key: found[key] + before[key] for key in ("flops", "seconds")}
    return {**found, **total, "own_flops": found["flops"], "own_seconds": found["seconds"]}


def _trainer(setting: Setting, data: Images, seed: int) -> Trainer:
    return Trainer(data, Recipe(setting.dense_epochs, setting.lr, setting.batch), seed)
