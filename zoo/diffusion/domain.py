"""The diffusion domain: its dense models and the job that trains them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from zoo.diffusion.data import CaptionedNoise, load_pictures
from zoo.diffusion.flows import Flow, Noised, velocity_loss
from zoo.diffusion.latents import LatentTextToImage
from zoo.diffusion.models import TextToImage, denoising_loss
from zoo.errors import ConfigError
from zoo.shared.train import Job, Recipe

RECIPE = Recipe(
    epochs=20, lr=2e-3, optimizer="adamw", weight_decay=0.01, ema=0.995, clip=1.0, warmup=0.05, decay="cosine"
)
SIZES: dict[str, dict[str, Any]] = {
    "digits": {"side": 8, "widths": (24, 48), "attention": (True, True), "text_width": 48, "text_layers": 2},
    "mnist": {"side": 16, "widths": (16, 32, 32), "text_width": 32, "text_layers": 2},
    "latents": {
        "side": 4,
        "channels": 32,
        "widths": (40,),
        "attention": (True,),
        "text_width": 32,
        "text_layers": 2,
        "prediction": "v_prediction",  # of noise, this network learns nothing: its few channels lose it
    },
}


def dense_model(dataset: str, seed: int) -> TextToImage:
    """The text-to-image network of a data set with fresh weights.

    Raises:
        ConfigError: no network is set up for that data set.
    """
    if dataset not in SIZES:
        raise ConfigError(f"No network is set up for {dataset!r}. There are: {', '.join(SIZES)}.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return (LatentTextToImage if dataset == "latents" else TextToImage)(**SIZES[dataset])


def make_job(
    dataset: str,
    *,
    recipe: Recipe | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    model: nn.Module | None = None,
) -> Job:
    """The job of predicting noise or velocity on a captioned picture set, or a flow's; an epoch is 50 steps.

    Args:
        dataset: see `zoo.diffusion.data.load_pictures`.
        recipe: how to train; by default `RECIPE`.
        seed: of order, noise and captions.
        device: where to train.
        model: whose tokenizer and noise schedule are used; by default those of the data set's own network.
            One that has a `make_job` of its own is asked for it.

    Raises:
        DataError: an unknown data set, or files that are not there.
        ConfigError: a model of another domain.
    """
    if callable(own := getattr(model, "make_job", None)):
        job: Job = own(dataset, recipe=recipe, seed=seed, device=device)
        return job
    used = recipe or RECIPE
    owner = model if model is not None else dense_model(dataset, seed)
    if isinstance(owner, Flow):
        batches = Noised(load_pictures(dataset), used.batch)
        return Job(batches, loss=velocity_loss, recipe=used, seed=seed, device=device)
    if not isinstance(owner, TextToImage):
        raise ConfigError(f"{type(owner).__name__} is no text-to-image model and no flow of zoo.diffusion")
    times = int(owner.scheduler.config.num_train_timesteps)
    captioned = CaptionedNoise(load_pictures(dataset), owner.tokenise, times, used.batch)
    return Job(captioned, loss=denoising_loss, recipe=used, seed=seed, device=device)
