"""`zoo reproduce spin-nerf`: a ball taken off a painted disc, against the scene without the ball."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from zoo.errors import ConfigError
from zoo.neural3d.cameras import Camera, orbit
from zoo.neural3d.meshes import overlap
from zoo.neural3d.methods.spin_nerf import SPInNeRF, dilated, harmonic, segmented
from zoo.neural3d.metrics import psnr
from zoo.neural3d.shapes import OVER, trace
from zoo.neural3d.views import View, Views
from zoo.neural3d.weighed import WeighedField
from zoo.studies.cells import CellCache
from zoo.studies.figures import Columns, Curves
from zoo.studies.study import Arm, Claim, Study
from zoo.studies.view import Row, Value

BALLS = torch.tensor(  # centre, radius, colour; the first one is taken out
    [
        [0.0, -0.3, 0.0, 0.3, 0.85, 0.25, 0.2],
        [0.85, -0.2, -0.2, 0.2, 0.2, 0.45, 0.85],
        [-0.85, -0.22, 0.1, 0.22, 0.95, 0.75, 0.2],
    ]
)
SIZE, TRAIN, TEST = 48, 10, 6  # pixels, views
FIELD: dict[str, Any] = {"centre": [0.0, -0.35, 0.0], "half": 1.3, "levels": 6, "finest": 64, "hidden": 16}
MADE_UP = 0.15  # deviation of what the inpainter makes up
FOUND = 0.05  # share of pixels whose depth is known, as from structure from motion
GROW = 2  # pixels round the ball that are judged with it


SMOOTH, OWN = "harmonic filling", "filling with colours of each view's own"


@dataclass(frozen=True)
class HoleOptions:
    """Options.

    Args:
        seeds: how many, from 0.
        steps: of every field's training, and of the masks'.
        rays: of a step.
    """

    seeds: int = 3
    steps: int = 400
    rays: int = 256

    def __post_init__(self) -> None:
        if min(self.seeds, self.steps, self.rays) < 1:
            raise ConfigError("give at least one seed, step and ray")


class Taken(NamedTuple):
    """Views with the ball, the same ones without it, and where it is."""

    views: list[View]
    empty: list[View]
    masks: list[Tensor]


def painted(camera: Camera, balls: Tensor, name: str = "") -> View:
    """What the camera sees, the disc's chequer painted over with smooth colours; some depths."""
    fine = camera.resized(OVER * SIZE, OVER * SIZE)
    colour, hit, depth = trace(fine, balls)
    origin, rays = fine.rays()
    away = torch.where(hit, depth, 0.0) / (rays @ camera.viewmat[2, :3])
    x, y, z = (origin + away[..., None] * rays).unbind(-1)
    paint = torch.stack(
        [0.5 + 0.3 * (2 * x).sin(), 0.5 + 0.3 * (3 * z).cos(), 0.5 + 0.3 * (2 * x - z).sin()], 2
    )
    colour = torch.where((y.abs() < 1e-3)[..., None], paint, colour)
    found = torch.rand(hit.shape, generator=torch.Generator().manual_seed(0)) < FOUND
    some = torch.where(hit & found, depth, 0.0)
    return View(fine, torch.where(hit[..., None], colour, 1.0), depth=some, name=name).reduced(OVER)


def _taken(cameras: list[Camera]) -> Taken:
    views = [painted(camera, BALLS, f"view {n}") for n, camera in enumerate(cameras)]
    empty = [painted(camera, BALLS[1:]) for camera in cameras]
    masks = [(a.image - b.image).abs().amax(2) > 0.02 for a, b in zip(views, empty, strict=True)]
    return Taken(views, empty, masks)


@cache
def arc(test: bool = False) -> Taken:
    """Views from an arc of some 40 degrees, so that most of what the ball hides is hidden in all; others from
    between them to be judged on."""
    options: dict[str, Any] = {"field_of_view": 0.7, "start": 0.035 if test else 0.0}
    centre, heights = torch.tensor([0.0, -0.1, 0.0]), (0.65, 0.85, 0.75)
    cameras = orbit(centre, 3.6, 90, (SIZE, SIZE), elevations=heights, **options)
    return _taken(cameras[: TEST if test else TRAIN])


def rough(masks: list[Tensor], seed: int) -> list[Tensor]:
    """Masks as a segmenter of single views gives them: shifted by up to a pixel, with specks; one view has
    none."""
    generator, found = torch.Generator().manual_seed(seed), []
    for number, mask in enumerate(masks):
        down, right = torch.randint(-1, 2, (2,), generator=generator).tolist()
        specks = torch.rand(mask.shape, generator=generator) < 0.01
        found.append((mask.roll((down, right), (0, 1)) ^ specks) & (number != seed % len(masks)))
    return found


def imagined(image: Tensor, hole: Tensor) -> Tensor:
    """An inpainter that makes things up, as generative ones do: the harmonic filling with smooth colours that
    each picture has of its own."""
    filled = harmonic(image, hole)
    if image.shape[2] != 3:
        return filled  # disparities are smooth: nothing to make up
    generator = torch.Generator().manual_seed(int(1e6 * float(image.sum())) % 2**31)
    waves = functional.interpolate(
        torch.randn(1, 3, 8, 8, generator=generator), size=hole.shape, mode="bicubic"
    )
    return torch.where(hole[..., None], (filled + MADE_UP * waves[0].permute(1, 2, 0)).clamp(0, 1), filled)


@cache
def whole(steps: int, rays: int, seed: int) -> tuple[WeighedField, list[Tensor], Row]:
    """A field of the scene with the ball, consistent masks of the ball, and how good they are."""
    scene = arc()
    field = SPInNeRF(steps=steps, rays=rays, arguments=FIELD).scene(scene.views, seed)
    given = rough(scene.masks, seed)
    masks = segmented(field, scene.views, given, steps // 2, seed)
    agree = {
        name: sum(overlap(a, b) for a, b in zip(some, scene.masks, strict=True)) / TRAIN
        for name, some in (("given", given), ("rendered", masks))
    }
    return field, masks, agree


def without_ball() -> Views:
    """The training views, with the ball, and held-out ones without; masks are of where it is or was."""
    train, test = arc(), arc(test=True)
    masks = [dilated(mask, GROW).float() for mask in test.masks]
    return Views(
        "disc-without-ball",
        [replace(view, mask=mask.float()) for view, mask in zip(train.views, train.masks, strict=True)],
        [replace(view, mask=mask) for view, mask in zip(test.empty, masks, strict=True)],
        (1.0, 1.0, 1.0),
    )


INPAINTERS = {SMOOTH: harmonic, OWN: imagined}


def measure(make: SPInNeRF, options: HoleOptions, case: Row, cells: CellCache) -> Row:
    """PSNR of held-out views inside the hole and outside, and the overlap of masks with the true ones."""
    seed = case["seed"]
    scene, masks, agree = whole(options.steps, options.rays, seed)
    made = replace(
        make,
        steps=options.steps,
        rays=options.rays,
        arguments=FIELD,
        inpainter=INPAINTERS[case["level"]],
    )
    field, test = made.fit(scene, arc().views, masks, seed), arc(test=True)
    found: Row = {"hole": [], "outside": [], **agree}
    with torch.no_grad():
        for view, mask in zip(test.empty, test.masks, strict=True):
            seen, hole = field(view.camera), dilated(mask, GROW).float()
            found["hole"].append(psnr(seen, view.image, hole))
            found["outside"].append(psnr(seen, view.image, 1 - hole))
    return found


def cases(options: HoleOptions) -> Iterator[Row]:
    """All arms of a seed before the next seed."""
    for seed in range(options.seeds):
        for arm in ARMS:
            for level in (SMOOTH,) if ARMS[arm].flat else INPAINTERS:
                yield {"arm": arm, "level": level, "seed": seed}


OURS, EACH, NONE = "SPIn-NeRF", "inpainted views as they are", "nothing said of the hole"
ARMS = {
    OURS: Arm(SPInNeRF()),
    EACH: Arm(SPInNeRF(hole="plain")),
    NONE: Arm(SPInNeRF(hole="none"), flat=True),
}
HOLE = Value("hole", 1.0, 2, "dB", 2)
STUDY = Study(
    "spin-nerf",
    "SPIn-NeRF: a scene without one of its objects",
    "Ashkan Mirzaei et al.: SPIn-NeRF: Multiview Segmentation and Perceptual Inpainting with Neural Radiance "
    "Fields, CVPR 2023",
    HoleOptions,
    ARMS,
    cases,
    measure,
    papers=(24,),
    claims=[
        Claim("{level}: PSNR in the hole above that of fitting the views", "better", OURS, EACH),
        Claim("{level}: PSNR in the hole above that of saying nothing of it", "better", OURS, NONE),
        Claim(
            "rendered masks overlap by more than 80 % with the true ones",
            "91.7 % on the paper's scenes",
            OURS,
            bar=80.0,
            at=(SMOOTH,),
            value=Value("rendered", 100.0, 1, "%", 1),
        ),
    ],
    value=HOLE,
    varies=("seeds", "device"),
    tables=[
        Columns(
            "Held-out views without the ball, and its masks",
            {
                "in the hole (dB)": HOLE,
                "outside (dB)": Value("outside", 1.0, 2),
                "masks given (%)": Value("given", 100.0, 1),
                "masks rendered (%)": Value("rendered", 100.0, 1),
            },
        )
    ],
    plots=[
        Curves(
            "hole",
            "A ball taken off a disc",
            "PSNR outside the hole (dB)",
            "PSNR in the hole (dB)",
            x=Value("outside", 1.0),
            levels=(OWN,),
            points=True,
            alt="One point an arm, with the deviation over seeds.",
        )
    ],
    notes=lambda options: [
        f"{TRAIN} views of {SIZE} pixels from an arc, {TEST} held-out ones, compared with the scene without "
        f"the ball. {options.steps} steps of {options.rays} rays. Colours and disparities of the holes are "
        f"harmonic fillings, the second time with smooth colours of deviation {MADE_UP} that each view makes "
        f"up for itself, as generative inpainters do; the depth of {100 * FOUND:g} % of the pixels is known. "
        "LaMa and LPIPS are not used. All arms have the same rendered masks.",
    ],
)
