"""LoRA of peft on a sparse model: training and merging keep every zero.

    from peft import LoraConfig, get_peft_model
    from zoo.training.peft_lora import hold_masks

    adapted = get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))
    hold_masks(adapted)                    # before training; again after PeftModel.from_pretrained
    ...                                    # any training loop
    merged = adapted.merge_and_unload()    # carries the masks of the model, all zeros in place

peft adds s B A to a weight W, which fills its zeros when they are merged. Here the update is masked where the
weight is, W + s M * (B A), in training as in the merge, as in `zoo.llm.lora`. What is saved is peft's own
adapter (A and B), so that whoever loads it calls `hold_masks` before using or merging it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from zoo.errors import ConfigError
from zoo.shared.masks import MaskSet, masks_of

try:
    from peft import PeftModel
    from peft.tuners.lora import Linear, LoraLayer
except ModuleNotFoundError as error:
    if error.name != "peft":
        raise
    raise ConfigError("peft is not installed. Run: pip install 'sparse-model-zoo[peft]'") from error


class MaskedLoraLinear(Linear):
    """peft's LoRA of a linear layer with an update that is zero where the mask of the weight drops."""

    keep: Tensor

    def get_delta_weight(self, adapter: str) -> Tensor:
        """s M * (B A), of the weight's shape."""
        update: Tensor = super().get_delta_weight(adapter)
        return torch.where(self.keep.to(update.device), update, update.new_zeros(()))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output and that of the masked updates of the active adapters.

        Raises:
            ConfigError: other adapters within one batch, for which peft sums unmasked products.
        """
        if kwargs.get("adapter_names") is not None:
            raise ConfigError("adapters of a sparse model cannot be mixed within a batch; set one active")
        if self.disable_adapters or self.merged:
            result: Tensor = super().forward(x, *args, **kwargs)
            return result
        result = self.base_layer(x, *args, **kwargs)
        for adapter in self.active_adapters:
            if adapter in self.lora_A:
                update = self.get_delta_weight(adapter)
                update = update.T if self.fan_in_fan_out else update
                inputs = self.lora_dropout[adapter](x).to(update.dtype)
                added = functional.linear(inputs, update)
                if self.lora_bias[adapter]:
                    added = added + self.scaling[adapter] * self.lora_B[adapter].bias
                result = result + added.to(result.dtype)
        return result


def hold_masks(model: PeftModel, masks: MaskSet | None = None) -> list[str]:
    """Mask the LoRA updates of a peft model where its weights are masked, in place.

    Args:
        model: from `get_peft_model` or `PeftModel.from_pretrained`.
        masks: of the base model, by the names that its parameters had before; by default those it carries.

    Returns:
        The names of the masked weights that have an update now, as in the base model.

    Raises:
        ConfigError: no masks, nothing adapted is masked, or adapters other than plain LoRA of linear layers.
        MaskError: masks of another shape.
    """
    base: nn.Module = model.get_base_model()
    held = masks if masks is not None else masks_of(base)
    if not held:
        raise ConfigError(f"this {type(base).__name__} carries no masks; give those of the model: masks=...")
    found = []
    for name, module in base.named_modules():
        if not hasattr(module, "base_layer") or f"{name}.weight" not in held:
            continue
        plain = isinstance(module, LoraLayer) and type(module) in (Linear, MaskedLoraLinear)
        if not plain or module.lora_variant:
            raise ConfigError(
                f"{name} is masked and has an adapter {type(module).__name__}"
                f"{' with a variant such as DoRA' if plain else ''}: "
                "only plain LoRA of linear layers keeps zeros"
            )
        if module.merged:
            raise ConfigError(f"{name} is merged already: call unmerge_adapter() first")
        found.append((name, module, held[f"{name}.weight"]))
    if not found:
        raise ConfigError("none of the weights that LoRA adapts is masked: merge as usual")
    MaskSet({f"{name}.base_layer.weight": mask for name, _, mask in found}).check(base)
    for _, module, mask in found:
        module.__class__ = MaskedLoraLinear  # the object stays: optimisers and peft hold it
        module.register_buffer("keep", mask.keep, persistent=False)
    return [f"{name}.weight" for name, _, _ in found]
