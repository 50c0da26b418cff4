"""Sparse scenes: Gaussians that are rendered and trained on a CPU, pruned, compressed and read from files.

Importing this package does not import torch: everything is registered by address.
"""

from __future__ import annotations

from zoo.registry import (
    ARCHITECTURES,
    EXPORTERS,
    FILE_SPARSIFIERS,
    JOBS,
    MAKERS,
    METHODS,
    PICTURES,
    STUDIES,
    TASKS,
)

ARCHITECTURES.register("neural3d/gaussians", "zoo.neural3d.scene:GaussianScene")
for _suffix in (".ply", ".splat", ".spz", ".sog"):
    FILE_SPARSIFIERS.register(_suffix, "zoo.neural3d.sparsify:SparsifyScene")
EXPORTERS.register("viewer", "zoo.neural3d.exports:ExportViewer")
EXPORTERS.register("turntable", "zoo.neural3d.exports:ExportTurntable")
PICTURES.register("neural3d", "zoo.neural3d.exports:picture")
METHODS.register("splat-pruning", "zoo.neural3d.methods.splat_pruning:SplatPruning")
STUDIES.register("edge-gaussians", "zoo.neural3d.studies.edge_gaussians:STUDY")
STUDIES.register("orex", "zoo.neural3d.studies.orex:STUDY")
STUDIES.register("spare", "zoo.neural3d.studies.spare:STUDY")
STUDIES.register("queen", "zoo.neural3d.studies.queen:STUDY")
JOBS.register("neural3d", "zoo.neural3d.domain:make_job")
MAKERS.register("neural3d/gaussians", "zoo.neural3d.makers:gaussians")
for _name, _class in (
    ("shapes", "Shapes"),
    ("lego-100", "Lego"),
    ("fox-120", "Fox"),
    ("fern-126", "Fern"),
    ("dtu24-100", "DTU24"),
    ("fountain-128", "Fountain"),
    ("herzjesu-128", "HerzJesu"),
    ("livingroom-128", "LivingRoom"),
):
    TASKS.register(f"neural3d/{_name}", f"zoo.neural3d.tasks:{_class}")
