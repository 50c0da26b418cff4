"""How much of other libraries' networks structured pruning reaches, as a page.

python -m zoo.vision.reach > docs/reach.md
"""

from __future__ import annotations

import copy
import logging
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from zoo.errors import ConfigError
from zoo.optional import import_timm
from zoo.shared.errors import GroupError
from zoo.shared.structure.groups import trace_groups
from zoo.shared.structure.surgery import cut

HEAD = """# What structured pruning reaches

Made by `python -m zoo.vision.reach`: untrained networks of other libraries, their channels, heads and neurons
found by `zoo.shared.structure.groups.trace_groups`. Reach is the share of the parameters that lie in units
which can be cut. Half of each family's units is then cut from a copy, which must run; where no norm takes its
statistics over the units, its outputs must be those of the masked network.

The command takes names of networks; without any it goes through all that it knows, of which this page may
have a part.

| network | reach | families | parameters left, half of the units cut | outputs equal the masked network's |
|---|---|---|---|---|
"""

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
}
TORCHVISION = (
    "alexnet",
    "squeezenet1_1",
    "shufflenet_v2_x0_5",
    "googlenet",
    "efficientnet_v2_s",
    "vit_b_32",
    "swin_t",
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

        more: dict[str, Any] = {"init_weights": False} if own == "googlenet" else {}
        model, size = torchvision.models.get_model(own, num_classes=10, **more), 224
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


NAMES = (
    *(f"timm/{name}" for name in TIMM),
    *(f"torchvision/{name}" for name in TORCHVISION),
    *("transformers/ViT", "transformers/ConvNextV2", "ultralytics/C2f"),
)


def line(name: str) -> str:
    """The page's line of a network."""
    model, images = network(name)
    try:
        groups = trace_groups(model, (images,))
    except GroupError as error:
        return f"| {name} | 0 % | | | {' '.join(str(error).split())[:200]} |"
    total = sum(parameter.numel() for parameter in model.parameters())
    keep = {key: torch.arange(one.units) >= one.units // 2 for key, one in groups.items()}
    exact = {key: units for key, units in keep.items() if groups[key].exact}
    said = "no family is exact"
    try:
        if exact:
            cut(copy.deepcopy(model), groups, exact, check=(images,))
            said = "yes"
        smaller = copy.deepcopy(model)
        cut(smaller, groups, keep, allow_inexact=True, check=(images,))
        left = f"{sum(parameter.numel() for parameter in smaller.parameters()) / total:.2f}"
    except GroupError as error:
        left, said = "", f"no: {' '.join(str(error).split())[:160]}"
    return f"| {name} | {groups.reach(model):.0%} | {len(groups)} | {left} | {said} |"


def page(names: Sequence[str]) -> str:
    """The page over these networks."""
    lines = []
    for name in names:
        lines.append(line(name))
        print(lines[-1], file=sys.stderr, flush=True)
    return HEAD + "\n".join(lines) + "\n"


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")  # advice of the libraries about their own networks
    torch.set_num_threads(1)
    print(page(sys.argv[1:] or NAMES), end="")
