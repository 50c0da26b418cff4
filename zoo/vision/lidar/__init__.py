"""Boxes from point clouds: DSVT (Wang et al., CVPR 2023), its baselines, scenes, boxes, tasks.

Importing this package does not import torch; `zoo.vision` registers everything by address.
"""
