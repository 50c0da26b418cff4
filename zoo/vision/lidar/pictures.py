"""Pictures from above: points, true boxes and found ones.

python -m zoo.vision.lidar.pictures --model vision/dsvt-pillars-scenes --out pictures
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from zoo.bundles.store import load
from zoo.errors import ConfigError
from zoo.shared.store.io import atomic_write
from zoo.vision.lidar.average_precision import Detections
from zoo.vision.lidar.boxes import Boxes, corners_bev
from zoo.vision.lidar.data import LEAST_POINTS, Frame, real_frame, scene_frames
from zoo.vision.lidar.detector import Detector
from zoo.vision.lidar.tasks import LOOSE, detections, match, truth_of

TRUE, IGNORED = "#009e73", "#9ad1bf"
COLOURS = ("#0072b2", "#d55e00", "#cc79a7")  # of the classes' found boxes
KITTI_FRAME = ("lidar-kitti-mini", "000008")


def bev_picture(frame: Frame, found: Detections, model: Detector, title: str, least: float = 0.3) -> bytes:
    """A frame from above as PNG, x forward to the right: grey points, true boxes filled, found ones as
    outlines whose bar shows the heading.

    Args:
        frame: the points and the true boxes.
        found: what the detector found.
        model: whose range and classes are shown.
        title: above the picture.
        least: lowest score shown.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lower, upper = model.grid.lower, model.grid.upper
    figure = Figure(figsize=(7.5, 7.5))
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.09, 0.13, 0.88, 0.8))
    x, y = frame.points[:, 0].numpy(), frame.points[:, 1].numpy()
    axes.scatter(x, y, s=0.6, color="#8a8f98", linewidths=0, rasterized=True)
    for row, corners in enumerate(corners_bev(frame.boxes).tolist()):
        counts = int(frame.hits[row]) >= LEAST_POINTS and int(frame.labels[row]) > 0
        axes.fill(*zip(*corners, strict=True), color=TRUE if counts else IGNORED, alpha=0.45, linewidth=0)
    shown = found.scores >= least
    boxes, labels, scores = found.boxes[shown], found.labels[shown], found.scores[shown]
    for box, label, score in zip(boxes, labels.tolist(), scores.tolist(), strict=True):
        _outline(axes, box[None], COLOURS[(label - 1) % len(COLOURS)], f"{score:.2f}")
    for label, name in enumerate(model.classes):
        axes.plot([], [], color=COLOURS[label % len(COLOURS)], label=f"found: {name}")
    axes.fill([], [], color=TRUE, alpha=0.45, label="true")
    axes.fill([], [], color=IGNORED, alpha=0.45, label="true, not counted")
    axes.set(xlim=(lower[0], upper[0]), ylim=(lower[1], upper[1]), aspect="equal", title=title)
    axes.set(xlabel="x, metres", ylabel="y, metres")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=5, fontsize=8, frameon=False)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()


def _outline(axes: object, box: Boxes, colour: str, text: str) -> None:
    corners = corners_bev(box)[0]
    ring = torch.cat([corners, corners[:1]]).tolist()
    front, centre = (corners[0] + corners[3]) / 2, box[0, :2]
    line = {"color": colour, "linewidth": 1.2}
    axes.plot(*zip(*ring, strict=True), **line)  # type: ignore[attr-defined]
    axes.plot(*zip(centre.tolist(), front.tolist(), strict=True), **line)  # type: ignore[attr-defined]
    axes.text(*corners.amax(0).tolist(), text, color=colour, fontsize=6)  # type: ignore[attr-defined]


def recall_text(frame: Frame, found: Detections, classes: tuple[str, ...], least: float = 0.3) -> str:
    """How many boxes of each class were found (BEV, loose IoU), and how many boxes were found that are
    none."""
    truth, keep = truth_of(frame), found.scores >= least
    kept = Detections(found.boxes[keep], found.scores[keep], found.labels[keep])
    parts = []
    for label, name in enumerate(classes, start=1):
        bev, _ = match(kept, truth, label, LOOSE[label - 1])
        right = int(bev.right.sum())
        parts.append(f"{name} {right} of {bev.truths}, {len(bev.right) - right} false")
    return "; ".join(parts)


def inside(frame: Frame, model: Detector) -> Frame:
    """The frame cut to the detector's range."""
    lower, upper = (torch.tensor(bound[:2]) for bound in (model.grid.lower, model.grid.upper))

    def within(place: torch.Tensor) -> torch.Tensor:
        return ((place[:, :2] >= lower) & (place[:, :2] < upper)).all(1)

    points, boxes = within(frame.points), within(frame.boxes)
    names = tuple(name for name, kept in zip(frame.names, boxes.tolist(), strict=False) if kept)
    return Frame(frame.points[points], frame.boxes[boxes], frame.labels[boxes], frame.hits[boxes], names)


@dataclass(frozen=True)
class Pictures:
    """What to draw.

    Args:
        model: a detector of the zoo.
        out: folder of the pictures.
        scenes: how many test scenes.
        real: also draw KITTI's frame 000008, which lies below ZOO_DATA.
    """

    model: str
    out: Path
    scenes: int = 2
    real: bool = True


def main(config: Pictures) -> None:
    """Draw the scenes and the real frame."""
    model = load(config.model)
    if not isinstance(model, Detector):
        raise ConfigError(f"{config.model} is no detector of boxes")
    short = config.model.rpartition("/")[2]
    frames = {f"scene-{index}": frame for index, frame in enumerate(scene_frames("test", config.scenes))}
    if config.real:
        frames[f"kitti-{KITTI_FRAME[1]}"] = inside(real_frame(*KITTI_FRAME), model)
    config.out.mkdir(parents=True, exist_ok=True)
    for (name, frame), found in zip(frames.items(), detections(model, list(frames.values())), strict=True):
        text = recall_text(frame, found, model.classes)
        print(f"{short}, {name}: {text}")
        atomic_write(
            config.out / f"{short}-{name}.png", bev_picture(frame, found, model, f"{short}, {name}\n{text}")
        )


if __name__ == "__main__":
    main(tyro.cli(Pictures, description=__doc__))
