"""CenterHead (Yin et al., CVPR 2021): a heat map of centres per class, and what a box needs at each
centre."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from zoo.errors import ConfigError, DataError
from zoo.vision.lidar.average_precision import Detections
from zoo.vision.lidar.boxes import check_boxes
from zoo.vision.lidar.iou import paired_iou, rotated_nms
from zoo.vision.lidar.voxelise import NORM, Grid

# Channels of the branches beside the heat map: offset of the centre within its cell, height of the centre,
# logarithms of the dimensions, (cos, sin) of the yaw, and 2 IoU - 1.
BRANCHES = {"center": 2, "center_z": 1, "dim": 3, "rot": 2, "iou": 1}
PRIOR = -2.19  # the bias that makes 0.1 the first score everywhere
LOGIT_CLIP = 1e-4


@dataclass(frozen=True)
class HeadConfig:
    """The head's sizes, its targets and its decoding.

    Attributes:
        classes: names; label 1 is the first.
        channels: width of the shared convolution and of the branches.
        overlap: IoU that a box moved by the Gaussian's radius still has.
        least_radius: in cells.
        most: cells decoded per frame.
        rectify: per class, the weight a of the IoU branch: score^(1 - a) iou^a.
        threshold: lowest score.
        nms: per class, threshold of NMS.
        kept: most boxes per frame and class after NMS.
    """

    classes: tuple[str, ...]
    channels: int = 64
    overlap: float = 0.1
    least_radius: int = 2
    most: int = 500
    rectify: tuple[float, ...] = ()
    threshold: float = 0.1
    nms: tuple[float, ...] = ()
    kept: int = 500

    def __post_init__(self) -> None:
        count = len(self.classes)
        for name, value in (("rectify", 0.5), ("nms", 0.5)):
            given = getattr(self, name) or (value,) * count
            object.__setattr__(self, name, given)
            if len(given) != count or not all(0 <= v <= 1 for v in given):
                raise ConfigError(f"{name} needs a number from 0 to 1 for each of {count} classes: {given}")
        if not count or self.channels < 1 or self.most < 1 or not 0 < self.overlap < 1:
            raise ConfigError(f"a head needs classes, channels, cells and an overlap in (0, 1): {self}")


@dataclass(frozen=True, eq=False)
class Targets:
    """What the head is trained for: the heat map, and for each box its frame, cell and regression values."""

    heat: Float[Tensor, "batch classes ny nx"]
    frame: Int64[Tensor, " boxes"]
    cell: Int64[Tensor, " boxes"]
    boxes: Float[Tensor, "boxes 7"]
    values: dict[str, Tensor]


def gaussian_radius(
    length: Float[Tensor, " boxes"], width: Float[Tensor, " boxes"], overlap: float
) -> Float[Tensor, " boxes"]:
    """CornerNet's rule as OpenPCDet computes it: the least root of three quadratics, in the unit given."""
    b = length + width
    c = length * width
    first = (b + (b**2 - 4 * c * (1 - overlap) / (1 + overlap)).sqrt()) / 2
    second = (2 * b + (4 * b**2 - 16 * (1 - overlap) * c).sqrt()) / 2
    third = (-2 * overlap * b + (4 * overlap**2 * b**2 + 16 * overlap * (1 - overlap) * c).sqrt()) / 2
    return torch.minimum(torch.minimum(first, second), third)


class CenterHead(nn.Module):
    """Shared convolution, branches, targets, losses and decoding.

    Args:
        config: see `HeadConfig`.
        inputs: channels of the map.
        grid: voxels of the detector.
        stride: voxels per cell of the map.
    """

    def __init__(self, config: HeadConfig, inputs: int, grid: Grid, stride: int) -> None:
        super().__init__()
        self.config, self.grid, self.stride = config, grid, stride
        width = config.channels
        self.shared_conv = nn.Sequential(
            nn.Conv2d(inputs, width, 3, padding=1, bias=False), nn.BatchNorm2d(width, **NORM), nn.ReLU()
        )
        outputs = {**BRANCHES, "hm": len(config.classes)}
        branches = nn.ModuleDict()
        for name, channels in outputs.items():
            inner = nn.Sequential(
                nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width, **NORM), nn.ReLU()
            )
            branches[name] = nn.Sequential(inner, nn.Conv2d(width, channels, 3, padding=1))
        nn.init.constant_(branches["hm"][1].bias, PRIOR)  # type: ignore[index]
        self.heads_list = nn.ModuleList([branches])

    def forward(self, bev: Float[Tensor, "batch channels ny nx"]) -> dict[str, Tensor]:
        """The maps of all branches; `hm` holds logits."""
        shared = self.shared_conv(bev)
        branches: nn.ModuleDict = self.heads_list[0]  # type: ignore[assignment]
        return {name: branch(shared) for name, branch in branches.items()}

    @property
    def cell(self) -> tuple[float, float]:
        """Sides of a cell of the map, in metres."""
        return self.grid.voxel[0] * self.stride, self.grid.voxel[1] * self.stride

    def targets(self, gt_boxes: Float[Tensor, "batch most 8"], shape: tuple[int, int]) -> Targets:
        """Targets of a batch.

        Args:
            gt_boxes: (x, y, z, dx, dy, dz, yaw, label) with labels from 1; rows of label 0 are padding.
            shape: (ny, nx) of the map.

        Raises:
            DataError: boxes without size, or labels that the head does not have.
        """
        ny, nx = shape
        classes = len(self.config.classes)
        frame, row = (gt_boxes[..., 7] != 0).nonzero(as_tuple=True)
        boxes, label = gt_boxes[frame, row, :7], gt_boxes[frame, row, 7].long()
        check_boxes(boxes, "gt_boxes")
        if len(label) and not (int(label.min()) >= 1 and int(label.max()) <= classes):
            raise DataError(
                f"labels go from 1 to {classes} ({', '.join(self.config.classes)}); received "
                f"{int(label.min())} to {int(label.max())}"
            )
        (sx, sy), lower = self.cell, self.grid.lower
        place = torch.stack([(boxes[:, 0] - lower[0]) / sx, (boxes[:, 1] - lower[1]) / sy], 1)
        whole = place.floor().long()
        on_map = ((whole >= 0) & (whole < whole.new_tensor([nx, ny]))).all(1)
        frame, boxes, label = frame[on_map], boxes[on_map], label[on_map]
        place, whole = place[on_map], whole[on_map]
        radius = gaussian_radius(boxes[:, 3] / sx, boxes[:, 4] / sy, self.config.overlap).long()
        radius = radius.clamp(min=self.config.least_radius)
        heat = self._heat(len(gt_boxes), shape, frame, label - 1, whole, radius, boxes.dtype)
        values = {
            "center": place - whole,
            "center_z": boxes[:, 2:3],
            "dim": boxes[:, 3:6].log(),
            "rot": torch.stack([boxes[:, 6].cos(), boxes[:, 6].sin()], 1),
        }
        return Targets(heat, frame, whole[:, 1] * nx + whole[:, 0], boxes, values)

    def _heat(
        self,
        batch: int,
        shape: tuple[int, int],
        frame: Tensor,
        label: Tensor,
        whole: Tensor,
        radius: Tensor,
        dtype: torch.dtype,
    ) -> Tensor:
        """exp(-d^2 / (2 sigma^2)) around each centre, up to the radius, sigma = (2 r + 1) / 6."""
        ny, nx = shape
        classes = len(self.config.classes)
        heat = torch.zeros(batch * classes * ny * nx, dtype=dtype, device=whole.device)
        if not len(frame):
            return heat.view(batch, classes, ny, nx)
        reach = int(radius.max())
        step = torch.arange(-reach, reach + 1, device=whole.device)
        dy, dx = (d.flatten() for d in torch.meshgrid(step, step, indexing="ij"))
        x, y = whole[:, :1] + dx, whole[:, 1:] + dy
        sigma = (2 * radius + 1).to(dtype)[:, None] / 6
        value = torch.exp(-(dx**2 + dy**2).to(dtype) / (2 * sigma**2))
        inside = (x >= 0) & (x < nx) & (y >= 0) & (y < ny)
        inside &= (dx.abs() <= radius[:, None]) & (dy.abs() <= radius[:, None])
        at = ((frame * classes + label)[:, None] * ny + y) * nx + x
        heat = heat.scatter_reduce(0, at[inside], value[inside], "amax")
        return heat.view(batch, classes, ny, nx)

    def losses(
        self, maps: Mapping[str, Tensor], gt_boxes: Float[Tensor, "batch most 8"]
    ) -> dict[str, Float[Tensor, ""]]:
        """Penalty-reduced focal loss (exponents 2 and 4); 2 times L1 of the branches and 2 times 1 - DIoU at
        the centres; L1 of the IoU branch to 2 IoU - 1. Each divided by the number of boxes."""
        shape = maps["hm"].shape[2], maps["hm"].shape[3]
        target = self.targets(gt_boxes, shape)
        count = max(len(target.frame), 1)
        at = {name: _at(maps[name], target.frame, target.cell) for name in BRANCHES}
        boxes = self._boxes(at, target.cell, shape[1])
        regression = sum(
            (F.l1_loss(at[name], value, reduction="sum") for name, value in target.values.items()),
            start=maps["hm"].new_zeros(()),
        )
        with torch.no_grad():
            usable = boxes.detach().clone()
            usable[:, 3:6] = usable[:, 3:6].clamp(min=1e-3, max=1e3)
            _, overlap = paired_iou(usable, target.boxes)
        return {
            "heat": focal_loss(maps["hm"], target.heat) / count,
            "box": 2 * regression / count,
            "diou": 2 * (1 - diou(boxes, target.boxes)).sum() / count,
            "iou": F.l1_loss(at["iou"][:, 0], 2 * overlap - 1, reduction="sum") / count,
        }

    def _boxes(self, at: Mapping[str, Tensor], cell: Tensor, nx: int) -> Tensor:
        """Boxes from the branches' values at cells."""
        (sx, sy), lower = self.cell, self.grid.lower
        x = (cell % nx + at["center"][:, 0]) * sx + lower[0]
        y = (cell.div(nx, rounding_mode="floor") + at["center"][:, 1]) * sy + lower[1]
        size = at["dim"].clamp(-5, 5).exp()
        yaw = torch.atan2(at["rot"][:, 1], at["rot"][:, 0])
        return torch.cat([x[:, None], y[:, None], at["center_z"], size, yaw[:, None]], 1)

    @torch.no_grad()
    def decode(self, maps: Mapping[str, Tensor]) -> list[Detections]:
        """The boxes of each frame: best cells, scores rectified by the IoU branch, NMS per class. Labels
        from 1."""
        heat = maps["hm"].sigmoid()
        batch, classes, ny, nx = heat.shape
        rectify, nms = heat.new_tensor(self.config.rectify), self.config.nms
        found = []
        for frame in range(batch):
            scores, index = heat[frame].flatten().sort(descending=True, stable=True)
            scores, index = scores[: self.config.most], index[: self.config.most]
            label, cell = index.div(ny * nx, rounding_mode="floor"), index % (ny * nx)
            at = {name: _at(maps[name], torch.full_like(cell, frame), cell) for name in BRANCHES}
            weight = rectify[label]
            overlap = ((at["iou"][:, 0] + 1) / 2).clamp(0, 1)
            scores = scores ** (1 - weight) * overlap**weight
            boxes = self._boxes(at, cell, nx)
            good = (scores > self.config.threshold).nonzero().squeeze(1)
            scores, boxes, label = scores[good], boxes[good], label[good]
            kept = []
            for number in range(classes):
                mine = (label == number).nonzero().squeeze(1)
                kept.append(mine[rotated_nms(boxes[mine], scores[mine], nms[number], self.config.kept)])
            rows = torch.cat(kept)
            rows = rows[scores[rows].argsort(descending=True, stable=True)]
            found.append(Detections(boxes[rows], scores[rows], label[rows] + 1))
        return found


def _at(values: Tensor, frame: Tensor, cell: Tensor) -> Tensor:
    """Values [boxes, channels] of a map at cells of frames."""
    return values.flatten(2)[frame, :, cell]


def focal_loss(logits: Float[Tensor, "*shape"], heat: Float[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """-sum of (1 - p)^2 log p at centres and (1 - heat)^4 p^2 log(1 - p) elsewhere."""
    p = logits.sigmoid().clamp(LOGIT_CLIP, 1 - LOGIT_CLIP)
    centre: Bool[Tensor, "*shape"] = heat == 1
    positive = torch.where(centre, (1 - p) ** 2 * p.log(), torch.zeros_like(p))
    negative = torch.where(centre, torch.zeros_like(p), (1 - heat) ** 4 * p**2 * (1 - p).log())
    return -(positive.sum() + negative.sum())


def diou(a: Float[Tensor, "pairs 7"], b: Float[Tensor, "pairs 7"]) -> Float[Tensor, " pairs"]:
    """Distance IoU (Zheng et al. 2020) of boxes taken as axis-aligned, as the reference does: the yaw has a
    loss of its own. IoU - |distance of centres|^2 / |diagonal of the hull|^2."""
    low = torch.maximum(a[:, :3] - a[:, 3:6] / 2, b[:, :3] - b[:, 3:6] / 2)
    high = torch.minimum(a[:, :3] + a[:, 3:6] / 2, b[:, :3] + b[:, 3:6] / 2)
    shared = (high - low).clamp(min=0).prod(1)
    whole = a[:, 3:6].prod(1) + b[:, 3:6].prod(1) - shared
    outer = torch.maximum(a[:, :3] + a[:, 3:6] / 2, b[:, :3] + b[:, 3:6] / 2) - torch.minimum(
        a[:, :3] - a[:, 3:6] / 2, b[:, :3] - b[:, 3:6] / 2
    )
    apart = ((a[:, :3] - b[:, :3]) ** 2).sum(1)
    return shared / whole.clamp(min=math.ulp(1.0)) - apart / (outer**2).sum(1).clamp(min=1e-6)
