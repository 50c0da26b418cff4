"""De-fencing GAN: a fence is found in one photograph and what lies behind it is completed.

Jonna, Medhi and Sahay, Deep Generative Adversarial Network for Occlusion Removal from a Single Image, arXiv
2409.13242. Two stages, trained apart: a segmentation net finds the occluder; a completion net of gated
convolutions, densely connected and dilated, with self-attention, sees the masked image and the mask, and two
discriminators, one of texture (the composite) and one of structure (its edges), see what it made. The result
is mask * prediction + (1 - mask) * input.

Differs from the paper in: grey images; structure is the Sobel gradient, not a pretrained structure model; no
perceptual loss; the completion net predicts what is to be added to a harmonic fill of the hole.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from zoo.diffusion.networks.base import STEPS, USUAL, NetworkTask, PaperNetwork
from zoo.diffusion.networks.photos import crops, test_tiles
from zoo.errors import ConfigError
from zoo.harness.tasks import Progress, TaskResult, register_task
from zoo.shared.train import Drawn, Fit, Job, Recipe

SEEN, UNSEEN = (0.35, 1.2), (0.0, 0.3)  # angles of the wires to the horizontal, in radians: lattices, grids
TEXTURE, STRUCTURE, EDGES = 0.01, 0.01, 1.0  # weights beside the absolute error


def draw_fences(
    n: int, side: int, generator: torch.Generator, angles: tuple[float, float] = SEEN
) -> tuple[Float[Tensor, "n 1 S S"], Float[Tensor, "n 1 S S"]]:
    """(masks, their brightness in [0, 1]) of two families of parallel wires, 1 to 3 pixels wide and 6 to 12
    apart, that cross.

    Args:
        n, side: how many, of which size.
        generator: of all that is drawn.
        angles: from which the first family's is drawn; the second family's is its mirror image, or for small
            ones (grids) at right angles to it.
    """

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, 1, 1, generator=generator)

    first = uniform(*angles)
    second = -first if angles[0] > 0 else first + math.pi / 2
    y, x = torch.meshgrid(torch.arange(side) + 0.5, torch.arange(side) + 0.5, indexing="ij")
    period, width = uniform(6.0, 12.0), uniform(1.0, 3.0)
    mask = torch.zeros(n, side, side, dtype=torch.bool)
    for angle in (first, second):
        across = x * angle.sin() - y * angle.cos() + uniform(0.0, 12.0)
        mask |= (across % period) < width
    shade = uniform(0.0, 1.0) + 0.05 * torch.randn(n, side, side, generator=generator)
    return mask[:, None].float(), shade[:, None].clamp(0, 1)


def check(images: Tensor, masks: Tensor) -> None:
    """Refuse what cannot be completed.

    Raises:
        ConfigError: sizes that differ, values outside [0, 1], masks that are empty, full or not 0 and 1.
    """
    if images.shape != masks.shape or images.dim() != 4:
        raise ConfigError(
            f"images and masks are [n, 1, H, W]; received {list(images.shape)} and {list(masks.shape)}"
        )
    if not bool(torch.isfinite(images).all()) or images.min() < 0 or images.max() > 1:
        raise ConfigError(
            f"images are in [0, 1]; received {float(images.min()):g} to {float(images.max()):g}"
        )
    if not bool(((masks == 0) | (masks == 1)).all()):
        raise ConfigError("masks are 1 where the fence is and 0 elsewhere; threshold them first")
    share = masks.flatten(1).mean(1)
    if bool((share == 0).any()) or bool((share == 1).any()):
        raise ConfigError("a mask is empty or covers its whole image; there is nothing to complete from it")


@torch.no_grad()
def harmonic(
    images: Float[Tensor, "n 1 H W"], masks: Float[Tensor, "n 1 H W"], rounds: int = 60
) -> Float[Tensor, "n 1 H W"]:
    """Images whose holes solve Laplace's equation: the mean of the four neighbours, by Jacobi's iteration."""
    kernel = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]).to(images)[None, None] / 4
    known = images * (1 - masks)
    mean = known.sum((2, 3), keepdim=True) / (1 - masks).sum((2, 3), keepdim=True).clamp(min=1)
    filled = known + masks * mean
    for _ in range(rounds):
        around = F.conv2d(F.pad(filled, (1, 1, 1, 1), mode="replicate"), kernel)
        filled = known + masks * around
    return filled


def edges(images: Float[Tensor, "n 1 H W"]) -> Float[Tensor, "n 1 H W"]:
    """Absolute Sobel gradient, both directions added."""
    kernel = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]]).to(images) / 4
    padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
    found = F.conv2d(padded, torch.stack([kernel, kernel.T])[:, None])
    return found.abs().sum(1, keepdim=True)


class GatedConv(nn.Module):
    """phi(W_f x) * sigmoid(W_g x) with ELU.

    Args:
        inputs, outputs: channels.
        dilation: of the 3x3 kernel.
    """

    def __init__(self, inputs: int, outputs: int, dilation: int = 1) -> None:
        super().__init__()
        self.both = nn.Conv2d(inputs, 2 * outputs, 3, padding=dilation, dilation=dilation)

    def forward(self, x: Float[Tensor, "n C H W"]) -> Float[Tensor, "n D H W"]:
        feature, gate = self.both(x).chunk(2, 1)
        out: Tensor = F.elu(feature) * torch.sigmoid(gate)
        return out


class Segmentation(nn.Module):
    """Logits of the fence, by convolutions of growing dilation.

    Args:
        width: channels.
        whole: whether every place is told mean and deviation of the whole image's features, after the first
            two convolutions: a fence has one brightness wherever it runs.
    """

    def __init__(self, width: int, whole: bool = False) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(1, width, 3, padding=1), nn.ELU()]
        for dilation in (1, 2, 4, 2):
            layers += [nn.Conv2d(width, width, 3, padding=dilation, dilation=dilation), nn.ELU()]
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, 1, 3, padding=1))
        self.whole = nn.Linear(2 * width, width) if whole else None

    def forward(self, images: Float[Tensor, "n 1 H W"]) -> Float[Tensor, "n 1 H W"]:
        h: Tensor = self.layers[:3](2 * images - 1)
        if self.whole is not None:
            h = h + self.whole(torch.cat([h.mean((2, 3)), h.std((2, 3))], 1))[:, :, None, None]
        out: Tensor = self.layers[3:](h)
        return out


class Completion(nn.Module):
    """What is to be added to the harmonic fill: densely connected dilated gated convolutions around
    self-attention at a quarter of the resolution."""

    def __init__(self, width: int, growth: int) -> None:
        super().__init__()
        self.into = GatedConv(3, width)
        self.down = nn.Conv2d(width, 2 * width, 4, stride=4)
        self.attention = nn.MultiheadAttention(2 * width, 2, batch_first=True)
        self.up = nn.ConvTranspose2d(2 * width, growth, 4, stride=4)
        self.dense = nn.ModuleList(
            GatedConv(width + growth * (1 + step), growth, dilation)
            for step, dilation in enumerate((1, 2, 4, 1))
        )
        self.out = nn.Conv2d(width + growth * 5, 1, 3, padding=1)
        for parameter in self.out.parameters():
            nn.init.zeros_(parameter)

    def forward(
        self,
        images: Float[Tensor, "n 1 H W"],
        masks: Float[Tensor, "n 1 H W"],
        filled: Float[Tensor, "n 1 H W"],
    ) -> Float[Tensor, "n 1 H W"]:
        h = self.into(torch.cat([images * (1 - masks), masks, filled], 1))
        small = self.down(h)
        flat = small.flatten(2).transpose(1, 2)
        seen = self.attention(flat, flat, flat, need_weights=False)[0]
        known = [h, self.up((flat + seen).transpose(1, 2).unflatten(2, small.shape[2:]))]
        for layer in self.dense:
            known.append(layer(torch.cat(known, 1)))
        out: Tensor = self.out(torch.cat(known, 1))
        return out


class Defencing(PaperNetwork):
    """Segmentation and completion.

    Args:
        side: of the training crops, a multiple of 4.
        width, growth: channels of the nets.
        adversarial: whether the discriminators are used.
        whole: whether the segmentation is told of the whole image, see `Segmentation`.
    """

    usual = dataclasses.replace(USUAL, steps=400, batch=8, weight_decay=0.0, ema=0.98)

    def __init__(
        self, side: int = 32, width: int = 16, growth: int = 12, adversarial: bool = True, whole: bool = False
    ) -> None:
        super().__init__()
        if side % 4:
            raise ConfigError(f"side must be a multiple of 4; received {side}")
        self.side, self.width, self.adversarial = side, width, adversarial
        self.segmentation = Segmentation(width, whole)
        self.completion = Completion(width, growth)

    def find(self, images: Float[Tensor, "n 1 H W"]) -> Float[Tensor, "n 1 H W"]:
        """Masks, 1 where a fence is seen."""
        return (self.segmentation(images) > 0).float()

    def complete(
        self, images: Float[Tensor, "n 1 H W"], masks: Float[Tensor, "n 1 H W"]
    ) -> Float[Tensor, "n 1 H W"]:
        """The composite mask * prediction + (1 - mask) * input; see `check` for what is refused."""
        check(images, masks)
        filled = harmonic(images, masks)
        return masks * (filled + self.completion(images, masks, filled)) + (1 - masks) * images

    def forward(self, images: Float[Tensor, "n 1 H W"]) -> Float[Tensor, "n 1 H W"]:
        """Images without the fences that are found, each grown by a pixel; without one, as they are."""
        grown = F.max_pool2d(self.find(images), 3, 1, 1)
        share = grown.flatten(1).mean(1)
        able = (share > 0) & (share < 1)
        made = images.clone()
        if bool(able.any()):
            made[able] = self.complete(images[able], grown[able]).clamp(0, 1)
        return made

    def fenced(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """(images with fences, masks, true images), training patterns on crops of T91."""
        true = (crops(self.side)(n, generator)[0] + 1) / 2
        masks, shade = draw_fences(n, self.side, generator)
        return masks * shade + (1 - masks) * true, masks, true

    def make_job(
        self, dataset: str, *, recipe: Recipe | None = None, seed: int = 0, device: str | torch.device = "cpu"
    ) -> Job:
        if dataset != "photos":
            raise ConfigError(f"Unknown images {dataset!r}. There are: photos.")
        used = recipe or self.usual
        return Job(
            Drawn(self.fenced, used.batch, STEPS, 1), both_losses, recipe=used, seed=seed, device=device
        )

    def learn(
        self, dataset: str, *, recipe: Recipe | None = None, seed: int = 0, device: str | torch.device = "cpu"
    ) -> Job:
        """Segmentation, then completion."""
        job = self.make_job(dataset, recipe=recipe, seed=seed, device=device)
        self.learn_to_find(job)
        self.learn_to_complete(job)
        return job

    def learn_to_find(self, job: Job) -> None:
        """Train the segmentation, the first stage."""
        job.replace(loss=segmentation_loss).fit(self, parameters=self.segmentation.parameters()).run()
        self.eval()

    def learn_to_complete(self, job: Job) -> None:
        """Train the completion, the second stage; discriminators learn after each of its steps."""
        critics = Critics.fresh(job.seed) if self.adversarial else None
        loss = completion_loss if critics is None else critics.against
        fit = job.replace(loss=loss).fit(self, parameters=self.completion.parameters())
        if critics is None:
            fit.run()
        else:
            critics.to(fit.device).follow(fit)
        self.eval()


def segmentation_loss(model: nn.Module, batch: Any) -> Float[Tensor, ""]:
    """Class-balanced cross-entropy + 1 - Dice."""
    images, masks, _ = batch
    network: Any = getattr(model, "module", model)
    logits = network.segmentation(images)
    share = masks.mean().clamp(0.01, 0.99)
    weight = torch.where(masks > 0, 0.5 / share, 0.5 / (1 - share))
    chance = torch.sigmoid(logits)
    dice = 2 * (chance * masks).sum() / (chance.sum() + masks.sum()).clamp(min=1e-6)
    return F.binary_cross_entropy_with_logits(logits, masks, weight=weight) + 1 - dice


def completion_loss(model: nn.Module, batch: Any) -> Float[Tensor, ""]:
    """Absolute and squared error in the hole, of the image and of its edges."""
    images, masks, true = batch
    network: Any = getattr(model, "module", model)
    made = network.complete(images, masks)
    return reconstruction(made, true, masks)


def reconstruction(made: Tensor, true: Tensor, masks: Tensor) -> Float[Tensor, ""]:
    """|made - true| + 10 (made - true)^2 + |edges|, per pixel of the holes."""
    size = masks.sum().clamp(min=1)
    error = made - true
    return (error.abs().sum() + 10 * error.square().sum()) / size + EDGES * (
        edges(made) - edges(true)
    ).abs().sum() / size / 4


def both_losses(model: nn.Module, batch: Any) -> Float[Tensor, ""]:
    """Both stages at once, without discriminators, for training on a sparse network."""
    return segmentation_loss(model, batch) + completion_loss(model, batch)


class Critics(PaperNetwork):
    """Discriminators of texture and structure: patch scores, hinge loss, spectral norm."""

    usual = Recipe(steps=1, lr=1e-3, optimizer="adam", weight_decay=0.0)

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.texture, self.structure = (
            nn.Sequential(
                spectral_norm(nn.Conv2d(2, width, 4, 2, 1)),
                nn.LeakyReLU(0.2),
                spectral_norm(nn.Conv2d(width, 2 * width, 4, 2, 1)),
                nn.LeakyReLU(0.2),
                spectral_norm(nn.Conv2d(2 * width, 1, 3, padding=1)),
            )
            for _ in range(2)
        )

    def forward(
        self, images: Float[Tensor, "n 1 H W"], masks: Float[Tensor, "n 1 H W"]
    ) -> tuple[Tensor, Tensor]:
        """(texture, structure) scores of patches; larger for real ones."""
        return self.texture(torch.cat([images, masks], 1)), self.structure(
            torch.cat([edges(images), masks], 1)
        )

    def against(self, model: nn.Module, batch: Any) -> Float[Tensor, ""]:
        """The completion's loss: reconstruction, and the hinge terms -D(composite)."""
        images, masks, true = batch
        network: Any = getattr(model, "module", model)
        made = network.complete(images, masks)
        texture, structure = self(made, masks)
        self.last = made.detach(), masks, true
        return reconstruction(made, true, masks) - TEXTURE * texture.mean() - STRUCTURE * structure.mean()

    def follow(self, fit: Fit) -> None:
        """Run a completion's training, with a step of the discriminators after each of its steps."""
        optimizer = self.usual.make_optimizer(self.parameters())

        def step() -> None:
            optimizer.zero_grad()
            hinge(self, self.last).backward()
            optimizer.step()

        fit.run(after_step=step)

    def make_job(self, *_: Any, **__: Any) -> Job:
        """Discriminators learn beside a completion only."""
        raise ConfigError("discriminators have no training of their own; train a Defencing network")


def hinge(critics: Any, batch: tuple[Tensor, Tensor, Tensor]) -> Float[Tensor, ""]:
    """mean max(0, 1 - D(true)) + mean max(0, 1 + D(made)), both discriminators."""
    made, masks, true = batch
    pairs = zip(critics(true, masks), critics(made, masks), strict=True)
    return torch.stack([F.relu(1 - real).mean() + F.relu(1 + fake).mean() for real, fake in pairs]).sum()


def iou(found: Float[Tensor, "n 1 H W"], masks: Float[Tensor, "n 1 H W"]) -> Float[Tensor, " n"]:
    """Intersection over union of each mask."""
    both, either = ((f(found, masks)).flatten(1).sum(1) for f in (torch.minimum, torch.maximum))
    return both / either.clamp(min=1)


def hole_psnr(made: Tensor, true: Tensor, masks: Tensor) -> Float[Tensor, " n"]:
    """PSNR of each image's hole in dB; values are 0 to 1."""
    error = ((made.clamp(0, 1) - true).square() * masks).flatten(1).sum(1) / masks.flatten(1).sum(1)
    return -10 * torch.log10(error.clamp(min=1e-6))


def fenced_tiles(side: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """(images with fences, masks, true images): squares of Set5 and Set14 with patterns that are not trained
    on, grids instead of lattices."""
    true = (test_tiles(side, count) + 1) / 2
    masks, shade = draw_fences(len(true), side, torch.Generator().manual_seed(1), UNSEEN)
    return masks * shade + (1 - masks) * true, masks, true


@register_task
class Fences(NetworkTask):
    """200 squares of Set5 and Set14 with drawn grids, patterns that no training shows.

    Metrics: `iou` of the found fence; `psnr` in the hole in dB, completed with the true mask.
    """

    name, primary, network = "diffusion/fences-photos", "psnr", Defencing
    unit = "dB"
    count: ClassVar[int] = 200

    def evaluate(self, model: nn.Module, *, progress: Progress | None = None) -> TaskResult:
        """Find and complete."""
        network = self.fitting(model)
        images, masks, true = fenced_tiles(network.side, self.count)
        with torch.no_grad():
            found, made = network.find(images), network.complete(images, masks)
        samples = {"iou": iou(found, masks).tolist(), "psnr": hole_psnr(made, true, masks).tolist()}
        return TaskResult.from_samples(samples, hashlib.sha256(b"fences/200").hexdigest()[:16])

    def example(self, model: Any) -> tuple[Tensor]:
        """One image."""
        return (fenced_tiles(model.side, self.count)[0][:1],)
