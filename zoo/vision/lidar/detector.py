"""Detectors: voxel features, an encoder on sparse voxels, a bird's-eye-view backbone, a head.

The four parts have OpenPCDet's names (vfe, backbone_3d, backbone_2d, dense_head), so that its state dicts
fit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zoo.errors import ConfigError, DataError
from zoo.names import suggestion
from zoo.vision.lidar.average_precision import Detections
from zoo.vision.lidar.bev import BEVBackbone, BEVConfig, scatter_bev
from zoo.vision.lidar.center_head import CenterHead, HeadConfig
from zoo.vision.lidar.dsvt import DSVT, DSVTConfig
from zoo.vision.lidar.options import as_tuples
from zoo.vision.lidar.sparse_encoder import SparseEncoder
from zoo.vision.lidar.voxelise import Grid, VoxelEncoder, voxelise


class NoEncoder(nn.Module):
    """Voxels go to the map as they are: PointPillars."""

    def __init__(self, size: Sequence[int], width: int) -> None:
        super().__init__()
        self.size, self.width = tuple(size), width

    def forward(self, x: Tensor, coords: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
        return x, coords


def _dsvt(grid: Grid, width: int, options: Mapping[str, Any]) -> DSVT:
    return DSVT(DSVTConfig(sparse_shape=grid.size, **as_tuples(dict(options))))


def _pillars(grid: Grid, width: int, options: Mapping[str, Any]) -> NoEncoder:
    if options:
        raise ConfigError(f"the encoder 'pillars' has no options; received {sorted(options)}")
    return NoEncoder(grid.size, width)


def _sparse(grid: Grid, width: int, options: Mapping[str, Any]) -> SparseEncoder:
    return SparseEncoder(grid.size, width, **options)


ENCODERS: dict[str, Callable[[Grid, int, Mapping[str, Any]], Any]] = {
    "dsvt": _dsvt,
    "pillars": _pillars,
    "sparse-conv": _sparse,
}


class Detector(nn.Module):
    """A detector of rotated boxes.

    Args:
        point_cloud_range: (x0, y0, z0, x1, y1, z1) in metres.
        voxel_size: sides (x, y, z) in metres; a voxel as high as the range is a pillar.
        encoder: dsvt, pillars (none) or sparse-conv.
        vfe: widths of the point layers.
        backbone: options of the encoder; of DSVT the fields of `DSVTConfig` but sparse_shape.
        bev: fields of `BEVConfig`.
        head: fields of `HeadConfig`, the classes among them.
        point_features: raw features of a point, x, y, z first.

    Raises:
        ConfigError: parts that do not fit each other.
    """

    def __init__(
        self,
        point_cloud_range: Sequence[float | int],
        voxel_size: Sequence[float | int],
        encoder: str,
        vfe: Sequence[int],
        backbone: Mapping[str, Any],
        bev: Mapping[str, Any],
        head: Mapping[str, Any],
        point_features: int = 4,
    ) -> None:
        super().__init__()
        if encoder not in ENCODERS:
            raise ConfigError(f"Unknown encoder {encoder!r}. {suggestion(encoder, ENCODERS)}")
        self.arguments: dict[str, Any] = {
            "point_cloud_range": list(point_cloud_range),
            "voxel_size": list(voxel_size),
            "encoder": encoder,
            "vfe": list(vfe),
            "backbone": dict(backbone),
            "bev": dict(bev),
            "head": dict(head),
            "point_features": point_features,
        }
        self.grid = Grid.of(point_cloud_range, voxel_size)
        self.vfe = VoxelEncoder(point_features, vfe, self.grid)
        try:
            self.backbone_3d: Any = ENCODERS[encoder](self.grid, vfe[-1], backbone)
            bev_config, head_config = BEVConfig(**as_tuples(dict(bev))), HeadConfig(**as_tuples(dict(head)))
        except TypeError as error:
            raise ConfigError(f"an option that the detector does not have: {error}") from error
        depth = self.backbone_3d.size[2]
        self.backbone_2d = BEVBackbone(bev_config, self.backbone_3d.width * depth)
        self.dense_head = CenterHead(head_config, self.backbone_2d.width, self.grid, bev_config.stride)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes; label 1 is the first."""
        return self.dense_head.config.classes

    def maps(self, points: Tensor, batch_size: int) -> dict[str, Tensor]:
        """The head's maps for points with rows (frame, x, y, z, ...)."""
        voxels = voxelise(points, self.grid, batch_size)
        x, coords = self.backbone_3d(self.vfe(voxels), voxels.coords, batch_size)
        return self.dense_head(self.backbone_2d(scatter_bev(x, coords, self.backbone_3d.size, batch_size)))

    def detect(self, points: Tensor, batch_size: int) -> list[Detections]:
        """The boxes in each frame, best first."""
        return self.dense_head.decode(self.maps(points, batch_size))

    def losses(self, points: Tensor, batch_size: int, gt_boxes: Tensor) -> dict[str, Tensor]:
        """The terms of the training loss; see `CenterHead.losses`."""
        return self.dense_head.losses(self.maps(points, batch_size), gt_boxes)

    def forward(self, batch_dict: Mapping[str, Any]) -> list[dict[str, Tensor]] | dict[str, Tensor]:
        """OpenPCDet's call; the dictionary is left as it is.

        Args:
            batch_dict: `points` [n, 1 + features] with rows (frame, x, y, z, ...), `batch_size`, and in
            training
                `gt_boxes` [batch, most, 8] (x, y, z, dx, dy, dz, yaw, label), padded with zeros.

        Returns:
            In training `loss` and its terms; else per frame `pred_boxes`, `pred_scores`, `pred_labels`.

        Raises:
            DataError: a key is missing, or what the parts refuse.
        """
        needed = ("points", "batch_size", "gt_boxes") if self.training else ("points", "batch_size")
        if missing := [key for key in needed if key not in batch_dict]:
            raise DataError(f"batch_dict lacks {missing[0]!r}; it holds {sorted(batch_dict)}")
        points, batch_size = batch_dict["points"], int(batch_dict["batch_size"])
        if self.training:
            terms = self.losses(points, batch_size, batch_dict["gt_boxes"])
            return {"loss": torch.stack(list(terms.values())).sum(), **terms}
        return [
            {"pred_boxes": one.boxes, "pred_scores": one.scores, "pred_labels": one.labels}
            for one in self.detect(points, batch_size)
        ]

    def current_arguments(self) -> dict[str, Any]:
        """The arguments that build this detector anew."""
        return self.arguments
