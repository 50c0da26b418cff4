"""Recipes of timm's classifiers, tried at reduced size (see `zoo.recipes.check`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from zoo.optional import import_timm
from zoo.recipes import Entry
from zoo.recipes.check import Library, new_zeros
from zoo.vision.timm_folders import load_folder


class Timm(Library):
    """A folder as timm saves it for a hub, with the arguments that make it small."""

    def base(self, entry: Entry, work: Path) -> Path:
        """A random model at reduced size."""
        timm = import_timm()
        torch.manual_seed(0)
        model = timm.create_model(entry.kind, num_classes=10, **_tuples(entry.config))
        options = {"model_args": dict(entry.config)} if entry.config else {}
        timm.models.save_for_hf(model, work / "base", safe_serialization=True, **options)
        return work / "base"

    def parameters(self, entry: Entry) -> int:
        """Of the real model with ImageNet's classes."""
        with torch.device("meta"):
            model = import_timm().create_model(entry.kind)
        return sum(parameter.numel() for parameter in model.parameters())

    def zeros(self, entry: Entry, work: Path) -> float:
        """Share of zeros in what was pruned."""
        dense, made = load_folder(work / "base"), load_folder(work / "out")
        return new_zeros(dense, made)


def _tuples(config: Any) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in config.items()}
