"""Grids of samples: a row per model, a column per digit, from the same noise.

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

from zoo.diffusion.data import WORDS, captions
from zoo.diffusion.models import TextToImage
from zoo.diffusion.sampling import sample
from zoo.errors import ConfigError
from zoo.shared.store.io import atomic_write

ZOOM, GAP = 6, 1


def sample_grid(models: Sequence[TextToImage], steps: int = 10, seed: int = 0) -> UInt8[Tensor, "H W"]:
    """Grey values of ten samples per model, one of each digit; all models start from the same noise.

    Args:
        models: one per row, with images of one shape and one channel.
        steps: of the sampler.
        seed: of the noise.

    Raises:
        ConfigError: no model, or models of different shapes.
    """
    shapes = {model.sample_shape for model in models}
    if len(shapes) != 1 or next(iter(shapes))[0] != 1:
        raise ConfigError(
            f"a grid needs grey images of one shape; received {sorted(shapes) or 'no model at all'}"
        )
    (shape,) = shapes
    noise = torch.randn((len(WORDS), *shape), generator=torch.Generator().manual_seed(seed))
    texts = captions(torch.arange(len(WORDS)))
    rows = []
    for model in models:
        with torch.no_grad():
            condition = model.encode(model.tokenise(texts))
            made = sample(model, noise.to(condition.dtype), condition, steps=steps).float()
        padded = torch.nn.functional.pad(made[:, 0], (GAP, GAP, GAP, GAP), value=0.0)
        rows.append(torch.cat(list(padded), dim=1))
    grey = (torch.cat(rows).clamp(-1, 1) + 1) * 127.5
    return grey.round().to(torch.uint8)


def png(grid: UInt8[Tensor, "H W"]) -> bytes:
    """The grid as a PNG picture, enlarged without smoothing."""
    image = Image.fromarray(grid.numpy())
    image = image.resize((image.width * ZOOM, image.height * ZOOM), Image.Resampling.NEAREST)
    held = io.BytesIO()
    image.save(held, "PNG")
    return held.getvalue()


def _model(loaded: nn.Module) -> TextToImage:
    if not isinstance(loaded, TextToImage):
        raise ConfigError(f"a {type(loaded).__name__} makes no images from text")
    return loaded


def main(picture: str, *names: str) -> None:
    """Draw the models of these names."""
    import zoo

    atomic_write(Path(picture), png(sample_grid([_model(zoo.load(name)) for name in names])))


if __name__ == "__main__":
    main(*sys.argv[1:])
