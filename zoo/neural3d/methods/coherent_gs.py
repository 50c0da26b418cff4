"""CoherentGS: a Gaussian for every pixel of a few views, whose depths move together.

Paliwal et al., "CoherentGS: Sparse Novel View Synthesis with Coherent 3D Gaussians", ECCV 2024. A Gaussian
stays
on the ray of its pixel. Its depth begins with a monocular one, first brought to scale per view by optical
flow,
then changed by a small convolutional decoder that knows nothing but the number of the view, once for each
layer
of depth; total variation and flow keep it smooth and consistent.

Differs from the paper in: layers are quantiles of disparity, not clusters; flow comes with the job; opacities
are free rather than decoded; no perceptual loss (VGG's weights are not here), no supersampling; the depth is
not filtered first. Flow's weight is the paper's 0.1 (the reference multiplies by it twice).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from zoo.errors import ConfigError
from zoo.methods.contract import Sparsified, stated_options
from zoo.neural3d.cameras import Camera
from zoo.neural3d.hull import pixels_of
from zoo.neural3d.priors import MOBILITY, given, known_depth
from zoo.neural3d.refine import RATES, RECIPE, picture_loss, refine, views_of
from zoo.neural3d.splats import SH_C0, Splats
from zoo.neural3d.views import View, ViewBatches
from zoo.shared.masks import MaskSet
from zoo.shared.ops.rasterize import Rendering, rasterize
from zoo.shared.train import Job

FREQUENCIES = 10
OPACITY = {2: 0.6, 3: 0.5, 4: 0.35}  # by number of views
_EDGE: Literal["replicate"] = "replicate"  # a reflected border needs two pixels
REACH = 0.2  # of a decoder's output, in units of the mean depth
Flow = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class PairedViews(ViewBatches):
    """Views with optical flow between them.

    Attributes:
        flows: from view i to view j, by (i, j): where each pixel of i is in j [h, w, 2] in pixels, and
        whether
            it is seen there [h, w].
    """

    flows: Mapping[tuple[int, int], Flow] = field(default_factory=dict)


def flow_of(one: View, other: View) -> Flow:
    """The exact flow between two views whose depth is known: what is nearer than 2 % is seen."""
    origin, rays = one.camera.rays()
    depth = known_depth(one)
    points = origin + rays * (depth / (rays @ one.camera.viewmat[2, :3]))[..., None]
    place, away = pixels_of(other.camera, points.reshape(-1, 3))
    place, away = place.reshape(*depth.shape, 2), away.reshape(depth.shape)
    there = warped(known_depth(other)[..., None], place)[..., 0]
    seen = (depth > 0) & (away > 0) & ((there - away).abs() < 0.02 * away)
    return place, seen


def flows_between(views: Sequence[View]) -> dict[tuple[int, int], Flow]:
    """The exact flow between all pairs of views."""
    numbers = range(len(views))
    return {(i, j): flow_of(views[i], views[j]) for i in numbers for j in numbers if i != j}


def warped(image: Tensor, place: Tensor) -> Tensor:
    """Values [h, w, c] of an image at places [h, w, 2] in pixels, bilinear, zero outside."""
    size = torch.tensor([image.shape[1], image.shape[0]])
    at = (place / size * 2 - 1)[None]
    return functional.grid_sample(image.permute(2, 0, 1)[None], at, align_corners=False)[0].permute(1, 2, 0)


class Decoder(nn.Module):
    """Maps [layers, h, w] from the number of a view alone: twofold upsampling and convolutions from one
    pixel."""

    def __init__(self, layers: int, width: int, height: int, across: int) -> None:
        super().__init__()
        self.sizes = [(height, across)]
        while max(self.sizes[0]) > 1:
            high, wide = self.sizes[0]
            self.sizes.insert(0, (-(-high // 2), -(-wide // 2)))
        channels = [
            2 * FREQUENCIES,
            *(width * max(2, 16 >> number // 3) for number in range(len(self.sizes))),
        ]
        self.steps = nn.ModuleList(
            # The second layer also sees where it is.
            nn.Conv2d(
                a + 2 * (number == 1), b, 3 if number else 1, padding=min(number, 1), padding_mode=_EDGE
            )
            for number, (a, b) in enumerate(zip(channels, channels[1:], strict=False))
        )
        self.last = nn.Conv2d(channels[-1], layers, 3, padding=1, padding_mode=_EDGE)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0, 0.02)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    def forward(self, share: float) -> Tensor:
        """Of a view, by its number as a share of the last one's, 0 to 1."""
        angles = share * 2.0 ** torch.arange(FREQUENCIES)
        now = torch.cat([angles.sin(), angles.cos()])[None, :, None, None]
        for number, (step, size) in enumerate(zip(self.steps, self.sizes, strict=True)):
            now = functional.interpolate(now, size, mode="bilinear", align_corners=True)
            if number == 1:
                y, x = torch.meshgrid(*(torch.linspace(-1, 1, side) for side in size), indexing="ij")
                now = torch.cat([now, torch.stack([x, y])[None]], 1)
            now = functional.leaky_relu(step(now), 0.2)
        return self.last(now)[0]


class PixelScene(nn.Module):
    """A Gaussian for each pixel of views of one size, on the pixel's ray.

    Its depth is scale_v D + shift_v of the prior D, plus a residual: with `decoder` that of `Decoder`, one
    map
    for each layer of depth, else a free number for each pixel.

    Args:
        views: with a prior; pixels without one have no Gaussian.
        background: colour where nothing is.
        layers: of depth.
        width: of the decoder's layers; 0 for free depths.
    """

    def __init__(self, views: list[View], background: Tensor, layers: int, width: int) -> None:
        super().__init__()
        self.register_buffer("background", background.clone(), persistent=False)
        self.background: Tensor
        depth = torch.stack([known_depth(view) for view in views])
        self.depth, self.known = depth, depth > 0
        self.origins = torch.stack([view.camera.centre for view in views])
        self.rays = torch.stack([self._ahead(view.camera) for view in views])
        self.focal = torch.stack([view.camera.intrinsics[0, 0] for view in views])
        self.layers = layer_masks(depth, layers)
        count = int(self.known.sum())
        self.scale = nn.Parameter(torch.ones(len(views)))
        self.shift = nn.Parameter(torch.zeros(len(views)))
        self.reach = REACH * float(depth[self.known].mean())
        self.decoder = Decoder(layers, width, *depth.shape[1:]) if width else None
        self.residual = None if width else nn.Parameter(torch.zeros_like(depth))
        colours = torch.stack([view.image for view in views])[self.known]
        self.sh0 = nn.Parameter((colours[:, None] - 0.5) / SH_C0)
        opacity = OPACITY[len(views)]
        self.opacities = nn.Parameter(torch.full((count,), opacity).logit())
        self.stretch = nn.Parameter(torch.zeros(count, 3))

    @staticmethod
    def _ahead(camera: Camera) -> Tensor:
        """Rays [h, w, 3] of length one along the camera's axis."""
        rays = camera.rays()[1]
        return rays / (rays @ camera.viewmat[2, :3])[..., None]

    def depths(self) -> Tensor:
        """Depths [views, h, w] of all pixels."""
        aligned = self.scale[:, None, None] * self.depth + self.shift[:, None, None]
        if self.decoder is None:
            assert self.residual is not None
            return aligned + self.reach * self.residual
        last = max(1, len(self.scale) - 1)
        maps = torch.stack([self.decoder(number / last) for number in range(len(self.scale))])
        return aligned + self.reach * (maps.tanh() * self.layers).sum(1)

    def positions(self) -> Tensor:
        """Places [views, h, w, 3] in the world of all pixels."""
        return self.origins[:, None, None] + self.rays * self.depths()[..., None]

    def splats(self) -> Splats:
        """The Gaussians, unbounded as files have them."""
        depth = self.depths()
        means = (self.origins[:, None, None] + self.rays * depth[..., None])[self.known]
        # The radius follows the depth without pulling at it.
        radius = (0.6 * depth.detach() / self.focal[:, None, None])[self.known].clamp_min(1e-6)
        quats = torch.tensor([1.0, 0, 0, 0]).repeat(len(means), 1)
        return Splats(means, quats, radius.log()[:, None] + self.stretch, self.opacities, self.sh0)

    def render(self, camera: Camera) -> Rendering:
        """What a camera sees."""
        now = self.splats()
        return rasterize(
            now.means,
            now.quats,
            now.scales.exp(),
            now.opacities.sigmoid(),
            now.sh,
            camera.viewmat,
            camera.intrinsics,
            camera.width,
            camera.height,
            sh_degree=0,
            background=self.background,
        )

    def forward(self, camera: Camera) -> Tensor:
        """The colours [h, w, 3] that a camera sees."""
        return self.render(camera).colour


@dataclass
class CoherentGS:
    """Fit a Gaussian for every pixel of a few views, along its ray."""

    needs_job: ClassVar[bool] = True
    recipe: ClassVar[Mapping[str, Any]] = {**RECIPE, "steps": 300}

    motion: str = "decoder"
    """How depths move: by the decoder, each pixel's `ray` for itself, or Gaussians `free` in space."""

    align: int = 300
    """Steps that bring the prior of each view to scale by flow alone."""

    layers: int = 5
    """Layers of depth."""

    width: int = 4
    """Of the decoder's layers (ngf)."""

    flow: float = 0.1
    """Weight of the flow loss."""

    smooth: float = 0.5
    """Weight of the total variation of disparity."""

    decoder_rate: float = 1e-3
    """Learning rate of the decoder, and of free depths."""

    def sparsify(self, model: nn.Module, job: Job | None = None) -> Sparsified:
        """A scene of a Gaussian a pixel; the scene given tells the background.

        Raises:
            ConfigError: no scene, views without a prior or without flow, of different or too small size,
            or an
                option out of range.
        """
        scene, job = given(model, job, self)
        views = views_of(job)
        self._check(views, job)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(job.seed)
            width = self.width if self.motion == "decoder" else 0
            pixels = PixelScene(views, scene.background, self.layers, width)
        flows = job.batches.flows
        aligned(pixels, job, self.align, flows)
        affine = torch.stack([pixels.scale, pixels.shift]).detach()
        extras = {"affine/scale-and-shift": affine}
        if self.motion == "free":
            fitted = refine(scene.like(pixels.splats().map(torch.Tensor.detach)), job, mobility=MOBILITY)
        else:
            self._fit(pixels, job, flows)
            fitted = scene.like(pixels.splats().map(torch.Tensor.detach))
        arguments = {"count": len(fitted), "sh_degree": 0, "background": fitted.background.tolist()}
        arguments["antialiased"] = fitted.antialiased
        options = stated_options(self, job)
        return Sparsified(fitted.eval(), MaskSet({}), extras, options, arguments=arguments)

    def _check(self, views: list[View], job: Job) -> None:
        if self.motion not in ("decoder", "ray", "free") or self.layers < 1 or self.width < 1:
            raise ConfigError(f"CoherentGS: motion is decoder, ray or free; received {self}")
        sizes = {tuple(view.image.shape[:2]) for view in views}
        if len(views) not in OPACITY or len(sizes) != 1 or min(next(iter(sizes))) < 16:
            raise ConfigError(
                f"CoherentGS takes two to four views of one size, 16 pixels at least; received {len(views)} "
                f"of {sorted(sizes)}"
            )
        flows = getattr(job.batches, "flows", {})
        pairs = [(i, j) for i in range(len(views)) for j in range(len(views)) if i != j]
        size = next(iter(sizes))
        for pair in pairs:
            if pair not in flows or tuple(flows[pair][0].shape) != (*size, 2):
                raise ConfigError(
                    f"CoherentGS needs the flow from view {pair[0]} to {pair[1]} as {(*size, 2)}: make the "
                    "job of zoo.neural3d.methods.coherent_gs.PairedViews"
                )

    def _fit(self, pixels: PixelScene, job: Job, flows: Mapping[tuple[int, int], Flow]) -> None:
        lr = job.recipe.lr
        moved: list[Any] = [*pixels.decoder.parameters()] if pixels.decoder is not None else [pixels.residual]
        groups = [
            {"params": moved, "lr": lr * self.decoder_rate},
            {"params": [pixels.sh0], "lr": lr * RATES["sh0"]},
            {"params": [pixels.opacities], "lr": lr * RATES["opacities"]},
            {"params": [pixels.stretch], "lr": lr * RATES["scales"]},
        ]

        def loss(model: nn.Module, view: View) -> Tensor:
            assert isinstance(model, PixelScene)
            total = picture_loss(model.render(view.camera).colour, view)
            if self.smooth:
                total = total + self.smooth * variation(model)
            return total + self.flow * flow_loss(model, flows) if self.flow else total

        job.replace(loss=loss).fit(pixels, parameters=groups, macs=lambda: 0.0).run()


def layer_masks(depth: Tensor, layers: int) -> Tensor:
    """Which of `layers` quantiles of disparity each pixel is in: one-hot [views, layers, h, w], no layer
    where
    the depth is unknown."""
    disparity = torch.where(depth > 0, 1 / depth.clamp_min(1e-9), 0.0)
    edges = disparity[depth > 0].quantile(torch.arange(1, layers) / layers)
    number = torch.bucketize(disparity, edges, right=True)
    return functional.one_hot(number, layers).permute(0, 3, 1, 2) * (depth > 0)[:, None]


def flow_loss(pixels: PixelScene, flows: Mapping[tuple[int, int], Flow]) -> Tensor:
    """Mean distance between the places of pixels that flow says are one, over all pairs of views."""
    places = pixels.positions()
    losses = []
    for (one, other), (place, seen) in flows.items():
        apart = (warped(places[other], place) - places[one]).abs().sum(-1)
        losses.append((apart * seen).sum() / seen.sum().clamp_min(1))
    return torch.stack(losses).mean()


def variation(pixels: PixelScene) -> Tensor:
    """Total variation of the disparity 1 / (1 + depth / mean)."""
    disparity = 1 / (1 + pixels.depths() / pixels.depth[pixels.known].mean())
    across = (
        (disparity[:, :, 1:] - disparity[:, :, :-1]).abs() * pixels.known[:, :, 1:] * pixels.known[:, :, :-1]
    )
    down = (disparity[:, 1:] - disparity[:, :-1]).abs() * pixels.known[:, 1:] * pixels.known[:, :-1]
    return across.mean() + down.mean()


def aligned(pixels: PixelScene, job: Job, steps: int, flows: Mapping[tuple[int, int], Flow]) -> None:
    """Bring the prior of each view to scale in place: scale and shift by the flow loss alone."""
    if not steps:
        return
    unit = pixels.reach / REACH
    groups = [{"params": [pixels.scale], "lr": 0.02}, {"params": [pixels.shift], "lr": 0.02 * unit}]
    fit = job.replace(loss=lambda model, view: flow_loss(pixels, flows)).fit(
        pixels, parameters=groups, macs=lambda: 0.0, steps=steps, lr=1.0
    )
    fit.run()
