"""LoRA by peft on a denoiser: the updates are masked like the weights, and merging them keeps every zero."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from zoo.errors import ConfigError
from zoo.shared.masks import masks_of, set_masks
from zoo.training.finetune import require_zeros


def attach_lora(model: nn.Module, rank: int, alpha: float | None = None, seed: int = 0) -> Callable[[], None]:
    """Freeze a model and give every `nn.Linear` of its denoiser a low-rank update, in place.

    The model puts its masks aside until the merge, since its weights have other names until then.

    Args:
        model: with a `unet`, or a denoiser itself.
        rank: of the updates, at least 1.
        alpha: scale of the updates times the rank; by default twice the rank.
        seed: of the fresh updates, which add nothing at first.

    Returns:
        What merges the updates into the weights, takes them off and checks every zero.

    Raises:
        ConfigError: peft is not installed, a rank below 1, or a denoiser without linear layers.
    """
    from zoo.training.peft_lora import hold_masks  # says what to install where peft is missing

    if rank < 1:
        raise ConfigError(f"the rank of LoRA is at least 1; received {rank}")
    from peft import LoraConfig, get_peft_model

    linear = {id(part) for part in getattr(model, "unet", model).modules() if type(part) is nn.Linear}
    names = [name for name, part in model.named_modules() if id(part) in linear]
    if not names:
        raise ConfigError(f"the denoiser of this {type(model).__name__} has no linear layer to adapt")
    masks = masks_of(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LoraConfig(r=rank, lora_alpha=alpha or 2 * rank, target_modules=names)
        adapted = get_peft_model(model, config)
    if masks is not None and any(f"{name}.weight" in masks for name in names):
        hold_masks(adapted, masks)
    set_masks(model, None)

    def merge() -> None:
        adapted.merge_and_unload()
        model.requires_grad_(True)
        require_zeros(model, masks)

    return merge
