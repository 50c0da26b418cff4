"""Image models with few weights: the pruning methods everybody compares with, on one core and one loop.

Importing this package does not import torch: everything is registered by address.
"""

from __future__ import annotations

import importlib
from typing import Any

from zoo.registry import (
    ARCHITECTURES,
    CONTENTS,
    DATASETS,
    EXAMPLES,
    FINETUNERS,
    FOLDERS,
    JOBS,
    MAKERS,
    MEASURED,
    METHODS,
    PRETRAINERS,
    RECIPE_CHECKS,
    STUDIES,
    TASKS,
)

ARCHITECTURES.register("vision/resnet", "zoo.vision.models:ResNet")
ARCHITECTURES.register("vision/convnet", "zoo.vision.models:ConvNet")
ARCHITECTURES.register("vision/mlp", "zoo.vision.models:MLP")
ARCHITECTURES.register("vision/vit", "zoo.vision.models:ViT")
ARCHITECTURES.register("vision/mobilenet", "zoo.vision.mobilenet:MobileNetV1")
ARCHITECTURES.register("vision/squeezenet", "zoo.vision.squeezenet:SqueezeNet")
ARCHITECTURES.register("vision/edsr", "zoo.vision.upscalers:EDSR")
ARCHITECTURES.register("vision/swinir", "zoo.vision.upscalers:SwinIR")
ARCHITECTURES.register("vision/lidar-detector", "zoo.vision.lidar.detector:Detector")
ARCHITECTURES.register("vision/feature-autoencoder", "zoo.vision.features:FeatureAutoencoder")
ARCHITECTURES.register("vision/searched", "zoo.vision.searched:SearchedNet")
ARCHITECTURES.register("vision/slots", "zoo.vision.methods.slash:SlotModel")
METHODS.register("ofb", "zoo.vision.methods.ofb:OFB")
METHODS.register("sparse-byte-nn", "zoo.vision.methods.kernel_groups:KernelGroups")
RECIPE_CHECKS.register("timm", "zoo.vision.recipe_check:Timm")
JOBS.register("vision", "zoo.vision.domain:make_job")
EXAMPLES.register("vision", "zoo.vision.domain:example_of")
FOLDERS.register("vision/config.json:pretrained_cfg", "zoo.vision.timm_folders:sparsify_folder")
TASKS.register("vision/digits", "zoo.vision.tasks:Digits")
TASKS.register("vision/cifar10-jpeg", "zoo.vision.tasks:CifarJpeg")
TASKS.register("vision/cifar10-true", "zoo.vision.tasks:CifarTrue")
TASKS.register("vision/imagenet-one-per-class", "zoo.vision.tasks:ImageNetPhotos")
TASKS.register("images", "zoo.vision.tasks:Own")
TASKS.register("vision/set5-x2", "zoo.vision.superres:Set5")
TASKS.register("vision/set14-x2", "zoo.vision.superres:Set14")
TASKS.register("vision/lidar-scenes", "zoo.vision.lidar.tasks:Scenes")
TASKS.register("vision/digits-pixels", "zoo.vision.features:ChosenPixels")
TASKS.register("vision/digits-forgotten", "zoo.vision.unlearned:Forgotten")
TASKS.register("vision/sprites", "zoo.vision.slots:SpriteSlots")
DATASETS.register("vision/mnist", "zoo.vision.studies.small:mnist")
TASKS.register("vision/kitti", "zoo.vision.lidar.real_tasks:Kitti")
TASKS.register("frames", "zoo.vision.lidar.real_tasks:OwnFrames")
MEASURED.register("vision", "zoo.vision.domain:measured")
CONTENTS.register("vision", "zoo.vision.domain:content")
MAKERS.register("vision/classifier", "zoo.vision.makers:classifier")
MAKERS.register("vision/published-resnet", "zoo.vision.makers:published_resnet")
MAKERS.register("vision/published-squeezenet", "zoo.vision.makers:published_squeezenet")
MAKERS.register("vision/taught", "zoo.vision.makers:taught")
MAKERS.register("vision/continual", "zoo.vision.makers:continual")
MAKERS.register("vision/upscaler", "zoo.vision.makers:upscaler")
MAKERS.register("vision/spark", "zoo.vision.makers:spark")
MAKERS.register("vision/autoencoder", "zoo.vision.features:autoencoder")
MAKERS.register("vision/unlearned", "zoo.vision.unlearned:unlearned")
MAKERS.register("vision/reprogrammed", "zoo.vision.reprogrammed:reprogrammed")
MAKERS.register("vision/searched", "zoo.vision.searched:searched")
MAKERS.register("vision/slots", "zoo.vision.makers:slots")
MAKERS.register("vision/detector", "zoo.vision.makers:detector")
FINETUNERS.register("vision", "zoo.vision.finetune:Finetune")
PRETRAINERS.register("vision", "zoo.vision.spark.command:Pretrain")
STUDIES.register("dass", "zoo.vision.studies.dass:STUDY")
STUDIES.register("dsvt", "zoo.vision.studies.dsvt:STUDY")
STUDIES.register("pruning-benchmark", "zoo.vision.studies.pruning:STUDY")
STUDIES.register("pruning-claims", "zoo.vision.studies.claims:STUDY")
STUDIES.register("structured-pruning", "zoo.vision.studies.structured:STUDY")
STUDIES.register("sparcl", "zoo.vision.studies.sparcl:STUDY")
STUDIES.register("unlearning", "zoo.vision.studies.unlearning:STUDY")
STUDIES.register("superres-pruning", "zoo.vision.studies.superres:STUDY")
STUDIES.register("slash", "zoo.vision.studies.slash:STUDY")
STUDIES.register("fast-convnets", "zoo.vision.studies.fast_convnets:STUDY")
STUDIES.register("ofb", "zoo.vision.studies.ofb:STUDY")
STUDIES.register("sparse-byte-nn", "zoo.vision.studies.kernel_groups:STUDY")
STUDIES.register("consensus", "zoo.vision.studies.consensus:STUDY")
STUDIES.register("turbo-vbi", "zoo.vision.studies.turbo_vbi:STUDY")
STUDIES.register("random-search", "zoo.vision.studies.random_search:STUDY")
STUDIES.register("reprogramming", "zoo.vision.studies.reprogramming:STUDY")
STUDIES.register("clip-sharpness", "zoo.vision.studies.clip_sharpness:STUDY")
STUDIES.register("spark", "zoo.vision.studies.spark:STUDY")

_PUBLIC = {
    "ConvNet": "models",
    "MLP": "models",
    "ResNet": "models",
    "ViT": "models",
    "load_images": "data",
}


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"zoo.vision.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
