"""gsplat behind the signature of `zoo::rasterize`, for a CUDA device. No test runs it: it needs a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import OpError
from .rasterize_native import Camera, Scene
from .rasterize_reference import sh_colours


def rasterize_gsplat(scene: Scene, camera: Camera) -> Tensor:
    """The image [channels + depth + alpha, height, width] by `gsplat.rasterization` (gsplat >= 1.5).

    Raises:
        OpError: gsplat is not installed, or `shift` is given, which gsplat has no room for.
    """
    try:
        from gsplat import rasterization
    except ImportError as error:
        raise OpError("drawing Gaussians on a GPU needs gsplat: pip install 'gsplat>=1.5.3'") from error
    if scene.shift is not None:
        raise OpError("gsplat has no shift of projected means: leave it out, or draw on the CPU")
    colours = scene.values
    if scene.sh is not None:
        colours = torch.cat([sh_colours(scene.sh, scene.means, camera.viewmat), colours], 1)
    out, alpha, _ = rasterization(
        *scene[:4],
        colours,
        camera.viewmat[None],
        camera.intrinsics[None],
        camera.width,
        camera.height,
        near_plane=camera.near,
        far_plane=camera.far,
        eps2d=camera.eps2d,
        render_mode="RGB+D",
        rasterize_mode="antialiased" if camera.antialiased else "classic",
    )
    return torch.cat([out[0], alpha[0]], -1).permute(2, 0, 1)
