"""What the bundles of the domain are made of: dense networks, and for each method its options at two levels.

`zoo.vision.pretrain` runs what is listed here.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from zoo.bundles.sources import Source
from zoo.shared.masks import set_masks
from zoo.vision import superres
from zoo.vision.base import VisionMethod
from zoo.vision.bip import BiP
from zoo.vision.channels import WGSEF, MaskSparsity
from zoo.vision.data import SOURCES, load_images
from zoo.vision.fast_convnets import FastConvNet
from zoo.vision.iss_p import ISSP
from zoo.vision.jackpots import LotteryJackpot
from zoo.vision.magnitude import MagnitudePruning
from zoo.vision.mobilenet import MobileNetV1
from zoo.vision.models import Classifier, ConvNet, reinitialised
from zoo.vision.nm_training import BDWP, ProgressiveFlow
from zoo.vision.random_pruning import DynamicSparse, RandomPruning
from zoo.vision.soups import SparseSoup
from zoo.vision.sparse_ift import SparseIFT
from zoo.vision.tickets import LotteryTicket
from zoo.vision.train import Recipe, Trainer
from zoo.vision.upscalers import EDSR, Upscaler

Network = Classifier | Upscaler
UPSCALING: dict[str, Any] = {"epochs": 6, "steps": 50, "batch": 8}


@dataclass(frozen=True)
class Made:
    """A finished training."""

    model: Network
    extras: dict[str, Tensor]
    options: dict[str, Any]
    seconds: float


@dataclass(frozen=True)
class Family:
    """Bundles that share a dense network and are measured alike.

    Attributes:
        slug: last part of the names of its bundles.
        title: of the dense network, for summaries.
        architecture: its registered name.
        build: from the architecture's arguments to the network; without arguments the dense one.
        recipe: of the dense network, as its card states it.
        train: makes the dense network of that recipe and a seed.
        tasks: what measures it.
        protocol: of the figures.
        source: of the data.
        dataset: of classifiers.
    """

    slug: str
    title: str
    architecture: str
    build: Callable[..., Any]  # a classifier or an upscaler
    recipe: dict[str, Any]
    train: Callable[[Family, int], Made]
    tasks: tuple[str, ...]
    protocol: str
    source: Source
    dataset: str | None = None

    @property
    def twin(self) -> str:
        """Name of the dense bundle, without the domain."""
        return f"dense-{self.slug}"

    def dense(self, seed: int) -> Made:
        """The dense network of a seed, trained."""
        return self.train(self, seed)


def _dense_classifier(family: Family, seed: int) -> Made:
    fresh = reinitialised(family.build(), seed)
    start = time.process_time()
    Trainer(load_images("digits"), Recipe(**family.recipe), seed).fit(fresh).run()
    return Made(fresh.eval(), {}, family.recipe, time.process_time() - start)


def _dense_upscaler(family: Family, seed: int) -> Made:
    start = time.process_time()
    made = ISSP(0.0, "one-shot", seed=seed, **family.recipe).train(family.build())[0]
    set_masks(made, None)
    return Made(made.eval(), {}, family.recipe, time.process_time() - start)


def _mobilenet(**arguments: Any) -> MobileNetV1:
    own: dict[str, Any] = {"width": 0.125, "classes": 10, "channels": 1, "stem_stride": 1}
    return MobileNetV1(**{**own, **arguments})


def _edsr(**arguments: Any) -> EDSR:
    return EDSR(**{"blocks": 4, "width": 16, **arguments})


DIGITS: dict[str, Any] = {
    "tasks": ("vision/digits",),
    "protocol": "500 test images, last epoch",
    "source": SOURCES["digits"],
    "dataset": "digits",
}
CONVNET = Family(
    "convnet-digits",
    "net of four convolutions on scikit-learn's digits",
    "vision/convnet",
    ConvNet,
    {"epochs": 20, "lr": 0.1, "batch": 64, "weight_decay": 5e-4},
    _dense_classifier,
    **DIGITS,
)
MOBILENET = Family(
    "mobilenet-digits",
    "MobileNet-v1 of an eighth of the width on scikit-learn's digits",
    "vision/mobilenet",
    _mobilenet,
    {"epochs": 40, "lr": 0.02, "batch": 64, "weight_decay": 5e-4},
    _dense_classifier,
    **DIGITS,
)
EDSR_X2 = Family(
    "edsr-x2",
    "EDSR of 4 blocks of 16 channels, twice the size",
    "vision/edsr",
    _edsr,
    UPSCALING,
    _dense_upscaler,
    ("vision/set5-x2", "vision/set14-x2"),
    "whole images, luma, borders of 2 pixels cropped, last step",
    superres.SOURCE,
)
FAMILIES = (CONVNET, MOBILENET, EDSR_X2)


@dataclass(frozen=True)
class Entry:
    """A method of the zoo at two levels: its registered name, its citation, what it starts from, and what
    makes it at a level and a seed."""

    method: str
    citation: str
    family: Family
    levels: tuple[str, str]
    make: Callable[[str, int], VisionMethod | ISSP]

    def at(self, level: str, seed: int) -> VisionMethod | ISSP:
        """The method with the options of a level and a seed."""
        method = self.make(level, seed)
        if isinstance(method, VisionMethod):
            method.dataset = self.family.dataset
        return method

    def run(self, level: str, seed: int, dense: Network) -> Made:
        """What the method makes of a dense network."""
        method = self.at(level, seed)
        start = time.process_time()
        made = method.sparsify(dense)
        if not isinstance(made.model, Classifier | Upscaler):
            raise TypeError(f"{self.method} made a {type(made.model).__name__} of a {type(dense).__name__}")
        return Made(made.model, made.extras, made.hyperparameters, time.process_time() - start)


def _share(level: str) -> float:
    return int(level) / 100


ENTRIES: dict[str, Entry] = {
    "global-magnitude": Entry(
        "magnitude",
        "Gupta et al. Is Complexity Required for Neural Network Pruning? arXiv 2209.14624.",
        CONVNET,
        ("90", "98"),
        lambda level, seed: MagnitudePruning(_share(level), floor=0.0005, seed=seed),
    ),
    "lamp": Entry(
        "magnitude",
        "Lee et al. Layer-adaptive Sparsity for the Magnitude-based Pruning. ICLR 2021.",
        CONVNET,
        ("90", "98"),
        lambda level, seed: MagnitudePruning(_share(level), allocation="lamp", seed=seed),
    ),
    "random-erk": Entry(
        "random-pruning",
        "Liu et al. The Unreasonable Effectiveness of Random Pruning. ICLR 2022.",
        CONVNET,
        ("90", "98"),
        lambda level, seed: RandomPruning(_share(level), epochs=30, lr=0.1, seed=seed),
    ),
    "rigl": Entry(
        "dynamic-sparse",
        "Evci et al. Rigging the Lottery: Making All Tickets Winners. ICML 2020.",
        CONVNET,
        ("90", "98"),
        lambda level, seed: DynamicSparse(_share(level), epochs=30, lr=0.1, seed=seed),
    ),
    "lottery-ticket": Entry(
        "lottery-ticket",
        "Frankle et al. Linear Mode Connectivity and the Lottery Ticket Hypothesis. ICML 2020.",
        CONVNET,
        ("90", "98"),
        lambda level, seed: LotteryTicket(_share(level), epochs=20, lr=0.1, seed=seed),
    ),
    "lottery-jackpot": Entry(
        "lottery-jackpot",
        "Zhang et al. Lottery Jackpots Exist in Pre-trained Models. arXiv 2104.08700.",
        CONVNET,
        ("90", "98"),
        lambda level, seed: LotteryJackpot(_share(level), seed=seed),
    ),
    "bip": Entry(
        "bip",
        "Zhang et al. Advancing Model Pruning via Bi-level Optimization. NeurIPS 2022.",
        CONVNET,
        ("90", "95"),
        lambda level, seed: BiP(_share(level), seed=seed),
    ),
    "sparse-soup": Entry(
        "sparse-soup",
        "Zimmer et al. Sparse Model Soups: A Recipe for Improved Pruning via Model Averaging. ICLR 2024.",
        CONVNET,
        ("90", "98"),
        lambda level, seed: SparseSoup(_share(level), seed=seed),
    ),
    "pgf": Entry(
        "pgf",
        "Bambhaniya et al. Progressive Gradient Flow for Robust N:M Sparsity Training in Transformers. 2024.",
        CONVNET,
        ("2of8", "1of16"),
        lambda level, seed: ProgressiveFlow(pattern=level.replace("of", ":"), epochs=20, seed=seed),
    ),
    "bdwp": Entry(
        "bdwp",
        "Zhang et al. Bidirectional weight pruning for N:M sparse training. 2023.",
        CONVNET,
        ("2of8", "1of8"),
        lambda level, seed: BDWP(pattern=level.replace("of", ":"), epochs=20, seed=seed),
    ),
    "sparse-ift": Entry(
        "sparse-ift",
        "Thangarasa et al. Sparse-IFT: Sparse Iso-FLOP Transformations for Maximizing Training "
        "Efficiency. ICML 2024.",
        CONVNET,
        ("50", "75"),
        lambda level, seed: SparseIFT(_share(level), epochs=20, seed=seed),
    ),
    "mask-sparsity": Entry(
        "mask-sparsity",
        "Jiang et al. Pruning-aware Sparse Regularization for Network Pruning. 2023.",
        CONVNET,
        ("25", "50"),
        lambda level, seed: MaskSparsity(_share(level), epochs=15, sparse_epochs=8, seed=seed),
    ),
    "wgsef": Entry(
        "wgsef",
        "Sparse optimisation with the weighted group sparse envelope function.",
        CONVNET,
        ("50", "75"),
        lambda level, seed: WGSEF(_share(level), penalty=1.0, epochs=15, sparse_epochs=8, seed=seed),
    ),
    "fast-convnet": Entry(
        "fast-convnet",
        "Elsen et al. Fast Sparse ConvNets. CVPR 2020.",
        MOBILENET,
        ("80", "90"),
        lambda level, seed: FastConvNet(_share(level), epochs=40, lr=0.02, seed=seed),
    ),
    "iss-p": Entry(
        "iss-p",
        "Wang et al. Iterative Soft Shrinkage Learning for Efficient Image Super-Resolution. ICCV 2023.",
        EDSR_X2,
        ("90", "95"),
        lambda level, seed: ISSP(_share(level), seed=seed, **UPSCALING),
    ),
}


def slug(name: str, level: str) -> str:
    """Name of a sparse bundle without its domain."""
    return f"{name}-{ENTRIES[name].family.slug}-{level if 'of' in level else 's' + level}"
