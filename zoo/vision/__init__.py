"""Image models with few weights: the pruning methods everybody compares with, on one core and one loop.

Importing this package does not import torch: everything is registered by address.
"""

from __future__ import annotations

import importlib
from typing import Any

from zoo.registry import ARCHITECTURES, EXPERIMENTS, METHODS, TASKS

ARCHITECTURES.register("vision/resnet", "zoo.vision.models:ResNet")
ARCHITECTURES.register("vision/convnet", "zoo.vision.models:ConvNet")
ARCHITECTURES.register("vision/mlp", "zoo.vision.models:MLP")
ARCHITECTURES.register("vision/vit", "zoo.vision.models:ViT")
METHODS.register("magnitude", "zoo.vision.magnitude:MagnitudePruning")
METHODS.register("random-pruning", "zoo.vision.random_pruning:RandomPruning")
METHODS.register("dynamic-sparse", "zoo.vision.random_pruning:DynamicSparse")
METHODS.register("lottery-ticket", "zoo.vision.tickets:LotteryTicket")
METHODS.register("lottery-jackpot", "zoo.vision.jackpots:LotteryJackpot")
METHODS.register("bip", "zoo.vision.bip:BiP")
METHODS.register("sparse-soup", "zoo.vision.soups:SparseSoup")
TASKS.register("vision/digits", "zoo.vision.tasks:Digits")
TASKS.register("vision/cifar10-jpeg", "zoo.vision.tasks:CifarJpeg")
TASKS.register("vision/cifar10-true", "zoo.vision.tasks:CifarTrue")
EXPERIMENTS.register("pruning-benchmark", "zoo.vision.reproduce:PruningBenchmark")

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
