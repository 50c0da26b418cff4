"""`zoo pretrain vision`: a ResNet pre-trained by SparK, as a bundle that `zoo finetune vision` takes.

Every few epochs the whole state goes into one file beside the output; the same command goes on from there
after a kill, and its result equals that of an uninterrupted run.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from zoo.bundles.catalog import find
from zoo.bundles.publish import About, Figure, Trained, publish
from zoo.names import name_for
from zoo.progress import progress_bar
from zoo.shared.store.kept import going_on_from
from zoo.shared.train import Checkpoint, Fit, Recipe, device_named
from zoo.training.options import check_target, checkpoint_folder, command_of, options_of
from zoo.vision.data import SOURCES, load_images
from zoo.vision.models import ResNet
from zoo.vision.spark.masking import kept_cells
from zoo.vision.spark.pictures import write_sheet
from zoo.vision.spark.pretraining import fresh_spark, held_out_loss, pretraining, resumed
from zoo.vision.spark.probe import fit_head

CITATION = (
    "Tian et al. Designing BERT for Convolutional Networks: Sparse and Hierarchical Masked Modeling. ICLR "
    "2023."
)
PROBE = "linear probe: ridge regression of all training labels on the frozen features"


@dataclass
class Pretrain:
    """Pre-train a CIFAR ResNet by SparK: hidden cells of images are predicted from the visible ones.

    No label is used, but for the head of the bundle: a linear probe on the finished, frozen features.
    """

    out: Path
    """Folder for the new bundle."""

    dataset: str = "digits"
    """Images: digits, cifar10-jpeg or cifar10-true."""

    depth: int = 8
    """Of the ResNet: 6 n + 2."""

    width: int = 16
    """Channels of its first stage."""

    cell: int = 4
    """Side of a cell: a multiple of the network's stride, 4, that divides the images' sides."""

    ratio: float = 0.6
    """Share of the cells that are hidden; rounded to whole cells."""

    decoder: int = 32
    """Channels of the decoder at the coarsest map."""

    epochs: int = 30
    """Passes over the training images."""

    lr: float = 3e-3
    """Peak of the learning rate of Adam: linear warm-up, then linear to 0."""

    batch: int = 64
    """Images per step."""

    seed: int = 0
    """Of weights, order, augmentation and masks."""

    execution: Literal["auto", "masked", "pairs", "grid"] = "auto"
    """How the encoder computes; auto measures which is the fastest."""

    device: str = "cpu"
    """Where to train: cpu, cuda or cuda:1, say."""

    checkpoint_every: int = 1
    """Epochs between checkpoints."""

    pictures: Path | None = None
    """Also write a PNG of reconstructions."""

    twin: str | None = None
    """The same network trained without pre-training, to stand beside it on the card."""

    name: str | None = None
    """Name on the card; by default vision/ and the folder's name."""

    overwrite: bool = False
    """Replace the bundle that is there."""

    def run(self) -> Path:
        """Pre-train, or go on with an interrupted run, and write the bundle.

        Returns:
            The folder of the new bundle.

        Raises:
            ConfigError: options out of range, images that do not divide into cells, a mask ratio that hides
                nothing or everything, or a checkpoint of another run.
            SparseError: whatever data or saving refuse.
        """
        check_target(self)
        start = time.perf_counter()
        with going_on_from(checkpoint_folder(self.out)):
            model, loss = self.pretrained()
            path = self._publish(model, time.perf_counter() - start, loss)
        self._checkpoint().remove()
        return path

    def pretrained(self) -> tuple[ResNet, float]:
        """The network with a linear probe as its head, and the loss on hidden cells of held-out images."""
        device = device_named(self.device)
        recipe = Recipe(self.epochs, self.lr, self.batch, 0.0, optimizer="adam")
        data = load_images(self.dataset)
        _, channels, height, width = data.train.images.shape
        model = ResNet(self.depth, self.width, channels=channels)
        spark = fresh_spark(
            model, (height, width), self.cell, self.decoder, self.seed, execution=self.execution
        )
        kept_cells(spark.encoder.grid[0] * spark.encoder.grid[1], self.ratio)
        fit = pretraining(spark.to(device), data.to(device), recipe, self.ratio, self.seed)
        with progress_bar() as progress:

            def note(fit: Fit) -> None:
                progress(fit.step, fit.steps, f"loss on hidden cells {fit.last_loss:.4f}")

            resumed(fit, self._checkpoint(), self.checkpoint_every, note)
        loss = held_out_loss(spark, data.to(device), data.to(device).val, self.ratio)
        model.load_state_dict(spark.encoder.export())
        fit_head(model, data)
        if self.pictures is not None:
            write_sheet(spark, data.to(device), self.ratio, self.pictures)
        return model.eval(), loss

    def _checkpoint(self) -> Checkpoint:
        options = {name: value for name, value in options_of(self).items() if name != "twin"}
        return Checkpoint(checkpoint_folder(self.out), options)

    def _publish(self, model: ResNet, seconds: float, loss: float) -> Path:
        options = {name: value for name, value in options_of(self).items() if name != "twin"}
        source = SOURCES[self.dataset]
        trained = Trained(
            {self.seed: model},
            {"name": "vision/resnet", "args": model.current_arguments()},
            "dense" if self.twin is None else "spark",  # no weight is dropped
            {**options, "pretraining": "SparK", "hidden_loss": loss},
            seconds,
        )
        about = About(
            self.name or name_for("vision", self.out),
            f"ResNet-{self.depth} pre-trained by SparK on {source.title} without labels, with a linear probe "
            "as its head.",
            command_of(self, "vision", verb="pretrain"),
            CITATION,
            {"name": source.title, "source": source.origin, "licence": source.licence},
        )
        return publish(
            trained,
            about,
            [Figure(f"vision/{self.dataset}", protocol=PROBE)],
            self.out,
            twin=None if self.twin is None else find(self.twin),
            overwrite=self.overwrite,
        )
