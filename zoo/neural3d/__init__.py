"""Sparse scenes: Gaussians that are rendered and trained on a CPU, pruned, compressed and read from files.

Importing this package does not import torch: everything is registered by address.
"""

from __future__ import annotations

from zoo.registry import ARCHITECTURES, FILE_SPARSIFIERS

ARCHITECTURES.register("neural3d/gaussians", "zoo.neural3d.scene:GaussianScene")
for _suffix in (".ply", ".splat", ".spz", ".sog"):
    FILE_SPARSIFIERS.register(_suffix, "zoo.neural3d.sparsify:SparsifyScene")
