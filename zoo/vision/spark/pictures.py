"""Pictures of a SparK model at work: the image, what the encoder sees, and the hidden cells filled in."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from zoo.shared.measure.modes import eval_mode
from zoo.shared.store.io import atomic_write
from zoo.vision.data import Images
from zoo.vision.spark.masking import draw_cells
from zoo.vision.spark.objective import SparK

SCALE = 4  # pixels of the picture for one of the image
GAP = 1  # image pixels between pictures


def reconstructions(
    spark: SparK, data: Images, ratio: float, count: int = 12
) -> tuple[Float[Tensor, "n C H W"], Float[Tensor, "n C H W"], Float[Tensor, "n C H W"]]:
    """The first validation images, their visible part (grey where hidden), and their reconstruction, 0 to 1.

    A hidden cell is shown with its own mean and deviation, which the loss leaves out.
    """
    shown = data.val.images[:count]
    images = data.normalised(shown)
    cells = draw_cells(len(images), spark.encoder.grid, ratio, torch.Generator().manual_seed(0))
    cells = cells.to(images.device)
    with eval_mode(spark):
        filled = spark.reconstruct(images, cells)
    mean = torch.tensor(data.mean, device=images.device).view(1, -1, 1, 1)
    std = torch.tensor(data.std, device=images.device).view(1, -1, 1, 1)
    whole = shown.float() / data.scale
    cell = spark.encoder.cell
    plane = cells.repeat_interleave(cell, 1).repeat_interleave(cell, 2)[:, None]
    return whole, torch.where(plane, whole, 0.5), (filled * std + mean).clamp(0, 1)


def write_sheet(spark: SparK, data: Images, ratio: float, path: Path, count: int = 12) -> Path:
    """A PNG with one column per image: the image, what is visible, the reconstruction."""
    from PIL import Image

    rows = []
    for strip in reconstructions(spark, data, ratio, count):
        padded = torch.nn.functional.pad(strip.cpu(), (GAP, GAP, GAP, GAP), value=1.0)
        rows.append(torch.cat(list(padded), dim=2))
    sheet = torch.cat(rows, dim=1).repeat_interleave(SCALE, 1).repeat_interleave(SCALE, 2)
    if sheet.shape[0] == 1:
        sheet = sheet.expand(3, -1, -1)
    pixels = np.ascontiguousarray((sheet * 255).round().byte().permute(1, 2, 0).numpy())
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    path.parent.mkdir(parents=True, exist_ok=True)
    return atomic_write(path, buffer.getvalue())
