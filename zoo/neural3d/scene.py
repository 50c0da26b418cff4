"""A scene of Gaussians as a module: parameters that train, rows that pruning drops, `render` for a view."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from zoo.neural3d.cameras import Camera
from zoo.neural3d.splats import Splats
from zoo.shared.ops.rasterize import Rendering, rasterize


class GaussianScene(nn.Module):
    """Gaussians that a camera can look at.

    Parameters, one row a Gaussian, are unbounded, with the names and the layout of gsplat: `means` [n, 3],
    `quats` [n, 4] (w, x, y, z), `scales` [n, 3] (logarithms), `opacities` [n] (logits), `sh0` [n, 1, 3] and
    `shN` [n, bases - 1, 3], apart since the harmonics beyond the first are trained more slowly.

    Args:
        count: number of Gaussians.
        sh_degree: of the harmonics, 0 to 4.
        background: colour where nothing is.
        antialiased: see `rasterize`.

    Attributes:
        full_precision: that it computes in float32, also on weights stored in float16.
    """

    full_precision: ClassVar[bool] = True

    def __init__(
        self,
        count: int,
        sh_degree: int = 0,
        background: Sequence[float] = (0.0, 0.0, 0.0),
        antialiased: bool = False,
    ) -> None:
        super().__init__()
        self.sh_degree, self.antialiased = sh_degree, antialiased
        self.means = nn.Parameter(torch.zeros(count, 3))
        self.quats = nn.Parameter(torch.tensor([1.0, 0, 0, 0]).repeat(count, 1))
        self.scales = nn.Parameter(torch.zeros(count, 3))
        self.opacities = nn.Parameter(torch.zeros(count))
        self.sh0 = nn.Parameter(torch.zeros(count, 1, 3))
        self.shN = nn.Parameter(torch.zeros(count, (sh_degree + 1) ** 2 - 1, 3))
        self.register_buffer(
            "background", torch.tensor(list(background), dtype=torch.float32), persistent=False
        )
        self.background: Tensor

    @classmethod
    def from_splats(
        cls, splats: Splats, background: tuple[float, float, float] = (0.0, 0.0, 0.0)
    ) -> GaussianScene:
        """The scene of what a file holds."""
        scene = cls(len(splats), splats.sh_degree, background)
        with torch.no_grad():
            for name in ("means", "quats", "scales", "opacities"):
                getattr(scene, name).copy_(getattr(splats, name))
            scene.sh0.copy_(splats.sh[:, :1])
            scene.shN.copy_(splats.sh[:, 1:])
        return scene

    def like(self, splats: Splats) -> GaussianScene:
        """A scene of other Gaussians over the same background."""
        red, green, blue = self.background.tolist()
        other = GaussianScene.from_splats(splats, (red, green, blue))
        other.antialiased = self.antialiased
        return other

    def __len__(self) -> int:
        return len(self.means)

    @property
    def splats(self) -> Splats:
        """What a file would hold: the parameters without their history."""
        sh = torch.cat([self.sh0, self.shN], 1)
        return Splats(self.means, self.quats, self.scales, self.opacities, sh).map(torch.Tensor.detach)

    def render(
        self,
        camera: Camera,
        *,
        background: Tensor | None = None,
        features: Tensor | None = None,
        shift: Tensor | None = None,
        sh_degree: int | None = None,
    ) -> Rendering:
        """What the camera sees.

        Args:
            background: colour [3] instead of the scene's.
            features: [n, f] more values to blend.
            shift: [n, 2] pixels, zeros whose gradient tells where more Gaussians are needed.
            sh_degree: harmonics up to this one only.
        """
        return rasterize(
            self.means,
            self.quats,
            self.scales.exp(),
            self.opacities.sigmoid(),
            torch.cat([self.sh0, self.shN], 1),
            camera.viewmat.to(self.means),
            camera.intrinsics.to(self.means),
            camera.width,
            camera.height,
            sh_degree=self.sh_degree if sh_degree is None else sh_degree,
            features=features,
            shift=shift,
            background=self.background if background is None else background,
            antialiased=self.antialiased,
        )

    def forward(self, camera: Camera) -> Tensor:
        """The colours [height, width, 3] that the camera sees."""
        return self.render(camera).colour
