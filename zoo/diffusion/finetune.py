"""`zoo finetune diffusion`: train a sparse text-to-image model or a flow on, with every zero kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from zoo.bundles.catalog import Bundle
from zoo.bundles.store import load_bundle
from zoo.diffusion.data import SOURCES
from zoo.diffusion.domain import make_job
from zoo.diffusion.flows import Flow
from zoo.diffusion.lora import attach_lora
from zoo.diffusion.models import TextToImage
from zoo.errors import ConfigError
from zoo.shared.train import Distillation, Job, Recipe
from zoo.training.finetune import FineTuner, Plan


@dataclass
class Finetune(FineTuner):
    """Fine-tune a text-to-image model to predict noise or velocity, or a flow its own; zeros stay zero.

    What was cut stays cut: a network without some of its heads, neurons or layers is trained as it is. With a
    rank, low-rank updates of the denoiser's linear layers are trained by peft, masked like the weights, and
    merged at the end.
    """

    domain: ClassVar[str] = "diffusion"
    counts: ClassVar[str] = "steps"

    distillation: float = 0.0
    """Weight of the squared distance to the dense twin's prediction, added to the loss; 0 leaves it out."""

    dataset: str | None = None
    """Pictures to train on: digits or mnist; by default those that the model's card names."""

    prediction: str | None = None
    """What a text-to-image model learns to predict, epsilon (the noise) or v_prediction (the velocity); by
    default what it predicts now. A change takes many more steps."""

    steps: int = 200
    """Optimizer steps."""

    batch: int = 64
    """Images per step, over all processes."""

    lr: float = 5e-4
    """AdamW's highest learning rate; it falls by a cosine."""

    weight_decay: float = 0.0
    """Decoupled decay of all weights."""

    ema: float = 0.98
    """Decay per step of the average of the weights that is kept; 0 for the last weights."""

    lora_rank: int = 0
    """Rank of the updates (needs the extra peft); 0 trains all weights."""

    lora_alpha: float | None = None
    """Scale of the updates times the rank; by default twice the rank."""

    checkpoint_every: int = 25
    """Steps between checkpoints."""

    def plan(self, source: Bundle, loaded: nn.Module, twin: Bundle | None, device: torch.device) -> Plan:
        """Training on a picture set."""
        if not isinstance(loaded, (TextToImage, Flow)):
            raise ConfigError(
                f"{source.card.name} is a {type(loaded).__name__}; this command trains text-to-image models "
                "and flows"
            )
        if self.lora_rank < 0:
            raise ConfigError(f"lora_rank must not be negative. Received: {self.lora_rank}.")
        arguments = self._predicting(source, loaded, twin)
        dataset = self.dataset or source.card.metrics[0].task.rpartition("-")[2]
        recipe = Recipe(
            steps=self.steps,
            batch=self.batch,
            lr=self.lr,
            weight_decay=self.weight_decay,
            ema=self.ema,
            optimizer="adamw",
            clip=1.0,
            decay="cosine",
        )
        model = loaded.float()
        job = make_job(dataset, recipe=recipe, seed=self.seed, device=device, model=model)
        if (made := job.batches.example()[0].shape[1:]) != loaded.sample_shape:
            raise ConfigError(
                f"{source.card.name} makes images of {loaded.sample_shape}; those of {dataset} are "
                f"{tuple(made)}"
            )
        origin = SOURCES[dataset]
        words = {"name": origin.title, "source": origin.origin, "licence": origin.licence}
        how, merge = "", None
        if self.lora_rank:
            how, merge = "by LoRA", attach_lora(model, self.lora_rank, self.lora_alpha, self.seed)
        known = {"dataset": dataset}
        return Plan(model, job, dataset, how, arguments, data=words, identity=known, finish=merge)

    def _predicting(self, source: Bundle, model: TextToImage | Flow, twin: Bundle | None) -> dict[str, Any]:
        """The arguments on the new card, after the model was told what to predict.

        Raises:
            ConfigError: a flow, an unknown prediction, or a teacher that predicts something else.
        """
        arguments = dict(source.card.architecture.args)
        if isinstance(model, Flow):
            if self.prediction is not None:
                raise ConfigError(
                    f"{source.card.name} is a flow, which predicts its velocity; leave out prediction"
                )
            return arguments
        if self.prediction is not None:
            model.predict(self.prediction)
            arguments["prediction"] = self.prediction
        taught = twin.card.architecture.args.get("prediction", "epsilon") if twin else model.prediction
        if self.distillation and taught != model.prediction:
            raise ConfigError(
                f"the dense twin predicts {taught} and cannot teach what predicts {model.prediction}: "
                "leave out distillation, or name a --twin that predicts the same"
            )
        return arguments

    def taught(self, job: Job, twin: Bundle) -> Job:
        """The job with the dense twin's prediction as a second target."""
        teacher = load_bundle(twin).float().to(job.device)
        return job.replace(distil=Distillation(teacher, squared=self.distillation))
