"""GVGEN's generation: a prompt becomes a Gaussian distance field, the field a volume of Gaussians.

He et al., "GVGEN: Text-to-3D Generation with Volumetric Representation", ECCV 2024. Stage one is a diffusion
of the field of distances to the nearest Gaussian, whose 3D U-Net says the clean field (x0) at each of 1,000
times of a linear schedule, sampled by DDIM; stage two is a U-Net that turns field and prompt into the 14
attributes of all nodes at once, trained on normalised attributes and on 0.2 L1 + 0.8 (1 - SSIM) of one view.

Differs from the released code: 8^3 nodes for 32^3 and two narrow levels; toy volumes that are constructed
(`zoo.neural3d.solids`); words go into every block as scales and shifts (FiLM), not by cross-attention to
CLIP's tokens, since three words in any order leave nothing to attend to; convolutions are told where they
are; a rotation is a quaternion; a step draws one view of one volume, weighed by a tenth. The clamp of 0.15 is
4.65 spacings there, and so here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from zoo.errors import ConfigError, DataError
from zoo.neural3d.cameras import orbit
from zoo.neural3d.methods.gvgen import LIMITS, GaussianVolume
from zoo.neural3d.metrics import ssim_map_mean
from zoo.neural3d.networks import fresh
from zoo.neural3d.scene import GaussianScene
from zoo.neural3d.solids import CHANNELS, TOTAL, WORDS, pool, told
from zoo.shared.train import Drawn, Job, Recipe

WHITE = (1.0, 1.0, 1.0)
FAR = 0.15 * 31  # spacings beyond which the field is flat
FAINT = 0.005  # opacity below which a Gaussian is none
TIMES, STEPS = 1000, 25
TOLD = 48  # numbers that prompt and time become
POOL, EPOCH = 20, 50  # volumes of a prompt; steps of an epoch
PICTURE = 0.1  # weight of the view: at 1 the noise of one view of one volume a step drowns the attributes
CAMERAS = orbit(torch.zeros(3), 2.5, 5, (32, 32), field_of_view=0.45, elevations=(0.1, 0.5))
RECIPE = Recipe(
    lr=1e-2,
    steps=500,
    batch=16,
    optimizer="adam",
    weight_decay=0.0,
    warmup=0.05,
    decay="cosine",
    clip=1.0,
    ema=0.98,
)


def gaussian_distance_field(
    offsets: Float[Tensor, "n 3"], opacities: Float[Tensor, " n"], grid: Float[Tensor, "n 3"]
) -> Float[Tensor, " n"]:
    """The distance from each node to the nearest Gaussian that is seen, from -1 (there) to 1 (4.65 spacings
    or more).

    Args:
        offsets: of the Gaussians from their nodes.
        opacities: logits.
        grid: nodes, as many along each axis.

    Raises:
        ConfigError: a grid that is no cube.
        DataError: a value that is not finite, or no Gaussian that is seen.
    """
    sides = [len(grid[:, axis].unique()) for axis in range(3)]
    if len(set(sides)) > 1 or sides[0] ** 3 != len(grid) or sides[0] < 2:
        raise ConfigError(f"a volume has as many nodes along each axis, two or more; received {sides}")
    wrong = ~torch.cat([offsets, opacities[:, None]], 1).isfinite().all(1)
    if bool(wrong.any()):
        raise DataError(f"Gaussian {int(wrong.nonzero()[0, 0])} has an offset or opacity that is not finite")
    seen = opacities.sigmoid() >= FAINT
    if not bool(seen.any()):
        raise DataError(f"no Gaussian has an opacity of {FAINT} or more: there is nothing to be far from")
    far = FAR * float(grid[:, 0].max() - grid[:, 0].min()) / (sides[0] - 1)
    distance = torch.cdist(grid, (grid + offsets)[seen]).amin(1)
    return 2 * distance.clamp(0, far) / far - 1


@functools.cache
def scheduler() -> Any:
    """The published schedule, by diffusers: 1,000 times, beta from 1e-4 to 0.02, the clean sample predicted.

    Raises:
        ConfigError: diffusers is not installed.
    """
    try:
        from diffusers import DDIMScheduler
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{error.name} is not installed. Run: pip install 'sparse-model-zoo[diffusion]'"
        ) from error
    return DDIMScheduler(TIMES, 1e-4, 0.02, "linear", prediction_type="sample", clip_sample=True)


class Block(nn.Module):
    """Two convolutions, scaled and shifted by what is told, beside a shortcut."""

    def __init__(self, given: int, wanted: int) -> None:
        super().__init__()
        self.before, self.after = nn.GroupNorm(4, given), nn.GroupNorm(4, wanted, affine=False)
        self.first = nn.Conv3d(given, wanted, 3, padding=1)
        self.second = nn.Conv3d(wanted, wanted, 3, padding=1)
        self.film = nn.Linear(TOLD, 2 * wanted)
        self.short = nn.Conv3d(given, wanted, 1) if given != wanted else nn.Identity()

    def forward(self, x: Float[Tensor, "b c s s s"], about: Float[Tensor, "b t"]) -> Tensor:
        scale, shift = self.film(about)[..., None, None, None].chunk(2, 1)
        value = self.after(self.first(functional.silu(self.before(x))))
        out: Tensor = self.short(x) + self.second(functional.silu(value * (1 + scale) + shift))
        return out


class VolumeNet(nn.Module):
    """A 3D U-Net of two levels over a grid, told a time and words.

    Args:
        given, wanted: channels in and out.
        width: channels of the fine level; the coarse one has twice as many.
    """

    def __init__(self, given: int, wanted: int, width: int) -> None:
        super().__init__()
        self.time, self.words = nn.Linear(16, TOLD), nn.Linear(len(WORDS), TOLD)
        self.into = nn.Conv3d(given + 3, width, 3, padding=1)
        self.down, self.low = Block(width, width), Block(width, 2 * width)
        self.up, self.out = Block(3 * width, width), nn.Conv3d(width, wanted, 1)

    def forward(
        self, x: Float[Tensor, "b c s s s"], time: Float[Tensor, " b"], words: Float[Tensor, "b 9"]
    ) -> Float[Tensor, "b d s s s"]:
        """The clean volume; times from 0 to 1."""
        rates = 2.0 ** torch.arange(8, device=x.device)
        when = torch.cat([(time[:, None] * rates).sin(), (time[:, None] * rates).cos()], 1)
        about = functional.silu(self.time(when) + self.words(words))
        line = torch.linspace(-1, 1, x.shape[2], device=x.device)
        places = torch.stack(torch.meshgrid(line, line, line, indexing="ij")).expand(len(x), -1, -1, -1, -1)
        fine = self.down(self.into(torch.cat([x, places], 1)), about)
        coarse = self.low(functional.avg_pool3d(fine, 2), about)
        wide = torch.cat([fine, functional.interpolate(coarse, scale_factor=2.0)], 1)
        out: Tensor = self.out(self.up(wide, about))
        return out


@torch.no_grad()
def diffused(
    net: VolumeNet, words: Float[Tensor, "b 9"], shape: Sequence[int], generator: torch.Generator
) -> Tensor:
    """Samples of a shape [c, s, s, s] from noise, by DDIM."""
    value = torch.randn(len(words), *shape, generator=generator)
    steps = scheduler()
    steps.set_timesteps(STEPS)
    for time in steps.timesteps:
        clean = net(value, (time / TIMES).expand(len(value)), words)
        value = steps.step(clean, time, value).prev_sample
    return value


class Batch(NamedTuple):
    """Fields [b, 1, s, s, s] of volumes, a time from 0 to 1 [b] for each, words [b, 9], attributes
    [b, 14, s, s, s], noise of their shape, and the camera that looks at the first."""

    fields: Tensor
    times: Tensor
    words: Tensor
    values: Tensor
    noise: Tensor
    camera: int


def attributes(values: Float[Tensor, "14 s s s"]) -> dict[str, Tensor]:
    """The parameters of a `GaussianVolume` that normalised attributes stand for, in their ranges."""
    found, parts = {}, values.clamp(-1, 1).flatten(1).T.split(list(CHANNELS.values()), 1)
    for name, part in zip(CHANNELS, parts, strict=True):
        low, high = LIMITS[name]
        found[name] = low + (part + 1) / 2 * (high - low)
    return {**found, "sh0": found["sh0"][:, None], "opacities": found["opacities"][:, 0]}


def scene_of(values: Float[Tensor, "14 s s s"]) -> GaussianScene:
    """The scene that normalised attributes stand for."""
    volume = GaussianVolume(values.shape[1], WHITE)
    volume.load_state_dict(attributes(values), strict=False)
    return GaussianScene.from_splats(volume.splats, WHITE).eval()


def draws(side: int, batch: int, seed: int) -> Drawn:
    """Batches of constructed volumes of the known prompts; the seed decides which volumes there are."""
    values, prompts = pool(side, POOL, seed)
    values, words = values.unflatten(2, (side, side, side)), told(prompts)
    grid = GaussianVolume(side, WHITE).grid
    parts = [attributes(one) for one in values]
    fields = torch.stack([gaussian_distance_field(p["offsets"], p["opacities"], grid) for p in parts])
    fields = fields.reshape(-1, 1, side, side, side)

    def make(count: int, generator: torch.Generator) -> Batch:
        rows = torch.randint(len(values), (count,), generator=generator)
        times = torch.randint(TIMES, (count,), generator=generator)
        noise = torch.randn(count, TOTAL, side, side, side, generator=generator)
        camera = int(torch.randint(len(CAMERAS), (), generator=generator))
        return Batch(fields[rows], times / TIMES, words[rows], values[rows], noise, camera)

    return Drawn(make, batch, EPOCH, inputs=3)


def denoised(net: VolumeNet, clean: Tensor, batch: Batch) -> Tensor:
    """Mean squared distance of what the net says of noisy volumes from the clean ones."""
    steps = (batch.times * TIMES).round().long()
    noisy = scheduler().add_noise(clean, batch.noise[:, : clean.shape[1]], steps)
    return functional.mse_loss(net(noisy, batch.times, batch.words), clean)


class GVGenText(nn.Module):
    """Volumes of prompts in two stages.

    Args:
        side: nodes along an axis, an even number.
        width: of the first stage's net at its fine level; the second's is half as wide.

    Raises:
        ConfigError: an odd side, or a width that is no multiple of eight.
    """

    full_precision: ClassVar[bool] = True

    def __init__(self, side: int = 8, width: int = 16) -> None:
        super().__init__()
        if side < 4 or side % 2 or width < 8 or width % 8:
            raise ConfigError(f"give an even side from 4 and a width in eights; received {side} and {width}")
        self.side = side
        self.field, self.attributes = VolumeNet(1, 1, width), VolumeNet(1, TOTAL, width // 2)

    @classmethod
    def trained(cls, seed: int, steps: int, batch: int, lr: float, **arguments: int) -> GVGenText:
        """The network of a seed, for the maker of bundles."""
        return trained(cls, seed, steps, batch, lr, **arguments)

    def make_job(
        self, dataset: str | None, *, recipe: Recipe | None, seed: int, device: str | torch.device
    ) -> Job:
        """The job of training it further, on constructed volumes; an epoch is 50 steps.

        Raises:
            ConfigError: other data.
        """
        if dataset not in (None, "toys"):
            raise ConfigError(f"prompts are learned from the data set toys; received {dataset!r}")
        return text_job(self, recipe or RECIPE, seed).replace(device=device)

    def forward(
        self, noisy: Float[Tensor, "b 1 s s s"], time: Float[Tensor, " b"], words: Float[Tensor, "b 9"]
    ) -> tuple[Tensor, Tensor]:
        """The clean field, and the attributes [b, 14, s, s, s] of its nodes."""
        field = self.field(noisy, time, words)
        return field, self.attributes(field, torch.zeros_like(time), words)

    def loss(self, batch: Batch) -> Tensor:
        """Of both stages: the second sees true fields."""
        found = self.attributes(batch.fields, torch.zeros(len(batch.words)), batch.words)
        volume, camera = GaussianVolume(self.side, WHITE), CAMERAS[batch.camera]
        seen, wanted = (
            torch.func.functional_call(volume, attributes(one), (camera,))
            for one in (found[0], batch.values[0])
        )
        picture = 0.2 * (seen - wanted).abs().mean() + 0.8 * (1 - ssim_map_mean(seen, wanted))
        exact = denoised(self.field, batch.fields, batch) + functional.mse_loss(found, batch.values)
        return exact + PICTURE * picture

    @torch.no_grad()
    def volumes(self, prompts: Sequence[str], generator: torch.Generator) -> Float[Tensor, "b 14 s s s"]:
        """A random volume of each prompt, as normalised attributes.

        Raises:
            ConfigError: as for `zoo.neural3d.solids.told`.
        """
        words = told(prompts)
        field = diffused(self.field, words, (1, self.side, self.side, self.side), generator)
        found: Tensor = self.attributes(field, torch.zeros(len(words)), words)
        return found

    def generate(self, prompt: str, generator: torch.Generator) -> GaussianScene:
        """A random scene of a prompt, of side^3 Gaussians.

        Raises:
            ConfigError: a word that is not known, or not one size, colour and shape.
        """
        return scene_of(self.volumes([prompt], generator)[0])


N = TypeVar("N", bound=nn.Module)


def text_job(model: Any, recipe: Recipe, seed: int) -> Job:
    """What a network with a `loss` of batches is trained on: constructed volumes of the known prompts."""

    def loss(net: Any, batch: Batch) -> Tensor:
        found: Tensor = net.loss(batch)
        return found

    return Job(draws(model.side, recipe.batch, seed), loss=loss, recipe=recipe, seed=seed)


def trained(kind: Callable[..., N], seed: int, steps: int, batch: int, lr: float, **arguments: int) -> N:
    """A network of a seed after so many steps."""
    model = fresh(kind, seed, **arguments)
    recipe = replace(RECIPE, steps=steps, batch=batch, lr=lr)
    text_job(model, recipe, seed).fit(model, macs=lambda: 0.0).run()
    return model.eval()
