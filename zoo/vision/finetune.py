"""`zoo finetune vision`: train a classifier or an upscaler on, with every zero kept.

Every few epochs the whole state goes into one file beside the output; the same command goes on from there
after a kill, and its result equals that of an uninterrupted run bit for bit.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch

from zoo.bundles.catalog import find
from zoo.bundles.sources import Source
from zoo.bundles.store import info, load_bundle
from zoo.checkpoints import CheckpointFile
from zoo.errors import ConfigError
from zoo.harness.subjects import twin_of
from zoo.harness.tasks import get_task
from zoo.harness.tuning import (
    check_target,
    checkpoint_folder,
    finetuned_card,
    options_of,
    publish,
    require_zeros,
    show_change,
    zero_count,
)
from zoo.progress import progress_bar
from zoo.shared.masks import masks_of, set_masks
from zoo.vision.base import back_on_cpu, checked_device, clone, dataset_of
from zoo.vision.data import SOURCES, load_images
from zoo.vision.models import Classifier
from zoo.vision.superres import SOURCE, PatchBatches, l1_loss, load_t91
from zoo.vision.train import Fit, Recipe, Trainer
from zoo.vision.upscalers import Upscaler


@dataclass
class Finetune:
    """Fine-tune an image classifier on the images of its card, or an upscaler on T91; the zeros of a sparse
    one stay zero."""

    model: str
    """The model to start from: a name, folder or hf://owner/name."""

    out: Path
    """Folder for the new bundle."""

    epochs: int = 5
    """Passes over the training images; for an upscaler each is 50 steps."""

    lr: float | None = None
    """Peak of the learning rate: linear warm-up, then linear to 0. By default 0.02 of SGD for classifiers and
    0.0005 of Adam for upscalers."""

    batch: int | None = None
    """Images per step, by default 64; for an upscaler patches, by default 8."""

    weight_decay: float = 5e-4
    """L2 penalty on all weights of a classifier; upscalers are trained without."""

    train_images: int = 0
    """Use the first so many training images; 0 for all."""

    seed: int = 0
    """Of shuffling and augmentation."""

    device: str = "cpu"
    """Where to train: cpu, cuda or cuda:1, say."""

    checkpoint_every: int = 1
    """Epochs between checkpoints."""

    name: str | None = None
    """Name on the card; by default vision/ and the folder's name."""

    overwrite: bool = False
    """Replace the bundle that is there."""

    def run(self) -> Path:
        """Train, or go on with an interrupted training, and write the bundle.

        Returns:
            The folder of the new bundle.

        Raises:
            ConfigError: options out of range, a model that is no classifier, or a checkpoint of another run.
            SparseError: whatever loading, data or saving refuse.
        """
        device = checked_device(self.device)
        check_target(self)
        source = find(self.model)
        loaded = load_bundle(source)
        if not isinstance(loaded, Classifier | Upscaler):
            raise ConfigError(
                f"{source.card.name} is no image classifier and no upscaler that this command can train; "
                "detectors in point clouds have their own: zoo finetune lidar."
            )
        masks = masks_of(loaded)
        if isinstance(loaded, Upscaler):
            fit, origin = self._upscaling(loaded, device)
        else:
            fit, origin = self._classifying(loaded, device)
        model = fit.model
        set_masks(model, masks)
        file = CheckpointFile(
            checkpoint_folder(self.out), {**options_of(self), "weights": source.card.weights.sha256}
        )
        if (stored := file.read()) is not None:
            fit.load_state(stored[0])
        start = time.perf_counter()
        self._train(fit, file)
        seconds = time.perf_counter() - start
        require_zeros(back_on_cpu(model).eval(), masks)
        task = get_task(source.card.metrics[0].task)
        fields = finetuned_card(
            self,
            source.card,
            twin_of(source) if source.card.dense_twin else None,
            model,
            task,
            protocol=f"fine-tuned from {source.card.name}, last epoch",
            seconds=seconds,
            data={"name": origin.title, "source": origin.origin, "licence": origin.licence},
            arguments=source.card.architecture.args,
        )
        extras = info(loaded).extras
        path = publish(self, model, fields, extras)
        values = source.card.metrics[0].value, fields["metrics"][0]["value"]
        zeros = zero_count(loaded), zero_count(model)
        show_change(f"{source.card.name} on {task.name}", task.primary, values, zeros)
        return path

    def _classifying(self, loaded: Classifier, device: torch.device) -> tuple[Fit, Source]:
        """The training of a copy of a classifier, ready to run, and where its images are from."""
        dataset = dataset_of(loaded)
        data = load_images(dataset)
        if self.train_images:
            data = data.subset(self.train_images)
        lr = 0.02 if self.lr is None else self.lr
        recipe = Recipe(self.epochs, lr, self.batch or 64, self.weight_decay)
        trainer = Trainer(data.to(device), recipe, self.seed)
        return trainer.fit(clone(loaded).to(device)), SOURCES[dataset]

    def _upscaling(self, loaded: Upscaler, device: torch.device) -> tuple[Fit, Source]:
        """The training of a copy of an upscaler, ready to run, and where its images are from."""
        model = loaded.fresh(self.seed)
        model.load_state_dict(loaded.state_dict())
        model.to(device)
        pairs = load_t91(model.scale)
        batches = PatchBatches(pairs[: self.train_images or len(pairs)], batch=self.batch or 8, device=device)
        lr = 5e-4 if self.lr is None else self.lr
        recipe = Recipe(self.epochs, lr, weight_decay=0.0, optimizer="adam")
        return Fit(model, batches, recipe, loss=l1_loss, seed=self.seed), SOURCE

    def _train(self, fit: Fit, file: CheckpointFile) -> None:
        masks = masks_of(fit.model)
        handle = masks.attach(fit.model, fit.optimizer) if masks is not None else None
        with progress_bar() as progress:

            def on_epoch(fit: Fit) -> None:
                progress(fit.epoch, fit.recipe.epochs, f"loss {fit.last_loss:.4f}")
                if fit.epoch % self.checkpoint_every == 0 and fit.epoch < fit.recipe.epochs:
                    file.write(fit.state(), {})

            fit.run(on_epoch=on_epoch)
        if handle is not None:
            handle.detach()
