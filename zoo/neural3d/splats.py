"""The tensors of a Gaussian scene, as files have them and as they are trained: unbounded, one row a
Gaussian."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from zoo.errors import DataError
from zoo.shared.ops.rasterize_reference import sh_bases

SH_C0 = 0.28209479177387814  # the first harmonic, which is constant


@dataclass(frozen=True)
class Splats:
    """Gaussians in the layout of 3DGS, float32, OpenCV axes.

    Attributes:
        means: [N, 3].
        quats: [N, 4] as (w, x, y, z), of any length but zero.
        scales: [N, 3], natural logarithms of the standard deviations.
        opacities: [N], logits.
        sh: [N, bases, 3], bases 1, 4, 9, 16 or 25; colour = 0.5 + harmonics . sh.
    """

    means: Tensor
    quats: Tensor
    scales: Tensor
    opacities: Tensor
    sh: Tensor

    def __len__(self) -> int:
        return len(self.means)

    @property
    def sh_degree(self) -> int:
        """Degree of the harmonics."""
        return math.isqrt(self.sh.shape[1]) - 1

    def rows(self, index: Tensor) -> Splats:
        """The Gaussians that a mask or an index picks."""
        return self.map(lambda tensor: tensor[index])

    def map(self, change: Callable[[Tensor], Tensor]) -> Splats:
        """The scene with each tensor changed."""
        return Splats(*map(change, self.tensors))

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The five tensors, in the order of the fields."""
        return self.means, self.quats, self.scales, self.opacities, self.sh

    def with_degree(self, degree: int) -> Splats:
        """The same Gaussians with harmonics up to `degree`: higher ones are dropped, missing ones zero."""
        bases = (degree + 1) ** 2
        sh = self.sh[:, :bases]
        if sh.shape[1] < bases:
            sh = torch.cat([sh, sh.new_zeros(len(self), bases - sh.shape[1], 3)], 1)
        return replace(self, sh=sh)

    def turned(self) -> Splats:
        """The scene with y and z negated: from y up to y down and back."""
        sign = self.means.new_tensor([1.0, -1.0, -1.0])
        direction = torch.tensor([[0.48, 0.6, 0.64]], dtype=torch.float64)
        bases = self.sh.shape[1]
        parity = sh_bases(direction * sign.double(), bases) / sh_bases(direction, bases)
        quats = self.quats * self.quats.new_tensor([1.0, 1.0, -1.0, -1.0])
        sh = self.sh * parity.round().to(self.sh.dtype).T
        return replace(self, means=self.means * sign, quats=quats, sh=sh)


def from_points(points: Tensor, colours: Tensor, sh_degree: int) -> Splats:
    """Round Gaussians at points [n, 3], as wide as the mean distance to the three nearest others (3DGS)."""
    distance = torch.cdist(points, points)
    distance.fill_diagonal_(torch.inf)
    near = distance.topk(min(3, len(points) - 1), largest=False).values.mean(1).clamp_min(1e-6)
    n = len(points)
    quats = torch.tensor([1.0, 0, 0, 0]).repeat(n, 1)
    opacities = torch.full((n,), 0.1).logit()
    splats = Splats(
        points, quats, near.log()[:, None].repeat(1, 3), opacities, (colours[:, None] - 0.5) / SH_C0
    )
    return splats.with_degree(sh_degree)


def checked(splats: Splats, source: str) -> Splats:
    """The splats, if every Gaussian can be drawn.

    Raises:
        DataError: a value that is not finite, or a quaternion of length zero; names the row.
    """
    names = ("position", "rotation", "scale", "opacity", "colour")
    for name, tensor in zip(names, splats.tensors, strict=True):
        wrong = tensor.isfinite().logical_not()
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0, 0])
            raise DataError(f"{source}: the {name} of Gaussian {row} is not finite; drop that Gaussian")
    empty = (splats.quats == 0).all(1)
    if bool(empty.any()):
        raise DataError(f"{source}: the rotation of Gaussian {int(empty.nonzero()[0, 0])} has length zero")
    return splats


def logits(opacity: Tensor) -> Tensor:
    """Logits of opacities in [0, 1], finite for 0 and 1 too."""
    return opacity.double().clamp(1e-6, 1 - 1e-6).logit().float()
