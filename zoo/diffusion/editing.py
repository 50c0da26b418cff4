"""LoMOE (arXiv 2403.00437): several masked objects of one image edited in one pass, the rest left alone.

The image is inverted to noise by the deterministic sampler run backwards. A reference pass under the
background's prompt records latents, cross-attention and what each step misses of the inversion, which the
edit adds back. In the edit each mask has a branch with its own prompt; the branches' steps are merged by
their masks, and the background is held by two losses. Two things are ours: the predicted noise is not
regularised while inverting (what is missed is added back, so that the image comes out all the same), and the
background's branch is guided as its reference was.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDIMScheduler
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from zoo.diffusion.models import TextToImage
from zoo.errors import ConfigError

Reference = tuple[list[Tensor], list[Tensor], list[list[Tensor]]]


@dataclass(frozen=True)
class Edit:
    """How an edit is made.

    Attributes:
        steps: of inversion and of sampling.
        guidance: scale of classifier-free guidance, of every branch.
        bootstrap: share of the steps in which a branch sees a plain background instead of the scene.
        colour: of that background, in the range of the images.
        attention, background: weights of the two losses; with both zero the pass is plain multi-diffusion.
        rate: of the one gradient step on the latents that the losses take at every sampling step.
    """

    steps: int = 20
    guidance: float = 3.0
    bootstrap: float = 0.4
    colour: float = -1.0
    attention: float = 1.0
    background: float = 1.75
    rate: float = 0.1

    def __call__(
        self,
        model: TextToImage,
        image: Tensor,
        masks: Tensor,
        prompts: Sequence[str],
        source: str,
        noise_seed: int = 0,
    ) -> Tensor:
        """The edited image.

        Args:
            model: whose prompts these are; sparse or cut ones work alike.
            image: [C, H, W], in the range of the model's images.
            masks: boolean [K, H, W], where each prompt holds; they must not overlap.
            prompts: one per mask.
            source: what the image shows outside the masks.
            noise_seed: of the plain backgrounds' noise.

        Raises:
            ConfigError: masks that overlap, are empty or of another size or number, an image whose size the
                network cannot halve, a scheduler that draws noise or clips, or another prediction than noise.
        """
        self._check(model, image, masks, prompts)
        network = model.unet
        levels = schedule(model.scheduler, self.steps)
        with torch.no_grad():
            conditions = model.encode(model.tokenise([source, *prompts]))
            empty = model.encode(model.tokenise([""])).expand_as(conditions)
            inverted = invert(model, image[None], conditions[:1], levels)
            reference, missed, attended = self._reference(model, inverted, conditions[:1], empty[:1], levels)
        outside = ~masks.any(0, keepdim=True)
        shares = torch.cat([outside, masks])[:, None].to(image.dtype)
        generator = torch.Generator().manual_seed(noise_seed)
        x = inverted[-1]
        for index in range(self.steps):
            now, after = levels[-1 - index], levels[-2 - index]
            if self.attention or self.background:
                x = self._held(network, x, reference[index], attended[index], conditions[:1], now, outside)
            branches = x.expand(len(shares), -1, -1, -1)
            if index < self.bootstrap * self.steps:
                noise = torch.randn(branches.shape, generator=generator)
                plain = now.signal * self.colour + now.noise * noise
                plain[0] = x[0]
                branches = torch.where(shares.bool(), branches, plain)
            with torch.no_grad():
                moved = step(self.guided(model, branches, conditions, empty, now), branches, now, after)
                moved = moved + missed[index]
                total = shares.sum(0, keepdim=True)
                merged = (shares * moved).sum(0, keepdim=True) / total.clamp(min=1)
            x = torch.where(total > 0, merged, x)
        return x[0]

    def guided(self, model: TextToImage, x: Tensor, conditions: Tensor, empty: Tensor, now: Level) -> Tensor:
        """The predicted noise, with guidance."""
        times = torch.full((len(x),), now.time)
        own = model.denoise(x, times, conditions)
        if self.guidance == 1.0:
            return own
        plain = model.denoise(x, times, empty)
        return plain + self.guidance * (own - plain)

    def _reference(
        self, model: TextToImage, inverted: list[Tensor], own: Tensor, empty: Tensor, levels: list[Level]
    ) -> Reference:
        """Latents, what each step misses of the inversion, and cross-attention, from noise to image."""
        latents, missed, attended = [], [], []
        for index in range(self.steps):
            x, now = inverted[-1 - index], levels[-1 - index]
            with recorded(model.unet) as probabilities:
                model.denoise(x, torch.tensor([now.time]), own)
            moved = step(self.guided(model, x, own, empty, now), x, now, levels[-2 - index])
            latents.append(x)
            missed.append(inverted[-2 - index] - moved)
            attended.append(list(probabilities))
        return latents, missed, attended

    def _held(
        self,
        network: nn.Module,
        x: Tensor,
        reference: Tensor,
        attended: list[Tensor],
        condition: Tensor,
        now: Level,
        outside: Tensor,
    ) -> Tensor:
        """The latents after one gradient step of the two losses."""
        moved = x.detach().requires_grad_(True)
        loss = self.background * (outside * (moved - reference)).square().sum() / x.shape[1]
        if self.attention:
            called: Any = network
            with recorded(network) as probabilities:
                called(moved, torch.tensor([now.time]), encoder_hidden_states=condition)
            for own, theirs in zip(probabilities, attended, strict=True):
                loss = loss + self.attention * (own - theirs).square().mean(0).sum() / own.shape[1]
        (slope,) = torch.autograd.grad(loss, moved)
        return x - self.rate * slope

    def _check(self, model: TextToImage, image: Tensor, masks: Tensor, prompts: Sequence[str]) -> None:
        scheduler = model.scheduler
        if not isinstance(scheduler, DDIMScheduler) or scheduler.config.get("clip_sample"):
            raise ConfigError(
                f"an image is inverted by a deterministic sampler that does not clip; received a "
                f"{type(scheduler).__name__}. Use DDIMScheduler with clip_sample=False."
            )
        if (kind := scheduler.config.prediction_type) != "epsilon":
            raise ConfigError(f"editing inverts a model that predicts noise (epsilon); this one: {kind}")
        if masks.dtype != torch.bool or masks.dim() != 3 or masks.shape[1:] != image.shape[1:]:
            raise ConfigError(f"masks are boolean [K, {image.shape[1]}, {image.shape[2]}], one per prompt")
        if len(masks) != len(prompts) or not len(masks):
            raise ConfigError(f"{len(masks)} masks and {len(prompts)} prompts: give one prompt per mask")
        if not bool(masks.flatten(1).any(1).all()):
            raise ConfigError("a mask is empty: leave out edits that hold nowhere")
        if bool((masks.sum(0) > 1).any()):
            raise ConfigError("masks overlap: give each pixel to one prompt")
        halvings = 2 ** (len(model.unet.config.block_out_channels) - 1)
        if image.shape[1] % halvings or image.shape[2] % halvings:
            raise ConfigError(f"height and width must be multiples of {halvings}: pad the image")


@dataclass(frozen=True)
class Level:
    """A time step with the shares of signal and noise in an image there; before the first, no noise."""

    time: int
    signal: float
    noise: float


def schedule(scheduler: Any, steps: int) -> list[Level]:
    """Levels from the image itself to the noisiest, steps + 1 of them.

    Raises:
        ConfigError: fewer than one step, or more than the schedule has.
    """
    count = int(scheduler.config.num_train_timesteps)
    if not 1 <= steps <= count:
        raise ConfigError(f"steps must be 1 to {count}; received {steps}")
    times = [index * (count // steps) for index in range(steps)]
    kept = [float(scheduler.alphas_cumprod[time]) for time in times]
    noisy = [Level(time, share**0.5, (1 - share) ** 0.5) for time, share in zip(times, kept, strict=True)]
    return [Level(0, 1.0, 0.0), *noisy]


def step(noise: Tensor, x: Tensor, now: Level, after: Level) -> Tensor:
    """The image at another level, by the deterministic step of DDIM in either direction."""
    clean = (x - now.noise * noise) / now.signal
    return after.signal * clean + after.noise * noise


@torch.no_grad()
def invert(model: TextToImage, image: Tensor, condition: Tensor, levels: list[Level]) -> list[Tensor]:
    """The image [1, C, H, W] at every level, by the sampler run backwards without guidance."""
    found = [image]
    for now, after in zip(levels[:-1], levels[1:], strict=True):
        noise = model.denoise(found[-1], torch.tensor([now.time]), condition)
        found.append(step(noise, found[-1], now, after))
    return found


class _Recorder:
    """An attention processor that keeps the probabilities, with their graph."""

    def __init__(self, into: list[Tensor]) -> None:
        self.into = into

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            attn.head_to_batch_dim(x) for x in (attn.to_q(hidden_states), attn.to_k(text), attn.to_v(text))
        )
        probabilities = attn.get_attention_scores(query, key, attention_mask)
        self.into.append(probabilities)
        out: Tensor = attn.to_out[0](attn.batch_to_head_dim(probabilities @ value))
        return out


@contextmanager
def recorded(network: nn.Module) -> Iterator[list[Tensor]]:
    """The cross-attention probabilities [heads, pixels, tokens] of the calls in the context, in order.

    Raises:
        ConfigError: the network has no cross-attention.
    """
    found = [m for n, m in network.named_modules() if isinstance(m, Attention) and n.endswith(".attn2")]
    if not found:
        raise ConfigError(
            f"this {type(network).__name__} has no cross-attention left to hold: edit with attention=0"
        )
    into: list[Tensor] = []
    before = [module.processor for module in found]
    for module in found:
        module.processor = _Recorder(into)
    try:
        yield into
    finally:
        for module, processor in zip(found, before, strict=True):
            module.processor = processor
