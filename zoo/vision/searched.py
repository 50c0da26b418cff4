"""Networks that DASS searched: their architecture, whose arguments hold what was chosen, and their maker."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from zoo.bundles.make import Work
from zoo.bundles.recipes import Row
from zoo.errors import ConfigError
from zoo.methods.contract import Sparsified
from zoo.shared.learned.gates import harden
from zoo.shared.masks import MaskSet, masks_of
from zoo.shared.structure.relatives import seeded
from zoo.shared.train import Job, Recipe
from zoo.vision.data import Images, Split, load_images
from zoo.vision.domain import image_job
from zoo.vision.methods.dass import DASS, EDGES, NODES, OPERATIONS, CellNet, Genotype
from zoo.vision.models import Classifier


class SearchedNet(CellNet, Classifier):
    """A network of the cells that a search chose.

    Args:
        genotype: of `normal` and `reduction`, the operation of each edge that is there, by its number.
        width: of all maps.
        classes: of the output.
        channels: of the images.

    Raises:
        ConfigError: another genotype than two edges of each node, each with an operation.
    """

    def __init__(
        self,
        genotype: Mapping[str, Mapping[str, str]],
        width: int = 24,
        classes: int = 10,
        channels: int = 3,
    ) -> None:
        super().__init__(width, classes, genotype_of(genotype))
        self.stem = nn.Sequential(nn.Conv2d(channels, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width))
        plain = {kind: dict(chosen) for kind, chosen in genotype.items()}
        self.arguments = {"genotype": plain, "width": width, "classes": classes, "channels": channels}


def genotype_of(plain: Mapping[str, Mapping[str, str]]) -> Genotype:
    """A genotype from the plain values of a card, whose edges are numbers in decimal digits.

    Raises:
        ConfigError: other cells, edges or operations than DASS has, or not two edges of each node.
    """
    try:
        found = {kind: {int(edge): name for edge, name in chosen.items()} for kind, chosen in plain.items()}
        targets = {kind: sorted(EDGES[edge][1] for edge in chosen) for kind, chosen in found.items()}
        names = {name for chosen in found.values() for name in chosen.values()}
        fits = targets == dict.fromkeys(("normal", "reduction"), sorted(2 * list(range(NODES))))
        fits = fits and names <= set(OPERATIONS[1:]) and all(min(chosen) >= 0 for chosen in found.values())
    except (AttributeError, IndexError, TypeError, ValueError):
        fits = False
    if not fits:
        raise ConfigError(
            f"a genotype gives for normal and reduction two of the edges 0 to {len(EDGES) - 1} of each node, "
            f"each with one of {', '.join(OPERATIONS[1:])}; received {plain!r}"
        )
    return found


def plain_of(genotype: Genotype) -> dict[str, dict[str, str]]:
    """A genotype in the plain values that a card stores."""
    return {kind: {str(edge): name for edge, name in chosen.items()} for kind, chosen in genotype.items()}


@dataclass(frozen=True)
class SearchAndTrain(DASS):
    """DASS, and the training of what it chose: dense, then scores, then weights under the masks of these."""

    def train(self, net: CellNet, job: Job, stages: tuple[int, int, int]) -> MaskSet:
        """Train a chosen network in place.

        Args:
            net: with fresh weights.
            job: all training images.
            stages: epochs dense, of scores, and under the masks; (n, 0, 0) leaves it dense.

        Returns:
            The masks that it now carries.
        """
        dense, scored, sparse = stages
        job.fit(net, epochs=dense, macs=lambda: 0.0).run()
        if not scored:
            return MaskSet({})
        job.fit(net, parameters=self._scored(net), epochs=scored, lr=self.rate, macs=lambda: 0.0).run()
        harden(net)
        job.fit_masked(net, epochs=sparse, macs=lambda: 0.0)
        return masks_of(net) or MaskSet({})


def coloured(images: Images) -> Images:
    """Grey images with three equal channels, which is what a search takes; those of colours as they are."""

    def part(split: Split) -> Split:
        return Split(split.images.expand(-1, 3, -1, -1), split.labels)

    return replace(
        images,
        train=part(images.train),
        val=part(images.val),
        test=part(images.test),
        mean=(3 * images.mean)[:3],
        std=(3 * images.std)[:3],
    )


def searched(row: Row, seed: int, start: nn.Module | None, work: Work) -> Sparsified:
    """Maker: a network searched by DASS on halves of the training images, trained on all of them.

    Options: `sparsity`; `search`, epochs of the search's stages, and `stages`, those of the training, see
    `DASS`; (n, 0, 0) for a search or a training that is all dense.
    """
    images, recipe = load_images(str(row.dataset)), Recipe(**row.recipe)
    wide, half = coloured(images), len(images.train) // 2
    halves = [wide.train.take(one) for one in torch.arange(2 * half).split(half)]
    weights, mix = (image_job(replace(wide, train=one), recipe, seed, work.device) for one in halves)
    method = SearchAndTrain(row.options.get("sparsity", 0.0), tuple(row.options["search"]))
    genotype, _ = method.search(weights, mix)
    with seeded(seed):
        net: Any = SearchedNet(plain_of(genotype), **row.arguments)
    masks = method.train(net, image_job(images, recipe, seed, work.device), tuple(row.options["stages"]))
    return Sparsified(net.cpu().eval(), masks, arguments=net.current_arguments())
