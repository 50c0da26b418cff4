"""ITER: super-resolution by tokens that a second network evaluates and a third one refines.

Chen et al., Iterative Token Evaluation and Refinement for Real-World Super-Resolution, AAAI 2024
(arXiv 2312.05616). A VQ autoencoder gives the tokens of sharp images. A distortion-removal network predicts
them from the small image: S0. The evaluation net E says which tokens of a map are right, seeing S0 as well;
the refinement net R fills in masked tokens. At inference E's confident tokens are kept from the start, and a
step whose plan asks for no more tokens than are kept is skipped, sample by sample; else further tokens to
keep are drawn from E's probabilities, and R draws the rest.

Differs from the paper in: plain transformers (diffusers) for Swin ones; codes of unit length; the small image
is enlarged bicubically and then read at the grid of the tokens; no perceptual and no adversarial losses.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from zoo.diffusion.data import load_pictures
from zoo.diffusion.networks.base import STEPS, USUAL, NetworkTask, PaperNetwork, picked, transformer
from zoo.diffusion.networks.photos import crops
from zoo.diffusion.networks.quantiser import Quantiser
from zoo.errors import ConfigError
from zoo.harness.tasks import Progress, TaskResult, register_task
from zoo.shared.measure.modes import eval_mode
from zoo.shared.train import Drawn, Job, Recipe

BETA = 0.9999  # of the effective number of samples
Chooser = Literal["evaluation", "random"]


def degrade(
    images: Float[Tensor, "n 1 H W"], scale: int, noise: float = 0.0, seed: int = 0
) -> Float[Tensor, "n 1 h w"]:
    """Small images: blurred and reduced (antialiased bicubic), with normal noise of a seed."""
    side = images.shape[-1] // scale
    small = F.interpolate(images, size=(side, side), mode="bicubic", antialias=True, align_corners=False)
    draws = torch.randn(small.shape, generator=torch.Generator().manual_seed(seed))
    return small + noise * draws.to(small)


class Autoencoder(nn.Module):
    """VQ autoencoder of grey images, one token per square of `factor` pixels.

    Args:
        factor: 2 or 4.
        codes: how many.
        width: channels.
    """

    def __init__(self, factor: int, codes: int, width: int = 24, code_width: int = 8) -> None:
        super().__init__()
        down: list[nn.Module] = []
        up: list[nn.Module] = []
        for _ in range(int(math.log2(factor))):
            down += [nn.Conv2d(width, width, 4, 2, 1), nn.SiLU()]
            up += [nn.Upsample(scale_factor=2), nn.Conv2d(width, width, 3, 1, 1), nn.SiLU()]
        first, last = nn.Conv2d(1, width, 3, 1, 1), nn.Conv2d(width, code_width, 1)
        self.encoder = nn.Sequential(first, nn.SiLU(), *down, last)
        self.quantiser = Quantiser(codes, code_width)
        self.decoder = nn.Sequential(
            nn.Conv2d(code_width, width, 3, 1, 1), nn.SiLU(), *up, nn.Conv2d(width, 1, 3, 1, 1)
        )

    def quantise(self, x: Float[Tensor, "n 1 H W"]) -> tuple[Tensor, Int[Tensor, "n L"], Float[Tensor, ""]]:
        """(codes [n, L, d], numbers, loss of the quantiser) of images."""
        out: tuple[Tensor, Tensor, Tensor] = self.quantiser(self.encoder(x).flatten(2).transpose(1, 2))
        return out

    def paint(self, codes: Float[Tensor, "n L d"]) -> Float[Tensor, "n 1 H W"]:
        """Images from codes on a square grid."""
        side = math.isqrt(codes.shape[1])
        out: Tensor = self.decoder(codes.transpose(1, 2).unflatten(2, (side, side)))
        return out

    def forward(self, x: Float[Tensor, "n 1 H W"]) -> Float[Tensor, "n 1 H W"]:
        return self.paint(self.quantise(x)[0])


class TokenNet(nn.Module):
    """A transformer over maps of tokens, of which `codes` itself stands for a masked one.

    Args:
        codes: how many tokens there are.
        positions: of a map.
        maps: how many maps it reads; their embeddings are added.
        out: values per position.
        width, depth: of the transformer.
    """

    def __init__(self, codes: int, positions: int, maps: int, out: int, width: int, depth: int) -> None:
        super().__init__()
        self.tokens = nn.ModuleList(nn.Embedding(codes + 1, width) for _ in range(maps))
        self.places = nn.Parameter(0.5 * torch.randn(positions, width))
        self.blocks = transformer(width, depth)
        self.out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, out))

    def forward(self, *maps: Int[Tensor, "n L"]) -> Float[Tensor, "n L out"]:
        h = self.places + sum(embed(one) for embed, one in zip(self.tokens, maps, strict=True))
        for block in self.blocks:
            h = block(h)
        found: Tensor = self.out(h)
        return found


class DistortionRemoval(nn.Module):
    """Logits of the tokens of the sharp image from the small one."""

    def __init__(self, codes: int, grid: int, width: int, depth: int) -> None:
        super().__init__()
        self.grid = grid
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, 1, 1), nn.SiLU(), nn.Conv2d(width, width, 3, 1, 1))
        self.places = nn.Parameter(0.5 * torch.randn(grid**2, width))
        self.blocks = transformer(width, depth)
        self.out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, codes))

    def forward(self, small: Float[Tensor, "n 1 h w"]) -> Float[Tensor, "n L codes"]:
        x = F.interpolate(small, size=(self.grid, self.grid), mode="bicubic", align_corners=False)
        h = self.stem(x).flatten(2).transpose(1, 2) + self.places
        for block in self.blocks:
            h = block(h)
        found: Tensor = self.out(h)
        return found


class Iter(PaperNetwork):
    """Autoencoder, distortion removal, evaluation and refinement.

    Args:
        side: of the sharp images.
        scale: how many times smaller the small ones are.
        factor: pixels per token and axis.
        codes: how many tokens there are.
        width, depth: of the three transformers.
        noise: standard deviation on the small images in training; pixels are -1 to 1.
    """

    usual = dataclasses.replace(USUAL, steps=600, batch=16, ema=0.99)

    def __init__(
        self,
        side: int = 8,
        scale: int = 2,
        factor: int = 2,
        codes: int = 64,
        width: int = 48,
        depth: int = 2,
        noise: float = 0.3,
    ) -> None:
        super().__init__()
        if factor not in (2, 4) or side % factor or side % scale:
            raise ConfigError(
                f"factor is 2 or 4 and side a multiple of factor and scale; received side {side}, factor "
                f"{factor}, scale {scale}"
            )
        self.side, self.scale, self.codes, self.noise = side, scale, codes, noise
        self.grid = side // factor
        self.autoencoder = Autoencoder(factor, codes)
        self.removal = DistortionRemoval(codes, self.grid, width, depth)
        self.evaluation = TokenNet(codes, self.grid**2, 2, 2, width, depth)
        self.refinement = TokenNet(codes, self.grid**2, 2, codes, width, depth)

    def rightness(self, tokens: Int[Tensor, "n L"], first: Int[Tensor, "n L"]) -> Float[Tensor, "n L"]:
        """E: the probability that each token is right."""
        found: Tensor = self.evaluation(tokens, first).softmax(-1)[..., 1]
        return found

    def refined(
        self, tokens: Int[Tensor, "n L"], kept: Bool[Tensor, "n L"], first: Int[Tensor, "n L"]
    ) -> Float[Tensor, "n L codes"]:
        """R: logits at every position.

        Args:
            tokens: of which those that are not kept are masked.
            kept: True where a token stays.
            first: S0, with the tokens masked that E does not trust.
        """
        found: Tensor = self.refinement(first, tokens.masked_fill(~kept, self.codes))
        return found

    def predict(self, small: Float[Tensor, "n 1 h w"]) -> Int[Tensor, "n L"]:
        """S0, the likeliest tokens.

        Raises:
            ConfigError: small images of another size.
        """
        side = self.side // self.scale
        if small.shape[1:] != (1, side, side):
            raise ConfigError(
                f"this network reads images of {(1, side, side)}; received {tuple(small.shape[1:])}. Cut or "
                "reflect-pad them to squares of that size."
            )
        tokens: Tensor = self.removal(small).argmax(-1)
        return tokens

    def decode(self, tokens: Int[Tensor, "n L"]) -> Float[Tensor, "n 1 H W"]:
        """Images of tokens.

        Raises:
            ConfigError: another number of tokens, or one that is no code's.
        """
        low, high = int(tokens.min()), int(tokens.max())
        if tokens.shape[1] != self.grid**2 or low < 0 or high >= self.codes:
            raise ConfigError(
                f"a map has {self.grid**2} tokens from 0 to {self.codes - 1}; received {tokens.shape[1]} "
                f"from {low} to {high}"
            )
        return self.autoencoder.paint(self.autoencoder.quantiser.vectors(tokens))

    @torch.no_grad()
    def refine(
        self,
        small: Float[Tensor, "n 1 h w"],
        *,
        steps: int = 8,
        threshold: float = 0.5,
        chooser: Chooser = "evaluation",
        generator: torch.Generator | None = None,
    ) -> tuple[Int[Tensor, "n L"], Int[Tensor, " n"]]:
        """(tokens after iterative refinement, how many steps each image took).

        Args:
            small: the images.
            steps: T, the most that are made.
            threshold: from which probability on a token of S0 is kept from the start; lower for fidelity,
                higher for texture.
            chooser: who picks the tokens to keep; `random` is the control, with as many from the start.
            generator: of the draws.

        Raises:
            ConfigError: a number out of range, or images of another size.
        """
        if steps < 1 or not 0 <= threshold <= 1:
            raise ConfigError(
                f"steps must be at least 1 and threshold from 0 to 1; received {steps} and {threshold}"
            )
        first = self.predict(small)
        score = self.rightness(first, first)
        trusted = score >= threshold
        seen = first.masked_fill(~trusted, self.codes)
        tokens, kept = first.clone(), trusted
        if chooser == "random":
            score = torch.rand(score.shape, generator=generator)
            kept = _most(score, trusted.sum(1))
        taken = torch.zeros(len(first), dtype=torch.long)
        for step in range(1, steps):
            planned = planned_tokens(step, steps, first.shape[1])
            active = (kept.sum(1) < planned).nonzero().flatten()
            if not len(active):
                continue
            chance = score[active].clamp(min=1e-6).masked_fill(kept[active], 0.0)
            # Drawing without replacement in proportion to the chances: the largest of u^(1/p), each image
            # with a number of its own.
            keys = torch.rand(chance.shape, generator=generator).log() / chance
            more = _most(keys.masked_fill(kept[active], -torch.inf), planned - kept[active].sum(1))
            kept[active] |= more
            logits = self.refined(tokens[active], kept[active], seen[active])
            flat = logits.softmax(-1).flatten(0, 1)
            drawn = torch.multinomial(flat, 1, generator=generator).view(len(active), -1)
            tokens[active] = torch.where(kept[active], tokens[active], drawn)
            if chooser == "evaluation":
                score[active] = self.rightness(tokens[active], first[active])
            taken[active] += 1
        return tokens, taken

    def forward(self, small: Float[Tensor, "n 1 h w"]) -> Float[Tensor, "n 1 H W"]:
        """Images from the refined tokens, drawn by seed 0."""
        return self.decode(self.refine(small, generator=torch.Generator().manual_seed(0))[0])

    def sharp(self, dataset: str) -> Any:
        """Draws sharp images of a data set."""
        return crops(self.side) if dataset == "photos" else picked(load_pictures(dataset).train)

    def make_job(
        self, dataset: str, *, recipe: Recipe | None = None, seed: int = 0, device: str | torch.device = "cpu"
    ) -> Job:
        used = recipe or self.usual
        draw = self.sharp(dataset)

        def pairs(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
            images = draw(n, generator)[0]
            own = int(torch.randint(2**31, (), generator=generator))
            return degrade(images, self.scale, self.noise, own), images

        return Job(Drawn(pairs, used.batch, STEPS, 1), refinement_loss, recipe=used, seed=seed, device=device)

    def learn(
        self, dataset: str, *, recipe: Recipe | None = None, seed: int = 0, device: str | torch.device = "cpu"
    ) -> Job:
        """The autoencoder first, in a third of the steps, without averaging; then the rest beside it."""
        second = self.make_job(dataset, recipe=recipe, seed=seed, device=device)
        used = second.recipe
        batches = Drawn(self.sharp(dataset), used.batch, STEPS, 1)
        first = second.replace(batches=batches, loss=autoencoder_loss)
        # No moving average there: codes that are restarted jump.
        steps = max(1, (used.steps or used.epochs * len(batches)) // 3)
        first.fit(self, parameters=self.autoencoder.parameters(), steps=steps, ema=0.0).run()
        rest = [p for name, p in self.named_parameters() if not name.startswith("autoencoder.")]
        second.fit(self, parameters=rest).run()
        self.eval()
        return second


def planned_tokens(step: int, steps: int, positions: int) -> int:
    """How many tokens the cosine plan keeps before a step: (1 - cos(pi step / 2 steps)) of all."""
    return int((1 - math.cos(math.pi * step / (2 * steps))) * positions + 1e-9)


def _most(score: Float[Tensor, "n L"], counts: Int[Tensor, " n"]) -> Bool[Tensor, "n L"]:
    """True at the positions of the largest scores, in each row as many as its count."""
    rank = score.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return rank < counts[:, None]


def balance(right: Bool[Tensor, "n L"]) -> Float[Tensor, " 2"]:
    """Weights of (wrong, right) by the effective number of samples (1 - b^n) / (1 - b), of mean one."""
    counts = torch.stack([(~right).sum(), right.sum()]).double()
    effective = (1 - BETA**counts) / (1 - BETA)
    weights = 1 / effective.clamp(min=1.0)
    return (2 * weights / weights.sum()).float()


def autoencoder_loss(model: nn.Module, batch: Any) -> Float[Tensor, ""]:
    """Absolute and squared error of the reconstruction + the loss of the quantiser."""
    network: Any = getattr(model, "module", model)
    codes, _, loss = network.autoencoder.quantise(batch[0])
    made = network.autoencoder.paint(codes)
    return F.l1_loss(made, batch[0]) + F.mse_loss(made, batch[0]) + loss


def refinement_loss(model: nn.Module, batch: Any) -> Float[Tensor, ""]:
    """Cross-entropies of distortion removal, of R, of E on S0 and on the refined tokens; all weigh 1."""
    network: Any = getattr(model, "module", model)
    small, images = batch
    with eval_mode(network.autoencoder), torch.no_grad():
        true = network.autoencoder.quantise(images)[1]
    logits = network.removal(small)
    loss = F.cross_entropy(logits.flatten(0, 1), true.flatten())
    first = logits.detach().argmax(-1)
    right = first == true
    judged = network.evaluation(first, first)
    weight = balance(right).to(judged)
    loss = loss + F.cross_entropy(judged.flatten(0, 1), right.flatten().long(), weight=weight)
    seen = first.masked_fill(judged.detach().softmax(-1)[..., 1] < 0.5, network.codes)
    # Of each image a share cos(pi r / 2) of the tokens is masked, at least one; the true ones are kept.
    masked_share = torch.cos(torch.rand(len(true), device=true.device) * math.pi / 2)
    count = (masked_share * true.shape[1]).ceil().long().clamp(min=1)
    kept = ~_most(torch.rand(true.shape, device=true.device), count)
    refined = network.refined(true, kept, seen)
    each = F.cross_entropy(refined.transpose(1, 2), true, reduction="none").mean(1)
    loss = loss + (masked_share * each).sum() / masked_share.sum()
    again = refined.detach().argmax(-1)
    judged = network.evaluation(again, first)
    return loss + F.cross_entropy(judged.flatten(0, 1), (again == true).flatten().long())


def psnr(made: Float[Tensor, "n 1 H W"], true: Float[Tensor, "n 1 H W"]) -> Float[Tensor, " n"]:
    """Peak signal-to-noise ratio of each image in dB; pixels are -1 to 1."""
    return 10 * torch.log10(4 / (made.clamp(-1, 1) - true).square().flatten(1).mean(1).clamp(min=1e-9))


@register_task
class Enlarged(NetworkTask):
    """The 500 test digits from 4x4 pixels with noise.

    Metrics: `psnr` in dB; `accuracy`, the share that the classifier still assigns to its class.
    """

    name, primary, network, unit = "diffusion/enlarged-digits", "psnr", Iter, "dB"

    def evaluate(self, model: nn.Module, *, progress: Progress | None = None) -> TaskResult:
        """Refine, decode, compare, classify."""
        from zoo.diffusion.classifier import load_judge

        network, data = self.fitting(model), load_pictures("digits")
        with torch.no_grad():
            made = network(degrade(data.test, network.scale, network.noise))
            right = load_judge("digits")(made).argmax(1) == data.test_labels
        samples = {"psnr": psnr(made, data.test).tolist(), "accuracy": right.double().tolist()}
        return TaskResult.from_samples(samples, hashlib.sha256(b"digits/500").hexdigest()[:16])

    def example(self, model: Any) -> tuple[Tensor]:
        """A small test image."""
        return (degrade(load_pictures("digits").test[:1], model.scale),)
