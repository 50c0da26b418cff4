"""How near a rendering is to a picture: PSNR and SSIM, over the picture or over an object in it.

LPIPS needs a backbone whose weights are not here: there is no number for it rather than one without meaning.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from zoo.errors import DataError

LPIPS = "not available"
BEST_PSNR = 100.0  # dB, of equal pictures


def psnr(
    found: Float[Tensor, "h w c"], wanted: Float[Tensor, "h w c"], mask: Float[Tensor, "h w"] | None = None
) -> float:
    """Peak signal-to-noise ratio in dB of colours cut to 0..1; where there is a mask, over its pixels.

    Raises:
        DataError: a mask without a pixel.
    """
    error = (found.clamp(0, 1) - wanted).square()
    if mask is not None:
        inside = mask > 0.5
        if not bool(inside.any()):
            raise DataError("a mask without a pixel: there is nothing to compare")
        error = error[inside]
    mean = float(error.mean(dtype=torch.float64))
    return min(BEST_PSNR, -10 * math.log10(mean)) if mean > 0 else BEST_PSNR


def ssim(
    found: Float[Tensor, "h w c"], wanted: Float[Tensor, "h w c"], mask: Float[Tensor, "h w"] | None = None
) -> float:
    """Structural similarity, window 11, sigma 1.5 (Wang et al. 2004), by torchmetrics; where there is a mask,
    inside its bounding box.

    Raises:
        DataError: a picture or a box smaller than the window.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    if mask is not None:
        rows, columns = (mask > 0.5).nonzero(as_tuple=True)
        if not len(rows):
            raise DataError("a mask without a pixel: there is nothing to compare")
        box = slice(int(rows.min()), int(rows.max()) + 1), slice(int(columns.min()), int(columns.max()) + 1)
        found, wanted = found[box], wanted[box]
    if min(found.shape[:2]) < 11:
        raise DataError(f"SSIM needs 11 x 11 pixels; received {tuple(found.shape[:2])}")
    one, other = (image.clamp(0, 1).permute(2, 0, 1)[None] for image in (found, wanted))
    return float(structural_similarity_index_measure(one, other, data_range=1.0))  # type: ignore[arg-type]


def ssim_map_mean(found: Float[Tensor, "h w c"], wanted: Float[Tensor, "h w c"]) -> Float[Tensor, ""]:
    """SSIM as a loss term: differentiable, colours not cut."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    one, other = (image.permute(2, 0, 1)[None] for image in (found, wanted))
    mean = structural_similarity_index_measure(one, other, data_range=1.0)
    assert isinstance(mean, Tensor)
    return mean
