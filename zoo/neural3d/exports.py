"""What `zoo export MODEL --to viewer` and `--to turntable` write of a scene, and `zoo show --picture`."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from zoo.bundles.catalog import Bundle, find
from zoo.bundles.store import load, load_bundle
from zoo.cli.parsing import Positional, metavar
from zoo.errors import ConfigError
from zoo.neural3d.cameras import orbit
from zoo.neural3d.fields import HashField
from zoo.neural3d.formats import read_splats
from zoo.neural3d.importance import middle_of
from zoo.neural3d.methods.gvgen_text import GVGenText
from zoo.neural3d.packed import read_packed
from zoo.neural3d.scene import GaussianScene
from zoo.neural3d.solids import COLOURS, SHAPES, SIZES
from zoo.neural3d.sparsify import save_rows
from zoo.neural3d.viewer import write_viewer
from zoo.neural3d.views import load_views
from zoo.shared.store.io import atomic_write


@dataclass
class _Export:
    """The options that exports of scenes share."""

    model: Annotated[str, Positional, metavar("SCENE")]
    """A name, folder or hf://owner/name; or a .ply, .splat, .spz, .sog or .safetensors of `zoo sparsify`."""

    out: Path
    """The file to write."""

    background: tuple[float, float, float] | None = None
    """Colour behind the scene, from 0 to 1; by default the bundle's, and white for a file."""

    overwrite: bool = False
    """Replace a file that is there."""

    json: bool = False
    """Print JSON."""

    def scene(self, suffix: str) -> GaussianScene:
        """The scene, once the place for the file is known to be free.

        Raises:
            ConfigError: another ending, a file that is there, or a model that is no scene of Gaussians.
            DataError: a file that is no scene.
        """
        if self.out.suffix != suffix:
            raise ConfigError(f"--out {self.out}: give a name that ends in {suffix}")
        if self.out.exists() and not self.overwrite:
            raise ConfigError(f"{self.out} is there already; give another place, or --overwrite")
        found = scene_of(self.model)
        if self.background is not None:
            found.background.copy_(torch.tensor(self.background))
        return found


@dataclass
class ExportViewer(_Export):
    """Write a scene as one HTML page that turns it in a browser, without a server or a network."""

    finer: float = 0.5
    """Factor on the steps to which the Gaussians are rounded; smaller is exacter and larger."""

    def run(self) -> dict[str, Any]:
        """Write the page.

        Raises:
            ConfigError, DataError: as for `scene`; a factor that is not above zero.
        """
        if not self.finer > 0:
            raise ConfigError(f"--finer must be above 0; received {self.finer}")
        scene = self.scene(".html")
        size = write_viewer(self.out, scene, Path(self.model).name, self.finer)
        return {"model": self.model, "file": str(self.out), "gaussians": len(scene), "bytes": size}

    @staticmethod
    def describe(report: dict[str, Any]) -> str:
        """A report of `run` as a line of text."""
        return f"{report['file']}: {report['gaussians']:,} Gaussians in {report['bytes'] / 1e6:.2f} MB"


@dataclass
class ExportTurntable(_Export):
    """Write a scene that turns, as an animated .gif."""

    frames: int = 36
    """Pictures of a turn."""

    size: int = 240
    """Pixels on a side."""

    def run(self) -> dict[str, Any]:
        """Write the pictures.

        Raises:
            ConfigError, DataError: as for `scene`; fewer than two pictures or 16 pixels.
        """
        if self.frames < 2 or self.size < 16:
            raise ConfigError(f"--frames from 2 and --size from 16; received {self.frames} and {self.size}")
        write_turntable(self.out, self.scene(".gif"), self.frames, self.size)
        return {"model": self.model, "file": str(self.out), "bytes": self.out.stat().st_size}

    @staticmethod
    def describe(report: dict[str, Any]) -> str:
        """A report of `run` as a line of text."""
        return f"{report['file']}: {report['bytes'] / 1e6:.2f} MB"


def scene_of(model: str) -> GaussianScene:
    """The scene of a name or of a file.

    Raises:
        ConfigError: a model that is no scene of Gaussians.
        DataError: a file that is no scene.
    """
    path = Path(model)
    if path.is_file() or path.suffix in (".ply", ".splat", ".spz", ".sog"):
        splats = read_packed(path) if path.suffix == ".safetensors" else read_splats(path)
        return GaussianScene.from_splats(splats, (1.0, 1.0, 1.0))
    return _scene(load(model), model)


def write_turntable(path: Path, scene: GaussianScene, frames: int = 36, size: int = 240) -> None:
    """Write a turn round the scene's middle as an animated .gif of four seconds."""
    from PIL import Image

    centre, reach = middle_of(scene.splats)
    cameras = orbit(centre, 2.6 * reach, frames, (size, size), elevations=(0.35,))
    with torch.no_grad():
        seen = [(scene(camera).clamp(0, 1) * 255).round().byte().numpy() for camera in cameras]
    first, *rest = [Image.fromarray(picture).quantize(128, dither=Image.Dither.NONE) for picture in seen]
    content = io.BytesIO()
    first.save(content, "GIF", save_all=True, append_images=rest, duration=max(20, 4000 // frames), loop=0)
    atomic_write(path, content.getvalue())


def picture(bundle: Bundle, path: Path) -> str:
    """Draw a bundle's scene: .gif turning, or .png with photographs above, its dense twin, and it below; of
    one that makes scenes from prompts one of each prompt, a colour in each column.

    Returns:
        what was drawn, in words.

    Raises:
        ConfigError: another ending, or a model that is no scene of Gaussians and, for .png, no field.
        DataError: the photographs are not at hand.
    """
    if path.suffix not in (".png", ".gif"):
        raise ConfigError(f"--picture {path}: give a name that ends in .png or .gif")
    twin = bundle.card.dense_twin
    if path.suffix == ".gif":
        write_turntable(path, _scene(load_bundle(bundle), bundle.card.name))
        return "a turn round the scene"
    if isinstance(model := load_bundle(bundle), GVGenText):
        save_rows(path, prompted(model))
        return "small and large balls, boxes and cones, a colour in each column"
    test = load_views(bundle.card.metrics[0].task.partition("/")[2]).test
    test = test[:: math.ceil(len(test) / 4)]
    shown = [_drawn(load_bundle(find(twin)), twin)] if twin else []
    shown.append(_drawn(model, bundle.card.name))
    with torch.no_grad():
        rows = [[one(view.camera) for view in test] for one in shown]
    save_rows(path, [[view.image for view in test], *rows])
    return "held-out photographs" + (", the dense twin" if twin else "") + " and the scene, from above"


def prompted(model: GVGenText) -> list[list[Tensor]]:
    """Renderings of a scene of every prompt, rows of sizes and shapes, columns of colours."""
    generator = torch.Generator().manual_seed(0)
    camera = orbit(torch.zeros(3), 2.5, 1, (96, 96), field_of_view=0.45, elevations=(0.4,), start=0.5)[0]
    rows = [[f"{size} {colour} {shape}" for colour in COLOURS] for size in SIZES for shape in SHAPES]
    with torch.no_grad():
        return [[model.generate(prompt, generator)(camera) for prompt in row] for row in rows]


def _drawn(model: Any, name: str) -> GaussianScene | HashField:
    if not isinstance(model, GaussianScene | HashField):
        raise ConfigError(f"{name} is a {type(model).__name__}; scenes of Gaussians and fields are drawn")
    return model


def _scene(model: Any, name: str) -> GaussianScene:
    if not isinstance(model, GaussianScene):
        raise ConfigError(f"{name} is a {type(model).__name__}; scenes of Gaussians are drawn")
    return model
