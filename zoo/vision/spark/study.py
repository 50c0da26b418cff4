"""The cells of `zoo reproduce spark`: one pre-training, and one fine-tuning, each kept as it finishes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from torch import Tensor, nn

from zoo.checkpoints import CheckpointFile
from zoo.errors import ConfigError
from zoo.harness.experiments import CellCache
from zoo.shared.store.io import atomic_write
from zoo.vision.data import Images, load_images
from zoo.vision.models import ResNet, reinitialised
from zoo.vision.spark.encoder import Execution, SparKEncoder
from zoo.vision.spark.masking import Choice
from zoo.vision.spark.objective import SparK
from zoo.vision.spark.pretraining import held_out_loss, mixed_precision, pretraining
from zoo.vision.spark.probe import fit_head
from zoo.vision.train import Batch, Fit, ImageBatches, Recipe, correct

CELL_VERSION = 1  # raise it when a cell means something else

#: Arms that pre-train: scales of the decoder (0: all) and the execution.
ARMS: dict[str, tuple[int, Execution]] = {
    "SparK": (0, "auto"),
    "no re-masking": (0, "plain"),
    "single scale": (1, "auto"),
}
SCRATCH = "scratch"


@dataclass(frozen=True)
class Setting:
    """What all arms share.

    Args:
        dataset: name of the images.
        depth, width: of the CIFAR ResNet.
        cell: side of a cell.
        ratio: share of hidden cells.
        decoder: width of the decoder at the coarsest map.
        pretrain_epochs, pretrain_lr, pretrain_batch: of pre-training with Adam.
        batch: images per step of fine-tuning with SGD.
        weight_decay: of fine-tuning.
        train_images, test_images: the first so many; 0 takes all.
    """

    dataset: str
    depth: int
    width: int
    cell: int
    ratio: float
    decoder: int
    pretrain_epochs: int
    pretrain_lr: float
    pretrain_batch: int
    batch: int
    weight_decay: float
    train_images: int = 0
    test_images: int = 0

    def data(self) -> Images:
        """The images."""
        data = load_images(self.dataset)
        return data.subset(self.train_images) if self.train_images else data

    def model(self, seed: int) -> ResNet:
        """The network with fresh weights."""
        images = load_images(self.dataset).train.images
        model = reinitialised(ResNet(self.depth, self.width, channels=images.shape[1]), seed)
        if not isinstance(model, ResNet):
            raise ConfigError(f"a ResNet was expected, not {type(model).__name__}")
        return model

    def spark(self, arm: str, seed: int) -> SparK:
        """Encoder and decoder of an arm with fresh weights."""
        images = load_images(self.dataset).train.images
        scales, execution = ARMS[arm]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            size = (images.shape[2], images.shape[3])
            encoder = SparKEncoder(self.model(seed), size, self.cell, images.shape[1])
            return SparK(encoder, self.decoder, scales, execution)

    def key(self, **rest: Any) -> dict[str, Any]:
        """A cell's key."""
        return {"experiment": "spark", "version": CELL_VERSION, **asdict(self), **rest}


@dataclass(frozen=True)
class Tuning:
    """A fine-tuning.

    Args:
        labels: how many training images have one; 0 for all.
        epochs: passes over them.
        lr: peak of the learning rate.
    """

    labels: int
    epochs: int
    lr: float


def pretrained(
    setting: Setting, arm: str, seed: int, cells: CellCache, device: str = "cpu"
) -> tuple[SparK, dict[str, Any]]:
    """A pre-trained arm and its figures: the loss on held-out images before and after, by epoch."""
    key = setting.key(arm=arm, seed=seed, what="pre-training")
    file = cells.path(key).with_suffix(".safetensors")

    def compute() -> dict[str, Any]:
        data = setting.data().to(device)
        spark = setting.spark(arm, seed).to(device)
        recipe = Recipe(
            setting.pretrain_epochs, setting.pretrain_lr, setting.pretrain_batch, 0.0, optimizer="adam"
        )
        fit = pretraining(spark, data, recipe, setting.ratio, seed)
        checkpoint = CheckpointFile(cells.folder / f"{file.stem}-checkpoint", key)
        losses = {"0": held_out_loss(spark, data, data.val, setting.ratio)}
        if (stored := checkpoint.read()) is not None:
            fit.load_state(stored[0])
            spark.execution = Choice.parse(stored[1]["execution"])
            losses = {k.partition("/")[2]: float(v) for k, v in stored[0].items() if k.startswith("loss/")}
            fit.cost.seconds = float(stored[0]["seconds"])
        every = max(1, setting.pretrain_epochs // 10)

        def on_epoch(fit: Fit) -> None:
            if fit.epoch % every == 0 or fit.epoch == setting.pretrain_epochs:
                losses[str(fit.epoch)] = held_out_loss(spark, data, data.val, setting.ratio)
                kept = {f"loss/{k}": torch.tensor(v, dtype=torch.float64) for k, v in losses.items()}
                seconds = torch.tensor(fit.cost.seconds, dtype=torch.float64)
                facts = {"execution": str(spark.execution)}
                checkpoint.write({**fit.state(), **kept, "seconds": seconds}, facts)

        fit.run(on_epoch=on_epoch)
        weights = {k: v.detach().cpu().contiguous() for k, v in spark.state_dict().items()}
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(file, save(weights))
        return {
            "losses": losses,
            "execution": str(spark.execution),
            "seconds": fit.cost.seconds,
            "device": device,
        }

    if not file.exists():
        cells.path(key).unlink(missing_ok=True)
    found = cells.cell(key, compute)
    spark = setting.spark(arm, seed)
    spark.load_state_dict(load_file(file))
    return spark.eval(), found


def tuned(
    setting: Setting, arm: str, tuning: Tuning, seed: int, cells: CellCache, device: str = "cpu"
) -> tuple[ResNet, dict[str, Any]]:
    """A network fine-tuned from an arm, or trained from fresh weights, and its figures on the test images."""
    key = setting.key(arm=arm, seed=seed, what="fine-tuning", **asdict(tuning))
    if arm == SCRATCH:  # nothing of the pre-training decides it
        key = _without_pretraining(key)
    file = cells.path(key).with_suffix(".safetensors")

    def compute() -> dict[str, Any]:
        model = setting.model(seed)
        if arm != SCRATCH:
            model.load_state_dict(_with_head(pretrained(setting, arm, seed, cells, device)[0], model))
        data = setting.data()
        data = (data.subset(tuning.labels) if tuning.labels else data).to(device)
        model.to(device)
        recipe = Recipe(tuning.epochs, tuning.lr, setting.batch, setting.weight_decay)
        batches = ImageBatches(data, recipe.batch)
        fit = Fit(model, batches, recipe, loss=classification_loss, seed=seed, macs=lambda: 0.0).run()
        test = data.test.take(torch.arange(setting.test_images or len(data.test), device=device))
        right = correct(model, data, test)
        validation = float(correct(model, data, data.val).double().mean())
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(file, save({k: v.cpu().contiguous() for k, v in model.state_dict().items()}))
        return {
            "accuracy": float(right.double().mean()),
            "images": len(right),
            "validation": validation,
            "correct": np.packbits(right.numpy()).tobytes().hex(),
            "seconds": fit.cost.seconds,
            "device": device,
        }

    if not file.exists():
        cells.path(key).unlink(missing_ok=True)
    found = cells.cell(key, compute)
    model = setting.model(seed)
    model.load_state_dict(load_file(file))
    return model.eval(), found


def probed(
    setting: Setting, arm: str, labels: int, seed: int, cells: CellCache, device: str = "cpu"
) -> dict[str, Any]:
    """Test accuracy of a linear probe on the frozen features of an arm; those of fresh weights from scratch.

    Args:
        labels: how many training images it sees; 0 for all.
    """
    key = setting.key(arm=arm, seed=seed, what="probe", labels=labels)
    if arm == SCRATCH:
        key = _without_pretraining(key)

    def compute() -> dict[str, Any]:
        model, data = setting.model(seed), setting.data()
        if arm != SCRATCH:
            model.load_state_dict(_with_head(pretrained(setting, arm, seed, cells, device)[0], model))
        fit_head(model, data.subset(labels) if labels else data)
        test = data.test.take(torch.arange(setting.test_images or len(data.test)))
        return {"accuracy": float(correct(model, data, test).double().mean()), "images": len(test)}

    return cells.cell(key, compute)


def _without_pretraining(key: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in key.items() if not k.startswith("pretrain") and k not in _ENCODER_ONLY}


_ENCODER_ONLY = ("cell", "ratio", "decoder")


def classification_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy, with the products in bfloat16 on a GPU."""
    images, labels = batch
    with mixed_precision(images):
        logits = model(images)
    return F.cross_entropy(logits.float(), labels)


def _with_head(spark: SparK, model: ResNet) -> dict[str, Tensor]:
    """The encoder's weights with the fresh head of a network."""
    head = spark.encoder.trunk.head
    own = {k: v for k, v in model.state_dict().items() if k.startswith(head)}
    return {**spark.encoder.export(), **own}
