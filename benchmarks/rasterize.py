"""zoo::rasterize, forward and backward, against its definition (the torch pair list); real scenes beside it.

Real scenes have no goal here: those that were set for them are over a scalar C++ rasteriser under the AGPL,
which is not part of this repository.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from zoo.neural3d.cameras import Camera, lens
from zoo.neural3d.formats import read_splats
from zoo.neural3d.importance import cameras_around
from zoo.neural3d.scene import GaussianScene
from zoo.neural3d.splats import Splats
from zoo.shared import ops
from zoo.shared.bench import Bound, Cell, Goal, main
from zoo.shared.bench.runner import Later
from zoo.shared.ops.rasterize import rasterize
from zoo.shared.ops.rasterize_reference import ALPHA_MAX, ALPHA_MIN, boxes, project

# Operations of a pair: the exponent 8, its power of two 16, alpha and light 6, four channels 8; going back
# the first three again, four channels both ways 16, the slope 8, moments 6.
FLOPS = 38 + 60
LIT = 1e-6  # of the light: where less is left, nothing need be drawn
REAL = (
    ("plant", "splat-captures/plant.splat", 800),
    ("biker", "splat-playcanvas/biker.compressed.ply", 800),
    ("spot", "splat-mesh2splat/spot_10k.splat", 256),
    ("plant", "splat-captures/plant.splat", 256),
)


def random_scene(count: int, degree: int = 0) -> GaussianScene:
    """Gaussians of 0.02 to 0.07 in a cube of side 2, 3 away."""
    generator = torch.Generator().manual_seed(0)
    opacity = torch.rand(count, generator=generator) * 0.95 + 0.02
    splats = Splats(
        torch.rand(count, 3, generator=generator) * 2 + torch.tensor([-1.0, -1.0, 2.0]),
        torch.randn(count, 4, generator=generator),
        (torch.rand(count, 3, generator=generator) * 0.05 + 0.02).log(),
        opacity.logit(),
        torch.randn(count, (degree + 1) ** 2, 3, generator=generator) * 0.3,
    )
    return GaussianScene.from_splats(splats)


@torch.no_grad()
def lit_pairs(scene: GaussianScene, camera: Camera) -> int:
    """Pairs of a Gaussian and a pixel inside its contour that light reaches: those that must be met."""
    opacities = scene.opacities.sigmoid()
    shape = (scene.means, scene.quats, scene.scales.exp(), opacities, camera.viewmat, camera.intrinsics)
    flat = project(*shape, camera.width, camera.height)
    first, count = boxes(flat, camera.width, camera.height)
    light, lit = torch.ones(camera.height, camera.width), 0
    xx, xy, yy = flat.covariances.unbind(1)
    conics = (torch.stack([yy, -xy, xx], 1) / (xx * yy - xy * xy)[:, None]).tolist()
    order = flat.depths.argsort()
    means, alphas = flat.means.tolist(), opacities.tolist()
    for index in order[count[order].prod(1) > 0].tolist():
        (left, top), (width, height) = first[index].tolist(), count[index].tolist()
        dx = torch.arange(left, left + width) + 0.5 - means[index][0]
        dy = (torch.arange(top, top + height) + 0.5 - means[index][1])[:, None]
        a, b, c = conics[index]
        alpha = alphas[index] * torch.exp(-(a * dx * dx + 2 * b * dx * dy + c * dy * dy) / 2)
        alpha = torch.where(alpha >= ALPHA_MIN, alpha.clamp_max(ALPHA_MAX), 0.0)
        window = light[top : top + height, left : left + width]
        lit += int(((alpha > 0) & (window >= LIT)).sum())
        window *= 1 - alpha
    return lit


def bound(scene: GaussianScene, camera: Camera) -> Bound:
    """Every lit pair computed; every parameter read and its gradient written once, the picture twice."""
    parameters = sum(p.numel() for p in scene.parameters())
    bytes_ = 8 * parameters + 16 * camera.width * camera.height * 4
    return Bound(bytes_, FLOPS * lit_pairs(scene, camera))


def both_ways(scene: GaussianScene, camera: Camera, backend: str) -> Callable[[], object]:
    """Colour and depth, and from their gradients those of all that a Gaussian has."""
    values = [p.detach() for p in (scene.means, scene.quats, scene.scales.exp(), scene.opacities.sigmoid())]
    leaves = [value.clone().requires_grad_() for value in (*values, scene.sh0[:, 0])]
    generator = torch.Generator().manual_seed(1)
    flows = [torch.randn(camera.height, camera.width, *tail, generator=generator) for tail in ((3,), ())]

    def run() -> tuple[Tensor, ...]:
        with ops.backend(backend):
            seen = rasterize(*leaves, camera.viewmat, camera.intrinsics, camera.width, camera.height)
            return torch.autograd.grad((seen.colour, seen.depth), leaves, flows)

    return run


def whole_step(count: int, camera: Camera, backend: str) -> Callable[[], object]:
    """Harmonics of degree 3, activation, rendering, L1 against a picture, backward, Adam."""
    scene = random_scene(count, degree=3)
    picture = torch.rand(camera.height, camera.width, 3, generator=torch.Generator().manual_seed(2))
    optimizer = torch.optim.Adam(scene.parameters(), lr=1e-6, eps=1e-15, fused=True)

    def run() -> None:
        with ops.backend(backend):
            loss = (scene(camera) - picture).abs().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return run


def cells(quick: bool, threads: int) -> Iterator[Cell | Later]:
    for count, size in ((1000, 100), (3000, 100), (10000, 135)):
        camera = Camera(torch.eye(4), lens(size, size, 2 * math.atan(1 / 2.4)), size, size)

        def cell(count: int = count, camera: Camera = camera) -> Cell:
            scene = random_scene(count)
            labels = {
                "scene": "random",
                "gaussians": count,
                "pixels": camera.width,
                "what": "forward + backward",
            }
            ours = both_ways(scene, camera, "native")
            peers = {"pair list": both_ways(scene, camera, "reference")}
            return Cell(labels, ours, peers, bound(scene, camera), Goal(40))

        labels = {"scene": "random", "gaussians": count, "pixels": size, "what": "forward + backward"}
        yield Later(labels, cell)
    camera = Camera(torch.eye(4), lens(100, 100, 2 * math.atan(1 / 2.4)), 100, 100)
    labels = {"scene": "random", "gaussians": 3000, "pixels": 100, "what": "whole step, SH 3, Adam"}
    steps = (whole_step(3000, camera, backend) for backend in ("native", "reference"))
    yield Cell(
        labels, next(steps), {"pair list": next(steps)}, bound(random_scene(3000, 3), camera), Goal(25)
    )
    folder = Path(os.environ.get("ZOO_DATA", "missing"))
    for name, file, size in REAL[2:] if quick else REAL:
        if not (folder / file).exists():
            continue

        def real(file: str = file, name: str = name, size: int = size) -> Cell:
            splats = read_splats(folder / file)
            scene, camera = GaussianScene.from_splats(splats), cameras_around(splats, 1, size)[0]
            labels = {"scene": name, "gaussians": len(splats), "pixels": size, "what": "forward + backward"}
            ours = both_ways(scene, camera, "native")
            peers = {"pair list": both_ways(scene, camera, "reference")}
            return Cell(labels, ours, peers, bound(scene, camera))

        yield Later({"scene": name, "pixels": size, "what": "forward + backward"}, real)


if __name__ == "__main__":
    sys.exit(main("drawing Gaussians and its gradients against a pair list", cells))
