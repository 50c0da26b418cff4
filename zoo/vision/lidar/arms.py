"""The detectors that are compared: one voxel encoder, one 2D backbone design, one head, equal parameters.

All see the same pillars of 0.8 m (the sparse convolutions the same cells cut in eight along z). What an
encoder does not spend, the 2D backbone gets.
"""

from __future__ import annotations

from typing import Any

import torch

from zoo.errors import ConfigError
from zoo.names import suggestion
from zoo.vision.lidar.detector import Detector
from zoo.vision.lidar.scenes import CLASSES

RANGE = [-12.8, -12.8, -3.0, 12.8, 12.8, 1.0]
PILLAR, VOXEL = [0.8, 0.8, 4.0], [0.8, 0.8, 0.5]
WIDTH = 32
# The classes' thresholds of NMS and weights of the IoU branch.
HEAD = {
    "classes": list(CLASSES),
    "channels": 16,
    "rectify": [0.5, 0.5, 0.5],
    "nms": [0.2, 0.2, 0.2],
    "most": 200,
    "kept": 100,
}
_SETS: dict[str, Any] = {
    "window_shape": [[12, 12, 1]],
    "set_info": [[36, 2]],
    "d_model": [WIDTH],
    "nhead": [2],
    "dim_feedforward": [2 * WIDTH],
    "hybrid_factor": [2, 2, 1],
    "shifts_list": [[[0, 0, 0], [6, 6, 0]]],
}
_STILL = {**_SETS, "hybrid_factor": [1, 1, 1], "shifts_list": [[[0, 0, 0], [0, 0, 0]]], "rotate": False}
_CONV: dict[str, Any] = {"widths": [12, 16, 20, 24], "layers": 1}


def _bev(*widths: int) -> dict[str, Any]:
    return {
        "layer_nums": [1, 1, 1],
        "layer_strides": [1, 2, 2],
        "num_filters": list(widths),
        "upsample_strides": [1, 2, 4],
        "num_upsample_filters": [16, 16, 16],
    }


def _arm(
    encoder: str, voxel: list[float], vfe: int, backbone: dict[str, Any], bev: dict[str, Any]
) -> dict[str, Any]:
    return {
        "point_cloud_range": RANGE,
        "voxel_size": voxel,
        "encoder": encoder,
        "vfe": [16, vfe],
        "backbone": backbone,
        "bev": bev,
        "head": HEAD,
    }


ARMS: dict[str, dict[str, Any]] = {
    "dsvt": _arm("dsvt", PILLAR, WIDTH, _SETS, _bev(16, 24, 32)),
    "no rotation, no shift": _arm("dsvt", PILLAR, WIDTH, _STILL, _bev(16, 24, 32)),
    "dense pillars": _arm("pillars", PILLAR, WIDTH, {}, _bev(24, 28, 40)),
    "sparse convolution": _arm("sparse-conv", VOXEL, 12, _CONV, _bev(16, 24, 32)),
}


def make_arm(name: str, seed: int) -> Detector:
    """The detector of an arm with the fresh weights of a seed, whatever was drawn before.

    Raises:
        ConfigError: an unknown arm.
    """
    if name not in ARMS:
        raise ConfigError(f"Unknown arm {name!r}. {suggestion(name, ARMS)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Detector(**ARMS[name])
