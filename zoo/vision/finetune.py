"""`zoo finetune vision`: train a classifier on, with every zero kept.

Every few epochs the whole state goes into one file beside the output; the same command goes on from there
after a kill, and its result equals that of an uninterrupted run bit for bit.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from shared.masks import masks_of, set_masks
from zoo.bundles import info, load_bundle, save
from zoo.catalog import find
from zoo.checkpoints import CheckpointFile
from zoo.errors import ConfigError
from zoo.harness.subjects import twin_of
from zoo.harness.tasks import get_task
from zoo.harness.tuning import (
    checkpoint_folder,
    finetuned_card,
    options_of,
    require_zeros,
    show_change,
    zero_count,
)
from zoo.progress import progress_bar
from zoo.vision.base import clone, dataset_of
from zoo.vision.data import SOURCES, load_images
from zoo.vision.models import Classifier
from zoo.vision.train import Fit, Recipe, Trainer


@dataclass
class Finetune:
    """Fine-tune an image classifier on the images of its card; the zeros of a sparse one stay zero."""

    model: str
    """The model to start from: a name, folder or hf://owner/name."""

    out: Path
    """Folder for the new bundle."""

    epochs: int = 5
    """Passes over the training images."""

    lr: float = 0.02
    """Peak of the learning rate of SGD: linear warm-up, then linear to 0."""

    batch: int = 64
    """Images per step."""

    weight_decay: float = 5e-4
    """L2 penalty on all weights."""

    train_images: int = 0
    """Use the first so many training images; 0 for all."""

    seed: int = 0
    """Of shuffling and augmentation."""

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
        if self.checkpoint_every < 1:
            raise ConfigError(f"checkpoint_every must be at least 1. Received: {self.checkpoint_every}.")
        recipe = Recipe(self.epochs, self.lr, self.batch, self.weight_decay)
        if self.out.exists() and not self.overwrite:
            raise ConfigError(f"{self.out} is there already. Add --overwrite, or choose another --out.")
        source = find(self.model)
        loaded = load_bundle(source)
        if not isinstance(loaded, Classifier):
            raise ConfigError(f"{source.card.name} is no image classifier that this command can train.")
        dataset = dataset_of(loaded)
        data = load_images(dataset)
        if self.train_images:
            data = data.subset(self.train_images)
        masks = masks_of(loaded)
        model = clone(loaded)
        set_masks(model, masks)
        fit = Trainer(data, recipe, self.seed).fit(model)
        file = CheckpointFile(
            checkpoint_folder(self.out), {**options_of(self), "weights": source.card.weights.sha256}
        )
        if (stored := file.read()) is not None:
            fit.load_state(stored[0])
        start = time.perf_counter()
        self._train(fit, file)
        seconds = time.perf_counter() - start
        require_zeros(model.eval(), masks)
        task = get_task(f"vision/{dataset}")
        origin = SOURCES[dataset]
        fields = finetuned_card(
            self, source.card, twin_of(source) if source.card.dense_twin else None, model, task,
            protocol=f"fine-tuned from {source.card.name}, last epoch", seconds=seconds,
            data={"name": origin.title, "source": origin.origin, "licence": origin.licence},
            arguments=source.card.architecture.args,
        )  # fmt: skip
        extras = info(loaded).extras
        self.out.parent.mkdir(parents=True, exist_ok=True)
        path = save(model, self.out, card=fields, extras=extras, overwrite=self.overwrite)
        shutil.rmtree(checkpoint_folder(self.out), ignore_errors=True)
        values = source.card.metrics[0].value, fields["metrics"][0]["value"]
        show_change(
            f"{source.card.name} on {task.name}", "accuracy", values, (zero_count(loaded), zero_count(model))
        )
        return path

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
