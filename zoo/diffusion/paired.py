"""Images that several models make of the same noise, and how far they drift from the dense model's."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from zoo.diffusion.data import captions
from zoo.diffusion.flows import Flow
from zoo.diffusion.models import TextToImage
from zoo.diffusion.sampling import sample
from zoo.harness.tasks import Progress


@torch.no_grad()
def images_of(
    model: TextToImage | Flow,
    noise: Float[Tensor, "n C H W"],
    *,
    steps: int = 10,
    batch: int = 100,
    progress: Progress | None = None,
) -> Float[Tensor, "n C H W"]:
    """Images of noise in single precision: of the digits in turn, without guidance, or of a flow.

    Args:
        model: in eval mode.
        noise: the starting points.
        steps: of a text-to-image model's sampler; a flow takes those that it is made for.
        batch: images at a time.
        progress: called before each batch.
    """
    labels, made = torch.arange(len(noise)) % 10, []
    dtype = next(model.parameters()).dtype
    for at in range(0, len(noise), batch):
        if progress is not None:
            progress(at, len(noise), "sampling")
        x = noise[at : at + batch].to(dtype)
        if isinstance(model, Flow):
            made.append(model.images(x).float())
        else:
            condition = model.encode(model.tokenise(captions(labels[at : at + batch])))
            made.append(sample(model, x.to(condition.dtype), condition, steps=steps).float())
    return torch.cat(made)


def drift(own: Float[Tensor, "n C H W"], dense: Float[Tensor, "n C H W"]) -> Float[Tensor, " n"]:
    """Mean squared difference from the dense model's image of the same noise, per image."""
    return (own - dense).square().flatten(1).mean(1)
