"""Sparse scenes: Gaussians and fields, rendered and trained on a CPU, pruned, compressed, read from files.

Importing this package does not import torch: everything is registered by address.
"""

from __future__ import annotations

from zoo.registry import (
    ARCHITECTURES,
    EXPORTERS,
    FILE_SPARSIFIERS,
    FINETUNERS,
    JOBS,
    MAKERS,
    METHODS,
    PICTURES,
    STUDIES,
    TASKS,
)

ARCHITECTURES.register("neural3d/gaussians", "zoo.neural3d.scene:GaussianScene")
ARCHITECTURES.register("neural3d/field", "zoo.neural3d.fields:HashField")
for _suffix in (".ply", ".splat", ".spz", ".sog"):
    FILE_SPARSIFIERS.register(_suffix, "zoo.neural3d.sparsify:SparsifyScene")
EXPORTERS.register("viewer", "zoo.neural3d.exports:ExportViewer")
EXPORTERS.register("turntable", "zoo.neural3d.exports:ExportTurntable")
PICTURES.register("neural3d", "zoo.neural3d.exports:picture")
METHODS.register("splat-pruning", "zoo.neural3d.methods.splat_pruning:SplatPruning")
ARCHITECTURES.register("neural3d/stream", "zoo.neural3d.methods.queen:Stream")
ARCHITECTURES.register("neural3d/edge-points", "zoo.neural3d.methods.edge_gaussians:EdgePoints")
ARCHITECTURES.register("neural3d/sparp", "zoo.neural3d.methods.sparp:CoordinateNet")
ARCHITECTURES.register("neural3d/parts", "zoo.neural3d.methods.part123:PartScene")
ARCHITECTURES.register("neural3d/dpmesh", "zoo.neural3d.methods.dpmesh:DPMeshNet")
STUDIES.register("dpmesh", "zoo.neural3d.studies.dpmesh:STUDY")
ARCHITECTURES.register("neural3d/shapefusion", "zoo.neural3d.methods.shapefusion:SpiralNet")
STUDIES.register("shapefusion", "zoo.neural3d.studies.shapefusion:STUDY")
STUDIES.register("part123", "zoo.neural3d.studies.part123:STUDY")
ARCHITECTURES.register("neural3d/one2345", "zoo.neural3d.methods.one2345:CostVolumeNet")
STUDIES.register("one2345", "zoo.neural3d.studies.one2345:STUDY")
STUDIES.register("spin-nerf", "zoo.neural3d.studies.spin_nerf:STUDY")
STUDIES.register("edge-gaussians", "zoo.neural3d.studies.edge_gaussians:STUDY")
STUDIES.register("gvgen", "zoo.neural3d.studies.gvgen:STUDY")
ARCHITECTURES.register("neural3d/gvgen-text", "zoo.neural3d.methods.gvgen_text:GVGenText")
STUDIES.register("gvgen-text", "zoo.neural3d.studies.gvgen_text:STUDY")
ARCHITECTURES.register("neural3d/orex", "zoo.neural3d.methods.orex:IterativeField")
STUDIES.register("orex", "zoo.neural3d.studies.orex:STUDY")
STUDIES.register("spare", "zoo.neural3d.studies.spare:STUDY")
STUDIES.register("sparp", "zoo.neural3d.studies.sparp:STUDY")
STUDIES.register("queen", "zoo.neural3d.studies.queen:STUDY")
for _name, _class in (
    ("hollow_nerf", "HollowNeRF"),
    ("sparse_nerf", "SparseNeRF"),
    ("coherent_gs", "CoherentGS"),
    ("gaussian_object", "GaussianObject"),
    ("lm_gaussian", "LMGaussian"),
):
    _slug = _name.replace("_", "-")
    METHODS.register(_slug, f"zoo.neural3d.methods.{_name}:{_class}")
    STUDIES.register(_slug, f"zoo.neural3d.studies.{_name}:STUDY")
JOBS.register("neural3d", "zoo.neural3d.domain:make_job")
FINETUNERS.register("neural3d", "zoo.neural3d.finetune:Finetune")
MAKERS.register("neural3d/gaussians", "zoo.neural3d.makers:gaussians")
MAKERS.register("neural3d/few-views", "zoo.neural3d.makers:few_views")
MAKERS.register("neural3d/field", "zoo.neural3d.makers:field")
MAKERS.register("neural3d/carved", "zoo.neural3d.makers:carved")
MAKERS.register("neural3d/sections", "zoo.neural3d.makers:sections")
MAKERS.register("neural3d/volume", "zoo.neural3d.makers:volume")
MAKERS.register("neural3d/stream", "zoo.neural3d.makers:stream")
MAKERS.register("neural3d/edges", "zoo.neural3d.makers:edges")
MAKERS.register("neural3d/taken-out", "zoo.neural3d.makers:taken_out")
MAKERS.register("neural3d/coordinates", "zoo.neural3d.makers:coordinates")
MAKERS.register("neural3d/parted", "zoo.neural3d.makers:parted")
MAKERS.register("neural3d/network", "zoo.neural3d.networks:network")
TASKS.register("neural3d/hidden-joints", "zoo.neural3d.studies.dpmesh:HiddenJoints")
TASKS.register("neural3d/prompted-toys", "zoo.neural3d.studies.gvgen_text:PromptedToys")
TASKS.register("neural3d/prompted-toys-held", "zoo.neural3d.studies.gvgen_text:HeldToys")
TASKS.register("neural3d/region-edits", "zoo.neural3d.studies.shapefusion:RegionEdits")
TASKS.register("neural3d/sections-eight", "zoo.neural3d.studies.orex:EightSections")
TASKS.register("neural3d/moving-ball", "zoo.neural3d.studies.queen:MovingBall")
TASKS.register("neural3d/edges-abc", "zoo.neural3d.studies.edge_gaussians:EdgesOfABC")
TASKS.register("neural3d/toy-cameras", "zoo.neural3d.studies.sparp:ToyCameras")
TASKS.register("neural3d/chair-parts", "zoo.neural3d.studies.part123:ChairParts")
TASKS.register("neural3d/carved-shapes", "zoo.neural3d.studies.one2345:CarvedShapes")
for _name, _class in (
    ("shapes", "Shapes"),
    ("shapes-arc", "ShapesArc"),
    ("lego-100", "Lego"),
    ("fox-120", "Fox"),
    ("fern-126", "Fern"),
    ("dtu24-100", "DTU24"),
    ("fountain-128", "Fountain"),
    ("herzjesu-128", "HerzJesu"),
    ("livingroom-128", "LivingRoom"),
    ("lego-ring", "LegoRing"),
    ("livingroom-frames", "LivingRoomFrames"),
    ("disc-without-ball", "BallTakenOut"),
):
    TASKS.register(f"neural3d/{_name}", f"zoo.neural3d.tasks:{_class}")
