"""Maker of lottery tickets of MNIST, frozen, that tell scikit-learn's digits apart by a new head."""

from __future__ import annotations

from typing import Any

from torch import nn

from zoo.bundles.make import Work
from zoo.bundles.recipes import Row
from zoo.methods.contract import Sparsified
from zoo.methods.reprogramming import Probe, train_probe
from zoo.shared.masks import MaskSet, masks_of, set_masks
from zoo.shared.train import Recipe
from zoo.vision.data import load_images
from zoo.vision.domain import image_job
from zoo.vision.studies.reprogramming import ReprogramOptions, tickets

LEVELS = (0.36, 0.59, 0.83, 0.93)  # shares of zeros at which tickets are found, each from the one before


def reprogrammed(row: Row, seed: int, start: nn.Module | None, work: Work) -> Sparsified:
    """Maker: the dense source or one of its tickets, with a new head trained on the row's images.

    Options: `sparsity`, one of `LEVELS`, or 0 for the dense source; `images`, of MNIST to train it on;
    `epochs`, of each of its trainings.
    """
    level = row.options.get("sparsity", 0.0)
    options = ReprogramOptions(
        dataset="mnist",
        train_images=row.options["images"],
        epochs=row.options["epochs"],
        levels=LEVELS,
    )
    source = next(net for zeros, net in tickets(options, seed) if zeros == level)
    images = load_images(str(row.dataset))
    probe = train_probe(Probe(source, 10, seed), image_job(images, Recipe(**row.recipe), seed, work.device))
    model: Any = probe.net.requires_grad_(True)
    found = masks_of(source) or MaskSet({})
    masks = MaskSet({name: mask for name, mask in found.items() if not name.startswith("linear.")})
    set_masks(model, masks)
    return Sparsified(model.cpu().eval(), masks, arguments=model.current_arguments())
