"""Held-out views as tasks: how near a scene's renderings are to pictures that it was not trained on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from zoo.errors import TaskError
from zoo.harness.tasks import Flops, Progress, Task, TaskResult
from zoo.neural3d.cameras import Camera
from zoo.neural3d.fields import HashField
from zoo.neural3d.methods.edge_gaussians import EdgePoints
from zoo.neural3d.metrics import psnr, ssim
from zoo.neural3d.scene import GaussianScene
from zoo.neural3d.views import Views, load_views
from zoo.shared.ops.rasterize_reference import boxes, project


class HeldOut(Task):
    """PSNR and SSIM over the test views, one sample a view; also inside the object's mask where there is one.

    LPIPS is not measured: its backbone's weights are not available here.
    """

    domain, primary, unit = "neural3d", "psnr", "dB"
    views: str

    def _load(self) -> Views:
        return load_views(self.views)

    def measured_on(self) -> Any:
        return [[view.image, view.camera.viewmat, view.camera.intrinsics] for view in self._load().test]

    def evaluate(self, model: nn.Module, *, progress: Progress | None = None) -> TaskResult:
        """Measure a scene.

        Raises:
            TaskError: a model that renders nothing.
            DataError: the views are not there.
        """
        if not isinstance(model, GaussianScene | HashField):
            raise TaskError(f"{self.name} takes scenes that render; received {type(model).__name__}")
        views = self._load().test
        masked = all(view.mask is not None for view in views)
        samples: dict[str, list[float]] = {"psnr": [], "ssim": []}
        if masked:
            samples |= {"masked_psnr": [], "masked_ssim": []}
        with torch.no_grad():
            for number, view in enumerate(views, 1):
                found = model(view.camera)
                samples["psnr"].append(psnr(found, view.image))
                samples["ssim"].append(ssim(found, view.image))
                if masked:
                    samples["masked_psnr"].append(psnr(found, view.image, view.mask))
                    samples["masked_ssim"].append(ssim(found, view.image, view.mask))
                if progress is not None:
                    progress(number, len(views), view.name)
        return TaskResult.from_samples(samples)

    def flops(self, model: nn.Module) -> Flops | None:
        """Operations of drawing the test views; of a scene of Gaussians 500 a Gaussian seen for projection
        and colour, and 38 a pixel of its contour (an ellipse, of whose box the part inside the view
        counts)."""
        if isinstance(model, HashField):
            each = [model.operations(view.camera) for view in self._load().test]
            dense, sparse = map(sum, zip(*each, strict=True))
            return Flops(dense, sparse)
        if not isinstance(model, GaussianScene):
            return None
        total = drawing(model, [view.camera for view in self._load().test])
        return Flops(total, total)


def drawing(scene: GaussianScene | EdgePoints, cameras: Sequence[Camera]) -> int:
    """Operations of drawing Gaussians: 500 of each that a camera sees, and 38 a pixel of its contour."""
    total = 0.0
    with torch.no_grad():
        shape = (scene.means, scene.quats, scene.scales.exp(), scene.opacities.sigmoid())
        for camera in cameras:
            size = (camera.width, camera.height)
            boxed = boxes(project(*shape, camera.viewmat, camera.intrinsics, *size), *size)[1].prod(1)
            total += 500 * int((boxed > 0).sum()) + 38 * math.pi / 4 * int(boxed.sum())
    return round(total)


class Shapes(HeldOut):
    name, views = "neural3d/shapes", "shapes"


class ShapesArc(HeldOut):
    """Eight views of the shapes between three that few-view methods train on."""

    name, views = "neural3d/shapes-arc", "shapes-arc"


class Lego(HeldOut):
    """The 50 kept test views of NeRF-synthetic lego, at 100 x 100."""

    name, views = "neural3d/lego-100", "lego-100"


class Fox(HeldOut):
    name, views = "neural3d/fox-120", "fox-120"


class Fern(HeldOut):
    name, views = "neural3d/fern-126", "fern-126"


class DTU24(HeldOut):
    name, views = "neural3d/dtu24-100", "dtu24-100"


class Fountain(HeldOut):
    name, views = "neural3d/fountain-128", "fountain-128"


class HerzJesu(HeldOut):
    name, views = "neural3d/herzjesu-128", "herzjesu-128"


class LivingRoom(HeldOut):
    name, views = "neural3d/livingroom-128", "livingroom-128"


class LegoRing(HeldOut):
    """Eight test views of lego at 50 x 50, for scenes that are fitted to four."""

    name, views = "neural3d/lego-ring", "lego-ring"


class BallTakenOut(HeldOut):
    """Six views of a painted disc without the ball that the training views have; masked figures are of where
    the ball was."""

    name, views = "neural3d/disc-without-ball", "disc-without-ball"


class LivingRoomFrames(HeldOut):
    """Four frames of the living room at 64 x 48, between three that few-view methods train on."""

    name, views = "neural3d/livingroom-frames", "livingroom-frames"
