"""gsplat behind the signature of `zoo::rasterize`, for a CUDA device. No test runs it: it needs a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import OpError


def rasterize_gsplat(
    means: Tensor,
    quats: Tensor,
    scales: Tensor,
    opacities: Tensor,
    sh: Tensor | None,
    values: Tensor,
    shift: Tensor | None,
    viewmat: Tensor,
    intrinsics: Tensor,
    options: tuple[int, int, float, float, float, bool],
) -> Tensor:
    """The image [channels + depth + alpha, height, width] by `gsplat.rasterization` (gsplat >= 1.5).

    Raises:
        OpError: gsplat is not installed, or `shift` is given, which gsplat has no room for.
    """
    try:
        from gsplat import rasterization
    except ImportError as error:
        raise OpError("drawing Gaussians on a GPU needs gsplat: pip install 'gsplat>=1.5.3'") from error
    if shift is not None:
        raise OpError("gsplat has no shift of projected means: leave it out, or draw on the CPU")
    from .rasterize_reference import sh_colours

    width, height, near, far, eps2d, antialiased = options
    colours = values if sh is None else torch.cat([sh_colours(sh, means, viewmat), values], 1)
    out, alpha, _ = rasterization(
        means,
        quats,
        scales,
        opacities,
        colours,
        viewmat[None],
        intrinsics[None],
        width,
        height,
        near_plane=near,
        far_plane=far,
        eps2d=eps2d,
        render_mode="RGB+D",
        rasterize_mode="antialiased" if antialiased else "classic",
    )
    return torch.cat([out[0], alpha[0]], -1).permute(2, 0, 1)
