"""SparK as one module: encoder, decoder, and the loss on hidden cells."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from zoo.vision.spark.decoder import LightDecoder
from zoo.vision.spark.encoder import Execution, SparKEncoder

EPS = 1e-6


def patches(images: Float[Tensor, "B C H W"], grid: tuple[int, int]) -> Float[Tensor, "B f g pixels"]:
    """Cells of the images, each as one row of its values in the order row, column, channel."""
    batch, channels, height, width = images.shape
    f, g = grid
    cut = images.reshape(batch, channels, f, height // f, g, width // g)
    return cut.permute(0, 2, 4, 3, 5, 1).flatten(3)


def unpatched(cells: Float[Tensor, "B f g pixels"], channels: int, cell: int) -> Float[Tensor, "B C H W"]:
    """The inverse of `patches` for square cells."""
    batch, f, g, _ = cells.shape
    split = cells.view(batch, f, g, cell, cell, channels)
    return split.permute(0, 5, 1, 3, 2, 4).reshape(batch, channels, f * cell, g * cell)


def normalised_patches(
    cells: Float[Tensor, "B f g pixels"],
) -> tuple[Float[Tensor, "B f g pixels"], Float[Tensor, "B f g 1"], Float[Tensor, "B f g 1"]]:
    """(t - mean) / sqrt(var + 1e-6) of each cell with the unbiased variance; with the mean and the root."""
    mean = cells.mean(-1, keepdim=True)
    root = (cells.var(-1, keepdim=True) + EPS).sqrt()
    return (cells - mean) / root, mean, root


def hidden_loss(
    predicted: Float[Tensor, "B C H W"], images: Float[Tensor, "B C H W"], cells: Bool[Tensor, "B f g"]
) -> Float[Tensor, ""]:
    """Mean over the hidden cells of the mean squared error against their normalised values.

    Predicting zero everywhere costs (p - 1) / p for cells of p values: what was learnt lies below that.
    """
    grid = (cells.shape[1], cells.shape[2])
    target, _, _ = normalised_patches(patches(images.float(), grid))
    error = (patches(predicted.float(), grid) - target).square().mean(-1)
    hidden = ~cells
    return (error * hidden).sum() / hidden.sum()


class SparK(nn.Module):
    """Encoder and decoder.

    Args:
        encoder: of the network to be trained.
        width: of the decoder at its coarsest map.
        scales: how many of the encoder's maps it takes; 0 for all.
        execution: of the encoder.
    """

    def __init__(
        self, encoder: SparKEncoder, width: int, scales: int = 0, execution: Execution = "auto"
    ) -> None:
        super().__init__()
        self.encoder, self.execution = encoder, execution
        self.decoder = LightDecoder(
            encoder.widths,
            encoder.strides,
            encoder.trunk.norm,
            width,
            encoder.channels,
            scales,
            encoder.context,
        )

    def forward(
        self, images: Float[Tensor, "B C H W"], cells: Bool[Tensor, "B f g"]
    ) -> Float[Tensor, "B C H W"]:
        """Predicted images, in the normalised values of each cell."""
        visible = self.encoder.look(images, cells, self.execution)
        maps = self.encoder.stage_rows(images, visible)
        with self.encoder.context.looking_at(visible):
            return self.decoder(maps, visible)

    def loss(self, images: Float[Tensor, "B C H W"], cells: Bool[Tensor, "B f g"]) -> Float[Tensor, ""]:
        """The loss on hidden cells."""
        return hidden_loss(self(images, cells), images, cells)

    @torch.no_grad()
    def reconstruct(
        self, images: Float[Tensor, "B C H W"], cells: Bool[Tensor, "B f g"]
    ) -> Float[Tensor, "B C H W"]:
        """Images whose hidden cells are predicted, with each cell's own mean and deviation put back."""
        cell, channels = self.encoder.cell, self.encoder.channels
        target = patches(images, self.encoder.grid)
        _, mean, root = normalised_patches(target)
        filled = patches(self(images, cells), self.encoder.grid) * root + mean
        return unpatched(torch.where(cells[..., None], target, filled), channels, cell)
