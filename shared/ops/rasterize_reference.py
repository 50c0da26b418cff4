"""The definition of `rasterize` in plain PyTorch: a list of the pairs (Gaussian, pixel) inside its contours.

Everything here is differentiable by autograd, for the camera too, in any floating-point dtype, on any device.
The conventions are those of gsplat 1.5 (its `_torch_impl.py`), but for two: a pixel meets every Gaussian in
whose 1/255 contour it lies (gsplat stops at the first that would leave less than 1e-4 of the light), and
nothing is cut at three standard deviations.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

ALPHA_MIN = 1 / 255
ALPHA_MAX = 0.999
SH_BASES = (1, 4, 9, 16, 25)


class Projected(NamedTuple):
    """Gaussians on the image plane, in the order they came in.

    Attributes:
        means: [N, 2] pixels.
        covariances: [N, 3] xx, xy, yy in square pixels, `eps2d` added.
        depths: [N] along the camera's axis.
        opacities: [N], with the factor of antialiasing.
        visible: [N] bool, between the planes and opaque enough to be drawn anywhere.
    """

    means: Tensor
    covariances: Tensor
    depths: Tensor
    opacities: Tensor
    visible: Tensor


def rotations(quats: Tensor) -> Tensor:
    """Rotation matrices [N, 3, 3] of quaternions [N, 4] (w, x, y, z) of any length but zero."""
    w, x, y, z = functional.normalize(quats, dim=-1).unbind(-1)
    rows = [
        (1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
        (2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
        (2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
    ]
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


def project(
    means: Tensor,
    quats: Tensor,
    scales: Tensor,
    opacities: Tensor,
    viewmat: Tensor,
    intrinsics: Tensor,
    width: int,
    height: int,
    *,
    near: float = 0.01,
    far: float = 1e10,
    eps2d: float = 0.3,
    antialiased: bool = False,
) -> Projected:
    """Project Gaussians by the local affine approximation of Zwicker et al., "EWA splatting" (2002).

    The slope of a Gaussian far outside the image is held within 1.3 times the field of view, as in 3DGS.
    """
    rotation, translation = viewmat[:3, :3], viewmat[:3, 3]
    x, y, z = (means @ rotation.T + translation).unbind(-1)
    visible = (z > near) & (z < far)
    z = torch.where(visible, z, 1.0)
    focal, centre = (intrinsics[0, 0], intrinsics[1, 1]), (intrinsics[0, 2], intrinsics[1, 2])
    rows, flat = [], []
    for axis, (along, size) in enumerate(((x, width), (y, height))):
        margin = 0.15 * size / focal[axis]
        low, high = -centre[axis] / focal[axis] - margin, (size - centre[axis]) / focal[axis] + margin
        held = (along / z).clamp(low, high)
        row = [torch.zeros_like(z), torch.zeros_like(z), -focal[axis] * held / z]
        row[axis] = focal[axis] / z
        rows.append(torch.stack(row, -1))
        flat.append(focal[axis] * along / z + centre[axis])
    jacobian = torch.stack(rows, -2)
    half = jacobian @ (
        rotation @ (rotations(quats) * scales[:, None, :])
    )  # [N, 2, 3], a root of the covariance
    xx, xy, yy = half[:, 0].square().sum(-1), (half[:, 0] * half[:, 1]).sum(-1), half[:, 1].square().sum(-1)
    bare = xx * yy - xy * xy
    xx, yy = xx + eps2d, yy + eps2d
    det = xx * yy - xy * xy
    if antialiased:
        seen = bare > 0
        factor = torch.where(seen, torch.where(seen, bare, 1.0) / torch.where(seen, det, 1.0), 0.0)
        opacities = opacities * torch.where(seen, torch.where(seen, factor, 1.0).sqrt(), 0.0)
    visible = visible & (det > 0) & (opacities >= ALPHA_MIN)
    return Projected(torch.stack(flat, -1), torch.stack((xx, xy, yy), -1), z, opacities, visible)


def sh_bases(directions: Tensor, count: int) -> Tensor:
    """The first `count` real spherical harmonics at unit vectors [N, 3], in the order of 3DGS: [N, count].

    Recurrences of Sloan, "Efficient Spherical Harmonic Evaluation" (JCGT 2013).
    """
    x, y, z = directions.unbind(-1)
    out = [torch.full_like(x, 0.2820947917738781)]
    if count > 1:
        out += [-0.48860251190292 * y, 0.48860251190292 * z, -0.48860251190292 * x]
    zz, cos2, sin2 = z * z, x * x - y * y, 2 * x * y
    band2 = 0.9461746957575601 * zz - 0.3153915652525201
    if count > 4:
        one = -1.092548430592079 * z
        out += [0.5462742152960395 * sin2, one * y, band2, one * x, 0.5462742152960395 * cos2]
    cos3, sin3 = x * cos2 - y * sin2, x * sin2 + y * cos2
    band3 = z * (1.865881662950577 * zz - 1.119528997770346)
    if count > 9:
        one, two = -2.285228997322329 * zz + 0.4570457994644658, 1.445305721320277 * z
        out += [-0.5900435899266435 * sin3, two * sin2, one * y, band3, one * x, two * cos2]
        out += [-0.5900435899266435 * cos3]
    if count > 16:
        cos4, sin4 = x * cos3 - y * sin3, x * sin3 + y * cos3
        one = z * (-4.683325804901025 * zz + 2.007139630671868)
        two, three = 3.31161143515146 * zz - 0.47308734787878, -1.770130769779931 * z
        out += [0.6258357354491763 * sin4, three * sin3, two * sin2, one * y]
        out += [1.984313483298443 * z * band3 - 1.006230589874905 * band2]
        out += [one * x, two * cos2, three * cos3, 0.6258357354491763 * cos4]
    return torch.stack(out, -1)


def sh_colours(sh: Tensor, means: Tensor, viewmat: Tensor) -> Tensor:
    """Colours [N, 3] of harmonics [N, bases, 3] as the camera sees them: half is added, below zero is cut."""
    centre = -viewmat[:3, :3].T @ viewmat[:3, 3]
    directions = functional.normalize(means - centre, dim=-1)
    bases = sh_bases(directions, sh.shape[1])
    return ((bases[:, :, None] * sh).sum(1) + 0.5).clamp_min(0)


def boxes(flat: Projected, width: int, height: int) -> tuple[Tensor, Tensor]:
    """Pixels that each contour may reach: first (x, y), and number of columns and rows, int64 [N, 2] each."""
    reach = 2 * (flat.opacities.clamp_min(ALPHA_MIN) / ALPHA_MIN).log()
    extent = (reach[:, None] * flat.covariances[:, ::2]).sqrt()
    size = torch.tensor([width, height], device=extent.device)
    first = (flat.means - extent - 0.5).ceil().clamp_min(0).minimum(size.to(extent))
    last = (flat.means + extent - 0.5).floor().clamp_min(-1).minimum(size.to(extent) - 1)
    count = (last - first + 1).clamp_min(0)
    return first.long(), torch.where(flat.visible[:, None], count, 0.0).long()


def draw(flat: Projected, channels: Tensor, width: int, height: int) -> Tensor:
    """Blend channels [N, C] front to back: [C + 1, height, width], the last plane being alpha.

    alpha_i = min(0.999, opacity_i exp(-d^T covariance_i^-1 d / 2)), those below 1/255 dropped;
    out = sum over i, by depth, of channels_i alpha_i prod_{j nearer} (1 - alpha_j).
    """
    first, count = boxes(flat, width, height)
    owner = torch.repeat_interleave(count.prod(-1))
    start = (count.prod(-1).cumsum(0) - count.prod(-1))[owner]
    within = torch.arange(owner.numel(), device=owner.device) - start
    column = first[owner, 0] + within % count[owner, 0]
    row = first[owner, 1] + torch.div(within, count[owner, 0], rounding_mode="floor")

    def alphas(owner: Tensor, column: Tensor, row: Tensor) -> Tensor:
        dx = column + 0.5 - flat.means[owner, 0]
        dy = row + 0.5 - flat.means[owner, 1]
        xx, xy, yy = flat.covariances.unbind(-1)
        det = (xx * yy - xy * xy)[owner]
        distance = (yy[owner] * dx * dx - 2 * xy[owner] * dx * dy + xx[owner] * dy * dy) / det
        return flat.opacities[owner] * torch.exp(-distance / 2)

    with torch.no_grad():
        kept = (alphas(owner, column, row) >= ALPHA_MIN).nonzero()[:, 0]
        owner, column, row = owner[kept], column[kept], row[kept]
        rank = torch.empty(len(count), dtype=torch.int64, device=owner.device)
        rank[flat.depths.detach().argsort(stable=True)] = torch.arange(len(count), device=owner.device)
        order = ((row * width + column) * len(count) + rank[owner]).argsort()
        owner, column, row = owner[order], column[order], row[order]
    pixel = row * width + column
    alpha = alphas(owner, column, row).clamp_max(ALPHA_MAX)
    # The sum of logarithms over a million pairs needs more digits than float32 has.
    light = torch.log1p(-alpha.double())
    before = light.cumsum(0) - light
    starts = torch.searchsorted(pixel, torch.arange(width * height, device=pixel.device))
    padded = torch.cat([before, before.new_zeros(1)])
    weight = alpha * torch.exp(before - padded[starts][pixel]).to(alpha.dtype)
    channels = torch.cat([channels, torch.ones_like(channels[:, :1])], 1)
    out = channels.new_zeros(width * height, channels.shape[1])
    out = out.index_add(0, pixel, weight[:, None] * channels[owner])
    return out.T.reshape(-1, height, width)
