"""Runs one of nerfstudio's own commands: `python nerfstudio_command.py ns-train hollow-nerf ...`.

The index's torchvision is built for CUDA: beside a CPU build of torch its operators are missing, and its
import fails on the two that are named when it is imported. They are declared here, not defined: nothing that
the commands do calls them.
"""

import importlib.metadata
import sys

import torch

if not torch.version.cuda:
    for name in ("nms", "qnms"):
        torch.library.define(
            f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        )

if __name__ == "__main__":
    del sys.argv[0]
    (command,) = importlib.metadata.entry_points(group="console_scripts", name=sys.argv[0])
    command.load()()
