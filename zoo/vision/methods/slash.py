"""SLASH: slot attention whose maps are smoothed and whose slots are shepherded by a few known centres.

Kim, Choi, Choi, Kim, "Shepherding Slots to Objects: Towards Stable and Robust Object-Centric Learning", CVPR
2023. In slot attention (Locatello et al. 2020) slots compete for pixels: a softmax over slots, then a mean
over pixels, in three rounds. Here the logits of each slot are first filtered by one learned kernel whose
entries are positive and sum to 1 (ARK: scattered pixels are no object), and each slot says where it is and
hears it again (IPPE: a point from the slot, an offset to the slot from the point); for some pictures
centres are known, which then stand for the points of the slots that they match.

Differs from the reference: the kernel is a softmax of free logits, computed anew in each pass; there the
parameter is replaced in the forward pass, and no optimiser ever moves it.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn import functional

from zoo.errors import ConfigError, DataError


class Smoothing(nn.Module):
    """One kernel for the map of every slot, its entries positive with sum 1.

    Args:
        side: odd; 1 leaves maps as they are.

    Raises:
        ConfigError: an even side.
    """

    def __init__(self, side: int) -> None:
        super().__init__()
        if side < 1 or side % 2 == 0:
            raise ConfigError(f"the kernel has a middle: its side must be odd; received {side}")
        axis = torch.arange(side) - side // 2
        distance = axis[:, None].square() + axis[None].square()
        self.logits = nn.Parameter(-distance.float() / 2)

    def kernel(self) -> Float[Tensor, "side side"]:
        """The entries."""
        return self.logits.flatten().softmax(0).reshape(self.logits.shape)

    def forward(self, maps: Float[Tensor, "batch slots h w"]) -> Float[Tensor, "batch slots h w"]:
        batch, slots, h, w = maps.shape
        side = len(self.logits)
        padded = functional.pad(maps.reshape(-1, 1, h, w), (side // 2,) * 4, mode="replicate")
        out: Tensor = functional.conv2d(padded, self.kernel()[None, None])
        return out.reshape(batch, slots, h, w)


def matched(
    points: Float[Tensor, "batch slots 2"], centres: Float[Tensor, "batch objects 2"]
) -> tuple[Tensor, Tensor]:
    """Which slot each known centre belongs to, by the least sum of squared distances.

    Returns:
        Targets [batch, slots, 2] and whether a slot has one [batch, slots].

    Raises:
        DataError: a picture with more objects than there are slots.
    """
    targets, known = torch.zeros_like(points), torch.zeros(points.shape[:2], dtype=torch.bool)
    for number, (found, true) in enumerate(zip(points.detach(), centres, strict=True)):
        true = true[true.isfinite().all(1)]
        if len(true) > len(found):
            raise DataError(
                f"picture {number} has {len(true)} objects and the model {len(found)} slots: give it as many"
            )
        slots, objects = linear_sum_assignment(torch.cdist(found, true).square().numpy())
        targets[number, slots] = true[objects]
        known[number, slots] = True
    return targets, known


def _mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class SlotAttention(nn.Module):
    """Slots that compete for pixels.

    Args:
        width: of features and slots.
        slots: how many.
        rounds: of the competition.
        kernel: side of the smoothing; 1 for none.
        points: whether slots say and hear where they are.
    """

    def __init__(
        self, width: int, slots: int, rounds: int = 3, kernel: int = 1, points: bool = False
    ) -> None:
        super().__init__()
        self.slots, self.rounds = slots, rounds
        self.mean = nn.Parameter(torch.randn(width) * width**-0.5)
        self.spread = nn.Parameter(torch.full((width,), -1.0))
        self.query, self.key, self.value = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.before, self.normed, self.after = (nn.LayerNorm(width) for _ in range(3))
        self.memory = nn.GRUCell(width, width)
        self.residual = _mlp(width, 2 * width, width)
        self.smoothing = Smoothing(kernel) if kernel > 1 else None
        self.say = nn.Sequential(nn.LayerNorm(width), _mlp(width, 32, 16, 2)) if points else None
        self.hear = _mlp(2, 16, 32, width) if points else None

    def forward(
        self,
        features: Float[Tensor, "batch width h w"],
        noise: Float[Tensor, "batch slots width"],
        centres: Float[Tensor, "batch objects 2"] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Slots [batch, slots, width], the share of each slot in each pixel [batch, slots, h, w], and the
        squared error of points at the slots that have a known centre, summed over rounds.

        Args:
            features: of pixels.
            noise: from which slots start, standard normal.
            centres: of the objects of some pictures, NaN where unknown.
        """
        batch, width, h, w = features.shape
        pixels = self.before(features.flatten(2).mT)
        keys, values = self.key(pixels), self.value(pixels)
        slots = self.mean + self.spread.exp() * noise
        error, pair = slots.new_zeros(()), None
        share = slots.new_zeros(batch, self.slots, h, w)
        for _ in range(self.rounds):
            logits = (self.query(self.normed(slots)) @ keys.mT / width**0.5).reshape(batch, -1, h, w)
            if self.smoothing is not None:
                logits = self.smoothing(logits)
            share = logits.softmax(1)
            weight = share.flatten(2) + 1e-8
            update = (weight / weight.sum(2, keepdim=True)) @ values
            slots = self.memory(update.flatten(0, 1), slots.flatten(0, 1)).reshape(slots.shape)
            if self.say is not None and self.hear is not None:
                point = self.say(slots).sigmoid() - 0.5
                if centres is not None:
                    pair = matched(point, centres) if pair is None else pair
                    targets, known = pair
                    error = error + ((point - targets).square().sum(2) * known).sum() / batch
                    point = torch.where(known[..., None], targets, point)
                slots = slots + self.hear(point)
            slots = slots + self.residual(self.after(slots))
        return slots, share, error


class SlotModel(nn.Module):
    """Pictures to slots and back: convolutions, slot attention, a broadcast decoder.

    Args:
        size: of pictures, which are square.
        width: of everything.
        slots, rounds, kernel, points: see `SlotAttention`.

    Attributes:
        full_precision: that it computes in float32, also on weights stored in float16.
    """

    full_precision: ClassVar[bool] = True
    grid: Tensor

    def __init__(
        self,
        size: int,
        width: int = 24,
        slots: int = 4,
        rounds: int = 3,
        kernel: int = 1,
        points: bool = False,
    ) -> None:
        super().__init__()
        self.width, self.slots = width, slots
        axis = torch.linspace(0, 1, size)
        y, x = torch.meshgrid(axis, axis, indexing="ij")
        self.register_buffer("grid", torch.stack([y, x, 1 - y, 1 - x]), persistent=False)
        self.encoder = nn.Sequential(
            *(nn.Conv2d(3, width, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(width, width, 3, padding=1), nn.ReLU()),
        )
        self.place, self.broadcast = nn.Conv2d(4, width, 1), nn.Conv2d(4, width, 1)
        self.mix = nn.Sequential(
            *(nn.GroupNorm(1, width), nn.Conv2d(width, width, 1), nn.ReLU(), nn.Conv2d(width, width, 1))
        )
        self.attention = SlotAttention(width, slots, rounds, kernel, points)
        self.decoder = nn.Sequential(
            *(nn.Conv2d(width, 2 * width, 1), nn.ReLU()),
            *(nn.Conv2d(2 * width, 2 * width, 1), nn.ReLU(), nn.Conv2d(2 * width, 4, 1)),
        )

    def forward(
        self, images: Float[Tensor, "batch 3 h w"], noise: Tensor, centres: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstructions [batch, 3, h, w], alpha of each slot [batch, slots, h, w], error of points.

        Raises:
            ConfigError: pictures of another size.
        """
        if images.shape[2:] != self.grid.shape[1:]:
            sizes = tuple(self.grid.shape[1:]), tuple(images.shape[2:])
            raise ConfigError(f"this model takes pictures of {sizes[0]} pixels; received {sizes[1]}")
        features = self.mix(self.encoder(images) + self.place(self.grid))
        slots, _, error = self.attention(features, noise, centres)
        spread = slots.flatten(0, 1)[..., None, None] + self.broadcast(self.grid)
        drawn = self.decoder(spread).unflatten(0, slots.shape[:2])
        alpha = drawn[:, :, 3].softmax(1)
        return (drawn[:, :, :3] * alpha[:, :, None]).sum(1), alpha, error

    def noise(self, batch: int, generator: torch.Generator) -> Float[Tensor, "batch slots width"]:
        """What slots start from."""
        return torch.randn(batch, self.slots, self.width, generator=generator)
