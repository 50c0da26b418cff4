"""Networks of the real families at reduced width, with random weights: for dry runs and tests."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)
from torch import nn


def _unet() -> tuple[nn.Module, dict[str, Any]]:
    """Stable Diffusion 1.5: a resnet and a transformer per level, cross-attention to text."""
    net = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        cross_attention_dim=24,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    return net, {
        "sample": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([7, 300]),
        "encoder_hidden_states": torch.randn(2, 5, 24),
    }


def _sdxl() -> tuple[nn.Module, dict[str, Any]]:
    """SDXL: several blocks per transformer, linear projections."""
    net = UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        cross_attention_dim=24,
        attention_head_dim=(2, 4),
        transformer_layers_per_block=(1, 3),
        use_linear_projection=True,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    return net, {
        "sample": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor(10),
        "encoder_hidden_states": torch.randn(2, 5, 24),
    }


def _ddpm() -> tuple[nn.Module, dict[str, Any]]:
    """A plain DDPM UNet with attention on feature maps."""
    net = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    return net, {"sample": torch.randn(2, 1, 8, 8), "timestep": torch.tensor(10)}


def _sd3() -> tuple[nn.Module, dict[str, Any]]:
    net = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=24,
        caption_projection_dim=32,
        pooled_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    return net, {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "encoder_hidden_states": torch.randn(2, 5, 24),
        "pooled_projections": torch.randn(2, 16),
        "timestep": torch.tensor([3.0, 500.0]),
    }


def _flux() -> tuple[nn.Module, dict[str, Any]]:
    net = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=24,
        pooled_projection_dim=16,
        axes_dims_rope=(2, 2, 4),
    )
    return net, {
        "hidden_states": torch.randn(2, 16, 4),
        "encoder_hidden_states": torch.randn(2, 5, 24),
        "pooled_projections": torch.randn(2, 16),
        "timestep": torch.tensor([0.3, 0.9]),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(5, 3),
    }


def _dit() -> tuple[nn.Module, dict[str, Any]]:
    net = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=11,
        norm_num_groups=8,
    )
    return net, {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([3, 500]),
        "class_labels": torch.tensor([1, 2]),
    }


def _pixart() -> tuple[nn.Module, dict[str, Any]]:
    net = PixArtTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=3,
        cross_attention_dim=32,
        sample_size=8,
        patch_size=2,
        caption_channels=24,
        norm_num_groups=8,
        use_additional_conditions=False,
    )
    return net, {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "encoder_hidden_states": torch.randn(2, 5, 24),
        "timestep": torch.tensor([3, 500]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


FAMILIES = {
    "sd15": _unet,
    "sdxl": _sdxl,
    "ddpm": _ddpm,
    "sd3": _sd3,
    "flux": _flux,
    "dit": _dit,
    "pixart": _pixart,
}


def family(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A network of that family in eval mode, every parameter random (biases too), and its inputs."""
    torch.manual_seed(0)
    net, inputs = FAMILIES[name]()
    generator = torch.Generator().manual_seed(1)
    for parameter in net.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return net.eval(), inputs


def output(net: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return net(**inputs).sample
