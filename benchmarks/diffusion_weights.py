"""Pruning networks that were trained elsewhere: two denoisers of MNIST, and the autoencoder of FLUX.2.

Their weights lie below $ZOO_DATA/weights (README-A, README-C there). Of each denoiser, noise is predicted in
test images at random times, and images are sampled from fixed noise; drift is their mean squared difference
from the dense network's. Of the autoencoder, photographs are encoded densely and decoded by the pruned
decoder. Nothing is trained. Seeds decide noise, times and random scores.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from PIL import Image
from torch import Tensor, nn

from zoo.diffusion.latents import codec
from zoo.diffusion.methods.stable_diffusion import PruneParts
from zoo.diffusion.sampling import sample
from zoo.errors import DataError
from zoo.methods.magnitude import MagnitudePruning
from zoo.mnist import read_mnist
from zoo.shared.bench import machine
from zoo.shared.store.io import write_json
from zoo.shared.train import Job

SHARES = (0.2, 0.35, 0.5)
SCORES: dict[str, dict[str, Any]] = {
    "magnitude": {},
    "magnitude, global": {"scope": "global"},
    "wanda": {"score": "wanda", "scope": "row", "guidance": 1.0},
    "random": {"score": "random"},
}
CLIP = {"clip_sample": True}  # both were made to be sampled so


def read(name: str) -> dict[str, Tensor]:
    """The tensors of a file below $ZOO_DATA/weights; nothing in it is executed.

    Raises:
        DataError: it is not there.
    """
    path = Path(os.environ.get("ZOO_DATA", "")) / "weights" / name
    if not path.is_file():
        raise DataError(f"{path} is not there. Set ZOO_DATA to the folder with weights/.")
    found: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return found


class Unprompted(nn.Module):
    """A denoiser without prompts, as samplers and methods of text-to-image models take it.

    Args:
        denoiser: (images [n, 1, 28, 28], time steps [n]) -> noise.
        scheduler: of its noise.
        scale: half the range of its pixels.
    """

    def __init__(self, denoiser: nn.Module, scheduler: DDIMScheduler, scale: float) -> None:
        super().__init__()
        self.denoiser, self.scheduler, self.scale = denoiser, scheduler, scale

    def denoise(self, x: Tensor, times: Tensor, condition: Any = None) -> Tensor:
        """The noise in noisy images."""
        made: Tensor = self.denoiser(x, times)
        return made

    def encode(self, ids: Tensor) -> Tensor:
        """Nothing to encode."""
        return ids


class ConvDenoiser(nn.Module):
    """`ddpm-mnist`: convolutions of 7x7 at full resolution with layer norms over whole maps, 291,217
    parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.zeros(16))
        widths = (1, 16, 32, 32, 16)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {"net": nn.Sequential(nn.Conv2d(i, o, 7, padding=3), nn.LayerNorm((o, 28, 28)), nn.GELU())}
            )
            for i, o in itertools.pairwise(widths)
        )
        self.blocks.append(nn.Conv2d(16, 1, 3, padding=1))
        self.time_embed = nn.Sequential(
            *(layer for i in (32, 128, 128) for layer in (nn.Linear(i, 128), nn.GELU())), nn.Linear(128, 16)
        )

    def forward(self, x: Tensor, times: Tensor) -> Tensor:
        angles = (times[:, None] + 1) / 1000 * self.frequencies
        time = self.time_embed(torch.cat([angles.sin(), angles.cos() - 1], 1))
        first, *rest, last = self.blocks
        x = first["net"](x) + time[:, :, None, None]  # type: ignore[index]
        for block in rest:
            x = block["net"](x)  # type: ignore[index]
        made: Tensor = last(x)
        return made


class Residual(nn.Module):
    """Two convolutions, with the time added between them."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.gn1, self.gn2 = nn.GroupNorm(min(8, inner), inner), nn.GroupNorm(8, outer)
        self.conv1, self.conv2 = nn.Conv2d(inner, outer, 3, padding=1), nn.Conv2d(outer, outer, 3, padding=1)
        self.linear = nn.Linear(64, outer)
        self.skip = nn.Conv2d(inner, outer, 1) if inner != outer else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = F.silu(self.conv1(self.gn1(x))) + self.linear(time)[:, :, None, None]
        return F.silu(self.skip(x) + self.conv2(self.gn2(h)))


class Residuals(nn.Module):
    """Two of them."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Residual(inner, outer), Residual(outer, outer)])

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, time)
        return x


class SelfAttention(nn.Module):
    """Attention over all pixels, scaled by a learned number."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1))
        self.q, self.k, self.v = (nn.Conv2d(width, width, 1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        rows = (layer(x).flatten(2).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return x + self.gamma * F.scaled_dot_product_attention(*rows).transpose(1, 2).reshape(x.shape)


class AttentionUNet(nn.Module):
    """`unet-mnist-attn`: three levels, one of them with attention, 376,228 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(64, 128), nn.SiLU(), nn.Linear(128, 64))
        self.enc1, self.enc2, self.bottleneck = Residuals(1, 16), Residuals(32, 32), Residuals(64, 64)
        self.down1, self.down2 = nn.Conv2d(16, 32, 4, 2, 1), nn.Conv2d(32, 64, 4, 2, 1)
        self.attn16 = SelfAttention(32)
        self.up2, self.up1 = nn.ConvTranspose2d(64, 32, 4, 2, 1), nn.ConvTranspose2d(32, 16, 4, 2, 1)
        self.dec2, self.dec1 = Residuals(64, 32), Residuals(32, 16)
        self.final = nn.Conv2d(16, 1, 1)

    def forward(self, x: Tensor, times: Tensor) -> Tensor:
        angles = times[:, None] * 10000.0 ** (-torch.arange(32) / 32)
        time = self.embed(torch.cat([angles.sin(), angles.cos()], 1))
        outer = self.enc1(x, time)
        inner = self.attn16(self.enc2(self.down1(outer), time))
        h = self.up2(self.bottleneck(self.down2(inner), time))
        h = self.up1(self.dec2(torch.cat([h, inner], 1), time))
        made: Tensor = self.final(self.dec1(torch.cat([h, outer], 1), time))
        return made


def conv_denoiser() -> Unprompted:
    """The one of 7x7 convolutions, pixels in [-0.5, 0.5]."""
    held = read("ddpm-mnist/ddpm_mnist.pth")
    net = ConvDenoiser()
    net.load_state_dict({name.removeprefix("gt."): v for name, v in held.items() if name.startswith("gt.")})
    betas = held["beta_t"][1:].numpy()
    return Unprompted(net, DDIMScheduler(trained_betas=betas, clip_sample_range=0.5, **CLIP), 0.5).eval()


def attention_unet() -> Unprompted:
    """The UNet with attention, pixels in [-1, 1]."""
    net = AttentionUNet()
    net.load_state_dict(read("unet-mnist-attn/mnist_unet.pth"))
    return Unprompted(net, DDIMScheduler(beta_schedule="squaredcos_cap_v2", **CLIP), 1.0).eval()


DENOISERS: dict[str, Callable[[], Unprompted]] = {
    "ddpm-mnist": conv_denoiser,
    "unet-mnist-attn": attention_unet,
}


def noisy(model: Unprompted, times: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Noisy test images at given times, and their noise, [n, 1, 28, 28]."""
    images = torch.from_numpy(read_mnist("t10k")[0][: len(times)]).float()[:, None] / 127.5 - 1
    kept = model.scheduler.alphas_cumprod[times][:, None, None, None]
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    return kept**0.5 * model.scale * images + (1 - kept) ** 0.5 * noise, noise


@torch.no_grad()
def noise_error(model: Unprompted, times: Tensor, seed: int) -> float:
    """Mean squared error of the predicted noise."""
    x, noise = noisy(model, times, seed)
    return float((model.denoise(x, times) - noise).square().mean())


@torch.no_grad()
def images(model: Unprompted, count: int, seed: int) -> Tensor:
    """Images from fixed noise by ten steps."""
    return sample(model, torch.randn(count, 1, 28, 28, generator=torch.Generator().manual_seed(seed)), None)


def pruned(make: Callable[[], Unprompted], share: float, score: str, seed: int) -> Unprompted:
    """A denoiser without that share of its weights."""
    model = make()
    noise = torch.randn(16, 1, 28, 28, generator=torch.Generator().manual_seed(1000 + seed))
    batch = noise, noise, torch.zeros(16), torch.zeros(16, 1)  # Wanda takes noise and prompts
    PruneParts(sparsity=share, prompts=16, **SCORES[score]).sparsify(model, Job([batch], seed=seed))
    return model


def photographs(count: int, side: int = 128) -> Tensor:
    """The middles of photographs of Set14, in colour, [n, 3, side, side] in [0, 1]."""
    folder = Path(os.environ.get("ZOO_DATA", "")) / "superres" / "Set14" / "HR"
    made = []
    for path in sorted(folder.glob("*.png"))[:count]:
        with Image.open(path) as image:
            wide, high = image.size
            left, top = (wide - side) // 2, (high - side) // 2
            cut = image.convert("RGB").crop((left, top, left + side, top + side))
            made.append(torch.from_numpy(np.asarray(cut).copy()).permute(2, 0, 1) / 255)
    return torch.stack(made)


@torch.no_grad()
def decoded(count: int) -> Iterator[dict[str, Any]]:
    """PSNR of photographs by the pruned decoder, a row for each score and share."""
    truth = photographs(count)
    encoder, dense = codec()
    latents = encoder(truth)
    for score, share in [("dense", 0.0), *itertools.product(("magnitude", "random"), SHARES)]:
        net = dense
        if score != "dense":
            method = MagnitudePruning(sparsity=share, allocation="uniform", score=score)  # type: ignore[arg-type]
            net = method.sparsify(net).model
        error = (net(latents).clamp(0, 1) - truth).square().flatten(1).mean(1)
        yield {"network": "taef2", "score": score, "share": share, "psnr": float(-10 * error.log10().mean())}


def denoised(name: str, seeds: Sequence[int], count: int) -> Iterator[dict[str, Any]]:
    """Noise errors and drifts of a denoiser, a row for each score, share and seed."""
    for seed in seeds:
        times = torch.randint(1000, (8 * count,), generator=torch.Generator().manual_seed(seed))
        dense = DENOISERS[name]()
        whole = images(dense, count, seed)
        row = {"network": name, "seed": seed}
        yield {**row, "score": "dense", "share": 0.0, "noise": noise_error(dense, times, seed), "drift": 0.0}
        for score, share in itertools.product(SCORES, SHARES):
            made = pruned(DENOISERS[name], share, score, seed)
            drift = float((images(made, count, seed) - whole).square().mean()) / made.scale**2
            yield {
                **row,
                "score": score,
                "share": share,
                "noise": noise_error(made, times, seed),
                "drift": drift,
            }


def main() -> int:
    """Print a row per network, score and share."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--images", type=int, default=16, help="that are sampled; eight times as many get noise"
    )
    parser.add_argument("--json", metavar="FILE", help="write the figures as JSON")
    options = parser.parse_args()
    rows = [row for name in DENOISERS for row in denoised(name, range(options.seeds), options.images)]
    rows += decoded(8)
    for network, score, share in dict.fromkeys((r["network"], r["score"], r["share"]) for r in rows):
        same = [r for r in rows if (r["network"], r["score"], r["share"]) == (network, score, share)]
        words = []
        for figure in ("noise", "drift", "psnr"):
            values = [row[figure] for row in same if figure in row]
            spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
            words += [f"{figure} {statistics.fmean(values):.4f}{spread}"] if values else []
        print(f"{network:16} {score:18} {share:5.0%}  {'  '.join(words)}")
    if options.json:
        write_json(options.json, {"benchmark": "diffusion_weights", "machine": machine(), "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
