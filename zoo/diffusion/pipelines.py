"""Pipelines in pixel space and in a latent space, in the form that diffusers saves and loads."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, ModelMixin
from torch import Tensor

from zoo.diffusion.sampling import sample
from zoo.errors import ConfigError

__all__ = ["LatentTextToImagePipeline", "ModelMixin", "TextToImagePipeline"]


class TextToImagePipeline(DiffusionPipeline):
    """Text to image in pixel space: `pipe("a photo of a seven", num_inference_steps=10).images`.

    `save_pretrained` writes a folder that `TextToImagePipeline.from_pretrained` loads, cut as it is.

    Raises:
        ConfigError: a text encoder of another width than the UNet attends to.
    """

    model_cpu_offload_seq = "text_encoder->unet"

    def __init__(self, text_encoder: Any, tokenizer: Any, unet: Any, scheduler: Any) -> None:
        super().__init__()
        made, wanted = text_encoder.config.hidden_size, unet.config.cross_attention_dim
        if made != wanted:
            raise ConfigError(
                f"the text encoder's states are {made} wide, and the UNet attends to {wanted}: take the text "
                "encoder that the UNet was trained with"
            )
        self.register_modules(text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler)

    def denoise(self, x: Tensor, times: Tensor, condition: Tensor) -> Tensor:
        """The prediction at noisy images, given the encoded prompts."""
        out: Tensor = self.unet(x, times, encoder_hidden_states=condition).sample
        return out

    def encode(self, prompts: list[str]) -> Tensor:
        """Encoded prompts, [n, tokens, width].

        Raises:
            ConfigError: a prompt longer than the text encoder reads.
        """
        limit = self.tokenizer.model_max_length
        ids = self.tokenizer(prompts, padding="max_length", max_length=limit, return_tensors="pt").input_ids
        if ids.shape[1] > limit:
            raise ConfigError(
                f"a prompt has {ids.shape[1]} tokens; the text encoder reads {limit}. Shorten it."
            )
        states: Tensor = self.text_encoder(ids.to(self.device)).last_hidden_state
        return states

    def decode(self, made: Tensor) -> Tensor:
        """Images of what was sampled: here the pixels themselves."""
        return made

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        num_inference_steps: int = 10,
        guidance_scale: float = 1.0,
        generator: torch.Generator | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Make one image per prompt.

        Args:
            prompt: a text, or a list of them.
            num_inference_steps: steps of the sampler.
            guidance_scale: of classifier-free guidance; 1 for none.
            generator: of the starting noise, on the CPU.
            latents: the starting noise itself, [n, C, H, W].
            output_type: `pil`, `np` ([n, H, W, C] in [0, 1]) or `pt` ([n, C, H, W] in [-1, 1]).
            return_dict: an `ImagePipelineOutput`, or a tuple of its images.

        Raises:
            ConfigError: a prompt that is too long, or an unknown output type.
        """
        if output_type not in ("pil", "np", "pt"):
            raise ConfigError(f"output_type is 'pil', 'np' or 'pt'; received {output_type!r}")
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        side, channels = self.unet.config.sample_size, self.unet.config.in_channels
        if latents is None:
            latents = torch.randn((len(prompts), channels, side, side), generator=generator)
        made = sample(
            self,
            latents.to(self.device),
            self.encode(prompts),
            steps=num_inference_steps,
            guidance=guidance_scale,
            unconditional=self.encode([""] * len(prompts)) if guidance_scale != 1.0 else None,
        )
        images: Any = self.decode(made)
        if output_type != "pt":
            images = (images.clamp(-1, 1) / 2 + 0.5).permute(0, 2, 3, 1).cpu().float().numpy()
        if output_type == "pil":
            images = self.numpy_to_pil(images)
        return ImagePipelineOutput(images=images) if return_dict else (images,)


class LatentTextToImagePipeline(TextToImagePipeline):
    """Text to image in TAEF2's latent space; the decoder is read below $ZOO_DATA, not saved with the rest."""

    def decode(self, made: Tensor) -> Tensor:
        """Grey images of the latents, see `zoo.diffusion.latents.decode`."""
        from zoo.diffusion.latents import decode

        return decode(made)
