"""`zoo reproduce sparse-byte-nn`: groups of four output channels, in what order, how accurate, how fast."""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import mkldnn

import zoo
from zoo.shared.bench import compare
from zoo.shared.masks import MaskSet
from zoo.shared.ops import SparseConv1x1, packing
from zoo.shared.pruning.inventory import pointwise_weights
from zoo.shared.pruning.sparsifier import sparsify
from zoo.shared.structure.relatives import seeded
from zoo.shared.train import Recipe
from zoo.studies.cells import CellCache
from zoo.studies.figures import Curves, Grid
from zoo.studies.options import StudyOptions
from zoo.studies.study import BAR, Arm, Claim, Study, above
from zoo.studies.view import Row, Value
from zoo.vision.data import accuracy, load_images
from zoo.vision.domain import image_job
from zoo.vision.methods.kernel_groups import KernelGroups, kept_magnitude, rearrange
from zoo.vision.mobilenet import norms_folded, random_example

REARRANGED, PLAIN, SINGLE, DENSE = "groups of 4, reordered", "groups of 4", "single weights", "dense"


@dataclass(frozen=True)
class GroupOptions(StudyOptions):
    """Options of the experiment.

    Args:
        parts: digits (accuracy and kept magnitude of MobileNet-v1 / 8) and speed (MobileNet-v1, 224 pixels).
        seeds: how many, from 0.
        levels: of sparsity of the 1x1 convolutions.
        epochs: of pruning a trained network.
    """

    parts: tuple[str, ...] = ("speed", "digits")
    seeds: int = 3
    levels: tuple[float, ...] = (0.3, 0.7)
    epochs: int = 3


class OneDnn(nn.Module):
    """A network with its convolutions in oneDNN's own layout."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.features, self.linear = mkldnn.to_mkldnn(copy.deepcopy(model.features)), model.linear

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(self.features(x.to_mkldnn()).to_dense().mean((2, 3)))
        return out


@torch.no_grad()
def speed(pattern: str, sparsity: float, seed: int) -> Row:
    """How many times faster than the best of three dense layouts one image is, packed as `auto` packs, and
    with every 1x1 convolution in the sparse kernel."""
    with seeded(seed):
        example, image = random_example(224)
    dense, found = norms_folded(example), dict[str, nn.Module]()
    last, image_last = (
        copy.deepcopy(dense).to(memory_format=torch.channels_last),
        image.contiguous(memory_format=torch.channels_last),
    )
    blocked = OneDnn(dense)
    for name in ("auto", "forced"):
        model: Any = norms_folded(example)
        names = pointwise_weights(model)
        masks = sparsify(model, sparsity=sparsity, pattern=pattern, budget="uniform", names=names)
        if name == "forced":
            for weight in names:
                path = weight.removesuffix(".weight")
                layer: Any = model.get_submodule(path)
                model.set_submodule(path, SparseConv1x1.from_convolution(layer, masks[weight].keep))
            # What packing adds beside: depthwise kernels for these maps, ReLUs within.
            found[name] = packing.pack(model, MaskSet({}))
        else:
            found[name] = packing.pack(model, masks)
    runs: dict[str, Callable[[], object]] = {n: functools.partial(m, image) for n, m in found.items()}
    runs |= {
        "torch": lambda: dense(image),
        "last": lambda: last(image_last),
        "onednn": lambda: blocked(image),
    }
    timed = compare(runs, rounds=6, block_seconds=0.06, clock=time.process_time)
    best = min(timed[name].median for name in ("torch", "last", "onednn"))
    layers = sum(isinstance(module, SparseConv1x1) for module in found["auto"].modules())
    return {
        "speed": best / timed["auto"].median,
        "forced": best / timed["forced"].median,
        "layers": layers,
        "ms": 1000 * timed["auto"].median,
        "dense_ms": 1000 * best,
    }


def digits(arm: str, sparsity: float, options: GroupOptions, seed: int) -> Row:
    """Test accuracy of the digits' MobileNet after pruning, and what magnitude is left before training."""
    data, model = load_images("digits"), zoo.load("vision/dense-mobilenet-digits").float()
    recipe = Recipe(epochs=options.epochs, lr=0.02, batch=64, weight_decay=5e-4)
    job = image_job(data, recipe, seed)
    if arm == DENSE:
        job.fit(model, macs=lambda: 0.0).run()
        return {"accuracy": accuracy(model.eval(), data, data.test)}
    example = (data.normalised(data.test.images[:1]),)
    start = copy.deepcopy(model)
    if arm == REARRANGED:
        rearrange(start, example, sparsity)
    weights = [start.get_parameter(name).detach().flatten(1) for name in pointwise_weights(start)]
    totals = [float(w.abs().sum()) for w in weights]
    kept = sum(t * kept_magnitude(w, sparsity) for t, w in zip(totals, weights, strict=True)) / sum(totals)
    made = KernelGroups(sparsity, arm == REARRANGED).sparsify(model, job).model
    return {"accuracy": accuracy(made, data, data.test), "kept": kept}


def measure(make: Any, options: GroupOptions, case: Row, cells: CellCache) -> Row:
    """Speed of random weights, or accuracy of trained ones."""
    if case["part"] == "speed":
        pattern = "block4x1" if case["arm"] == PLAIN else "unstructured"
        return speed(pattern, case["level"], case["seed"])
    return digits(case["arm"], case["level"], options, case["seed"])


def cases(options: GroupOptions) -> Iterator[Row]:
    """All arms of a seed before the next seed; no order of channels changes a time."""
    for part in options.parts:
        for seed in range(options.seeds):
            if part == "digits":
                yield {"part": part, "arm": DENSE, "level": 0.0, "seed": seed}
            for arm in (PLAIN, SINGLE) if part == "speed" else (REARRANGED, PLAIN):
                for level in options.levels:
                    yield {"part": part, "arm": arm, "level": level, "seed": seed}


ARMS = {REARRANGED: Arm(), PLAIN: Arm(), SINGLE: Arm(), DENSE: Arm(flat=True)}
ACCURACY, KEPT = Value(), Value("kept", 100.0, 1, "points of magnitude", 1)
SPEED, FORCED = Value("speed", 1.0, 2, "times", 2), Value("forced", 1.0, 2, "times", 2)
DIGITS, TIMES = {"part": "digits"}, {"part": "speed"}
STUDY = Study(
    "sparse-byte-nn",
    "Kernel groups with reordered channels",
    "Haitao Xu, Songwei Liu, Yuyang Xu, Shuai Wang, Jiashi Li, Chenqian Yan, Liangqiang Li, Lean Fu, Xin "
    "Pan, Fangmin Chen: SparseByteNN: A Novel Mobile Inference Acceleration Framework Based on "
    "Fine-Grained Group Sparsity, 2023",
    GroupOptions,
    ARMS,
    cases,
    measure,
    papers=(10,),
    claims=[
        Claim(
            "30 % zeros in groups of 4: MobileNet-v1 is faster than the best dense one",
            "1.27 times at 30 %, on ARM",
            PLAIN,
            bar=1.0,
            at=(0.3,),
            value=SPEED,
            only=TIMES,
        ),
        Claim(
            "70 % zeros in groups of 4: it is faster", BAR, PLAIN, bar=1.0, at=(0.7,), value=SPEED, only=TIMES
        ),
        Claim(
            "30 % zeros: groups are faster than single weights, every 1x1 convolution sparse",
            BAR,
            PLAIN,
            SINGLE,
            at=(0.3,),
            value=FORCED,
            only=TIMES,
        ),
        above(REARRANGED, DENSE, -1.0, "-0.2 points", at=(0.3,), only=DIGITS),
        Claim(
            "70 %: the order keeps more magnitude in groups than channels as they are",
            BAR,
            REARRANGED,
            PLAIN,
            at=(0.7,),
            value=KEPT,
            only=DIGITS,
        ),
        Claim("70 %: the order is worth accuracy", BAR, REARRANGED, PLAIN, at=(0.7,), only=DIGITS),
    ],
    value=ACCURACY,
    by=("part",),
    titles={"digits": "MobileNet-v1 / 8 on digits", "speed": "MobileNet-v1, 224 pixels, one image"},
    tables=[
        Grid("{where}: accuracy (%)"),
        Grid("{where}: magnitude kept before training (%)", value=KEPT),
        Grid("{where}: times the best dense speed, packed", value=SPEED),
        Grid("{where}: times the best dense speed, every 1x1 convolution sparse", value=FORCED),
    ],
    plots=[
        Curves(
            "speed-{slug}",
            "{where}: as packed",
            "zeros (%)",
            "times the best dense speed",
            value=SPEED,
        ),
    ],
    notes=lambda options: [
        "Processor time on one thread; the best of torch's channel-major, channels-last and oneDNN layouts "
        "is what a time is held against. Packed: a layer where no sparse kernel gains stays dense.",
        "Every seed starts from the same trained network, an eighth as wide as MobileNet-v1, which has "
        "little to spare.",
        "In a first run packing left every layer below 50 % zeros alone, and nothing was gained at 30 %; "
        "blocks are packed from 25 % on since, and these are the times of that.",
    ],
)
