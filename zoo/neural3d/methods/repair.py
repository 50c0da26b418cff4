"""GaussianObject's repair of renderings, stages 3 to 5, by a small diffusion model trained on the spot.

Yang et al., "GaussianObject: High-Quality 3D Object Reconstruction from Four Views with Gaussian
Splatting", SIGGRAPH Asia 2024. The scene is fitted again without each view in turn, and shows that view
spoiled as views from elsewhere are; with the scene's own Gaussians shaken (3D noise) this makes pairs of
spoiled and true pictures. A diffusion model learns the true one from the spoiled one. Then the scene trains
on: every so often it is drawn from between its views, repaired, and pulled towards the repaired pictures.

Differs from the paper in: the model is a small network trained on these pairs alone, not Stable Diffusion
with a ControlNet, and says the clean picture; 3D noise is of one deviation; no perceptual loss.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from zoo.errors import ConfigError
from zoo.neural3d.cameras import Camera, look_at
from zoo.neural3d.networks import fresh
from zoo.neural3d.priors import MOBILITY
from zoo.neural3d.refine import picture_loss, refine, scene_job
from zoo.neural3d.scene import GaussianScene
from zoo.neural3d.views import View, middle_of_views
from zoo.shared.train import Drawn, Job, Recipe

TIMES = 50
RECIPE = Recipe(lr=2e-3, epochs=1, optimizer="adam", weight_decay=0.0, warmup=0.05, decay="cosine", clip=1.0)
SHAKEN = 0.3  # deviation of 3D noise: of a mean in its own scale, of logarithms and logits
Pairs = tuple[Tensor, Tensor]  # spoiled and true pictures [n, 3, h, w]


def kept(time: Tensor) -> Tensor:
    """Share of the picture's variance after times [n] from 0 (all) to 1 (none)."""
    return ((time * 0.99 + 0.008) / 1.008 * math.pi / 2).cos().square()


class RepairNet(nn.Module):
    """The clean picture from a noisy one and a spoiled one: a U-Net of three levels, which says what to add
    to the spoiled one.

    Args:
        width: channels of the finest level.
    """

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        one, two = width, 2 * width
        self.time = nn.Linear(1, two)
        self.into = nn.Conv2d(6, one, 3, padding=1)
        self.down = nn.Conv2d(one, two, 3, stride=2, padding=1)
        self.lower = nn.Conv2d(two, two, 3, stride=2, padding=1)
        self.lowest = nn.Conv2d(two, two, 3, padding=1)
        self.mid = nn.Conv2d(2 * two, two, 3, padding=1)
        self.up = nn.Conv2d(two + one, one, 3, padding=1)
        self.out = nn.Conv2d(one, 3, 3, padding=1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)  # type: ignore[arg-type]

    def forward(
        self, noisy: Float[Tensor, "n 3 h w"], spoiled: Float[Tensor, "n 3 h w"], time: Float[Tensor, " n"]
    ) -> Float[Tensor, "n 3 h w"]:
        """Clean pictures; colours from 0 to 1, times from 0 (clean) to 1 (noise)."""
        first = functional.silu(self.into(torch.cat([noisy, spoiled], 1)))
        second = functional.silu(self.down(first))
        third = functional.silu(self.lower(second) + self.time(time[:, None])[..., None, None])
        third = third + functional.silu(self.lowest(third))
        wide = functional.interpolate(third, second.shape[2:])
        second = functional.silu(self.mid(torch.cat([wide, second], 1)))
        wide = functional.interpolate(second, first.shape[2:])
        found: Tensor = self.out(functional.silu(self.up(torch.cat([wide, first], 1))))
        return spoiled + found

    @torch.no_grad()
    def repair(
        self, spoiled: Float[Tensor, "n 3 h w"], strength: float, generator: torch.Generator, steps: int = 8
    ) -> Float[Tensor, "n 3 h w"]:
        """Repaired pictures, by DDIM from the spoiled ones with noise up to time `strength`."""
        times = torch.linspace(strength, 0, steps + 1)
        share = kept(times)
        value = share[0].sqrt() * spoiled + (1 - share[0]).sqrt() * torch.randn(
            spoiled.shape, generator=generator
        )
        for number in range(steps):
            clean = self(value, spoiled, times[number].expand(len(value))).clamp(0, 1)
            noise = (value - share[number].sqrt() * clean) / (1 - share[number]).sqrt()
            value = share[number + 1].sqrt() * clean + (1 - share[number + 1]).sqrt() * noise
        return clean


def shaken(scene: GaussianScene, generator: torch.Generator) -> GaussianScene:
    """The scene with noise on places, scales, rotations and opacities; colours stay."""
    other = copy.deepcopy(scene)

    def noise(like: Tensor) -> Tensor:
        drawn = torch.randn(like.shape, generator=generator)
        return SHAKEN * drawn * (torch.rand(like.shape, generator=generator) < 0.3)

    with torch.no_grad():
        other.means.add_(noise(other.means) * other.scales.exp())
        for values in (other.scales, other.quats, other.opacities):
            values.add_(noise(values))
    return other


def between(views: Sequence[View], number: int, share: float) -> Camera:
    """A camera on the way round the object from one view to the next one, in the order of their angles: its
    angle, height and distance from the upward axis are between theirs, and it looks where the views look."""
    centre, _ = middle_of_views(views)
    up = -functional.normalize(torch.stack([view.camera.viewmat[1, :3] for view in views]).mean(0), dim=0)
    away = torch.stack([view.camera.centre for view in views]) - centre
    flat = away - (away @ up)[:, None] * up
    ahead = functional.normalize(flat[0], dim=0)
    angles = torch.atan2(flat @ torch.linalg.cross(up, ahead), flat @ ahead)
    order = angles.argsort()
    one, other = int(order[number]), int(order[(number + 1) % len(views)])
    turn = (angles[other] - angles[one]) % (2 * math.pi)
    angle = angles[one] + share * turn
    radius = torch.lerp(flat[one].norm(), flat[other].norm(), share)
    height = torch.lerp(away[one] @ up, away[other] @ up, share)
    side = angle.cos() * ahead + angle.sin() * torch.linalg.cross(up, ahead)
    x, y, z = up.tolist()
    lens = views[one].camera
    eye = centre + radius * side + height * up
    return look_at(eye, centre, lens.intrinsics, lens.width, lens.height, (x, y, z))


def planes(image: Float[Tensor, "h w 3"]) -> Float[Tensor, "3 h w"]:
    """A picture, colour by colour."""
    return image.permute(2, 0, 1)


@dataclass(frozen=True)
class Repair:
    """How the diffusion model is trained and the scene after it.

    Attributes:
        without: steps of each fit without one view.
        learned: steps of the diffusion model; 0 for none: the scene's own pictures are its aims.
        steps: of the scene's further training.
        every: steps between new repaired pictures.
        weight: of the repaired pictures at the beginning; falls to zero at 0.7 of the steps, as the paper's.
        strength: how much noise a picture gets before it is repaired.
        drawn: whether pictures from between the views count at all; the control goes without.
    """

    without: int = 80
    learned: int = 400
    steps: int = 80
    every: int = 20
    weight: float = 0.5
    strength: float = 0.5
    drawn: bool = True

    def __post_init__(self) -> None:
        if min(self.without, self.steps, self.every) < 1 or self.learned < 0 or not 0 < self.strength <= 1:
            raise ConfigError(f"repair needs steps of 1 or more and a strength in (0, 1]; received {self}")

    def pairs(self, scene: GaussianScene, start: GaussianScene, views: Sequence[View], seed: int) -> Pairs:
        """Spoiled and true pictures of each view: without it, and with shaken Gaussians.

        Raises:
            ConfigError: fewer than three views.
        """
        if len(views) < 3:
            raise ConfigError(f"leaving one out needs 3 views; received {len(views)}")
        generator = torch.Generator().manual_seed(seed)
        spoiled, true = [], []
        for left in views:
            rest = [view for view in views if view is not left]
            other = copy.deepcopy(start)
            refine(other, scene_job(rest, seed=seed, steps=self.without), mobility=MOBILITY)
            with torch.no_grad():
                for one in (other, shaken(other, generator), *(shaken(scene, generator) for _ in range(2))):
                    spoiled.append(planes(one(left.camera)).clamp(0, 1))
                    true.append(planes(left.image))
        return torch.stack(spoiled), torch.stack(true)

    def learn(self, pairs: Pairs, seed: int) -> RepairNet:
        """A model of the pairs, from crops and mirrored crops."""
        model = fresh(RepairNet, seed)
        spoiled, true = pairs
        height, width = spoiled.shape[2:]
        side = min(32, height // 4 * 4, width // 4 * 4)

        def make(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            rows = torch.randint(len(spoiled), (count,), generator=generator).tolist()
            downs = torch.randint(height - side + 1, (count,), generator=generator).tolist()
            rights = torch.randint(width - side + 1, (count,), generator=generator).tolist()
            turned = (torch.rand(count, generator=generator) < 0.5).tolist()
            found = []
            for row, down, right, turn in zip(rows, downs, rights, turned, strict=True):
                part = torch.stack([spoiled[row], true[row]])[..., down : down + side, right : right + side]
                found.append(part.flip(3) if turn else part)
            both = torch.stack(found)
            time = torch.rand(count, generator=generator)
            return both[:, 0], both[:, 1], time, torch.randn(both[:, 1].shape, generator=generator)

        def loss(net: nn.Module, batch: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
            bad, good, time, noise = batch
            share = kept(time)[:, None, None, None]
            found = net(share.sqrt() * good + (1 - share).sqrt() * noise, bad, time)
            return functional.mse_loss(found, good)

        Job(Drawn(make, 8, self.learned), loss=loss, recipe=RECIPE, seed=seed).fit(
            model, macs=lambda: 0.0
        ).run()
        return model.eval()

    def fit(
        self, scene: GaussianScene, start: GaussianScene, views: Sequence[View], seed: int = 0
    ) -> GaussianScene:
        """The scene trained on, with repaired pictures from between its views; the one given stays.

        Args:
            scene: fitted to the views.
            start: what it was fitted from.
        """
        fitted = copy.deepcopy(scene).train()
        generator = torch.Generator().manual_seed(seed)
        model = (
            self.learn(self.pairs(scene, start, views, seed), seed) if self.drawn and self.learned else None
        )
        aims: list[View] = []

        def renew() -> None:
            aims.clear()
            for number in range(len(views)):
                share = 0.5 + 0.6 * (float(torch.rand((), generator=generator)) - 0.5)
                camera = between(views, number, share)
                with torch.no_grad():
                    seen = planes(fitted(camera)).clamp(0, 1)[None]
                if model is not None:
                    seen = model.repair(seen, self.strength, generator)
                aims.append(View(camera, seen[0].permute(1, 2, 0)))

        now = 0

        def loss(net: nn.Module, view: View) -> Tensor:
            nonlocal now
            share, total = now / (0.7 * self.steps), picture_loss(net(view.camera), view)
            if self.drawn and share < 1:
                if now % self.every == 0:
                    renew()
                aim = aims[int(torch.randint(len(aims), (), generator=generator))]
                total = total + (1 - share) * self.weight * picture_loss(net(aim.camera), aim)
            now += 1
            return total

        refine(fitted, scene_job(views, seed=seed, steps=self.steps).replace(loss=loss))
        return fitted.eval()
