"""OpenPCDet's configurations, dictionaries and state dicts.

The parts of a detector have OpenPCDet's names, so a state dict is loaded as it is; what is checked is that it
is one of this very variant. The names of PointPillarScatter3d and of counters of batches carry no weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from zoo.errors import ConfigError, DataError
from zoo.names import suggestion
from zoo.vision.lidar.detector import Detector
from zoo.vision.lidar.dsvt import DSVT, DSVTConfig
from zoo.vision.lidar.options import as_lists

VFES = ("DynPillarVFE", "DynPillarVFE3D")


def detector_from_openpcdet(
    config: Mapping[str, Any], *, point_features: int = 4, compat: bool = False
) -> Detector:
    """The detector that an OpenPCDet configuration (a YAML file, read) describes.

    Understood are DSVT on pillars or voxels with the residual BEV backbone and one CenterHead.

    Args:
        config: with DATA_CONFIG, CLASS_NAMES and MODEL.
        point_features: raw features of a point; Waymo's frames have 5 (elongation), nuScenes' sweeps 5
        (time).
        compat: compute as the released code does, for its checkpoints.

    Raises:
        ConfigError: a part that is not understood, or a missing key.
    """
    try:
        data, model = config["DATA_CONFIG"], config["MODEL"]
        bounds, classes = data["POINT_CLOUD_RANGE"], config["CLASS_NAMES"]
        voxel = next(step["VOXEL_SIZE"] for step in data["DATA_PROCESSOR"] if "VOXEL_SIZE" in step)
        vfe, backbone = _part(model, "VFE", VFES), _part(model, "BACKBONE_3D", ("DSVT",))
        bev, head = (
            _part(model, "BACKBONE_2D", ("BaseBEVResBackbone",)),
            _part(model, "DENSE_HEAD", ("CenterHead",)),
        )
        for key, wanted in (("WITH_DISTANCE", False), ("USE_ABSLOTE_XYZ", True), ("USE_NORM", True)):
            if vfe.get(key, wanted) != wanted:
                raise ConfigError(f"VFE.{key} must be {wanted}; received {vfe[key]}")
        dsvt = DSVTConfig.from_openpcdet(backbone, compat=compat)
        options = as_lists(dsvt)
        shape = tuple(options.pop("sparse_shape"))
        detector = Detector(
            bounds,
            voxel,
            "dsvt",
            vfe["NUM_FILTERS"],
            options,
            _lower(bev, LEVELS),
            _head(head, classes),
            point_features,
        )
    except (KeyError, StopIteration) as error:
        key = error.args[0] if error.args else "DATA_PROCESSOR with VOXEL_SIZE"
        raise ConfigError(f"the OpenPCDet configuration lacks {key!r}") from error
    if shape != detector.grid.size:
        raise ConfigError(
            f"sparse_shape {list(shape)} is not the grid of POINT_CLOUD_RANGE and VOXEL_SIZE, "
            f"{list(detector.grid.size)}; make them agree"
        )
    return detector


LEVELS = ("LAYER_NUMS", "LAYER_STRIDES", "NUM_FILTERS", "UPSAMPLE_STRIDES", "NUM_UPSAMPLE_FILTERS")


def _part(model: Mapping[str, Any], key: str, names: tuple[str, ...]) -> Mapping[str, Any]:
    part: Mapping[str, Any] = model[key]
    if part["NAME"] not in names:
        raise ConfigError(f"{key} {part['NAME']!r} is not understood. {suggestion(part['NAME'], names)}")
    return part


def _lower(section: Mapping[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    return {key.lower(): list(section[key]) for key in keys}


def _head(head: Mapping[str, Any], classes: list[str]) -> dict[str, Any]:
    groups, after = head["CLASS_NAMES_EACH_HEAD"], head["POST_PROCESSING"]
    if len(groups) != 1 or list(groups[0]) != list(classes):
        raise ConfigError(f"one head for all classes is understood; CLASS_NAMES_EACH_HEAD is {groups}")
    given = {name: branch["out_channels"] for name, branch in head["SEPARATE_HEAD_CFG"]["HEAD_DICT"].items()}
    if given != {"center": 2, "center_z": 1, "dim": 3, "rot": 2, "iou": 1}:
        raise ConfigError(f"the head's branches are center, center_z, dim, rot and iou; received {given}")
    target = head["TARGET_ASSIGNER_CONFIG"]
    return {
        "classes": list(classes),
        "channels": head["SHARED_CONV_CHANNEL"],
        "overlap": target["GAUSSIAN_OVERLAP"],
        "least_radius": target["MIN_RADIUS"],
        "most": after["MAX_OBJ_PER_SAMPLE"],
        "rectify": list(after["IOU_RECTIFIER"]),
        "threshold": after["SCORE_THRESH"],
        "nms": list(after["NMS_CONFIG"]["NMS_THRESH"]),
        "kept": max(after["NMS_CONFIG"]["NMS_POST_MAXSIZE"]),
    }


def load_openpcdet_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a state dict into a detector, or into a backbone alone from a whole detector's state.

    Args:
        model: a `Detector` or a `DSVT`.
        state: names and tensors, e.g. `torch.load(path, weights_only=True)["model_state"]`.

    Raises:
        ConfigError: a state dict of another variant: names or shapes that do not fit.
    """
    ignored = ("global_step",)
    given = {name: value for name, value in state.items() if name not in ignored}
    prefix = "backbone_3d."
    if isinstance(model, DSVT) and any(name.startswith(prefix) for name in given):
        given = {name.removeprefix(prefix): v for name, v in given.items() if name.startswith(prefix)}
    own = model.state_dict()
    counters = {name for name in own if name.endswith("num_batches_tracked")}
    missing = sorted(own.keys() - given.keys() - counters)
    extra = sorted(given.keys() - own.keys())
    shapes = [name for name in own.keys() & given.keys() if own[name].shape != given[name].shape]
    if missing or extra or shapes:
        raise ConfigError(_difference(own, given, missing, extra, sorted(shapes)))
    model.load_state_dict({**{name: own[name] for name in counters}, **given})


def _difference(
    own: Mapping[str, Tensor],
    given: Mapping[str, Tensor],
    missing: list[str],
    extra: list[str],
    shapes: list[str],
) -> str:
    """What is wrong, in one line, and the settings to look at."""
    start = "a state dict of another variant:"
    if shapes:
        name = shapes[0]
        wrong, right = list(given[name].shape), list(own[name].shape)
        return (
            f"{start} {name!r} is {wrong}, this network has {right} ({len(shapes)} such); compare d_model, "
            "the voxel grid, classes and point_features"
        )
    lacks = f"it lacks {missing[0]!r} ({len(missing)} such)" if missing else ""
    has = f"it has {extra[0]!r} ({len(extra)} such)" if extra else ""
    return (
        f"{start} {lacks or has}; compare set_info, downsample_stride, window_shape and the head's branches"
    )


class OpenPCDetBackbone(nn.Module):
    """DSVT as OpenPCDet calls a BACKBONE_3D: a dictionary in, the same dictionary with more entries out.

    Reads `voxel_features`, `voxel_coords` (batch, z, y, x) and `batch_size`; writes `voxel_features`,
    `pillar_features` and `voxel_coords` of the last stage.
    """

    def __init__(self, config: DSVTConfig) -> None:
        super().__init__()
        self.backbone = DSVT(config)
        self.num_point_features = self.backbone.width

    def forward(self, batch_dict: dict[str, Any]) -> dict[str, Any]:
        """Raises:
        DataError: a key is missing, or what the backbone refuses.
        """
        for key in ("voxel_features", "voxel_coords", "batch_size"):
            if key not in batch_dict:
                raise DataError(f"batch_dict lacks {key!r}; it holds {sorted(batch_dict)}")
        coords = batch_dict["voxel_coords"].to(torch.int64)
        x, coords = self.backbone(batch_dict["voxel_features"], coords, int(batch_dict["batch_size"]))
        batch_dict |= {"voxel_features": x, "pillar_features": x, "voxel_coords": coords}
        return batch_dict
