"""Recipes of diffusers' networks, tried at reduced size (see `zoo.recipes.check`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from zoo.diffusion.families import family, output
from zoo.diffusion.pruned import load_network
from zoo.errors import ConfigError
from zoo.recipes import Entry
from zoo.recipes.check import Library, new_zeros


class Diffusers(Library):
    """One network's folder."""

    def base(self, entry: Entry, work: Path) -> Path:
        """A random model at reduced size."""
        network: Any = family(entry.kind)[0]
        network.save_pretrained(work / "base")
        return work / "base"

    def parameters(self, entry: Entry) -> int:
        """Of the real denoiser."""
        network: Any = type(family(entry.kind)[0])
        with torch.device("meta"):
            model = network.from_config(dict(entry.full))
        return sum(parameter.numel() for parameter in model.parameters())

    def zeros(self, entry: Entry, work: Path) -> float:
        """Share of zeros in what was pruned."""
        made = load_network(work / "out").eval()
        dense, inputs = family(entry.kind)
        if not torch.isfinite(output(made, inputs)).all():
            raise ConfigError("the result puts out what is not finite")
        left, before = (sum(p.numel() for p in one.parameters()) for one in (made, dense))
        return 1 - left / before if left < before else new_zeros(dense, made)
