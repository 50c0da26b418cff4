"""`zoo finetune vision`: train a classifier, an upscaler or a detector on, with every zero kept."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from zoo.bundles.catalog import Bundle
from zoo.bundles.publish import Figure
from zoo.bundles.store import load_bundle
from zoo.errors import ConfigError
from zoo.shared.train import Recipe
from zoo.training.finetune import FineTuner, Plan
from zoo.vision.domain import dataset_of, make_job, measured_on_frames, source_of
from zoo.vision.heads import classes_of, fitting_spec, for_classes
from zoo.vision.lidar.detector import Detector
from zoo.vision.lidar.train import detector_recipe
from zoo.vision.models import Classifier
from zoo.vision.tasks import measured_on_images
from zoo.vision.upscalers import Upscaler


@dataclass
class Finetune(FineTuner):
    """Fine-tune an image classifier, an upscaler or a detector in point clouds; the zeros of a sparse
    one stay zero."""

    domain: ClassVar[str] = "vision"

    dataset: str | None = None
    """What to train on: digits, cifar10-jpeg, cifar10-true or a folder with one for each class; t91 for
    upscalers; scenes (generated), kitti (9 of its 13 frames) or a folder of frames for detectors. By default
    what the model's card names."""

    epochs: int = 5
    """Passes over the training data; for an upscaler each is 50 steps."""

    lr: float | None = None
    """Peak of the learning rate: linear warm-up, then linear to 0. By default 0.02 of SGD for classifiers,
    0.0005 of Adam for upscalers and of AdamW for detectors."""

    batch: int | None = None
    """Images, patches or frames per step; by default 64, 8 and 4."""

    weight_decay: float | None = None
    """L2 penalty on all weights, for detectors decoupled; by default 0.0005, 0 and 0.01."""

    train_images: int = 0
    """Use the first so many training images, scenes or frames; 0 for all."""

    def plan(self, source: Bundle, loaded: nn.Module, twin: Bundle | None, device: torch.device) -> Plan:
        """Training of the kind that the model is made for."""
        arguments = None
        if isinstance(loaded, Classifier):
            recipe = Recipe(lr=0.02)
        elif isinstance(loaded, Upscaler):
            recipe = Recipe(lr=5e-4, batch=8, weight_decay=0.0, optimizer="adam")
        elif isinstance(loaded, Detector):
            recipe = detector_recipe(lr=5e-4, batch=4)
            arguments = loaded.current_arguments()
        else:
            raise ConfigError(
                f"{source.card.name} is no classifier, upscaler or detector that this command can train. "
                f"Received: {type(loaded).__name__}."
            )
        if self.distillation and not isinstance(loaded, Classifier):
            raise ConfigError(f"Distillation needs classes; {source.card.name} has none. Leave it out.")
        recipe = dataclasses.replace(
            recipe,
            epochs=self.epochs,
            lr=recipe.lr if self.lr is None else self.lr,
            batch=recipe.batch if self.batch is None else self.batch,
            weight_decay=recipe.weight_decay if self.weight_decay is None else self.weight_decay,
        )
        dataset, figures = self.dataset or dataset_of(loaded), None
        model = loaded.float()
        if isinstance(model, Classifier):
            dataset = fitting_spec(dataset, model)
            model, new = for_classes(model, classes_of(dataset), self.seed)
            arguments = model.current_arguments()
            if new:
                _check_twin(twin, classes_of(dataset), dataset)
                print(f"zoo: {dataset} has other classes: {', '.join(new)} are new", file=sys.stderr)
            if dataset != dataset_of(loaded):
                figures = [Figure(measured_on_images(dataset)[0])]
        elif isinstance(model, Detector) and (task := measured_on_frames(dataset)) is not None:
            figures = [Figure(task)] if dataset != "scenes" else None
        job = make_job(
            dataset, recipe=recipe, seed=self.seed, device=device, model=model, limit=self.train_images
        )
        origin = source_of(dataset)
        words = {"name": origin.title, "source": origin.origin, "licence": origin.licence}
        return Plan(
            model,
            job,
            dataset,
            arguments=arguments,
            figures=figures,
            data=words,
            identity={"dataset": dataset, "content": origin.origin},
        )


def _check_twin(twin: Bundle | None, classes: int, dataset: str) -> None:
    """Refuse, before anything is trained, a dense twin that cannot be measured on the new classes."""
    if twin is None:
        return
    model = load_bundle(twin)
    if isinstance(model, Classifier) and for_classes(model, classes, 0)[1]:
        raise ConfigError(
            f"{dataset} has {classes} classes, for which the dense twin {twin.card.name} has no head: "
            f"fine-tune it "
            f"first (zoo finetune vision --model {twin.card.name} --dataset {dataset} --out DIR), then give "
            f"that "
            "model with --twin DIR"
        )
