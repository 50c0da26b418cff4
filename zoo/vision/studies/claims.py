"""`zoo reproduce pruning-claims`: what the pruning papers claim, each in a small study.

Each is a `Small`: a function that is run once per seed and gives accuracies in percent (or counts, or ratios)
by name, and claims of which these names are the arms. All are on the embedded digits.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from zoo.methods.bdwp import BDWP
from zoo.methods.bip import BiP
from zoo.methods.contract import Method, default_recipe
from zoo.methods.jackpots import LotteryJackpot
from zoo.methods.magnitude import MagnitudePruning
from zoo.methods.nm import parsed_nm
from zoo.methods.pgf import ProgressiveFlow
from zoo.methods.soups import SparseSoup
from zoo.methods.sparse_ift import SparseIFT
from zoo.methods.sr_ste import SparseRefined
from zoo.names import check_known
from zoo.shared.bench.timing import compare
from zoo.shared.masks import MaskSet, masks_of
from zoo.shared.masks.patterns import NM
from zoo.shared.pruning.choose import magnitude_masks
from zoo.shared.pruning.inventory import inner_weights
from zoo.shared.pruning.sparsifier import sparsify
from zoo.shared.structure.averaging import recalibrate_norms
from zoo.shared.structure.groups import trace_groups
from zoo.shared.structure.relatives import copied, reinitialised
from zoo.shared.structure.surgery import cut
from zoo.shared.train import Job, Recipe
from zoo.studies.cells import CellCache
from zoo.studies.options import StudyOptions
from zoo.studies.study import Arm, Claim, Study, Tuned, above
from zoo.studies.tables import Table
from zoo.studies.verdict import mean_cell
from zoo.studies.view import Row, Value, View
from zoo.vision.data import accuracy
from zoo.vision.domain import image_job
from zoo.vision.models import MLP, Classifier, ConvNet, ResNet, ViT
from zoo.vision.studies.common import content, digits, fresh, trained

DENSE = Recipe(12, 0.1)
TUNED = 6  # epochs after the dense ones
LRS = (0.03, 0.1, 0.3)  # peak rates of which an arm of the study of BiP takes the best on validation images
Figures = dict[str, float]


def _job(seed: int, method: Method | None = None, **recipe: Any) -> Job:
    """The digits with a method's own recipe, or that of dense networks; fields of it may be others."""
    usual = DENSE if method is None else Recipe(**default_recipe(method))
    return image_job(digits(), replace(usual, **recipe), seed)


def _dense(model: Classifier, seed: int, recipe: Recipe = DENSE) -> Classifier:
    """The model with fresh weights, trained."""
    return fresh(model, digits(), recipe, seed)


def _test(model: nn.Module) -> float:
    return 100 * accuracy(model, digits(), digits().test)


def _made(method: Method, model: nn.Module, seed: int, **recipe: Any) -> nn.Module:
    """What a method makes of a model with its own recipe, fields of which may be others."""
    return method.sparsify(model, _job(seed, method, **recipe)).model


def jackpots(seed: int) -> Figures:
    """Search at 95 %: from magnitudes, from a random mask, and on weights that were never trained."""
    dense, out = _dense(ConvNet(), seed), {}
    cut_only = copied(dense)
    sparsify(cut_only, sparsity=0.95)
    out["magnitude, no training"] = _test(cut_only)
    recalibrate_norms(cut_only, (x for x, _ in _job(seed).sample(20)))
    out["magnitude, norms recalibrated"] = _test(cut_only)
    starts: tuple[Literal["magnitude", "random"], ...] = ("magnitude", "random")
    for start in starts:
        found = _made(LotteryJackpot(0.95, start=start), dense, seed, epochs=TUNED)
        weights, before = dict(found.named_parameters()), dict(dense.named_parameters())
        moved = [n for n, w in weights.items() if not torch.equal(w[w != 0], before[n][w != 0])]
        out[f"search from {start}"] = _test(found)
        out[f"weights changed by the search from {start}"] = float(len(moved))
    untrained = reinitialised(dense, seed)
    found = _made(LotteryJackpot(0.95), untrained, seed, epochs=TUNED)
    out["search on untrained weights"] = _test(found)
    return out


def _best(method: Any, dense: Classifier, seed: int, grid: Mapping[str, Sequence[float]]) -> nn.Module:
    """What a method makes with the one value of an option, its own or the recipe's, that is best on the
    validation images."""
    (name, values), made = next(iter(grid.items())), []
    for value in values:
        own = replace(method, **{name: value}) if hasattr(method, name) else method
        recipe = {} if hasattr(method, name) else {name: value}
        made.append(_made(own, dense, seed, epochs=TUNED, **recipe))
    return max(made, key=lambda model: accuracy(model, digits(), digits().val))


def bip(seed: int) -> Figures:
    """BiP at 95 % and 98 % beside one-shot and gradual magnitude with as many gradients, each with the best
    of three rates; how far its mask moves."""
    dense, out = _dense(ConvNet(), seed), Figures()
    for level in (0.95, 0.98):
        methods = {
            "BiP": (BiP(level), {"mask_lr": (0.1, 0.01, 0.001)}),
            "one-shot": (MagnitudePruning(level), {"lr": LRS}),
            "gradual": (MagnitudePruning(level, gradual=True), {"lr": LRS}),
            "scores only": (LotteryJackpot(level), {"lr": LRS}),
        }
        found = {name: _best(method, dense, seed, grid) for name, (method, grid) in methods.items()}
        out |= {f"{name} {level:.0%}": _test(model) for name, model in found.items()}
        masks = masks_of(found["BiP"]) or MaskSet({})
        out[f"IoU with the magnitude mask {level:.0%}"] = masks.iou(magnitude_masks(dense, level))
    return out


def soups(seed: int) -> Figures:
    """One phase of a soup of three at 95 % beside its members, and one network trained three times as
    long."""
    dense = _dense(ConvNet(), seed)
    method = SparseSoup(0.95, phases=1)
    job = _job(seed, method, epochs=TUNED)
    start = copied(dense)
    sparsify(start, sparsity=0.95)
    members = method.retrained(start, job, 1)
    values = [_test(member) for member in members]
    raw = replace(method, recalibrate=False).average(members, job)
    long = _made(MagnitudePruning(0.95), dense, seed, epochs=3 * TUNED)
    return {
        "soup": _test(method.average(members, job)),
        "mean member": statistics.fmean(values),
        "best member": max(values),
        "greedy soup": _test(replace(method, soup="greedy").average(members, job)),
        "soup, norms not recalibrated": _test(raw),
        "one network, three times as long": _test(long),
    }


def _random_nm(model: Classifier, pattern: str, names: Sequence[str], recipe: Recipe, seed: int) -> float:
    """Fresh weights trained under a random mask of the pattern, along the inputs."""
    start = reinitialised(model, seed)
    found = parsed_nm(pattern)
    sparsify(start, pattern=NM(found.n, found.m, 1), score="random", names=names, seed=seed)
    image_job(digits(), recipe, seed).fit_masked(start)
    return _test(start)


def _flows(model: Classifier, pattern: str, names: tuple[str, ...], epochs: int, seed: int) -> Figures:
    recipe = Recipe(epochs, 0.05)
    shared: dict[str, Any] = {"pattern": pattern, "names": names}
    methods = {
        "ste": SparseRefined(decay=0.0, **shared),
        "sr-ste": SparseRefined(**shared),
        "decay-linear": ProgressiveFlow(flow="decay-linear", **shared),
        "decay-exp": ProgressiveFlow(flow="decay-exp", **shared),
        "stepwise": ProgressiveFlow(flow="stepwise", **shared),
        "decay-exp, gradient not restricted": ProgressiveFlow(flow="decay-exp", restrict=False, **shared),
    }
    out = {}
    for name, method in methods.items():
        out[name] = _test(_made(method, model, seed, epochs=recipe.epochs, lr=recipe.lr))
    out["random mask"] = _random_nm(model, pattern, names, recipe, seed)
    out["dense"] = _test(_dense(model, seed, recipe))
    return out


def flow_mlp(seed: int) -> Figures:
    """1:16 in a perceptron."""
    return _flows(MLP(), "1:16", ("layers.*.weight",), 15, seed)


def flow_vit(seed: int) -> Figures:
    """1:16 in the feed-forward layers of a transformer."""
    return _flows(ViT(), "1:16", ("blocks.*.fc?.weight",), 30, seed)


def bdwp(seed: int) -> Figures:
    """BDWP at 2:8 beside SR-STE and dense, with the counted training cost."""
    out: Figures = {}
    methods = {"BDWP 2:8": BDWP(pattern="2:8"), "SR-STE 2:8": SparseRefined(pattern="2:8")}
    for name, method in methods.items():
        job = _job(seed, method, epochs=12)
        out[name] = _test(method.sparsify(ConvNet(), job).model)
        out[f"training GFLOPs of {name}"] = job.cost.flops / 1e9
    out["random mask"] = _random_nm(ConvNet(), "2:8", inner_weights(ConvNet()), DENSE, seed)
    dense, cost = trained(reinitialised(ConvNet(), seed), digits(), DENSE, seed)
    return {**out, "dense": _test(dense), "training GFLOPs of dense": cost.flops / 1e9}


def sparse_ift(seed: int) -> Figures:
    """Sparse-Wide at equal inference FLOPs of a net a quarter as wide as usual."""
    small, out = ConvNet().wider(0.25), {"dense": 0.0}
    out["dense"] = _test(_dense(small, seed))
    for level in (0.5, 0.75, 0.9):
        growths: tuple[Literal["rigl", "static"], ...] = ("rigl", "static")
        for growth in growths:
            found = _made(SparseIFT(level, growth=growth), small, seed, epochs=12)
            out[f"wide, {level:.0%}, {growth}"] = _test(found)
    out["dense, 4 times the weights"] = _test(_dense(small.wider(2), seed))
    return out


def removed_channels(seed: int) -> Figures:
    """How much faster ResNet-20 without half of its inner channels is, one image of 32x32, one thread."""
    model = reinitialised(ResNet(20), seed).eval()
    image = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    smaller = copied(model).eval()
    groups = trace_groups(smaller, (image,))
    inner = {name: family for name, family in groups.items() if name != "conv1.weight"}
    cut(smaller, groups, {name: torch.arange(family.units) % 2 == 0 for name, family in inner.items()})
    with torch.no_grad():
        timings = compare(
            {"whole": lambda: model(image), "cut": lambda: smaller(image)},
            rounds=4,
            block_seconds=0.2,
            clock=time.process_time,
        )
    parameters = [sum(p.numel() for p in net.parameters()) for net in (model, smaller)]
    return {
        "times as fast as whole": timings["whole"].median / timings["cut"].median,
        "whole": 1.0,
        "share of the weights": parameters[1] / parameters[0],
    }


@dataclass(frozen=True)
class Small:
    """A small study: what is run, whose paper it is about, and its claims."""

    title: str
    run: Callable[[int], Figures]
    paper: int
    claims: Sequence[Claim]


@dataclass(frozen=True)
class ClaimsOptions(StudyOptions):
    """Options.

    Args:
        studies: which; by default all.
    """

    studies: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_known("study", self.studies, SMALL)


def measure(make: Callable[[int], Figures], options: ClaimsOptions, case: Row, cells: CellCache) -> list[Row]:
    """Every figure of a study as a row."""
    return [{"arm": name, "value": value} for name, value in make(case["seed"]).items()]


def cases(options: ClaimsOptions) -> list[Row]:
    """Each study for every seed."""
    return [
        {"study": name, "arm": name, "level": "", "seed": seed}
        for name in options.studies or SMALL
        for seed in range(options.seeds)
    ]


def table(view: View) -> Table:
    """All figures of a study."""
    times = view.where["study"] == "removed-channels"
    digits = {row["arm"]: 2 if times or row["arm"].startswith(FACTS) else 1 for row in view.rows}
    body = [[arm, mean_cell(view.values(arm), count)] for arm, count in digits.items()]
    return Table(view.title, ["", f"test ({'times' if times else '%'})"], body)


FACTS = ("weights changed", "IoU", "training GFLOPs")  # figures that are no accuracies
TIMES = Value("value", 1.0, 2, "times", 2)
_FLOWS = [
    above("decay-exp", "sr-ste", 1.0, "up to 2 % (abstract)"),
    above("decay-exp", "ste", published="above"),
    above("decay-exp", "random mask"),
]
SMALL = {
    "jackpots": Small(
        "Lottery jackpots, 95 % zeros",
        jackpots,
        49,
        [
            above("search from magnitude", "magnitude, no training", 10.0),
            above("search from magnitude", "search from random", published="needs fewer epochs"),
            above("search from magnitude", "search on untrained weights", 10.0),
        ],
    ),
    "bip": Small(
        "BiP with as many gradients as the others",
        bip,
        54,
        [
            above("BiP 95%", "one-shot 95%", 1.0),
            above("BiP 95%", "gradual 95%", published="above IMP in most settings (abstract)"),
            above("BiP 95%", "scores only 95%"),
            above("BiP 98%", "one-shot 98%", 1.0),
            above("BiP 98%", "gradual 98%", published="above IMP in most settings (abstract)"),
        ],
    ),
    "soups": Small(
        "Sparse soups, 95 % zeros, one phase",
        soups,
        28,
        [
            above("soup", "mean member", 0.5),
            above("soup", "best member", published="above (abstract)"),
            above("soup", "soup, norms not recalibrated"),
            above("soup", "one network, three times as long", published="above (paper)"),
        ],
    ),
    "pgf-mlp": Small("N:M training, perceptron, 1:16", flow_mlp, 2, _FLOWS),
    "pgf-vit": Small("N:M training, feed-forward layers of a transformer, 1:16", flow_vit, 2, _FLOWS),
    "bdwp": Small(
        "BDWP, 2:8",
        bdwp,
        27,
        [
            above("BDWP 2:8", "dense", -1.0, "0.56 % below (abstract)"),
            above("BDWP 2:8", "SR-STE 2:8", -0.5),  # at two thirds of its cost
            above("BDWP 2:8", "random mask"),
        ],
    ),
    "sparse-ift": Small(
        "Sparse-IFT at equal inference FLOPs",
        sparse_ift,
        12,
        [
            above("wide, 75%, rigl", "dense", 1.0, "+3.5 % on ImageNet (abstract)"),
            above("wide, 50%, rigl", "dense", 1.0),
            above("wide, 90%, rigl", "wide, 90%, static", published="above"),
        ],
    ),
    "removed-channels": Small(
        "ResNet-20 without half of its inner channels",
        removed_channels,
        17,
        [above("times as fast as whole", "whole", value=TIMES)],
    ),
}
ARMS = {
    **{name: Arm(small.run) for name, small in SMALL.items()},
    **{
        f"{name} {level}": Arm(tuned=Tuned(what, "validation images", grid))
        for level in ("95%", "98%")
        for name, what, grid in (
            ("BiP", "rate of the scores", (0.1, 0.01, 0.001)),
            *((other, "peak rate", LRS) for other in ("one-shot", "gradual", "scores only")),
        )
    },
    **{name: Arm(control="random mask") for name in ("sr-ste", "ste", "SR-STE 2:8")},
}
STUDY = Study(
    "pruning-claims",
    "What the pruning papers claim, each in a small study",
    "those of the methods; see zoo/vision/README.md",
    ClaimsOptions,
    ARMS,
    cases,
    measure,
    claims=[
        replace(claim, only={"study": name}, papers=(small.paper,))
        for name, small in SMALL.items()
        for claim in small.claims
    ],
    value=Value("value", 1.0),
    varies=("studies", "seeds"),
    data=lambda options, where: content(digits()),
    by=("study",),
    titles={name: small.title for name, small in SMALL.items()},
    tables=[table],
    notes=lambda options: [
        "Mean ± sample standard deviation over seeds; differences are paired by seed with a 95 % interval "
        "(Student's t).",
        "The recipe is the same for all arms of a study and was set by hand, but for that of BiP and its "
        "rivals, whose rates are the best of three on the validation images, for each arm and seed.",
        "As run here, the members of a soup differ in their seed alone, N:M training is by SGD with "
        "momentum, and Sparse-IFT is its Sparse-Wide member.",
        "N:M training cannot be told apart on digits in the transformer and at 2:8: a random mask of the "
        "pattern is as good as a dense network there. `zoo reproduce nm-training` asks the same of a "
        "character model, with AdamW, where a random mask loses.",
    ],
)
