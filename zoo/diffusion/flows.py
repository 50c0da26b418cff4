"""Flow-matching models as modules: a velocity network and an Euler schedule, in the convention of diffusers.

`sigma` falls from 1 (noise) to 0 (data), x = (1 - sigma) data + sigma noise, the network is given 1000 sigma
and predicts noise - data. (SlimFlow counts time from noise to data: its velocity has the other sign.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler
from jaxtyping import Float
from torch import Tensor, nn

from zoo.diffusion.data import Pictures
from zoo.diffusion.plan import Plan
from zoo.diffusion.pruned import PrunedUNet2DModel, plan_of, prune
from zoo.diffusion.sampling import sample

TIMES = 1000


class Flow(nn.Module):
    """A model that moves noise to images along a velocity field.

    Args:
        side: height and width of the images.
        channels: of the images.
        steps: of the sampler, for which the model is made.

    Attributes:
        full_precision: that it computes in float32, also on weights stored in float16.
    """

    full_precision: ClassVar[bool] = True

    def __init__(self, side: int, channels: int, steps: int) -> None:
        super().__init__()
        self.sample_shape, self.steps = (channels, side, side), steps
        self.scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=TIMES)

    def denoise(self, x: Tensor, times: Tensor, condition: object = None) -> Tensor:
        """The velocity at images [n, C, H, W] and times [n] of 0 to 1000."""
        out: Tensor = self(x, times)
        return out

    def images(self, noise: Float[Tensor, "n C H W"], steps: int | None = None) -> Float[Tensor, "n C H W"]:
        """Images by Euler's method, in the model's own number of steps unless told otherwise."""
        return sample(self, noise, None, steps=steps or self.steps)


class MLPFlow(Flow):
    """A flow whose velocity is a residual perceptron's, plus a learned multiple of its input.

    Without that multiple, which is a function of time, a narrow network cannot carry the noise through.

    Args:
        side, channels, steps: see `Flow`.
        width: of the residual stream.
        blocks: of two layers each, with twice the width between them.
    """

    def __init__(
        self, side: int = 8, channels: int = 1, steps: int = 50, width: int = 160, blocks: int = 4
    ) -> None:
        super().__init__(side, channels, steps)
        self._arguments = {
            "side": side,
            "channels": channels,
            "steps": steps,
            "width": width,
            "blocks": blocks,
        }
        size = channels * side * side
        self.time = nn.Sequential(nn.Linear(32, width), nn.SiLU(), nn.Linear(width, width))
        self.first = nn.Linear(size, width)
        self.up = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(blocks))
        self.down = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(blocks))
        self.last, self.skip = nn.Linear(width, size), nn.Linear(width, 1)

    def current_arguments(self) -> dict[str, Any]:
        """The arguments that build this network, for the card."""
        return dict(self._arguments)

    def forward(self, x: Float[Tensor, "n C H W"], times: Tensor) -> Float[Tensor, "n C H W"]:
        """The velocity."""
        half = torch.exp(-math.log(1000.0) * torch.arange(16, device=x.device) / 15).to(x.dtype)
        angle = times.to(x.dtype)[:, None] / 10 * half
        when = self.time(torch.cat([angle.sin(), angle.cos()], dim=1))
        hidden = self.first(x.flatten(1))
        for up, down in zip(self.up, self.down, strict=True):
            hidden = hidden + down(F.silu(up(hidden + when)))
        out = self.last(hidden) + self.skip(when) * x.flatten(1)
        return out.view_as(x)


class UNetFlow(Flow):
    """A flow whose velocity is a UNet's of diffusers, whole or cut by a plan.

    Args:
        side, channels, steps: see `Flow`.
        widths: channels of the levels; all have attention.
        pruning_plan: what was cut, see `zoo.diffusion.plan.Plan`.
    """

    def __init__(
        self,
        side: int = 8,
        channels: int = 1,
        steps: int = 50,
        widths: Sequence[int] = (16, 32),
        pruning_plan: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(side, channels, steps)
        self._arguments = {"side": side, "channels": channels, "steps": steps, "widths": list(widths)}
        self.unet = PrunedUNet2DModel(
            sample_size=side,
            in_channels=channels,
            out_channels=channels,
            layers_per_block=1,
            block_out_channels=tuple(widths),
            down_block_types=("AttnDownBlock2D",) * len(widths),
            up_block_types=("AttnUpBlock2D",) * len(widths),
            norm_num_groups=8,
            attention_head_dim=8,
            pruning_plan=dict(pruning_plan) if pruning_plan is not None else None,
        )

    def current_arguments(self) -> dict[str, Any]:
        """The arguments that build this network as it is now, for the card."""
        plan = plan_of(self.unet)
        return {**self._arguments, **({"pruning_plan": plan.to_dict()} if plan is not None else {})}

    def cut(self, plan: Plan) -> None:
        """Cut the UNet in place, see `zoo.diffusion.pruned.prune`."""
        prune(self.unet, plan)

    def forward(self, x: Float[Tensor, "n C H W"], times: Tensor) -> Float[Tensor, "n C H W"]:
        """The velocity."""
        out: Tensor = self.unet(x, times).sample
        return out


@dataclass(frozen=True)
class Noised:
    """Training batches of a flow, (images, noise, sigmas), from pictures and independent noise.

    Args:
        pictures: the data.
        batch: images per step.
        steps: per epoch.
    """

    pictures: Pictures
    batch: int = 128
    steps: int = 50

    def __len__(self) -> int:
        return self.steps

    def sized(self, batch: int) -> Noised:
        """The same data in batches of another size."""
        return Noised(self.pictures, batch, self.steps)

    def draw(self, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The batches of one epoch."""
        images = self.pictures.train
        for _ in range(self.steps):
            chosen = images[torch.randint(len(images), (self.batch,), generator=generator)]
            noise = torch.randn(chosen.shape, generator=generator)
            yield chosen, noise, torch.rand(self.batch, generator=generator)

    def example(self) -> tuple[Tensor, Tensor]:
        """One image with its time, as the model takes it."""
        return self.pictures.train[:1], torch.tensor([0.0])


def between(images: Tensor, noise: Tensor, sigmas: Tensor) -> Tensor:
    """(1 - sigma) images + sigma noise, with a sigma for each image."""
    share = sigmas.view(-1, *[1] * (images.dim() - 1))
    return (1 - share) * images + share * noise


def velocity_loss(model: nn.Module, batch: Sequence[Tensor]) -> Float[Tensor, ""]:
    """Mean squared error of the velocity noise - images on a batch (images, noise, sigmas)."""
    images, noise, sigmas = batch
    return F.mse_loss(model(between(images, noise, sigmas), TIMES * sigmas), noise - images)
