"""Grids of samples: a row per model, from the same noise; of models with text a column per digit.

`python -m zoo.diffusion.grids PICTURE NAME...` draws one of models of the zoo.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor, nn

from zoo.bundles.catalog import Bundle, find
from zoo.bundles.store import load_bundle
from zoo.diffusion.data import WORDS, captions
from zoo.diffusion.flows import Flow
from zoo.diffusion.models import TextToImage
from zoo.diffusion.sampling import sample
from zoo.errors import ConfigError
from zoo.shared.store.io import atomic_write

ZOOM, GAP = 6, 1


def sample_grid(models: Sequence[TextToImage | Flow], steps: int = 10, seed: int = 0) -> UInt8[Tensor, "H W"]:
    """Grey values of ten samples per model; all models start from the same noise.

    Args:
        models: one per row, with grey images of one shape; text-to-image models show one sample of each
            digit (those in a latent space decoded), flows what they make of the noise in their own number of
            steps.
        steps: of the sampler of text-to-image models.
        seed: of the noise.

    Raises:
        ConfigError: no model, models of different shapes, or images that are not grey.
    """
    shapes = {model.sample_shape for model in models}
    if len(shapes) != 1:
        raise ConfigError(f"a grid needs models of one shape; received {sorted(shapes) or 'no model at all'}")
    (shape,) = shapes
    noise = torch.randn((len(WORDS), *shape), generator=torch.Generator().manual_seed(seed))
    rows = []
    for model in models:
        with torch.no_grad():
            made = model.images(noise) if isinstance(model, Flow) else _from_text(model, noise, steps)
        if made.shape[1] != 1:
            raise ConfigError(f"a grid shows grey images; received {made.shape[1]} channels")
        padded = torch.nn.functional.pad(made[:, 0].float(), (GAP, GAP, GAP, GAP), value=0.0)
        rows.append(torch.cat(list(padded), dim=1))
    grey = (torch.cat(rows).clamp(-1, 1) + 1) * 127.5
    return grey.round().to(torch.uint8)


def _from_text(model: TextToImage, noise: Tensor, steps: int) -> Tensor:
    condition = model.encode(model.tokenise(captions(torch.arange(len(WORDS)))))
    return model.decoded(sample(model, noise.to(condition.dtype), condition, steps=steps))


def png(grid: UInt8[Tensor, "H W"]) -> bytes:
    """The grid as a PNG picture, enlarged without smoothing."""
    image = Image.fromarray(grid.numpy())
    image = image.resize((image.width * ZOOM, image.height * ZOOM), Image.Resampling.NEAREST)
    held = io.BytesIO()
    image.save(held, "PNG")
    return held.getvalue()


def picture(bundle: Bundle, path: Path) -> str:
    """Draw ten samples of a bundle's model below those of its dense twin.

    Returns:
        what was drawn, in words.

    Raises:
        ConfigError: an ending that is not .png, or a model that makes no images from noise.
    """
    if path.suffix != ".png":
        raise ConfigError(f"--picture {path}: give a name that ends in .png")
    twin = bundle.card.dense_twin
    shown = [bundle] if twin is None else [find(twin), bundle]
    atomic_write(path, png(sample_grid([_model(load_bundle(one)) for one in shown])))
    return ("the dense twin above and the model below" if twin else "the model") + ", from the same noise"


def _model(loaded: nn.Module) -> TextToImage | Flow:
    if not isinstance(loaded, TextToImage | Flow):
        raise ConfigError(f"a {type(loaded).__name__} makes no images from noise alone")
    return loaded


def main(picture: str, *names: str) -> None:
    """Draw the models of these names."""
    atomic_write(Path(picture), png(sample_grid([_model(load_bundle(find(name))) for name in names])))


if __name__ == "__main__":
    main(*sys.argv[1:])
