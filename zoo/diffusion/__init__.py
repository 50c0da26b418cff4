"""Sparse diffusion models on diffusers: pipelines found by name, pruned, cut, distilled and evaluated.

Importing this package imports neither torch nor diffusers: everything is registered by address.
"""

from __future__ import annotations

import importlib
from typing import Any

from zoo.registry import (
    ARCHITECTURES,
    FINETUNERS,
    FOLDERS,
    JOBS,
    MAKERS,
    METHODS,
    PICTURES,
    RECIPE_CHECKS,
    STUDIES,
    TASKS,
)

ARCHITECTURES.register("diffusion/text-to-image", "zoo.diffusion.models:TextToImage")
ARCHITECTURES.register("diffusion/latent-text-to-image", "zoo.diffusion.latents:LatentTextToImage")
ARCHITECTURES.register("diffusion/mlp-flow", "zoo.diffusion.flows:MLPFlow")
ARCHITECTURES.register("diffusion/unet-flow", "zoo.diffusion.flows:UNetFlow")
METHODS.register("slimflow", "zoo.diffusion.methods.slimflow:SlimFlow")
METHODS.register("prune-parts", "zoo.diffusion.methods.stable_diffusion:PruneParts")
METHODS.register("ecodiff", "zoo.diffusion.methods.ecodiff:EcoDiff")
METHODS.register("laptop", "zoo.diffusion.methods.laptop:Laptop")
TASKS.register("diffusion/t2i-digits", "zoo.diffusion.tasks:Digits")
TASKS.register("diffusion/t2i-mnist", "zoo.diffusion.tasks:Mnist")
TASKS.register("diffusion/t2i-latents", "zoo.diffusion.tasks:MnistLatents")
TASKS.register("diffusion/flow-digits", "zoo.diffusion.tasks:FlowDigits")
TASKS.register("diffusion/drift-t2i-digits", "zoo.diffusion.tasks:DriftDigits")
TASKS.register("diffusion/drift-flow-digits", "zoo.diffusion.tasks:DriftFlow")
TASKS.register("diffusion/sampling-cost", "zoo.diffusion.tasks:SamplingCost")
TASKS.register("clip_score", "zoo.diffusion.public_judges:ClipScore")
TASKS.register("fid", "zoo.diffusion.public_judges:InceptionDistance")
PICTURES.register("diffusion", "zoo.diffusion.grids:picture")
FINETUNERS.register("diffusion", "zoo.diffusion.finetune:Finetune")
RECIPE_CHECKS.register("diffusers", "zoo.diffusion.recipe_check:Diffusers")
JOBS.register("diffusion", "zoo.diffusion.domain:make_job")
STUDIES.register("ecodiff", "zoo.diffusion.studies.ecodiff:STUDY")
STUDIES.register("laptop", "zoo.diffusion.studies.laptop:STUDY")
STUDIES.register("lomoe", "zoo.diffusion.studies.lomoe:STUDY")
STUDIES.register("slimflow", "zoo.diffusion.studies.slimflow:STUDY")
STUDIES.register("text-to-image-pruning", "zoo.diffusion.studies.parts:STUDY")
FOLDERS.register("diffusion/model_index.json", "zoo.diffusion.folders:sparsify_folder")
FOLDERS.register("diffusion/config.json:_diffusers_version", "zoo.diffusion.folders:sparsify_folder")
MAKERS.register("diffusion/text-to-image", "zoo.diffusion.makers:text_to_image")
MAKERS.register("diffusion/flow", "zoo.diffusion.makers:flow")

# Networks of papers that are no pruning methods.
ARCHITECTURES.register("diffusion/one-d-piece", "zoo.diffusion.networks.one_d_piece:OneDPiece")
ARCHITECTURES.register("diffusion/iter", "zoo.diffusion.networks.iter:Iter")
ARCHITECTURES.register("diffusion/pqdiff", "zoo.diffusion.networks.pqdiff:PQDiff")
ARCHITECTURES.register("diffusion/diffusesg", "zoo.diffusion.networks.diffusesg:DiffuseSG")
ARCHITECTURES.register("diffusion/defencing", "zoo.diffusion.networks.defencing:Defencing")
ARCHITECTURES.register("diffusion/visdiff", "zoo.diffusion.networks.visdiff:VisDiff")
MAKERS.register("diffusion/network", "zoo.diffusion.makers:network")
STUDIES.register("defencing", "zoo.diffusion.studies.defencing:STUDY")
STUDIES.register("diffusesg", "zoo.diffusion.studies.diffusesg:STUDY")
STUDIES.register("pqdiff", "zoo.diffusion.studies.pqdiff:STUDY")
STUDIES.register("iter", "zoo.diffusion.studies.iter:STUDY")
STUDIES.register("visdiff", "zoo.diffusion.studies.visdiff:STUDY")
STUDIES.register("one-d-piece", "zoo.diffusion.studies.one_d_piece:STUDY")
TASKS.register("diffusion/tokens-digits", "zoo.diffusion.networks.one_d_piece:Tokens")
TASKS.register("diffusion/enlarged-digits", "zoo.diffusion.networks.iter:Enlarged")
TASKS.register("diffusion/outpainted-digits", "zoo.diffusion.networks.pqdiff:Outpainted")
TASKS.register("diffusion/scene-graphs", "zoo.diffusion.networks.diffusesg:Agreement")
TASKS.register("diffusion/fences-photos", "zoo.diffusion.networks.defencing:Fences")
TASKS.register("diffusion/visible-polygons", "zoo.diffusion.networks.visdiff:VisiblePolygons")

_PUBLIC = {
    "TextToImage": "models",
    "TextToImagePipeline": "pipelines",
    "load_network": "pruned",
    "load_pictures": "data",
    "prune": "pruned",
}


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"zoo.diffusion.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
