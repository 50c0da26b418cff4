"""The parts of a pipeline that methods prune, and checks that all of them share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zoo.diffusion.sampling import sample
from zoo.errors import ConfigError

DENOISERS = ("denoiser", "unet", "transformer", "prior")


def denoiser_of(model: Any) -> nn.Module:
    """The denoising network of a model or pipeline; a bare network is its own.

    Raises:
        ConfigError: there is none.
    """
    for name in DENOISERS:
        if isinstance(found := getattr(model, name, None), nn.Module):
            return found
    if isinstance(model, nn.Module) and hasattr(model, "config"):
        return model
    raise ConfigError(
        f"{type(model).__name__} has no denoising network: none of {', '.join(DENOISERS)}. Give the UNet or "
        "transformer itself."
    )


def require_finite(model: nn.Module) -> None:
    """Refuse weights that are not finite.

    Raises:
        ConfigError: the first parameter that holds NaN or infinity.
    """
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise ConfigError(f"{name!r} holds NaN or infinity; repair the model first")


def require_plain(model: nn.Module) -> None:
    """Refuse models whose visible weights are not those that work, or are not finite.

    Raises:
        ConfigError: fused projections, adapters (LoRA), quantised layers, NaN or infinity, by name.
    """
    require_finite(model)
    for name, module in model.named_modules():
        if getattr(module, "fused_projections", False):
            raise ConfigError(f"{name!r} has fused projections: call `unfuse_qkv_projections()` first")
        if hasattr(module, "base_layer"):
            raise ConfigError(
                f"{name!r} has an adapter: merge it (`fuse_lora`) and unload it (`unload_lora_weights`) first"
            )
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.Linear) and isinstance(weight, Tensor) and not weight.is_floating_point():
            raise ConfigError(f"{name!r} is quantised ({weight.dtype}): prune the model before quantising it")


def prompts_of(batches: Sequence[Sequence[Tensor]], count: int) -> tuple[Tensor, Tensor]:
    """(noise, token ids) of the first `count` samples of batches (images, noise, times, token ids).

    Raises:
        ConfigError: fewer than two prompts.
    """
    noise = torch.cat([batch[1] for batch in batches])[:count]
    ids = torch.cat([batch[3] for batch in batches])[:count]
    if len(ids) < 2:
        raise ConfigError(f"at least two prompts are needed; received {len(ids)}")
    return noise, ids


def run_sampler(model: Any, batch: tuple[Tensor, Tensor], steps: int, guidance: float = 1.0) -> Tensor:
    """Images of a text-to-image model from (noise, token ids)."""
    noise, ids = batch
    empty = model.tokenise([""] * len(ids)).to(ids.device) if guidance != 1.0 else None
    return sample(
        model,
        noise,
        model.encode(ids),
        steps=steps,
        guidance=guidance,
        unconditional=None if empty is None else model.encode(empty),
    )
