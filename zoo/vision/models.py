"""The image classifiers of the domain: CIFAR ResNets, a small convolutional net, a perceptron, a small
transformer.

Every model keeps its `arguments`, from which the same one, a wider one or a cut one is built again.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, no_type_check

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from zoo.errors import ConfigError, MissingDataError
from zoo.shared.structure.relatives import seeded
from zoo.shared.train.device import device_of


class Classifier(nn.Module):
    """Base of the domain's models: images [B, C, H, W] to logits [B, classes].

    Attributes:
        arguments: what the constructor was called with, for cards and for building relatives of the model.
        full_precision: that it computes in float32, also on weights stored in float16.
    """

    full_precision: ClassVar[bool] = True
    arguments: dict[str, Any]

    def wider(self, factor: float | int) -> Classifier:
        """A fresh model whose inner layers have `factor` times the units, rounded.

        Raises:
            ConfigError: this kind of model has none.
        """
        raise ConfigError(f"{type(self).__name__} has no wider relative; take a ResNet, ConvNet, MLP or ViT.")

    def fresh(self, seed: int) -> Classifier:
        """A model of the same shapes on the same device, its weights drawn with `seed`; the caller's random
        state is left alone."""
        with seeded(seed):
            fresh = type(self)(**self.current_arguments())
        return fresh.to(device_of(self))

    def current_arguments(self) -> dict[str, Any]:
        """The arguments that build a model of the present shapes, after surgery too."""
        return dict(self.arguments)


class Block(nn.Module):
    """Two 3x3 convolutions with a shortcut; a shortcut that changes shape is sliced and padded with zero
    channels (option A of He et al. 2016) or a 1x1 convolution."""

    def __init__(
        self, inputs: int, inner: int, outputs: int, stride: int, shortcut: Literal["pad", "conv"]
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, inner, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        same = stride == 1 and inputs == outputs
        if same:
            self.shortcut: nn.Module = nn.Identity()
        elif shortcut == "pad":
            self.shortcut = PadShortcut(inputs, outputs, stride)
        else:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    @no_type_check  # fx traces it with proxies
    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:
        inner = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(inner)) + self.shortcut(x))


class PadShortcut(nn.Module):
    """Every second pixel, and zero channels on both sides."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.before = (outputs - inputs) // 2
        self.after = outputs - inputs - self.before

    @no_type_check  # fx traces it with proxies
    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))


class ResNet(Classifier):
    """The ResNets for 32x32 images (He et al. 2016, section 4.2): three stages of (depth - 2) / 6 blocks.

    Attributes:
        full_precision: that it computes in float32, also on weights stored in float16.

    Args:
        depth: 20, 32, 44, 56, 110: six layers a block and two more.
        width: channels of the first stage; the others have twice and four times as many.
        classes: of the output.
        channels: of the input.
        shortcut: "pad" as in the paper, or "conv", with which the channels of a stage can be cut.
        stages: channels of each stage, instead of `width`.
        inner: channels between the two convolutions of each block; by default those of its stage.
        blocks: of each stage, where some were removed; only the first stage may have none.

    Raises:
        ConfigError: a depth or a number of widths that makes no ResNet.
    """

    full_precision: ClassVar[bool] = True

    def __init__(
        self,
        depth: int = 20,
        width: int = 16,
        classes: int = 10,
        channels: int = 3,
        shortcut: Literal["pad", "conv"] = "pad",
        stages: Sequence[int] | None = None,
        inner: Sequence[int] | None = None,
        blocks: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        usual, rest = divmod(depth - 2, 6)
        if usual < 1 or rest or shortcut not in ("pad", "conv"):
            raise ConfigError(
                f"a CIFAR ResNet has depth 6 n + 2 and the shortcut 'pad' or 'conv'; received {depth} and "
                f"{shortcut!r}"
            )
        outer = list(stages) if stages is not None else [width, 2 * width, 4 * width]
        counts = list(blocks) if blocks is not None else [usual] * 3
        if len(counts) != 3 or min(counts[1:]) < 1 or min(counts) < 0 or max(counts) > usual:
            raise ConfigError(
                f"ResNet-{depth} has 3 stages of 1 to {usual} blocks, of which the first may have none; "
                f"received {counts}"
            )
        between = (
            list(inner)
            if inner is not None
            else [w for w, n in zip(outer, counts, strict=False) for _ in range(n)]
        )
        if len(outer) != 3 or len(between) != sum(counts) or min(outer + between) < 1:
            raise ConfigError(
                f"ResNet-{depth} needs 3 stages and {sum(counts)} inner widths, all at least 1; received "
                f"{outer} and {between}"
            )
        self.arguments = {
            "depth": depth,
            "width": width,
            "classes": classes,
            "channels": channels,
            "shortcut": shortcut,
        }
        if stages is not None:
            self.arguments["stages"] = outer
        if inner is not None:
            self.arguments["inner"] = between
        if blocks is not None:
            self.arguments["blocks"] = counts
        self.conv1 = nn.Conv2d(channels, outer[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outer[0])
        inputs, made, inside = outer[0], [], iter(between)
        for stage, outputs in enumerate(outer):
            sequence = []
            for index in range(counts[stage]):
                stride = 2 if stage > 0 and index == 0 else 1
                sequence.append(Block(inputs, next(inside), outputs, stride, shortcut))
                inputs = outputs
            made.append(nn.Sequential(*sequence))
        self.layer1, self.layer2, self.layer3 = made
        self.linear = nn.Linear(inputs, classes)
        _initialise(self)

    @no_type_check  # fx traces it with proxies
    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B classes"]:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))

    def wider(self, factor: float | int) -> ResNet:
        return ResNet(**{**self.arguments, "width": max(1, round(self.arguments["width"] * factor))})

    def current_arguments(self) -> dict[str, Any]:
        stages, inner, counts = [], [], []
        for layer in (self.layer1, self.layer2, self.layer3):
            blocks = [block for block in layer if isinstance(block, Block)]
            stages.append(blocks[0].conv2.out_channels if blocks else self.conv1.out_channels)
            inner += [block.conv1.out_channels for block in blocks]
            counts.append(len(blocks))
        found = {**self.arguments, "stages": stages, "inner": inner}
        if counts != [(self.arguments["depth"] - 2) // 6] * 3:
            found["blocks"] = counts
        return found


class ConvNet(Classifier):
    """3x3 convolutions with batch norm and ReLU, the mean over the image, a linear layer.

    Args:
        widths: channels of each convolution.
        strides: of each convolution.
        classes: of the output.
        channels: of the input.

    Raises:
        ConfigError: no widths, or not as many strides.
    """

    def __init__(
        self,
        widths: Sequence[int] = (16, 32, 32, 64),
        strides: Sequence[int] = (1, 2, 1, 2),
        classes: int = 10,
        channels: int = 1,
    ) -> None:
        super().__init__()
        if not widths or len(widths) != len(strides) or min(*widths, *strides) < 1:
            raise ConfigError(
                f"ConvNet needs as many strides as widths, all positive; received {widths}, {strides}"
            )
        self.arguments = {
            "widths": list(widths),
            "strides": list(strides),
            "classes": classes,
            "channels": channels,
        }
        layers: list[nn.Module] = []
        for inputs, outputs, stride in zip((channels, *widths), widths, strides, strict=False):
            layers += [
                nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
                nn.BatchNorm2d(outputs),
                nn.ReLU(),
            ]
        self.features = nn.Sequential(*layers)
        self.linear = nn.Linear(widths[-1], classes)
        _initialise(self)

    @no_type_check  # fx traces it with proxies
    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B classes"]:
        return self.linear(self.features(x).mean((2, 3)))

    def wider(self, factor: float | int) -> ConvNet:
        return ConvNet(**{**self.arguments, "widths": _scaled(self.arguments["widths"], factor)})

    def current_arguments(self) -> dict[str, Any]:
        widths = [layer.out_channels for layer in self.features if isinstance(layer, nn.Conv2d)]
        return {**self.arguments, "widths": widths}


class MLP(Classifier):
    """Linear layers with ReLU on the flattened image.

    Args:
        inputs: pixels times channels.
        widths: of the hidden layers.
        classes: of the output.
    """

    def __init__(self, inputs: int = 64, widths: Sequence[int] = (256, 256), classes: int = 10) -> None:
        super().__init__()
        self.arguments = {"inputs": inputs, "widths": list(widths), "classes": classes}
        layers: list[nn.Module] = [nn.Flatten()]
        for fan_in, fan_out in zip((inputs, *widths), widths, strict=False):
            layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
        self.layers = nn.Sequential(*layers)
        self.linear = nn.Linear((inputs, *widths)[-1], classes)
        _initialise(self)

    @no_type_check  # fx traces it with proxies
    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B classes"]:
        return self.linear(self.layers(x))

    def wider(self, factor: float | int) -> MLP:
        return MLP(**{**self.arguments, "widths": _scaled(self.arguments["widths"], factor)})

    def current_arguments(self) -> dict[str, Any]:
        widths = [layer.out_features for layer in self.layers if isinstance(layer, nn.Linear)]
        return {**self.arguments, "widths": widths}


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "B tokens dim"]) -> Float[Tensor, "B tokens dim"]:
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.heads, dim // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.proj(mixed.transpose(1, 2).reshape(batch, tokens, dim))


class EncoderBlock(nn.Module):
    """Attention and feed-forward, each after a norm and with a shortcut."""

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(dim), Attention(dim, heads)
        self.norm2, self.fc1, self.fc2 = nn.LayerNorm(dim), nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Float[Tensor, "B tokens dim"]) -> Float[Tensor, "B tokens dim"]:
        x = x + self.attention(self.norm1(x))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class ViT(Classifier):
    """A vision transformer: linear patches, learned positions, encoder blocks, the mean of all tokens.

    Args:
        size: side of the image.
        patch: side of a patch; divides `size`.
        dim: of a token; divisible by `heads`.
        depth: number of blocks.
        heads: of the attention.
        hidden: width of the feed-forward layers, of all or of each.
        classes: of the output.
        channels: of the input.
    """

    def __init__(
        self,
        size: int = 8,
        patch: int = 2,
        dim: int = 64,
        depth: int = 2,
        heads: int = 4,
        hidden: int | Sequence[int] = 128,
        classes: int = 10,
        channels: int = 1,
    ) -> None:
        super().__init__()
        if size % patch or dim % heads:
            raise ConfigError(f"ViT: {patch} must divide {size} and {heads} heads must divide {dim}")
        widths = [hidden] * depth if isinstance(hidden, int) else list(hidden)
        if len(widths) != depth:
            raise ConfigError(f"ViT of {depth} blocks needs as many hidden widths; received {widths}")
        self.arguments = {
            "size": size,
            "patch": patch,
            "dim": dim,
            "depth": depth,
            "heads": heads,
            "hidden": hidden if isinstance(hidden, int) else widths,
            "classes": classes,
            "channels": channels,
        }
        self.patches = nn.Conv2d(channels, dim, patch, patch)
        self.positions = nn.Parameter(torch.randn(1, (size // patch) ** 2, dim) * 0.02)
        self.blocks = nn.Sequential(*(EncoderBlock(dim, heads, width) for width in widths))
        self.norm = nn.LayerNorm(dim)
        self.linear = nn.Linear(dim, classes)

    @no_type_check  # fx traces it with proxies
    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B classes"]:
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        return self.linear(self.norm(self.blocks(tokens)).mean(1))

    def wider(self, factor: float | int) -> ViT:
        heads = self.arguments["heads"]
        dim = max(1, round(self.arguments["dim"] * factor / heads)) * heads
        hidden = _scaled(self.current_arguments()["hidden"], factor)
        return ViT(**{**self.arguments, "dim": dim, "hidden": hidden})

    def current_arguments(self) -> dict[str, Any]:
        hidden = [block.fc1.out_features for block in self.blocks if isinstance(block, EncoderBlock)]
        return {**self.arguments, "hidden": hidden}


def _scaled(widths: Sequence[int], factor: float | int) -> list[int]:
    return [max(1, round(width * factor)) for width in widths]


def _initialise(model: nn.Module) -> None:
    """He's normal initialisation of weights, zero biases."""
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def pretrained_resnet(depth: int = 20) -> ResNet:
    """The ResNet for CIFAR-10 of akamaster/pytorch_resnet_cifar10, from $ZOO_DATA/weights/resnet-cifar10.

    Trained on true pixels: measure it on `cifar10-true`, whose 932 test images it has not seen.

    Raises:
        DataError: ZOO_DATA is not set, or has no weights of this depth.
    """
    root = os.environ.get("ZOO_DATA")
    files = sorted(Path(root, "weights", "resnet-cifar10").glob(f"resnet{depth}-*.th")) if root else []
    if not files:
        raise MissingDataError(
            f"no weights resnet{depth}-*.th at {root or '$ZOO_DATA'}/weights/resnet-cifar10: set ZOO_DATA, "
            "or choose depth 20, 32, 44 or 56"
        )
    return read_resnet(files[0], depth)


def read_resnet(path: Path, depth: int) -> ResNet:
    """A ResNet of akamaster/pytorch_resnet_cifar10 from its file; nothing in the file is executed."""
    stored = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    model = ResNet(depth)
    model.load_state_dict({name.removeprefix("module."): value for name, value in stored.items()})
    return model.eval()
