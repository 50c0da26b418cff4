"""Super-resolution data and metrics: T91 patches for training, Set5 and Set14 for testing, PSNR and SSIM on
luma.

The protocol is the usual one: outputs rounded to bytes, Y of BT.601 YCbCr, `scale` pixels cropped off each
border. Metrics are those of torchmetrics.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from zoo.bundles.sources import Source
from zoo.errors import ConfigError, DataError, MissingDataError, TaskError
from zoo.harness.tasks import Flops, Progress, Task, TaskResult, register_task
from zoo.shared.measure.account import count
from zoo.vision.upscalers import Upscaler

SOURCE = Source(
    "T91 (training), Set5 and Set14 (test)",
    "tegg89/SRCNN-Tensorflow, jbhuang0604/SelfExSR",
    "not stated (repositories: MIT; not stated)",
)
Pair = tuple[Tensor, Tensor]


def superres_folder() -> Path:
    """The folder superres below $ZOO_DATA.

    Raises:
        DataError: ZOO_DATA is not set, or has no such folder.
    """
    root = os.environ.get("ZOO_DATA")
    folder = Path(root) / "superres" if root else None
    if folder is None or not (folder / "T91").is_dir():
        raise MissingDataError(
            f"Super-resolution images are not at {folder or '$ZOO_DATA/superres'}. Set ZOO_DATA to the "
            "folder with superres/."
        )
    return folder


def _read(path: Path) -> UInt8[Tensor, "3 H W"]:
    from PIL import Image

    return torch.from_numpy(np.asarray(Image.open(path).convert("RGB")).copy()).permute(2, 0, 1).contiguous()


def shrunk(image: UInt8[Tensor, "3 H W"], scale: int) -> UInt8[Tensor, "3 h w"]:
    """A `scale` times smaller copy by Pillow's bicubic filter; width and height must divide."""
    from PIL import Image

    _, height, width = image.shape
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    small = picture.resize((width // scale, height // scale), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.asarray(small).copy()).permute(2, 0, 1).contiguous()


def load_t91(scale: int) -> list[Pair]:
    """(small, large) training images as bytes, the large ones cropped to multiples of `scale`."""
    pairs = []
    for path in sorted((superres_folder() / "T91").glob("*.png")):
        large = _read(path)
        height, width = (side // scale * scale for side in large.shape[1:])
        large = large[:, :height, :width].contiguous()
        pairs.append((shrunk(large, scale), large))
    return pairs


def load_test(name: str, scale: int) -> list[Pair]:
    """(small, large) images of Set5 or Set14 as bytes; the small ones are those made by MATLAB.

    Raises:
        DataError: no such set or scale.
    """
    folder = superres_folder() / name
    small = sorted((folder / f"LRx{scale}").glob("*.png"))
    if not small:
        raise DataError(f"no images in {folder / f'LRx{scale}'}; there are Set5 and Set14, x2 and x4")
    pairs = []
    for path in small:
        low = _read(path)
        high = _read(folder / "HR" / path.name)[:, : scale * low.shape[1], : scale * low.shape[2]]
        pairs.append((low, high.contiguous()))
    return pairs


@dataclass(frozen=True)
class PatchBatches:
    """Random patches of the training images, turned and mirrored.

    Args:
        pairs: (small, large) images as bytes.
        patch: side in the small image.
        batch: patches per step.
        steps: per epoch.
        device: where the batches go.
    """

    pairs: list[Pair]
    patch: int = 24
    batch: int = 16
    steps: int = 50
    device: torch.device = torch.device("cpu")

    def __len__(self) -> int:
        return self.steps

    def draw(self, generator: torch.Generator) -> Iterator[Pair]:
        for _ in range(self.steps):
            drawn = [self._patch(generator) for _ in range(self.batch)]
            small, large = (
                torch.stack(side).to(self.device).float() / 255 for side in zip(*drawn, strict=True)
            )
            yield small, large

    def example(self) -> tuple[Tensor, ...]:
        return (self.pairs[0][0][None, :, : self.patch, : self.patch].to(self.device).float() / 255,)

    def _patch(self, generator: torch.Generator) -> Pair:
        def below(limit: int) -> int:
            return int(torch.randint(limit, (), generator=generator))

        low, high = self.pairs[below(len(self.pairs))]
        scale = high.shape[1] // low.shape[1]
        size = min(self.patch, *low.shape[1:])
        top, left = below(low.shape[1] - size + 1), below(low.shape[2] - size + 1)
        small = low[:, top : top + size, left : left + size]
        large = high[:, scale * top : scale * (top + size), scale * left : scale * (left + size)]
        turns, mirror = below(4), below(2)
        both = (torch.rot90(side, turns, (1, 2)) for side in (small, large))
        small, large = (side.flip(2) if mirror else side for side in both)
        return small, large


def l1_loss(model: nn.Module, batch: Pair) -> Float[Tensor, ""]:
    """Mean absolute error of an upscaler on a batch of small and large patches."""
    small, large = batch
    return F.l1_loss(model(small), large)


def luma(image: Float[Tensor, "3 H W"]) -> Float[Tensor, "H W"]:
    """Y of BT.601 in 16..235 from RGB in 0..255."""
    weights = torch.tensor([65.481, 128.553, 24.966], dtype=image.dtype) / 255
    return 16 + (image * weights.view(3, 1, 1)).sum(0)


def quality(made: Float[Tensor, "3 H W"], true: UInt8[Tensor, "3 H W"], crop: int) -> tuple[float, float]:
    """PSNR in dB and SSIM of an image in 0..1 against bytes, on luma, without `crop` pixels at each border.

    Raises:
        ConfigError: torchmetrics is not installed.
    """
    try:
        from torchmetrics.functional.image import (
            peak_signal_noise_ratio,
            structural_similarity_index_measure,
        )
    except ModuleNotFoundError as error:
        raise ConfigError(
            "PSNR and SSIM need the package torchmetrics. Run: pip install 'sparse-model-zoo[vision]'"
        ) from error
    bytes_made = (made * 255).round().clamp(0, 255).double()
    inside = slice(crop, -crop or None)
    a, b = (luma(image)[None, None, inside, inside] for image in (bytes_made, true.double()))
    return (
        float(peak_signal_noise_ratio(a, b, data_range=255.0)),
        float(structural_similarity_index_measure(a, b, data_range=255.0, sigma=1.5, kernel_size=11)),  # type: ignore[arg-type]
    )


class SuperResolution(Task):
    """PSNR (primary, dB) and SSIM on luma over one test set; a sample is an image. Subclasses name it."""

    domain = "vision"
    primary = "psnr"
    unit = "dB"
    images: ClassVar[str]
    scale: ClassVar[int] = 2

    def accepts(self, card: Any) -> bool:
        """Upscalers of this scale."""
        return card.domain == self.domain and card.architecture.args.get("scale") == self.scale

    def measured_on(self) -> Any:
        """Pairs of a small image and the large one."""
        return load_test(self.images, self.scale)

    def evaluate(self, model: nn.Module, *, progress: Progress | None = None) -> TaskResult:
        """Measure every image whole."""
        if getattr(model, "scale", None) != self.scale:
            raise TaskError(
                f"{self.name} needs an upscaler by {self.scale}; received {type(model).__name__} with scale "
                f"{getattr(model, 'scale', None)}"
            )
        pairs = load_test(self.images, self.scale)
        values = []
        for done, (small, large) in enumerate(pairs):
            if progress is not None:
                progress(done, len(pairs), self.name)
            with torch.no_grad():
                made = model(small[None].float() / 255)[0]
            values.append(quality(made, large, self.scale))
        psnr, ssim = (list(column) for column in zip(*values, strict=True))
        return TaskResult.from_samples({"psnr": psnr, "ssim": ssim}, f"{self.images}x{self.scale}")

    def flops(self, model: nn.Module) -> Flops | None:
        """Operations for a small image of 64 x 64."""
        if not isinstance(model, Upscaler):
            return None
        total = count(model, (torch.zeros(1, 3, 64, 64),)).total
        return Flops(total.flops, total.flops_kept)


@register_task
class Set5(SuperResolution):
    """Set5, twice the size: five photos."""

    name, images = "vision/set5-x2", "Set5"


@register_task
class Set14(SuperResolution):
    """Set14, twice the size: fourteen photos."""

    name, images = "vision/set14-x2", "Set14"
