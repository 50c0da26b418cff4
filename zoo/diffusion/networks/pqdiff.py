"""PQDiff: outpainting by any multiple in one sampling run, by queries of real-valued positions.

Zhang et al., Continuous-Multiple Image Outpainting in One-Step via Positional Query and A Diffusion-based
Approach, ICLR 2024 (arXiv 2401.15652). Anchor and target are two random crops of one image at one resolution.
The network reads the noisy target beside the clean anchor; between encoder and decoder one cross-attention,
without a residual, has the target's positions *relative to the anchor* as queries. Those are real numbers in
units of an anchor token, so one network serves any extension.

Differs from the paper in: pixels for latents, a few blocks of diffusers for U-ViT, the clean image is
predicted (not the noise), and the schedule is the cosine one, sampled by DDIM.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from jaxtyping import Float
from torch import Tensor, nn

from zoo.diffusion.classifier import load_judge
from zoo.diffusion.data import load_pictures
from zoo.diffusion.networks.base import STEPS, USUAL, NetworkTask, PaperNetwork, sine_cosine, transformer
from zoo.diffusion.sampling import sample
from zoo.errors import ConfigError
from zoo.harness.tasks import Progress, TaskResult, register_task
from zoo.shared.train import Drawn, Job, Recipe

ANCHOR, TARGET = (0.2, 0.5), (0.8, 1.0)  # shares of the image's area
RATIO = 4 / 3  # of a crop's sides, at most


def relative_positions(
    anchor: Float[Tensor, "n 4"], target: Float[Tensor, "n 4"], grid: int
) -> Float[Tensor, "n tokens 2"]:
    """Places (y, x) of the target's tokens, row by row, in units of an anchor token from the anchor's first.

    Token (i, j) lies at y = (top_t - top_a) / (h_a / G) + i h_t / h_a, and x alike.

    Args:
        anchor, target: boxes (top, left, height, width) in any common unit.
        grid: G, tokens per side.
    """
    start = (target[:, :2] - anchor[:, :2]) / (anchor[:, 2:] / grid)
    step = target[:, 2:] / anchor[:, 2:]
    places = start[:, None] + step[:, None] * torch.arange(grid).to(anchor)[None, :, None]
    y, x = places[..., 0], places[..., 1]
    pairs = torch.stack([y[:, :, None].expand(-1, -1, grid), x[:, None, :].expand(-1, grid, -1)], -1)
    return pairs.flatten(1, 2)


class PQDiff(PaperNetwork):
    """The outpainting network.

    Args:
        side: of anchor and target, in pixels.
        grid: G, tokens per side of each.
        width, depth: of the blocks before and after the query.
    """

    usual = dataclasses.replace(USUAL, steps=700, batch=32, ema=0.99)

    def __init__(self, side: int = 16, grid: int = 4, width: int = 64, depth: int = 2) -> None:
        super().__init__()
        if side % grid or width % 4:
            raise ConfigError(
                f"side must be a multiple of grid and width of 4; received {side}, {grid} and {width}"
            )
        self.side, self.grid, self.width = side, grid, width
        patch = side // grid
        self.into = nn.Conv2d(2, width, patch, patch)
        # A token's own place begins in the code of the queries, so that they find it from the start.
        unit = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
        own = sine_cosine(relative_positions(unit, unit, grid)[0], width)
        self.places = nn.Parameter(torch.cat([torch.zeros(1, width), own]))
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.before = transformer(width, depth)
        self.query = nn.Parameter(torch.zeros(width))
        self.query_norm = nn.LayerNorm(width)
        self.to_query, self.to_key = nn.Linear(width, width), nn.Linear(width, width)
        self.to_value = nn.Linear(width, width)
        self.to_key.load_state_dict(self.to_query.state_dict())
        self.middle = transformer(width, 1)
        self.skips = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(depth))
        self.after = transformer(width, depth)
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, patch**2)
        self.last = nn.Conv2d(1, 1, 3, padding=1)
        self.scheduler = DDIMScheduler(
            beta_schedule="squaredcos_cap_v2", prediction_type="sample", clip_sample=False
        )

    def denoise(self, x: Tensor, times: Tensor, condition: tuple[Tensor, Tensor]) -> Tensor:
        """The clean target in a noisy one; the condition is (anchor, relative positions)."""
        out: Tensor = self(x, times, *condition)
        return out

    def forward(
        self,
        x: Float[Tensor, "n 1 S S"],
        times: Tensor,
        anchor: Float[Tensor, "n 1 S S"],
        places: Float[Tensor, "n tokens 2"],
    ) -> Float[Tensor, "n 1 S S"]:
        """The clean target.

        Args:
            x: the noisy target.
            times: steps of the noise schedule, one per image.
            anchor: the clean anchor.
            places: see `relative_positions`.
        """
        h = self.into(torch.cat([x, anchor], 1)).flatten(2).transpose(1, 2)
        when = times.to(h).expand(len(x))
        angles = torch.stack([when, when], -1) / 10
        time = self.time(sine_cosine(angles, self.width))[:, None]
        h = torch.cat([time, h], 1) + self.places
        kept = []
        for block in self.before:
            h = block(h)
            kept.append(h)
        queries = sine_cosine(places, self.width).to(h) + self.query
        queries = torch.cat([time, queries], 1)
        seen = self.query_norm(h)
        heads = [
            part.unflatten(-1, (4, -1)).transpose(1, 2)
            for part in (self.to_query(queries), self.to_key(seen), self.to_value(seen))
        ]
        h = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)  # no residual: the paper's form
        for block in self.middle:
            h = block(h)
        for block, skip in zip(self.after, self.skips, strict=True):
            h = block(skip(torch.cat([h, kept.pop()], -1)))
        patches = self.out(self.norm(h[:, 1:])).transpose(1, 2)
        patch = self.side // self.grid
        out: Tensor = self.last(F.fold(patches, self.side, patch, stride=patch))
        return out

    @torch.no_grad()
    def outpaint(
        self,
        anchor: Tensor,
        extension: Sequence[float | int],
        *,
        steps: int = 10,
        generator: torch.Generator | None = None,
        shuffled: bool = False,
    ) -> Float[Tensor, "n 1 S S"]:
        """The enlarged field of view at the network's resolution.

        Args:
            anchor: [n, 1, H, W], pixels from -1 to 1, of any size; resized to the network's.
            extension: top, bottom, left, right as multiples of the anchor's height and width.
            steps: of the sampler.
            generator: of the noise and, in the ablation, of the order.
            shuffled: give the positions in random order, as an ablation.

        Raises:
            ConfigError: an extension that is negative or not finite, or an anchor without pixels.
        """
        top, bottom, left, right = self._checked(anchor, extension)
        n = len(anchor)
        small = F.interpolate(anchor, size=(self.side, self.side), mode="bilinear", align_corners=False)
        own = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
        whole = torch.tensor([[-top, -left, 1 + top + bottom, 1 + left + right]])
        places = relative_positions(own, whole, self.grid).expand(n, -1, -1)
        if shuffled:
            places = places[:, torch.randperm(places.shape[1], generator=generator)]
        noise = torch.randn(small.shape, generator=generator).to(small)
        return sample(self, noise, (small, places.to(small)), steps=steps)

    def _checked(self, anchor: Tensor, extension: Sequence[float | int]) -> tuple[float, ...]:
        if anchor.dim() != 4 or anchor.shape[1] != 1 or not anchor.numel():
            raise ConfigError(
                f"an anchor is [n, 1, H, W] with at least one pixel; received {list(anchor.shape)}"
            )
        values = tuple(float(value) for value in extension)
        if len(values) != 4 or not all(math.isfinite(value) and value >= 0 for value in values):
            raise ConfigError(
                f"an extension is four finite multiples that are not negative (top, bottom, left, right); "
                f"received {tuple(extension)}"
            )
        return values

    def make_job(
        self, dataset: str, *, recipe: Recipe | None = None, seed: int = 0, device: str | torch.device = "cpu"
    ) -> Job:
        used = recipe or self.usual
        images, times = load_pictures(dataset).train, int(self.scheduler.config.num_train_timesteps)

        def draw(n: int, generator: torch.Generator) -> tuple[Tensor, ...]:
            chosen = images[torch.randint(len(images), (n,), generator=generator)]
            boxes = [random_boxes(n, area, generator) for area in (ANCHOR, TARGET)]
            anchor, target = (cut(chosen, box, self.side) for box in boxes)
            noise = torch.randn(target.shape, generator=generator)
            when = torch.randint(times, (n,), generator=generator)
            noisy = self.scheduler.add_noise(target, noise, when)
            return noisy, when, anchor, relative_positions(boxes[0], boxes[1], self.grid), target

        return Job(Drawn(draw, used.batch, STEPS, 4), target_loss, recipe=used, seed=seed, device=device)


def target_loss(model: nn.Module, batch: Any) -> Float[Tensor, ""]:
    """Mean squared error of the clean target."""
    *inputs, target = batch
    return F.mse_loss(model(*inputs), target)


def random_boxes(n: int, area: tuple[float, float], generator: torch.Generator) -> Float[Tensor, "n 4"]:
    """Boxes (top, left, height, width) in an image of unit size: area uniform, ratio of sides log-uniform."""
    share = torch.empty(n).uniform_(*area, generator=generator)
    ratio = torch.empty(n).uniform_(-math.log(RATIO), math.log(RATIO), generator=generator).exp()
    size = torch.stack([(share * ratio).sqrt(), (share / ratio).sqrt()], 1).clamp(max=1.0)
    corner = torch.rand(n, 2, generator=generator) * (1 - size)
    return torch.cat([corner, size], 1)


def cut(
    images: Float[Tensor, "n C H W"], boxes: Float[Tensor, "n 4"], side: int, outside: str = "border"
) -> Float[Tensor, "n C side side"]:
    """Boxes (top, left, height, width) of images of unit size, resampled bilinearly; what lies outside an
    image repeats its border, or is 0 with `zeros`."""
    centres = (torch.arange(side) + 0.5) / side
    y = boxes[:, 0, None] + boxes[:, 2, None] * centres
    x = boxes[:, 1, None] + boxes[:, 3, None] * centres
    grid = torch.stack([x[:, None].expand(-1, side, -1), y[:, :, None].expand(-1, -1, side)], -1)
    return F.grid_sample(images, 2 * grid.to(images) - 1, padding_mode=outside, align_corners=False)


class View:
    """A crop of test digits and the whole digits around it.

    Args:
        multiple: how many times larger the whole is than the crop, per side.
        side: of both, in pixels.
        count: how many digits.
        at: where the crop lies: 0.5 in the middle, 0 at the top left.
    """

    def __init__(self, multiple: float, side: int, count: int, at: float = 0.5) -> None:
        data = load_pictures("digits")
        start, size = at * (1 - 1 / multiple), 1 / multiple
        box = torch.tensor([[start, start, size, size]])
        images, self.labels = data.test[:count], data.test_labels[:count]
        whole = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
        self.whole = cut(images, whole.expand(count, -1), side)
        self.anchor = cut(images, box.expand(count, -1), side)
        before, after = at * (multiple - 1), (1 - at) * (multiple - 1)
        self.extension = (before, after, before, after)
        centres = (torch.arange(side) + 0.5) / side
        inside = (centres > start) & (centres < start + size)
        self.inside = inside[:, None] & inside[None, :]
        self._back = torch.tensor([[-before, -before, multiple, multiple]])

    def filled(self, mean: bool) -> Float[Tensor, "n 1 S S"]:
        """The crop in its place, with its mean around it, or with its border repeated."""
        boxes = self._back.expand(len(self.anchor), -1)
        repeated = cut(self.anchor, boxes, self.anchor.shape[-1])
        if not mean:
            return repeated
        return torch.where(self.inside, repeated, self.anchor.mean((1, 2, 3), keepdim=True))

    @torch.no_grad()
    def right(self, images: Float[Tensor, "n 1 S S"]) -> Float[Tensor, " n"]:
        """1 where the judge of 8x8 digits sees the class."""
        small = F.adaptive_avg_pool2d(images, 8)
        return (load_judge("digits")(small).argmax(1) == self.labels).double()

    def psnr(self, images: Float[Tensor, "n 1 S S"]) -> Float[Tensor, " n"]:
        """Of the crop's pixels, in dB."""
        error = (images.clamp(-1, 1) - self.whole)[..., self.inside].square().flatten(1).mean(1)
        return 10 * torch.log10(4 / error.clamp(min=1e-9))


@register_task
class Outpainted(NetworkTask):
    """200 test digits from their top left, at 1.5, 1.8 and 2.25 times its size; ten DDIM steps, fixed noise.

    Metrics: `accuracy`, the share of whole digits that the classifier assigns to their class; `psnr` of the
    given part in dB. Both are means over the three multiples.
    """

    name, primary, network = "diffusion/outpainted-digits", "accuracy", PQDiff
    count: ClassVar[int] = 200
    multiples: ClassVar[tuple[float, ...]] = (1.5, 1.8, 2.25)

    def evaluate(self, model: nn.Module, *, progress: Progress | None = None) -> TaskResult:
        """Outpaint, classify, compare."""
        network = self.fitting(model)
        right, quality = torch.zeros(self.count).double(), torch.zeros(self.count).double()
        for multiple in self.multiples:
            view = View(multiple, network.side, self.count, at=0.0)
            made = network.outpaint(view.anchor, view.extension, generator=torch.Generator().manual_seed(0))
            right += view.right(made) / len(self.multiples)
            quality += view.psnr(made).double() / len(self.multiples)
        samples = {"accuracy": right.tolist(), "psnr": quality.tolist()}
        return TaskResult.from_samples(samples, hashlib.sha256(b"digits/200").hexdigest()[:16])

    def example(self, model: Any) -> tuple[Tensor, ...]:
        """One noisy target."""
        x = torch.zeros(1, 1, model.side, model.side)
        return x, torch.zeros(1), x, torch.zeros(1, model.grid**2, 2)
