"""Networks of other libraries that `zoo.vision.reach` goes through: what is built, and its images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from zoo.errors import ConfigError
from zoo.optional import import_timm

# Width of the square images, by name.
TIMM = {
    **dict.fromkeys(("resnet18", "resnet50", "resnext50_32x4d", "seresnet18", "vgg11", "densenet121"), 64),
    **dict.fromkeys(("efficientnet_b0", "mobilenetv2_100", "mobilenetv3_small_100", "mnasnet_100"), 64),
    **dict.fromkeys(
        ("regnety_002", "convnext_atto", "mobilevit_xxs", "res2net50_26w_4s", "ghostnet_050"), 64
    ),
    **dict.fromkeys(("repvgg_a0", "inception_v3", "xception41", "cspresnet50", "hrnet_w18_small"), 96),
    **dict.fromkeys(
        ("vit_tiny_patch16_224", "deit_tiny_patch16_224", "xcit_nano_12_p16_224", "mixer_s32_224"), 224
    ),
    **dict.fromkeys(("pit_ti_224", "swin_tiny_patch4_window7_224", "poolformer_s12"), 224),
    **dict.fromkeys(("ecaresnet26t", "skresnet18", "resnest14d", "dla34", "selecsls42", "gernet_s"), 64),
    **dict.fromkeys(("tf_efficientnetv2_b0", "mixnet_s", "lcnet_050", "fbnetc_100", "mobileone_s0"), 64),
    **dict.fromkeys(("rexnet_100", "hgnetv2_b0", "mobilenetv4_conv_small", "repvit_m0_9", "dpn48b"), 64),
    **dict.fromkeys(("resnetv2_50", "edgenext_xx_small", "starnet_s1", "efficientvit_b0"), 64),
    **dict.fromkeys(("deit3_small_patch16_224", "gmlp_s16_224", "resmlp_12_224", "pvt_v2_b0"), 224),
}
TORCHVISION = (
    *("alexnet", "vgg11_bn", "resnet18", "resnext50_32x4d", "wide_resnet50_2", "densenet121"),
    *("squeezenet1_1", "shufflenet_v2_x0_5", "googlenet", "inception_v3", "mobilenet_v2"),
    *("mobilenet_v3_small", "mnasnet0_5", "efficientnet_b0", "efficientnet_v2_s", "regnet_x_400mf"),
    *("regnet_y_400mf", "convnext_tiny", "vit_b_32", "swin_t", "swin_v2_t", "maxvit_t"),
)
NAMES = (
    *(f"timm/{name}" for name in TIMM),
    *(f"torchvision/{name}" for name in TORCHVISION),
    *("transformers/ViT", "transformers/ConvNextV2", "ultralytics/C2f"),
)


class C2f(nn.Module):
    """YOLOv8's block (Ultralytics): a list of chunks grows in a loop."""

    def __init__(self, inputs: int, outputs: int, bottlenecks: int = 2) -> None:
        super().__init__()
        width = outputs // 2
        self.cv1, self.cv2 = (
            _convolution(inputs, 2 * width, 1),
            _convolution((2 + bottlenecks) * width, outputs, 1),
        )
        self.m = nn.ModuleList(
            nn.Sequential(_convolution(width, width, 3), _convolution(width, width, 3))
            for _ in range(bottlenecks)
        )

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.cv1(x).chunk(2, 1))
        for block in self.m:
            parts.append(parts[-1] + block(parts[-1]))
        made: Tensor = self.cv2(torch.cat(parts, 1))
        return functional.silu(made)


def _convolution(inputs: int, outputs: int, size: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False), nn.BatchNorm2d(outputs), nn.SiLU()
    )


def network(name: str) -> tuple[nn.Module, Tensor]:
    """A network of the page with random weights and statistics, and a batch of two images.

    Raises:
        ConfigError: an unknown name, or a library that is not installed.
    """
    library, _, own = name.partition("/")
    torch.manual_seed(0)
    size = 64
    if library == "timm" and own in TIMM:
        model, size = import_timm().create_model(own, num_classes=10), TIMM[own]
    elif library == "torchvision" and own in TORCHVISION:
        import_timm()
        import torchvision

        slow: dict[str, Any] = {"init_weights": False} if own in ("googlenet", "inception_v3") else {}
        model, size = torchvision.models.get_model(own, num_classes=10, **slow), 224
    elif name == "transformers/ViT":
        from transformers import ViTConfig, ViTForImageClassification

        sizes: Any = {"image_size": 64, "hidden_size": 96, "intermediate_size": 384, "num_labels": 9}
        model = ViTForImageClassification(ViTConfig(**sizes))
    elif name == "transformers/ConvNextV2":
        from transformers import ConvNextV2Config, ConvNextV2ForImageClassification

        model = ConvNextV2ForImageClassification(ConvNextV2Config(hidden_sizes=[24, 48, 96, 192]))
    elif name == "ultralytics/C2f":
        head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
        model = nn.Sequential(_convolution(3, 32, 3), C2f(32, 64), *head)
    else:
        raise ConfigError(f"{name} is no network of this page; it has: {', '.join(NAMES)}")
    for module in model.modules():
        if (
            isinstance(module, nn.BatchNorm2d)
            and module.running_mean is not None
            and module.running_var is not None
        ):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
    return model.eval(), torch.randn(2, 3, size, size)
